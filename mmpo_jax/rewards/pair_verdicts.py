"""The reward of a judge's reply: does it prefer the answer that people preferred."""

from __future__ import annotations

from typing import Any

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.pair_questions import read_conclusion, read_verdict
from mmpo_jax.rewards.answers import think_format
from mmpo_jax.rewards.registry import MAX_LENGTH, reward


@reward("1 or 2, the place of the better answer, or tie")
def pair_verdict(text: str, solution: Any, format: float = 0.5, consistency: float = 0.5) -> float:
    """right * (1 + consistency * c) + format * f: right is 1 where the reply's verdict on two
    answers is the true one; f is 1 where it is `<think>...</think><answer>...</answer>` and
    nothing else; c is 1 where its reasoning comes to the verdict, -1 where it comes to the other
    one, and 0 where that cannot be told.

    R1-Reward (Zhang et al. 2025, arXiv 2505.02835), whose c a second model gives. Here a
    rule does: the last sentence of the reasoning that calls answer 1 or 2 better or worse.
    """
    expected = str(solution).strip().lower()
    if expected not in ("1", "2", "tie"):
        raise DataError(f"pair_verdict compares with 1, 2 or tie, not with {solution!r:.80}")
    if len(text) > MAX_LENGTH:
        return 0.0
    verdict, conclusion = read_verdict(text), read_conclusion(text)
    agrees = 0 if None in (verdict, conclusion) else 1 if verdict == conclusion else -1
    right = float(verdict == expected)
    return right * (1 + consistency * agrees) + format * think_format(text, None)
