"""Rows of questions and answers as benchmarks publish them, and which answer is whose.

JSON, JSONL, Parquet as everywhere (`data/files.py`), and besides tables of Excel and those with
tabs or commas between columns, in which VLMEvalKit and others keep answers.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import json
import math
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import openpyxl
from etils import epath

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import read_bytes
from mmpo_jax.data.files import file_rows
from mmpo_jax.data.skipped import UnusableRow


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a file."""

    file: str
    number: int
    """From 1; in text files, of the line."""
    values: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.file}, row {self.number}"

    def get(self, *keys: str) -> Any:
        """The first of the keys that the row has; None where it has none of them."""
        found = (self.values.get(key) for key in keys)
        return next((value for value in found if not _is_missing(value)), None)

    def need(self, *keys: str) -> Any:
        """The first of the keys that the row has.

        Raises:
          MmpoError: it has none of them.
        """
        value = self.get(*keys)
        if value is None:
            raise MmpoError(
                f"{self.name}: has no {' or '.join(map(repr, keys))}, only {', '.join(self.values)}"
            )
        return value

    def text(self, *keys: str) -> str:
        """The first of the keys that the row has, which is a text.

        Raises:
          MmpoError: it has none of them, or the value is no text.
        """
        value = self.need(*keys)
        if not isinstance(value, str):
            raise MmpoError(f"{self.name}: {keys[0]!r} is no text but {value!r:.80}")
        return value


def _is_missing(value: Any) -> bool:
    """Whether a value is null, or NaN, which pandas writes for it."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def said(row: Row, *keys: str) -> str:
    """The text of an answer, under one of the keys or as the only one of `responses`, as
    `mmpo generate` writes it; an empty cell of a table is an empty answer.

    Raises:
      MmpoError: there is none, it is no text, or there are several.
    """
    if any(key in row.values for key in keys):
        value = row.get(*keys)
        if not isinstance(value, str | int | float | None):
            raise MmpoError(f"{row.name}: the answer is no text but {value!r:.80}")
        return "" if value is None else str(value)
    given = row.get("responses")
    if given is None:
        row.need(*keys)
    if not isinstance(given, list) or len(given) != 1:
        raise MmpoError(f"{row.name}: `responses` is no list of one answer but {given!r:.80}")
    return str(given[0])


def read_table(path: epath.Path) -> list[Row]:
    """All rows of a file.

    Raises:
      MmpoError: the file cannot be read, or one of its rows.
    """
    reader = _READERS.get(path.suffix.lower(), _rows_of_data)
    return [Row(str(path), number, values) for number, values in reader(path)]


def _rows_of_json(path: epath.Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    """The rows; an object that is the whole file is one, as some scripts write their results."""
    text = read_bytes(path).decode("utf-8-sig", errors="replace")
    try:
        whole = json.loads(text) if text.lstrip()[:1] == "{" else None
    except ValueError:  # objects on lines of their own
        whole = None
    return _rows_of_data(path) if whole is None else [(1, whole)]


def _rows_of_data(path: epath.Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    for number, row in file_rows(path):
        if isinstance(row, UnusableRow):
            raise DataError(f"{path}, row {number}: {row.detail}")
        yield number, row


def _rows_of_excel(path: epath.Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
    try:
        book = openpyxl.load_workbook(io.BytesIO(read_bytes(path)), read_only=True, data_only=True)
    except (zipfile.BadZipFile, KeyError, OSError) as error:
        raise DataError(f"{path}: is no table of Excel: {error}") from error
    table = book.worksheets[0].iter_rows(values_only=True)
    header = [str(name) for name in next(table, ())]
    for number, cells in enumerate(table, 2):
        if any(cell is not None for cell in cells):
            yield number, dict(zip(header, cells, strict=False))


def _rows_of_text(delimiter: str) -> Callable[[epath.Path], Any]:
    def read(path: epath.Path) -> Iterable[tuple[int, Mapping[str, Any]]]:
        csv.field_size_limit(1 << 30)  # images in Base64
        try:
            text = io.StringIO(read_bytes(path).decode("utf-8-sig"), newline="")
            rows = list(csv.DictReader(text, delimiter=delimiter))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DataError(f"{path}: is no table of text: {error}") from error
        for number, row in enumerate(rows, 2):
            if None in row:
                raise DataError(f"{path}, row {number}: has more cells than the header")
            yield number, row

    return read


_READERS: dict[str, Callable[[epath.Path], Iterable[tuple[int, Mapping[str, Any]]]]] = {
    ".json": _rows_of_json,
    ".xlsx": _rows_of_excel,
    ".tsv": _rows_of_text("\t"),
    ".csv": _rows_of_text(","),
}


def have_ids(answers: Sequence[Row], *keys: str) -> bool:
    """Whether answers have ids, under `id` or one of the keys.

    Raises:
      MmpoError: some have and some have not.
    """
    named = [answer.get("id", *keys) is not None for answer in answers]
    if any(named) and not all(named):
        row = answers[named.index(False)]
        raise MmpoError(f"{row.name}: has no {' or '.join(('id', *keys))}, which other rows have")
    return all(named)


def match_by_id(
    questions: Sequence[Row], answers: Sequence[Row], *keys: str
) -> list[tuple[Row, Row]]:
    """(question, its answer) for every answer, in the order of the questions.

    Args:
      questions: each with an id of its own.
      answers: rows with an id, of which some may be missing.
      keys: names of the id; answers may also call it `id`.

    Raises:
      MmpoError: an answer names no question, two name the same one, or two questions share an id.
    """
    known = _by_id(questions, keys)
    found = _by_id(answers, ("id", *keys))
    for name, answer in found.items():
        if name not in known:
            raise MmpoError(f"{answer.name}: there is no question {name!r} in {questions[0].file}")
    return [(question, found[name]) for name, question in known.items() if name in found]


def _by_id(rows: Sequence[Row], keys: Sequence[str]) -> dict[str, Row]:
    named = [(as_id(row.need(*keys)), row) for row in rows]
    repeated = [
        name for name, count in collections.Counter(n for n, _ in named).items() if count > 1
    ]
    if repeated:
        raise MmpoError(f"{rows[0].file}: several rows have the id {repeated[0]!r}")
    return dict(named)


def match_by_order(questions: Sequence[Row], answers: Sequence[Row]) -> list[tuple[Row, Row]]:
    """(question, its answer), the first with the first, for as many as there are answers.

    Raises:
      MmpoError: there are more answers than questions.
    """
    if len(answers) > len(questions):
        raise MmpoError(
            f"{answers[0].file}: has {len(answers)} answers to the {len(questions)} questions of "
            f"{questions[0].file}"
        )
    return list(zip(questions, answers, strict=False))


def as_id(value: Any) -> str:
    """An id as a text: 7, 7.0 (as tables have whole numbers) and "7" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value)
