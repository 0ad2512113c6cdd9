"""Where the first sentence of a text ends."""

from __future__ import annotations

import re

_STOP = re.compile(
    r"""(?P<maybe>[.!?]+["'\u201d\u2019)\]*]*)(?=\s|$)    # of words with spaces between them
        |[\u3002\uff01\uff1f]+[\u201d\u2019\u300d\u300f\uff09]*   # of scripts without
        |\n""",
    re.VERBOSE,
)
_ABBREVIATION = re.compile(
    r"(?:^|[\s(])(?:Mr|Mrs|Ms|Dr|Prof|St|vs|e\.g|i\.e|cf|approx|[ap]\.m)\.$"
    r"|(?:^|[\s(.])[A-Z]\.$"  # initials, and U.S.
    r"|(?:^|\n)\s*\d{1,2}\.$"
)
"""What ends in a full stop that ends nothing: abbreviations, and the numbers of a list."""
_OF_NUMBERS = re.compile(r"(?:^|[\s(])(?:Nos?|Fig)\.$")
"""Abbreviations where a number follows; `No.` may also be an answer."""
_OPENING = frozenset("\"'\u201c\u2018([-*\u2022#")
"""Quotes, brackets and marks of lists that a sentence begins with."""


def first_sentence(text: str, end: str | None = None, *, finished: bool = True) -> str | None:
    """The beginning of a text up to the end of its first sentence, white space in front included.

    Args:
      text: any.
      end: regular expression of what ends a sentence; None for full stops, question and exclamation
        marks with the quotes and brackets behind them, where no small letter follows, and for line
        breaks.
      finished: whether the text ends where it does. A full stop at the end of one that was cut may
        be that of a number or an abbreviation.

    Returns:
      None where no sentence ends.
    """
    if end is not None:
        found = (text[: match.end()] for match in re.compile(end).finditer(text))
        return next((said for said in found if said.strip()), None)
    for match in _STOP.finditer(text):
        said, rest = text[: match.end()], text[match.end() :]
        sure = match["maybe"] is None or _ends(said, match["maybe"], rest, finished)
        if said.strip() and sure:
            return said
    return None


def _ends(said: str, stop: str, rest: str, finished: bool) -> bool:
    """Whether a sentence ends at a stop of a script with capitals, and `rest` is another."""
    if _ABBREVIATION.search(said):
        return False
    following = rest.lstrip()
    if "\n" in rest[: len(rest) - len(following)]:
        return True
    if not following:
        return finished
    first = following[0]
    if _OF_NUMBERS.search(said) and first.isdigit():
        return False
    apart = said[: -len(stop)][-1:].isspace()  # as words of the picture world are
    return apart or (first.isalnum() and not first.islower()) or first in _OPENING
