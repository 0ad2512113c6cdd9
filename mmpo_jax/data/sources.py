"""From a recipe's `data` section to records."""

from __future__ import annotations

import dataclasses
import logging

from mmpo_jax.data.readers import SkippedRow, check_images, check_skipped, read_records
from mmpo_jax.data.records import Record
from mmpo_jax.errors import DataError
from mmpo_jax.files import fingerprint_file, fingerprint_json
from mmpo_jax.recipe import FileData, ShapesData
from mmpo_jax.shapes import records as shapes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Usable records, the rows left out, and a fingerprint of what they were read from."""

    name: str
    """For messages: the file, or the picture world's split."""
    records: list[Record]
    skipped: list[SkippedRow]
    fingerprint: str
    max_skipped: float

    def skip(self, kept: list[Record], skipped: list[SkippedRow]) -> Source:
        """The source with more rows left out."""
        return dataclasses.replace(self, records=kept, skipped=[*self.skipped, *skipped])

    def check(self) -> None:
        """
        Raises:
          DataError: more rows were skipped than the recipe allows, or none is left.
        """
        total = len(self.records) + len(self.skipped)
        for row in self.skipped[:10]:
            log.warning("%s: row %s skipped: %s (%s)", row.file, row.id, row.reason, row.detail)
        check_skipped(self.skipped, total, self.max_skipped)
        if not self.records:
            raise DataError(f"{self.name}: no row that can be used")


def load_source(data: ShapesData | FileData, *, supervised: bool) -> Source:
    """Reads the records of a recipe's data section, unusable rows set apart.

    Args:
      data: where from.
      supervised: whether responses to learn from are wanted, or prompts only.

    Raises:
      DataError: the file cannot be read.
    """
    if isinstance(data, ShapesData):
        world = (data.split, data.seed, data.size, data.image_size)
        if supervised:
            records = shapes.supervised_records(*world, data.questions, data.hallucination_rate)
        else:
            records = shapes.prompt_records(*world)
        name = f"shapes/{data.split}"
        return Source(name, records, [], fingerprint_json([data.model_dump(), supervised]), 0.0)
    records, skipped = read_records(data.path, data.image_root)
    records, broken = check_images(records, data.path)
    skipped = [*skipped, *broken]
    if not supervised:
        skipped += [_without_prompt(data.path, record) for record in records if not record.prompt]
        records = [dataclasses.replace(r, responses=()) for r in records if r.prompt]
    fingerprint = fingerprint_json([data.model_dump(), fingerprint_file(data.path)])
    return Source(data.path, records, skipped, fingerprint, data.max_skipped)


def _without_prompt(path: str, record: Record) -> SkippedRow:
    detail = "the row's responses do not share a prompt that could be answered"
    return SkippedRow(path, None, record.id, "no_prompt", detail)
