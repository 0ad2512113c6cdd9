"""Names for the rows of a file: each its own, and the row's id wherever that is still free."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.data.rows import brief
from mmpo_jax.data.skipped import UnusableRow


class RowIds:
    """Gives every row of a file an id that no other row has.

    Preferences repeat a prompt's id in all of its pairs, so a repeated id is no error: the first
    row of an id is called by it, those after it ``ID (row N)`` with N their number in the file. A
    row without an id is ``row N``. Should a row's own id be a name of that form which an earlier
    row has got, it counts as repeated. So names are unique, and depend on no later row.
    """

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def name(self, own: str | None, number: int) -> str:
        """The unique id of a row.

        Args:
          own: its id, None where it has none.
          number: of the row, from 1.
        """
        name = f"row {number}" if own is None else own
        while name in self._taken:
            name = f"{name} (row {number})"
        self._taken.add(name)
        return name


ID_COLUMNS = ("id", "idx")
"""Columns with a row's id, the first that has one."""


def own_id(row: Mapping[str, Any], columns: Sequence[str] = ID_COLUMNS) -> str | None:
    """What a row says its id is, in the first of the columns that says one; None where none does.

    Whole numbers count as their digits, also where a table holds 7 as 7.0 since it has NaN, or an
    empty text, in rows without one.

    Raises:
      UnusableRow: the id is neither a text nor a whole number.
    """
    for key in columns:
        value = row.get(key)
        if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
            continue
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, str | int):
            detail = f"{key} {brief(value)} is neither a text nor a whole number"
            raise UnusableRow("bad_id", detail)
        return str(value)
    return None
