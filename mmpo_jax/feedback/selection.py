"""The best of several responses to a prompt, and what choosing them so does to their length."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from mmpo_jax.feedback.implicit import ImplicitRewards


def best_of(rewards: Float[np.ndarray, " R"]) -> int:
    """Place of the highest reward, of equal ones the first."""
    return int(np.argmax(rewards))


@dataclasses.dataclass(frozen=True)
class LengthShift:
    """How much longer the best responses are than all, in the mean over prompts."""

    tokens: float
    """Tokens of the best response minus the mean of its prompt's responses, EOS included."""
    words: float
    """The same in words."""


@dataclasses.dataclass(frozen=True)
class Selection:
    """What was chosen by the two rewards, over all prompts."""

    prompts: int
    responses: int
    mean_tokens: float
    """Mean number of tokens of a response: over prompts, of the mean of a prompt's responses."""
    mean_words: float
    per_token: LengthShift
    summed: LengthShift
    different: int
    """Prompts of which the two rewards choose responses of different text."""

    def to_json(self) -> dict[str, Any]:
        """The fields, and the share of prompts that `different` is."""
        return dataclasses.asdict(self) | {"different_share": self.different / self.prompts}

    def lines(self) -> Iterator[str]:
        """What it says, for a person."""
        yield f"{self.responses} responses to {self.prompts} prompts"
        yield f"{'':24s}  {'tokens':>8s}  {'words':>8s}"
        yield f"{'mean of all':24s}  {self.mean_tokens:8.2f}  {self.mean_words:8.2f}"
        for name, shift in (("per-token", self.per_token), ("summed", self.summed)):
            yield f"{f'best by {name} reward':24s}  {shift.tokens:+8.2f}  {shift.words:+8.2f}"
        share = 100 * self.different / self.prompts
        yield (
            f"the two rewards choose different responses to {self.different} of {self.prompts} "
            f"prompts ({share:.1f} %)"
        )


def describe_selection(
    rewards: Sequence[ImplicitRewards], texts: Sequence[Sequence[str]]
) -> Selection:
    """Compares the choice of the per-token reward with that of the sum.

    Args:
      rewards: of every prompt, with at least one response each; at least one prompt.
      texts: of the same responses.
    """
    shifts: dict[str, list[np.ndarray]] = {"per_token": [], "summed": []}
    means, different = [], 0
    for row, said in zip(rewards, texts, strict=True):
        lengths = np.array([row.num_tokens, [len(text.split()) for text in said]], np.float64)
        means.append(lengths.mean(axis=1))
        chosen = {name: best_of(getattr(row, name)) for name in shifts}
        for name, place in chosen.items():
            shifts[name].append(lengths[:, place] - means[-1])
        different += len({said[place] for place in chosen.values()}) > 1
    mean_tokens, mean_words = np.mean(means, axis=0).tolist()
    return Selection(
        prompts=len(rewards),
        responses=sum(map(len, texts)),
        mean_tokens=mean_tokens,
        mean_words=mean_words,
        different=different,
        **{name: LengthShift(*np.mean(rows, axis=0).tolist()) for name, rows in shifts.items()},
    )
