"""What differs between two responses, and which tokens spans of a text are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

MIN_MATCH = 3
"""Equal stretches shorter than this count as changed."""

Ranges = list[tuple[int, int]]
"""[start, end) each."""


def changed_segments(
    ours: Sequence[Any], theirs: Sequence[Any], min_match: int = MIN_MATCH
) -> tuple[Ranges, Ranges]:
    """The places where two sequences say something else, in each of them.

    The rule of RLHF-V's code: what lies between matching blocks of difflib of at least `min_match`
    elements, where both sides have something; what is only inserted or left out is no change.
    """
    blocks = difflib.SequenceMatcher(None, ours, theirs).get_matching_blocks()
    kept = [block for block in blocks if block.size >= min_match or block is blocks[-1]]
    mine: Ranges = []
    others: Ranges = []
    a = b = 0
    for block in kept:
        if a < block.a and b < block.b:
            mine.append((a, block.a))
            others.append((b, block.b))
        a, b = block.a + block.size, block.b + block.size
    return mine, others


def covered_tokens(
    text: str, offsets: Sequence[tuple[int, int]], start: int, end: int
) -> tuple[int, int]:
    """[first, last + 1) of the tokens that have a character of [start, end) of a text.

    Space in front of a word belongs to the word's token in most tokenizers and is no part of it
    here, but where the token is nothing else.

    Args:
      text: what was tokenized.
      offsets: characters [start, end) of every token, in order.
      start, end: of the span.
    """
    inside = []
    for place, (first, last) in enumerate(offsets):
        written = text[first:last]
        first += len(written) - len(written.lstrip()) if written.strip() else 0
        if first < end and start < last:
            inside.append(place)
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
