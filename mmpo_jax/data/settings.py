"""Sections of a recipe that say where rows come from and what sizes they are padded to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section
from mmpo_jax.data.rows import Format, MessagesAs

if TYPE_CHECKING:
    from mmpo_jax.data.sources import Source


class Lengths(Section):
    """Static shapes: the ascending sizes that prompts and responses are padded to."""

    prompt: tuple[PositiveInt, ...] = (64,)
    response: tuple[PositiveInt, ...] = (64,)

    @pydantic.field_validator("prompt", "response")
    @classmethod
    def _ascending(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        if not sizes or list(sizes) != sorted(set(sizes)):
            raise ValueError("give one or more sizes in ascending order")
        return sizes


class RecordSource(Section):
    """A source of records, as a recipe names it."""

    source: str

    def load(self, *, supervised: bool, messages_as: MessagesAs = "last_turn") -> Source:
        """The records, unusable rows set apart.

        Args:
          supervised: whether responses to learn from are wanted, or prompts only.
          messages_as: what rows of `messages` supervise, see `readers.iter_records`.

        Raises:
          DataError: they cannot be read.
        """
        raise NotImplementedError


class FileData(RecordSource):
    """Rows of a file, a folder or TFDS (docs/data.md)."""

    source: Literal["file"] = "file"
    path: str
    format: Format = "auto"
    """The convention of the rows; `auto` goes by their columns."""
    image_root: str | None = None
    """Folder the image paths are relative to and must stay in; the file's own by default."""
    max_skipped: float = Field(0.1, ge=0, le=1)
    """Share of unusable rows above which the run stops."""
    control_tokens: Literal["tokens", "text"] = "tokens"
    """What control tokens are that are typed in texts, such as `<|im_end|>` in an answer about chat
    templates: what the tokenizer makes of them, or text like any other."""

    def load(self, *, supervised: bool, messages_as: MessagesAs = "last_turn") -> Source:
        from mmpo_jax.data.sources import load_file  # which loads transformers

        return load_file(self, supervised, messages_as)


class LearnedFile(FileData):
    """A file of responses to learn from."""

    score: str | None = None
    """Which of several scores is `score`, by its name; responses without it have none then."""
    join_pairs: bool = False
    """Join the pairs of one prompt into a ranking, where they agree (docs/data.md)."""
