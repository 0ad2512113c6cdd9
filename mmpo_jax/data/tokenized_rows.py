"""Sequences of tokenised records whose sizes and digests are known without reading the records."""

from __future__ import annotations

import abc
import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa

from mmpo_jax.core.files import fingerprint_items, fingerprint_json
from mmpo_jax.data.contexts import all_contexts, context_id
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.row_tables import (
    SIZES,
    context_names_of,
    decode_row,
    open_table,
    row_sizes,
    shows_later,
)
from mmpo_jax.data.tokenization import TokenizedRecord, content_of, prompt_digest

SOLUTION = "solution"
"""Column of what rewards compare samples with, as JSON."""

Item = TypeVar("Item")


@dataclasses.dataclass(frozen=True)
class RowSizes:
    """How large the records of a sequence are, see `row_tables.row_sizes`; int32[n] each."""

    prompt: np.ndarray
    response: np.ndarray
    responses: np.ndarray
    tokens: np.ndarray
    targets: np.ndarray
    slots: np.ndarray
    truncated: np.ndarray
    shows_later: np.ndarray
    """bool[n]; whether images stand in responses."""
    contexts: Sequence[tuple[str, ...]]
    """Names of the contexts of each."""

    @classmethod
    def of(cls, records: Sequence[TokenizedRecord]) -> RowSizes:
        """The sizes of records that are at hand."""
        sizes = [row_sizes(record) for record in records]
        numbers = {name: np.array([size[name] for size in sizes], np.int32) for name in SIZES}
        later = np.array([shows_later(record) for record in records], bool)
        contexts = [tuple(context_names_of(record)) for record in records]
        return cls(**numbers, shows_later=later, contexts=contexts)

    def take(self, places: np.ndarray) -> RowSizes:
        """The sizes of the records at places."""
        taken = {name: getattr(self, name)[places] for name in (*SIZES, "shows_later")}
        return RowSizes(**taken, contexts=_at(self.contexts, places))


class KnownRows(Sequence[TokenizedRecord], abc.ABC):
    """Records that are made when one is asked for; what is known of all is known without that."""

    @property
    @abc.abstractmethod
    def ids(self) -> list[str]:
        """Ids of the records."""

    @property
    @abc.abstractmethod
    def sizes(self) -> RowSizes:
        """How large the records are."""

    @property
    @abc.abstractmethod
    def contents(self) -> list[str]:
        """SHA-256 of what a model sees of each, but for its id."""

    @property
    @abc.abstractmethod
    def prompts(self) -> list[str]:
        """SHA-256 of each prompt with its media."""

    @abc.abstractmethod
    def read(self, place: int) -> TokenizedRecord:
        """The record at a place, from 0."""

    def take(self, places: np.ndarray) -> KnownRows:
        """The records at places, int[n]."""
        return ChosenRows(self, places)

    def column(self, name: str) -> list[str]:
        """What is known of each record by a name of its own, see `row_stage.RowUse.tell`."""
        raise KeyError(name)

    def has_column(self, name: str) -> bool:
        """Whether there is such a column."""
        return False

    @overload
    def __getitem__(self, place: int) -> TokenizedRecord: ...
    @overload
    def __getitem__(self, place: slice) -> KnownRows: ...
    def __getitem__(self, place: int | slice) -> TokenizedRecord | KnownRows:
        if isinstance(place, slice):
            return self.take(np.arange(len(self))[place])
        count = len(self)
        if not -count <= place < count:
            raise IndexError(place)
        return self.read(place % count)

    def __iter__(self) -> Iterator[TokenizedRecord]:
        return map(self.read, range(len(self)))


@dataclasses.dataclass(frozen=True)
class StoredTable:
    """A file of `row_tables.encode_rows`."""

    file: str
    rows: int
    prefix: str = ""
    """Put in front of the ids of its records."""


class TokenizedRows(KnownRows):
    """Records in files; any selection of them, in any order."""

    def __init__(
        self,
        tables: Sequence[StoredTable],
        processor: Processor,
        places: np.ndarray | None = None,
    ):
        """
        Args:
          tables: hold the records, one after another.
          processor: lays their images out.
          places: which of their rows these are, int[n]; all by default.
        """
        self.tables, self.processor = tables, processor
        ends = np.cumsum([0, *(table.rows for table in tables)])
        self._starts = ends[:-1]
        self.places = np.arange(ends[-1]) if places is None else places

    def __len__(self) -> int:
        return len(self.places)

    def read(self, place: int) -> TokenizedRecord:
        row = int(self.places[place])
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        table = self.tables[number]
        at = row - int(self._starts[number])
        stored = open_table(table.file)
        return decode_row(stored, at, table.file, table.prefix, self.processor)

    def take(self, places: np.ndarray) -> TokenizedRows:
        return TokenizedRows(self.tables, self.processor, self.places[places])

    def column(self, name: str) -> list[Any]:
        return self._columns(name).take(pa.array(self.places)).to_pylist()

    def has_column(self, name: str) -> bool:
        return all(name in open_table(table.file).column_names for table in self.tables)

    def _columns(self, name: str) -> pa.ChunkedArray:
        return pa.chunked_array([c for t in self.tables for c in open_table(t.file)[name].chunks])

    @functools.cached_property
    def ids(self) -> list[str]:
        prefixes = np.repeat([t.prefix for t in self.tables], [t.rows for t in self.tables])
        chosen = prefixes[self.places]
        return [prefix + id_ for prefix, id_ in zip(chosen, self.column("id"), strict=True)]

    @functools.cached_property
    def sizes(self) -> RowSizes:
        taken = {
            name: self._columns(name).to_numpy()[self.places] for name in (*SIZES, "shows_later")
        }
        contexts = [tuple(json.loads(names)) for names in self.column("contexts")]
        return RowSizes(**taken, contexts=contexts)

    @property
    def contents(self) -> list[str]:
        return self.column("content")

    @property
    def prompts(self) -> list[str]:
        return self.column("prompt_digest")


class ChosenRows(KnownRows):
    """Some of other records."""

    def __init__(self, rows: KnownRows, places: np.ndarray):
        self.rows, self.places = rows, places

    def __len__(self) -> int:
        return len(self.places)

    def read(self, place: int) -> TokenizedRecord:
        return self.rows.read(int(self.places[place]))

    def column(self, name: str) -> list[str]:
        return _at(self.rows.column(name), self.places)

    def has_column(self, name: str) -> bool:
        return self.rows.has_column(name)

    @functools.cached_property
    def ids(self) -> list[str]:
        return _at(self.rows.ids, self.places)

    @functools.cached_property
    def sizes(self) -> RowSizes:
        return self.rows.sizes.take(self.places)

    @property
    def contents(self) -> list[str]:
        return _at(self.rows.contents, self.places)

    @property
    def prompts(self) -> list[str]:
        return _at(self.rows.prompts, self.places)


class ListedRows(KnownRows):
    """Records that are at hand."""

    def __init__(self, records: Sequence[TokenizedRecord]):
        self.records = records

    def __len__(self) -> int:
        return len(self.records)

    def read(self, place: int) -> TokenizedRecord:
        return self.records[place]

    @property
    def ids(self) -> list[str]:
        return [record.id for record in self.records]

    @functools.cached_property
    def sizes(self) -> RowSizes:
        return RowSizes.of(self.records)

    @property
    def contents(self) -> list[str]:
        return [fingerprint_json(content_of(record)) for record in self.records]

    @property
    def prompts(self) -> list[str]:
        return [prompt_digest(record) for record in self.records]


class ContextRows(KnownRows):
    """All contexts of records, those of a record one after another."""

    def __init__(self, rows: KnownRows):
        self.rows = rows
        counts = [len(names) for names in rows.sizes.contexts]
        self._owners = np.repeat(np.arange(len(rows)), counts).tolist()
        self._numbers = [number for count in counts for number in range(count)]

    def __len__(self) -> int:
        return len(self._owners)

    def read(self, place: int) -> TokenizedRecord:
        record = self.rows.read(self._owners[place])
        return all_contexts(record)[self._numbers[place]][1]

    @functools.cached_property
    def ids(self) -> list[str]:
        ids, names = self.rows.ids, self.rows.sizes.contexts
        pairs = zip(self._owners, self._numbers, strict=True)
        return [context_id(ids[owner], names[owner], number) for owner, number in pairs]

    @functools.cached_property
    def sizes(self) -> RowSizes:
        alone = len(self) == len(self.rows)
        return self.rows.sizes if alone else RowSizes.of(self)

    @property
    def contents(self) -> list[str]:
        contents = self.rows.contents
        pairs = zip(self._owners, self._numbers, strict=True)
        return [f"{contents[owner]}/{number}" for owner, number in pairs]

    @property
    def prompts(self) -> list[str]:
        return [prompt_digest(record) for record in self]  # each context has its own


def known(records: Sequence[TokenizedRecord]) -> KnownRows:
    """Records as `KnownRows`."""
    return records if isinstance(records, KnownRows) else ListedRows(records)


def concatenated(sets: Sequence[Sequence[TokenizedRecord]]) -> KnownRows:
    """The records of several sequences, one after another."""
    if len(sets) == 1:
        return known(sets[0])
    stored = [rows for rows in sets if isinstance(rows, TokenizedRows)]
    if not stored or len(stored) < len(sets):
        return ListedRows([record for rows in sets for record in rows])
    tables = [table for rows in stored for table in rows.tables]
    firsts = np.cumsum([0, *(sum(table.rows for table in rows.tables) for rows in stored)])
    places = [rows.places + first for rows, first in zip(stored, firsts, strict=False)]
    return TokenizedRows(tables, stored[0].processor, np.concatenate(places))


def prefixed(rows: KnownRows, prefix: str) -> KnownRows:
    """Rows whose ids have something in front."""
    if isinstance(rows, TokenizedRows):
        tables = [dataclasses.replace(table, prefix=prefix) for table in rows.tables]
        return TokenizedRows(tables, rows.processor, rows.places)
    return ListedRows([_prefixed(record, prefix) for record in rows])


def _prefixed(record: TokenizedRecord, prefix: str) -> TokenizedRecord:
    others = tuple((name, _prefixed(context, prefix)) for name, context in record.others)
    return dataclasses.replace(record, id=prefix + record.id, others=others)


def fingerprint_solutions(records: Sequence[TokenizedRecord]) -> str:
    """SHA-256 of what rewards compare samples of the records with."""
    rows = known(records)
    if rows.has_column(SOLUTION):
        return fingerprint_items(rows.column(SOLUTION))
    return fingerprint_items(json.dumps(record.solution) for record in rows)


def fingerprint_records(records: Sequence[TokenizedRecord]) -> str:
    """SHA-256 of what a model sees of the records: tokens, loss masks and encoded images."""
    rows = known(records)
    return fingerprint_items(zip(rows.ids, rows.contents, strict=True))


def _at(values: Sequence[Item], places: np.ndarray) -> list[Item]:
    return [values[place] for place in places]
