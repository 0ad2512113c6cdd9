"""Where the first sentence of a text ends."""

from __future__ import annotations

import re

_END = re.compile(
    r"""[.!?]+["'\u201d\u2019)\]*]*(?=\s|$)    # of words with spaces between them
        |[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*   # of scripts without
        |\n""",
    re.VERBOSE,
)
_NO_END = re.compile(
    r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e|cf|approx)\.$|(?:^|\n)\s*\d{1,2}\.$"
)
"""What ends in a full stop that ends nothing: abbreviations, and the numbers of a list."""


def first_sentence(text: str, end: str | None = None) -> str | None:
    """The beginning of a text up to the end of its first sentence, white space in front included.

    Args:
      text: any.
      end: regular expression of what ends a sentence; None for full stops, question and exclamation
        marks with the quotes and brackets behind them, and line breaks.

    Returns:
      None where no sentence ends.
    """
    for match in (_END if end is None else re.compile(end)).finditer(text):
        said = text[: match.end()]
        if said.strip() and not (end is None and _NO_END.search(said)):
            return said
    return None
