"""Scores of a response from the verdicts on its claims.

Every response is divided into claims, and a labeler gives each claim p(yes) and p(no). A score is
one number per response, higher being better; only scores of responses to one prompt compare.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from mmpo_jax.core.errors import DataError

VERDICTS = "verdicts"
"""Key of a judge's details with a response's claims: mappings of claim, question, p_yes and p_no.
"""

# log_odds stays finite when a labeler's probability underflows to 0.
_PROBABILITY_FLOOR = 1e-9
# Probabilities are sums over spellings ("yes", "Yes") of rounded floats.
_ROUNDING = 1e-3


@dataclass(frozen=True)
class ClaimVerdicts:
    """The claims of a response, and what the labeler thought of each."""

    claims: tuple[str, ...]
    p_yes: tuple[float, ...]
    """Probability of yes for each claim."""
    p_no: tuple[float, ...]
    """Probability of no for each claim; it need not be 1 - `p_yes`."""

    def check(self) -> None:
        """Whether there are verdicts for all claims.

        Raises:
          DataError: claims and probabilities differ in number, or a probability is none.
        """
        if not len(self.claims) == len(self.p_yes) == len(self.p_no):
            sizes = f"{len(self.claims)} claims, {len(self.p_yes)} p_yes, {len(self.p_no)} p_no"
            raise DataError(f"claims: {sizes}")
        # A NaN would compare false below and pass for a rejected claim.
        if not all(0 <= p <= 1 + _ROUNDING for p in self.p_yes + self.p_no):
            raise DataError("claims: a probability is not between 0 and 1")

    @property
    def verdicts(self) -> tuple[bool, ...]:
        """Whether each claim is accepted."""
        return tuple(map(accepted, self.p_yes, self.p_no))


def accepted(p_yes: float, p_no: float) -> bool:
    """The labeler's verdict on a claim; a tie rejects it."""
    return p_yes > p_no


def count_score(verdicts: Sequence[bool]) -> int:
    """RLAIF-V's score: minus the number of rejected claims. A long response has more to lose."""
    return -sum(not verdict for verdict in verdicts)


def fraction_score(verdicts: Sequence[bool]) -> float:
    """The share of accepted claims, in [0, 1]; wants a `min_difference` below 1.

    Raises:
      ValueError: there are no claims.
    """
    if not verdicts:
        raise ValueError("the share of accepted claims needs a claim")
    return sum(verdicts) / len(verdicts)


def log_odds_score(p_yes: Sequence[float], p_no: Sequence[float]) -> float:
    """Sum over claims of log p(yes) - log p(no): `count_score` with the labeler's confidence."""
    return math.fsum(
        math.log(max(yes, _PROBABILITY_FLOOR)) - math.log(max(no, _PROBABILITY_FLOOR))
        for yes, no in zip(p_yes, p_no, strict=True)
    )


SCORES: Mapping[str, Callable[[ClaimVerdicts], float]] = {
    "count": lambda claims: count_score(claims.verdicts),
    "fraction": lambda claims: fraction_score(claims.verdicts),
    "log_odds": lambda claims: log_odds_score(claims.p_yes, claims.p_no),
}
