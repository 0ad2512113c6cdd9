"""Video files: what they hold, and single frames of them.

Decoded by PyAV, an extra. The container is told by the first bytes, not by the name, and no other
is opened: FFmpeg knows playlists, which name further files and addresses.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import fingerprint_bytes, is_local
from mmpo_jax.core.known_files import recall, remember, state_of
from mmpo_jax.data.edits import edit_image
from mmpo_jax.data.images import MAX_PIXELS, ImageTooLarge
from mmpo_jax.data.records import ImageRef, VideoFacts, VideoRef
from mmpo_jax.data.skipped import Problem

CONTAINERS = {"mp4": "mp4", "webm": "webm"}
"""Ending of a file -> FFmpeg's name of the container, under which it also opens kin such as MOV and
Matroska."""
_STRICT_DECODERS = {"vp9": "libvpx-vp9"}
"""FFmpeg's name of a codec -> of the decoder that tells damage where FFmpeg's own does not; both
make the same frames. Of more than eight bits a sample, some builds of it take nothing."""
_FOUND_OUT = "video/2"
"""What is kept of a file under: changes with what is found out about it."""


def video_problem(file: ImageRef) -> Problem | None:
    """Why a video file cannot be decoded; None where it can.

    It is decoded once, whole. What is found out about a file is kept while it stays as it is.

    Raises:
      MmpoError: PyAV is not installed.
    """
    problem = _known(file)["problem"]
    return None if problem is None else (problem[0], problem[1])


def video_facts(video: VideoRef) -> VideoFacts:
    """Frames, rate and size of a video file.

    Raises:
      DataError: it cannot be decoded.
      MmpoError: PyAV is not installed.
    """
    if video.facts is not None:
        return video.facts
    assert video.file is not None
    known = _known(video.file)
    if known["problem"] is not None:
        raise DataError(known["problem"][1])
    height, width = known["size"]
    return VideoFacts(known["frames"], known["rate"], (height, width))


def shown_range(video: VideoRef) -> range:
    """The numbers of the frames of a video file among which those that are shown are chosen: all,
    or those of its seconds, as qwen-vl-utils' `calculate_video_frame_range` has them.

    Raises:
      DataError: it cannot be decoded, says no rate, or has less than two frames in these seconds.
      MmpoError: PyAV is not installed.
    """
    facts = video_facts(video)
    if video.seconds is None:
        return range(facts.frames)
    if facts.rate is None:
        raise DataError(f"video {video.name} does not say how many frames a second it has")
    length = facts.frames / facts.rate
    start, end = video.seconds
    first = math.ceil(min(start or 0.0, length) * facts.rate)
    last = facts.frames - 1
    if end is not None:
        last = min(last, math.floor(min(end, length) * facts.rate))
    if first >= last:
        until = f"{length:.2f}" if end is None else end
        raise DataError(
            f"video {video.name} has less than two frames between seconds {start or 0} and "
            f"{until}: it has {facts.frames} in {length:.2f} seconds"
        )
    return range(first, last + 1)


def cut_problem(video: VideoRef) -> Problem | None:
    """Why the seconds that are to be shown of a sound video file cannot be; None where they can."""
    if video.seconds is None:
        return None
    try:
        shown_range(video)
    except DataError as error:
        return "bad_video_entry", str(error)
    return None


def read_frames(file: ImageRef, numbers: Sequence[int]) -> list[Image.Image]:
    """Frames of a video file in RGB; what the reference says to change is changed in each.

    Args:
      file: the encoded video.
      numbers: of frames, from 0.

    Raises:
      DataError: it cannot be decoded, or has fewer frames.
      MmpoError: PyAV is not installed.
    """
    wanted, last = set(numbers), max(numbers)
    found: dict[int, Image.Image] = {}
    with _stream(file) as (container, stream):
        for number, frame in enumerate(_decoded(container, stream, _name(file))):
            if number in wanted:
                found[number] = Image.fromarray(frame.to_ndarray(format="rgb24"))
            if number >= last:
                break
    if len(found) < len(wanted):
        raise DataError(f"video {_name(file)} ends before frame {last + 1}")
    return [edit_image(found[number], file.edit) for number in numbers]


def spread_frames(video: VideoRef, count: int) -> list[ImageRef]:
    """Frames of what is shown of a video as images, evenly over it: each is the middle of an equal
    part.

    Args:
      video: by its frames, which are given as they are; those of a file become PNG.
      count: how many; of a video with fewer, all.

    Raises:
      DataError: it cannot be decoded.
      MmpoError: PyAV is not installed.
    """
    shown = range(len(video.frames)) if video.file is None else shown_range(video)
    count = min(count, len(shown))
    numbers = [shown[(2 * part + 1) * len(shown) // (2 * count)] for part in range(count)]
    if video.file is None:
        return [video.frames[number] for number in numbers]
    decoded = read_frames(video.file, numbers)
    return [
        ImageRef(f"{video.name}, frame {number}", _as_png(frame))
        for number, frame in zip(numbers, decoded, strict=True)
    ]


def _as_png(picture: Image.Image) -> bytes:
    written = io.BytesIO()
    picture.save(written, "PNG")
    return written.getvalue()


def container_of(data: bytes) -> str | None:
    """A key of `CONTAINERS`, by the first 12 bytes; None for anything else."""
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "mp4"
    return "webm" if data[:4] == b"\x1a\x45\xdf\xa3" else None


def _known(file: ImageRef) -> dict[str, Any]:
    """What decoding a video once tells: `problem`, and where there is none `frames`, `rate` and
    `size`."""
    known = {} if file.path is None else recall(file.path)
    if _FOUND_OUT not in known:
        before = None if file.path is None else state_of(file.path)
        known = _examine(file)
        if file.path is not None and "sha256" in known:
            remember(file.path, before, known)
    found: dict[str, Any] = known[_FOUND_OUT]
    return found


def _examine(file: ImageRef) -> dict[str, Any]:
    """What `_known` is of, and where it can be read `sha256`."""
    facts: dict[str, Any] = {}
    found: dict[str, Any]
    try:
        facts["sha256"] = fingerprint_bytes(file.read())
        sizes: dict[tuple[int, int], int] = {}
        with _stream(file) as (container, stream):
            rate = stream.average_rate and float(stream.average_rate)
            for frame in _decoded(container, stream, _name(file), strict=True):
                size = frame.height, frame.width
                sizes[size] = sizes.get(size, 0) + 1
        if len(sizes) != 1:
            what = f"frames of sizes {sorted(sizes)}" if sizes else "no frames"
            raise DataError(f"video {_name(file)} has {what}")
        ((size, count),) = sizes.items()
        found = {"problem": None, "frames": count, "rate": rate or None, "size": size}
    except ImageTooLarge as error:
        found = {"problem": ("image_too_large", str(error))}
    except DataError as error:
        found = {"problem": ("image_broken", str(error))}
    return facts | {_FOUND_OUT: found}


def _decoded(container: Any, stream: Any, name: str, *, strict: bool = False) -> Iterator[Any]:
    """The frames of a stream, none of which is made up for what is damaged.

    FFmpeg hides damage and marks the frames. That it stop there (`err_detect`) is not asked: it
    then also refuses clips that were cut out of a longer one without being encoded again.

    Args:
      container, stream: of `_stream`.
      name: how messages call the video.
      strict: whether all marks are waited for. Several threads hand frames out before them.

    Raises:
      DataError: a frame is damaged.
    """
    decoder = _decoder(stream)
    decoder.thread_type = "NONE" if strict else "AUTO"
    number = 0
    for packet in container.demux(stream):
        for frame in decoder.decode(packet if packet.size else None):
            if frame.is_corrupt:
                raise DataError(f"video {name} is damaged: frame {number} is not whole")
            yield frame
            number += 1


def _decoder(stream: Any) -> Any:
    """The stream's own decoder, or a stricter one where there is one."""
    av, own = _av(), stream.codec_context
    name, pixels = _STRICT_DECODERS.get(own.name), own.format
    is_deep = pixels is not None and any(part.bits > 8 for part in pixels.components)
    if name is None or name not in av.codecs_available or is_deep:
        return own
    decoder = av.CodecContext.create(name, "r")
    decoder.extradata = own.extradata
    return decoder


@contextlib.contextmanager
def _stream(file: ImageRef) -> Iterator[tuple[Any, Any]]:
    """(container, stream of pictures) of a video; what goes wrong inside becomes a `DataError`."""
    av, name = _av(), _name(file)
    with _opened(file) as encoded:
        kind = CONTAINERS[_container(encoded, name)]
        try:
            with av.open(encoded, format=kind) as container:
                if not container.streams.video:
                    raise DataError(f"video {name} has no pictures")
                stream = container.streams.video[0]
                if stream.width * stream.height > MAX_PIXELS:
                    size = f"{stream.width} x {stream.height} pixels, at most {MAX_PIXELS}"
                    raise ImageTooLarge(f"video {name} is too large to decode safely ({size})")
                yield container, stream
        except DataError:
            raise
        except Exception as error:  # decoders that are given damaged bytes raise many types
            raise DataError(f"video {name} is damaged: {error}") from error


@contextlib.contextmanager
def _opened(file: ImageRef) -> Iterator[Any]:
    """The encoded video as a stream; a file of this machine is not read at once."""
    if file.path is None or not is_local(file.path):
        yield io.BytesIO(file.read())
        return
    try:
        stream = open(file.path, "rb")  # noqa: SIM115  # closed below
    except OSError as error:
        raise DataError(f"cannot read video {_name(file)}: {error.strerror or error}") from error
    with stream:
        yield stream


def _container(stream: Any, name: str) -> str:
    begins = stream.read(12)
    stream.seek(0)
    found = container_of(begins)
    if found is None:
        what = "is neither MP4 nor WebM" if begins else "is empty (0 bytes)"
        raise DataError(f"video {name} {what}")
    return found


def _name(file: ImageRef) -> str:
    return os.fspath(file.path) if file.path is not None else file.name


def _av() -> Any:
    """
    Raises:
      MmpoError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise MmpoError(
            "the data has video files, which PyAV decodes: pip install 'mmpo_jax[video]'; or give "
            "the frames as images"
        ) from error
    return av
