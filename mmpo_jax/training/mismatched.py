"""Responses to other prompts or images, which objectives compare a record's own with."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.tokenized_rows import KnownRows, RowSizes, known
from mmpo_jax.objectives.registry import VIEWS


class MismatchedRows(KnownRows):
    """Records with the responses of others after their own."""

    def __init__(self, rows: KnownRows, places: Sequence[int]):
        """
        Args:
          rows: the records.
          places: of every record the place of the one whose responses are its mismatched ones.
        """
        self.rows, self.places = rows, np.array(places, int)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, place: int) -> TokenizedRecord:
        record, other = self.rows.read(place), self.rows.read(int(self.places[place]))
        mismatched = (dataclasses.replace(r, mismatched=True) for r in other.responses)
        return dataclasses.replace(record, responses=(*record.responses, *mismatched))

    def column(self, name: str) -> list[str]:
        return self.rows.column(name)

    def has_column(self, name: str) -> bool:
        return self.rows.has_column(name)

    @property
    def ids(self) -> list[str]:
        return self.rows.ids

    @functools.cached_property
    def sizes(self) -> RowSizes:
        own, other = self.rows.sizes, self.rows.sizes.take(self.places)
        return dataclasses.replace(
            own,
            response=np.maximum(own.response, other.response),
            responses=own.responses + other.responses,
            tokens=own.tokens + other.tokens - other.prompt,
            targets=own.targets + other.targets,
            truncated=own.truncated + other.truncated,
        )

    @property
    def contents(self) -> list[str]:
        contents = self.rows.contents
        pairs = zip(contents, self.places, strict=True)
        return [fingerprint_json([content, contents[place]]) for content, place in pairs]

    @property
    def prompts(self) -> list[str]:
        return self.rows.prompts


def with_mismatched(records: Sequence[TokenizedRecord]) -> MismatchedRows:
    """Records with the responses of others to other prompts or images after their own.

    So they are scored in the same pass, by the reference too. See `_mismatched_places`.

    Raises:
      DataError: there is only one record.
    """
    rows = known(records)
    if len(rows) < 2:
        raise DataError(
            f"the objective compares with {VIEWS['mismatched']}, and there is only one record"
        )
    later = np.flatnonzero(rows.sizes.shows_later)
    if len(later):
        raise DataError(
            f"the objective compares with {VIEWS['mismatched']}, and those of "
            f"{rows.ids[later[0]]!r} show images of their own: leave such rows out"
        )
    return MismatchedRows(rows, _mismatched_places(rows.prompts))


def _mismatched_places(questions: Sequence[str]) -> list[int]:
    """For every record, the place of the one whose responses are its mismatched ones.

    The records stand in a circle, cut into runs of one prompt with one set of images. A record
    takes one of the run before its own: in runs of one length the first takes the first, and so on,
    so all responses of the data serve once, and not the last of every prompt alone, which in pairs
    that were exported one by one is always the rejected one. Of a longer run before, the last ones
    are taken; of a shorter one all, in turn. Where there is only one run, the record before.

    Args:
      questions: digests of the records' prompts and images.
    """
    count = len(questions)
    starts = [i for i in range(count) if questions[i - 1] != questions[i]]
    if not starts:
        return [(i - 1) % count for i in range(count)]
    places = [0] * count
    before = range(starts[-1] - count, starts[0])
    for start, end in zip(starts, [*starts[1:], starts[0] + count], strict=True):
        run = range(start, end)
        for number, place in enumerate(run):
            places[place % count] = before[(number - len(run)) % len(before)] % count
        before = run
    return places
