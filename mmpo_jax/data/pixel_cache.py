"""Pixels of the prompts that were asked for last, so that several questions about an image decode
it once."""

from __future__ import annotations

import collections
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from mmpo_jax.data.records import ImageRef, VideoRef

MAX_BYTES = 512 * 2**20


class PixelCache:
    """The newest entries that take `MAX_BYTES` at most; several threads may use it at once."""

    def __init__(self) -> None:
        self._kept: collections.OrderedDict[Any, list[np.ndarray]] = collections.OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, key: Any) -> list[np.ndarray] | None:
        """The pixels of `pixel_key`; None where they are not kept."""
        with self._lock:
            return self._kept.get(key)

    def put(self, key: Any, pixels: list[np.ndarray]) -> None:
        """Keeps pixels, unless another thread that made the same was faster."""
        with self._lock:
            if key in self._kept:
                return
            self._kept[key] = pixels
            self._bytes += _size(key, pixels)
            while self._bytes > MAX_BYTES:
                self._bytes -= _size(*self._kept.popitem(last=False))


def pixel_key(images: Sequence[ImageRef], videos: Sequence[VideoRef]) -> Any:
    """What pixels depend on: where each image and frame is, or it itself, and what is changed."""
    return (
        tuple((image.place, image.edit) for image in images),
        tuple(
            (*((part.place, part.edit) for part in video.parts), ((video.fps, video.seconds), None))
            for video in videos
        ),
    )


def _size(key: Any, pixels: Sequence[np.ndarray]) -> int:
    """Bytes that an entry takes, with encoded images that are its key."""
    images, videos = key
    places = [place for one in (images, *videos) for place, _ in one]
    encoded = sum(len(place) for place in places if isinstance(place, bytes))
    return encoded + sum(one.nbytes for one in pixels)
