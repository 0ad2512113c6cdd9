"""Where a recipe's records come from: its `data` sections, and what loading one gives."""

from __future__ import annotations

import dataclasses
import logging
from typing import Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import Section
from mmpo_jax.data.joining import join_pairs
from mmpo_jax.data.media_check import check_images
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.readers import left_out_rows, read_records
from mmpo_jax.data.records import SCORE, Record, Response
from mmpo_jax.data.reward_files import rewarded
from mmpo_jax.data.rows import FormatName, MessagesAs
from mmpo_jax.data.skipped import SkippedRow

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class RecordSet:
    """Usable records and the rows left out."""

    name: str
    """The file, or the picture world's split, for messages."""
    records: list[Record]
    skipped: list[SkippedRow]
    max_skipped: float
    joined: int = 0
    """Rows that went into others' rankings."""
    partly: tuple[SkippedRow, ...] = ()
    """Responses that alone were left out of rows that went into rankings."""
    notes: Notes = dataclasses.field(default_factory=Notes)
    """Counts of the rows."""
    joining: str = ""
    """What the log says of how rows were joined."""


class RecordSource(Section):
    """A source of records, as a recipe names it."""

    source: str

    def load(self, *, supervised: bool, messages_as: MessagesAs = "last_turn") -> RecordSet:
        """The records, and the rows that cannot be used.

        Args:
          supervised: whether responses to learn from are wanted, or prompts only.
          messages_as: what rows of `messages` supervise, see `mmpo_jax.data.parsing.parse_rows`.

        Raises:
          DataError: they cannot be read.
        """
        raise NotImplementedError


class FileData(RecordSource):
    """Rows of a file, a folder or TFDS (docs/data.md)."""

    source: Literal["file"] = "file"
    path: str
    format: FormatName = "auto"
    """The convention of the rows; `auto` goes by their columns."""
    image_root: str | None = None
    """Folder the image paths are relative to and must stay in; the file's own by default."""
    max_skipped: float = Field(0.1, ge=0, le=1)
    """Share of unusable rows above which the run stops."""
    control_tokens: Literal["tokens", "text"] = "tokens"
    """What control tokens are that are typed in texts, such as `<|im_end|>` in an answer about chat
    templates: what the tokenizer makes of them, or text like any other."""

    def load(self, *, supervised: bool, messages_as: MessagesAs = "last_turn") -> RecordSet:
        return load_file(self, supervised, messages_as)


class LearnedFile(FileData):
    """A file of responses to learn from."""

    score: str | None = None
    """Which of several scores is `score`, by its name; responses without it have none then."""
    join_pairs: bool = False
    """Join the pairs of one prompt into a ranking, where they agree (docs/data.md)."""
    rewards: str | None = None
    """File of `mmpo reward` about these rows: its rewards are the responses' scores."""

    @pydantic.model_validator(mode="after")
    def _one_score(self) -> LearnedFile:
        if self.rewards is not None and (self.score is not None or self.join_pairs):
            other = "join_pairs" if self.join_pairs else "score"
            raise ValueError(f"rewards: are scores of rows as they are; leave {other} out")
        return self


def load_file(data: FileData, supervised: bool, messages_as: MessagesAs) -> RecordSet:
    """The records of a file that a recipe names, and the rows that cannot be used.

    Args:
      data: where from.
      supervised: whether responses to learn from are wanted, or prompts only.
      messages_as: what rows of `messages` supervise, see `mmpo_jax.data.parsing.parse_rows`.

    Raises:
      DataError: the file cannot be read.
    """
    notes = Notes()
    records, skipped = read_records(
        data.path, data.image_root, messages_as, data.format, notes, prompts_only=not supervised
    )
    for line in notes.lines():
        log.info("%s: %s", data.path, line)
    for line in notes.warnings():
        log.warning("%s: %s", data.path, line)
    if data.control_tokens == "text":
        records = [dataclasses.replace(record, plain_text=True) for record in records]
    records, broken = check_images(records, data.path)
    skipped = [*skipped, *broken]
    if not supervised:
        skipped += [without_prompt(data.path, record) for record in records if not record.prompt]
        records = [dataclasses.replace(r, responses=()) for r in records if r.prompt]
    joined, partly, joining = 0, list[SkippedRow](), ""
    if supervised and isinstance(data, LearnedFile) and data.join_pairs:
        done = join_pairs(records)
        joining = str(done)
        log.info("%s: %s", data.path, joining)
        alone = set(map(id, done.records))
        partly = left_out_rows((r for r in records if id(r) not in alone), data.path)
        records, joined = done.records, done.absorbed
    return RecordSet(
        data.path, records, skipped, data.max_skipped, joined, tuple(partly), notes, joining
    )


def with_scores(record_set: RecordSet, data: LearnedFile) -> RecordSet:
    """The records with the scores that a recipe's section asks for, see `scored_record`."""
    records = [scored_record(record, data) for record in record_set.records]
    return dataclasses.replace(record_set, records=records)


def scored_record(record: Record, data: FileData) -> Record:
    """A record with the scores that a recipe's section asks for: those of one name, or the rewards
    of a file.

    Raises:
      DataError: naming the file and the row of it that cannot be read.
    """
    if not isinstance(data, LearnedFile):
        return record
    if data.rewards is not None:
        return rewarded(record, data.rewards)
    return record if data.score is None else scored(record, data.score)


def scored(record: Record, name: str) -> Record:
    """A record whose responses' score of this name is the one that is called `SCORE`."""

    def of(response: Response) -> Response:
        score = response.scores.get(name)
        scores = {} if score is None else {**response.scores, SCORE: score}
        return dataclasses.replace(response, scores=scores)

    return dataclasses.replace(record, responses=tuple(map(of, record.responses)))


def without_prompt(path: str, record: Record) -> SkippedRow:
    """The row of a record without a prompt, left out."""
    detail = "the row's responses do not share a prompt that could be answered"
    return SkippedRow(path, record.row, record.id, "no_prompt", detail)
