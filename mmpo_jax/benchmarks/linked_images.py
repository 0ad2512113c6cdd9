"""Images that rows of benchmarks name by links, which users download into a folder."""

from __future__ import annotations

import dataclasses
from urllib.parse import unquote, urlsplit

from mmpo_jax.benchmarks.benchmark import Files
from mmpo_jax.benchmarks.tables import Row
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.records import ImageRef

ENDINGS = ("jpg", "jpeg", "png", "webp")


def linked_image(files: Files, row: Row, link: str, *names: str) -> ImageRef:
    """The image of a row: its own bytes or path under `image` or `image_path`, else the file in the
    folder of images, or in `images/` below it, that is called as the link ends, or as a name.

    Args:
      files: of the benchmark.
      row: of the question.
      link: key of the address.
      names: that the file may have, without ending.

    Raises:
      MmpoError: it is not there.
    """
    if row.get("image", "image_path") is not None:
        return files.image(row, "image", "image_path")
    folder = files.images or (files.root if files.root.is_dir() else files.root.parent)
    last = unquote(urlsplit(row.text(link)).path).rsplit("/", 1)[-1]
    called = [last, *(f"{name}.{ending}" for name in names for ending in ENDINGS)]
    for name in called:
        for path in (name, f"images/{name}"):
            if (folder / path).exists():
                found = dataclasses.replace(row, values={**row.values, "image": path})
                return files.image(found, "image")
    raise MmpoError(
        f"{row.name}: {folder} has no {called[0]}, which is to be downloaded from {row.text(link)}"
    )
