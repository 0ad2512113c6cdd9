"""From a recipe's `data` section to records."""

from __future__ import annotations

import dataclasses
import logging

from mmpo_jax.data.readers import SkippedRow, check_images, check_skipped, read_records
from mmpo_jax.data.records import Record
from mmpo_jax.files import fingerprint_file, fingerprint_json
from mmpo_jax.recipe import FileData, ShapesData
from mmpo_jax.shapes import records as shapes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Source:
    """Usable records, the rows left out, and a fingerprint of what they were read from."""

    records: list[Record]
    skipped: list[SkippedRow]
    fingerprint: str
    max_skipped: float

    def skip(self, kept: list[Record], skipped: list[SkippedRow]) -> Source:
        """The source with more rows left out."""
        merged = dataclasses.replace(self, records=kept, skipped=[*self.skipped, *skipped])
        merged.check()
        return merged

    def check(self) -> None:
        """
        Raises:
          DataError: more rows were skipped than the recipe allows, or none is left.
        """
        total = len(self.records) + len(self.skipped)
        check_skipped(self.skipped, total, self.max_skipped)


def load_source(data: ShapesData | FileData, *, supervised: bool) -> Source:
    """Reads the records of a recipe's data section.

    Args:
      data: where from.
      supervised: whether the picture world gives dialogues to learn from, or prompts only.

    Raises:
      DataError: the file cannot be read, or too many of its rows cannot be used.
    """
    if isinstance(data, ShapesData):
        world = (data.split, data.seed, data.size, data.image_size)
        if supervised:
            records = shapes.supervised_records(*world, data.questions, data.hallucination_rate)
        else:
            records = shapes.prompt_records(*world)
        return Source(records, [], fingerprint_json([data.model_dump(), supervised]), 0.0)
    records, skipped = read_records(data.path, data.image_root)
    total = len(records) + len(skipped)
    records, broken = check_images(records)
    skipped = [*skipped, *broken]
    for row in skipped[:10]:
        log.warning("%s: row %s skipped: %s (%s)", row.file, row.row, row.reason, row.detail)
    check_skipped(skipped, total, data.max_skipped)
    fingerprint = fingerprint_json([data.model_dump(), fingerprint_file(data.path)])
    return Source(records, skipped, fingerprint, data.max_skipped)
