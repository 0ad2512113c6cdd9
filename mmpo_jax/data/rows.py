"""A row as a data file has it, the names of the formats, and how messages call what is in it."""

from collections.abc import Mapping
from typing import Any, Literal

FormatName = Literal[
    "auto",
    "record",
    "trl",
    "llama_factory",
    "ms_swift",
    "rlaif_v",
    "rlhf_v",
    "mm_rlhf",
    "mm_rlhf_pairs",
    "vl_rewardbench",
    "multimodal_rewardbench",
    "picture_world",
    "alpaca",
]
"""Conventions of rows, as recipes and flags name them; `auto` goes by the columns."""

MessagesAs = Literal["last_turn", "dialogue"]
"""What a row of whole dialogues supervises, see `mmpo_jax.data.parsing.parse_rows`."""

_BRIEF = 80
"""Characters of a value that a message may repeat."""

Row = Mapping[str, Any]
"""Columns -> values, without those that are null: Parquet has all columns in all rows."""


def brief(value: Any) -> str:
    """How messages call a value of a row: never with a picture's bytes or all of a long text."""
    if isinstance(value, str):
        head = value.partition(",")[0] + "," if value[:5].lower() == "data:" else value
        if len(value) <= _BRIEF:
            return repr(value)
        return f"{head[: _BRIEF // 2]!r}... ({len(value)} characters)"
    if isinstance(value, bytes | bytearray):
        return f"{len(value)} bytes"
    if isinstance(value, Mapping):
        return f"an object of {', '.join(map(str, value))[:_BRIEF] or 'nothing'}"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    return repr(value)[:_BRIEF]
