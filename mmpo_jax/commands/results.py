"""Where `mmpo generate`, `score` and `select` write: a JSONL file, a line for every usable row."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from etils import epath

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import check_reachable, write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.core.sections import Section
from mmpo_jax.data.formats.writing import place_image
from mmpo_jax.data.records import ImageRef
from mmpo_jax.data.skipped import SKIPPED_FILE
from mmpo_jax.data.sources import FileData


@dataclass(frozen=True)
class Results:
    """The files of one run."""

    rows: str
    """The result."""
    skipped: str
    """Rows of the data that were left out, with reasons."""
    parts: str
    """Folder of what is finished while the run goes on; gone at its end."""
    images: str
    """Folder of the images that the result names and that lie nowhere else in its folder."""

    @classmethod
    def at(cls, output: str, name: str, data: Section) -> Results:
        """The files of a recipe's `output`: a file `*.jsonl`, or a folder, which gets `name`.

        Raises:
          MmpoError: the result would replace the data it is made of, or cannot be written there.
        """
        check_reachable(output)
        stem, extension = os.path.splitext(output)
        if extension == ".jsonl":
            results = cls(output, f"{stem}.{SKIPPED_FILE}", f"{stem}.parts", f"{stem}.images")
        else:
            results = cls(
                os.path.join(output, f"{name}.jsonl"),
                os.path.join(output, SKIPPED_FILE),
                os.path.join(output, f"{name}.parts"),
                os.path.join(output, f"{name}.images"),
            )
        source = data.path if isinstance(data, FileData) else None
        written = (results.rows, results.skipped)
        if source and os.path.realpath(source) in map(os.path.realpath, written):
            raise MmpoError(f"output: {source} is the data; give another file")
        return results

    def beside(self, name: str) -> str:
        """Another file of the run: `OUTPUT.name` beside a file, `name` in a folder."""
        return self.skipped.removesuffix(SKIPPED_FILE) + name

    def name_image(self, image: ImageRef) -> str:
        """The path with which a row of the result names an image, relative to the result's folder.

        See `place_image`, which may write a copy to `images`.
        """
        return place_image(image, os.path.dirname(self.rows), self.images)

    def write(self, rows: Iterable[dict[str, Any]]) -> str:
        """Writes the result whole, and removes the parts it was made of.

        Args:
          rows: of the result; of several processes the first alone makes them.

        Returns:
          The result's file.

        Raises:
          DataError: a row holds NaN or an infinity, which JSON has not.
        """
        on_one(lambda: self._write(rows))
        return self.rows

    def _write(self, rows: Iterable[dict[str, Any]]) -> None:
        lines = [_json(row) + "\n" for row in rows]
        write_atomic(self.rows, "".join(lines).encode())
        parts = epath.Path(self.parts)
        if parts.exists():
            parts.rmtree()


def _json(row: dict[str, Any]) -> str:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise DataError(f"row {row.get('id')}: a number of its result is not finite") from error
