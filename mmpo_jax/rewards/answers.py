"""Rewards of short answers and of their form, as in Visual-RFT (arXiv 2503.01785)."""

from __future__ import annotations

import string
from typing import Any

from mmpo_jax.core.errors import DataError
from mmpo_jax.rewards.registry import MAX_LENGTH, final_answer, reward

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
EDGES = string.whitespace + ".,;:!?" + "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb" + "()[]{}"
"""What may stand around an answer: punctuation of sentences, quotes and brackets."""


@reward("a text")
def exact_match(text: str, solution: Any) -> float:
    """1 where the answer is the right one, but for case, spaces, and `.,;:!?`, quotes and brackets
    around it; else 0. Other signs (-5, 50%, C#) count.

    Visual-RFT (arXiv 2503.01785), whose data write the right one in `<answer>` tags, too.
    """
    if not isinstance(solution, str):
        raise DataError(f"exact_match compares with a text, and the solution is {solution!r:.80}")
    said = _plain(final_answer(text))
    return float(said != "" and said == _plain(final_answer(solution)))


@reward("anything, or none: it is not read")
def think_format(text: str, solution: Any) -> float:
    """1 where the text is `<think>...</think><answer>...</answer>` and nothing else; else 0.

    Visual-RFT (arXiv 2503.01785).
    """
    del solution
    text = text.strip()
    if len(text) > MAX_LENGTH or any(text.count(tag) != 1 for tag in TAGS):
        return 0.0
    begin, thought, said, end = (text.index(tag) for tag in TAGS)
    between = text[thought + len("</think>") : said]
    whole = begin == 0 and end + len("</answer>") == len(text)
    return float(whole and begin < thought < said < end and not between.strip())


def _plain(text: str) -> str:
    text = text.casefold().rstrip(EDGES)
    inside = text.lstrip(EDGES)
    if inside[:1].isdigit() and text.endswith(f".{inside}"):  # .5 is not 5
        inside = f".{inside}"
    return " ".join(inside.split())
