"""Examples: records in their contexts, with the numbers that their objectives need."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np

from mmpo_jax.data.contexts import MAIN
from mmpo_jax.data.packing import Size, sizes_of
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.tokenized_rows import KnownRows, known


@dataclasses.dataclass(frozen=True)
class Example:
    """A record in its contexts, with the numbers its objectives need beside the log-probs."""

    contexts: tuple[TokenizedRecord | None, ...]
    """One row of prompts each, of as many responses; the main one first. None for a context that
    other records have and this one has not."""
    fields: Mapping[str, np.ndarray]
    """name -> float32[S] or [S, t]."""
    reference: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    """`sums` float32[C, S] or `log_probs` float32[C, S, t]; empty where none was computed."""
    names: tuple[str, ...] = (MAIN,)
    """Names of the contexts; the same in all examples."""

    @property
    def id(self) -> str:
        first = self.contexts[0]
        assert first is not None
        return first.id

    @property
    def rows(self) -> list[TokenizedRecord]:
        """The contexts it has."""
        return [context for context in self.contexts if context is not None]

    @property
    def ranks(self) -> list[float]:
        """Ranks of the main context's own responses; none where no objective reads them."""
        main, ranks = self.rows[0], self.fields.get("rank", ())
        return [
            float(rank)
            for rank, response in zip(ranks, main.responses, strict=False)
            if len(response.ids) and not response.mismatched
        ]


class Examples(Sequence[Example]):
    """Examples of records, each made when it is asked for."""

    def __init__(self, rows: KnownRows, names: tuple[str, ...] = (MAIN,)):
        """
        Args:
          rows: the records.
          names: of the contexts; the same in all examples.
        """
        self.rows, self.names = rows, names

    def make(self, record: TokenizedRecord) -> Example:
        """The example of a record; here without numbers."""
        return Example((record,), {}, names=self.names)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, place: int) -> Example: ...
    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...
    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self.make(record) for record in self.rows[place]]
        return self.make(self.rows[place])

    def __iter__(self) -> Iterator[Example]:
        return map(self.make, self.rows)


def rows_of(examples: Sequence[Example]) -> KnownRows:
    """The records of examples, in all their contexts where they are at hand."""
    if isinstance(examples, Examples):
        return examples.rows
    return known([record for example in examples for record in example.rows])


class _Rows(Sequence[TokenizedRecord]):
    """The main contexts of examples."""

    def __init__(self, examples: Sequence[Example]):
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, number: Any) -> Any:
        return self.examples[number].contexts[0]


def sizes_of_examples(examples: Sequence[Example]) -> list[Size]:
    """What the main contexts of examples take."""
    return sizes_of(examples.rows if isinstance(examples, Examples) else _Rows(examples))
