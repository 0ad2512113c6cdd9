"""Preference pairs from scores, whoever gave them.

Every response has a score of a judge (`mmpo_jax.feedback.judge`). Here the responses to one prompt
become (chosen, rejected) pairs:

    scores -> pairs that differ enough -> a few per prompt -> balanced in length

The rules are those of RLAIF-V (Yu et al. 2024, arXiv 2405.17220, and its public code), except
that sampling is seeded. Every step counts what it removes.
"""

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations
from typing import Literal

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import canonical_json

Balance = Literal["rlaif_v", "symmetric", "none"]

# Relative: scores that are no whole numbers reach `min_difference` only up to rounding.
_ROUNDING = 1e-9
_LENGTH_STEPS = 50  # Thresholds 0.00, 0.02, ..., 0.98.


@dataclass(frozen=True)
class ScoredResponse:
    """One response with its score."""

    prompt_id: str
    sample: int
    """Number of the response among those to its prompt."""
    text: str
    score: float
    """More is better; only scores of responses to one prompt compare. NaN where it has none."""
    reason: str | None = None
    """Why it has none, in the words that are counted."""
    source: str = ""
    """Where it comes from."""


@dataclass(frozen=True)
class Pair:
    """A response preferred to another one to the same prompt."""

    prompt_id: str
    chosen: str
    rejected: str
    chosen_sample: int
    rejected_sample: int
    chosen_score: float
    rejected_score: float


@dataclass(frozen=True)
class PairingResult:
    """Pairs in the order of prompt id and sample numbers, and what became of everything else."""

    pairs: tuple[Pair, ...]
    counts: dict[str, int]
    """How many responses and pairs each step saw, dropped and left."""
    length_threshold: float | None
    """The share of its length by which the shorter text of a pair may fall behind, as chosen by
    `length_balance`; None where no pair was measured."""


def make_pairs(
    responses: Iterable[ScoredResponse],
    *,
    seed: int,
    round_number: int = 0,
    min_difference: float = 1.0,
    max_pairs_per_prompt: int | None = 2,
    balance: Balance = "rlaif_v",
    chosen_from: Sequence[str] | None = None,
    rejected_from: Sequence[str] | None = None,
    chosen_at_least: float | None = None,
) -> PairingResult:
    """Preference pairs from scored responses.

    The sampled pairs of a prompt depend on the seed, the round and that prompt's responses only,
    whatever the order of `responses` and the other prompts are. (The length balance looks at all
    pairs at once, as in RLAIF-V.) Responses without a score form no pairs.

    Args:
      responses: of any prompts, in any order.
      seed: of the draw.
      round_number: another draw in every round.
      min_difference: the score difference from which on a pair is a preference.
      max_pairs_per_prompt: how many pairs of a prompt are kept at random; None for all.
      balance: see `length_balance`.
      chosen_from, rejected_from: sources that the side of a pair may come from; None for any.
      chosen_at_least: score that a chosen response needs; None for any.

    Raises:
      DataError: two responses share prompt and sample number.
      MmpoError: a setting is out of range.
    """
    _check_settings(min_difference, max_pairs_per_prompt, balance)
    counts: Counter[str] = Counter(dict.fromkeys(_COUNTS, 0))
    if chosen_from is not None or rejected_from is not None:
        counts[_OTHER_SOURCE] = 0
    if chosen_at_least is not None:
        counts[_CHOSEN_TOO_LOW] = 0
    sides = chosen_from, rejected_from
    pairs: list[Pair] = []
    by_prompt = _usable_by_prompt(responses, counts)
    for prompt_id in sorted(by_prompt):
        candidates = _candidate_pairs(
            by_prompt[prompt_id], min_difference, sides, chosen_at_least, counts
        )
        kept = _sample(candidates, max_pairs_per_prompt, (seed, round_number, prompt_id))
        counts["pairs_over_limit"] += len(candidates) - len(kept)
        counts["prompts_without_pairs"] += not kept
        pairs.extend(kept)
    balanced, threshold = length_balance(pairs, balance)
    counts["pairs_length"] = len(pairs) - len(balanced)
    counts["pairs"] = len(balanced)
    return PairingResult(tuple(balanced), dict(counts), length_threshold=threshold)


# In the order of the steps. Behind them stands `responses_REASON` for every reason that responses
# have no score for: responses = usable + these, and
# pairs_all = small_difference + same_text + over_limit + length + pairs, and `_OTHER_SOURCE` and
# `_CHOSEN_TOO_LOW` where these are asked for.
_COUNTS = (
    "prompts",
    "responses",
    "responses_usable",
    "pairs_all",
    "pairs_small_difference",
    "pairs_same_text",
    "pairs_over_limit",
    "prompts_without_pairs",
    "pairs_length",
    "pairs",
)


_OTHER_SOURCE = "pairs_other_source"
_CHOSEN_TOO_LOW = "pairs_chosen_too_low"


def _check_settings(min_difference: float, max_pairs_per_prompt: int | None, balance: str) -> None:
    if not min_difference > 0:  # With equal scores neither response would be the better one.
        raise MmpoError(f"min_difference must be greater than 0, not {min_difference}")
    if max_pairs_per_prompt is not None and max_pairs_per_prompt < 1:
        raise MmpoError(f"max_pairs_per_prompt must be at least 1, not {max_pairs_per_prompt}")
    if balance not in _BALANCES:
        raise MmpoError(f"balance {balance!r} is none of {', '.join(_BALANCES)}")


def _usable_by_prompt(
    responses: Iterable[ScoredResponse], counts: Counter[str]
) -> dict[str, list[ScoredResponse]]:
    """Responses that have a score, by prompt and in the order of their sample numbers."""
    by_prompt: dict[str, dict[int, ScoredResponse]] = defaultdict(dict)
    for response in responses:
        samples = by_prompt[response.prompt_id]
        if response.sample in samples:
            name = f"response {response.sample} to prompt {response.prompt_id!r}"
            raise DataError(f"{name} occurs twice")
        samples[response.sample] = response
    usable: dict[str, list[ScoredResponse]] = {}
    for prompt_id, samples in by_prompt.items():
        counts["prompts"] += 1
        usable[prompt_id] = []
        for _, response in sorted(samples.items()):
            counts["responses"] += 1
            if math.isnan(response.score):
                counts[f"responses_{response.reason or 'no_verdict'}"] += 1
            else:
                usable[prompt_id].append(response)
        counts["responses_usable"] += len(usable[prompt_id])
    return usable


def _candidate_pairs(
    responses: Sequence[ScoredResponse],
    min_difference: float,
    sides: tuple[Sequence[str] | None, Sequence[str] | None],
    chosen_at_least: float | None,
    counts: Counter[str],
) -> list[Pair]:
    """All pairs of one prompt whose scores differ enough and whose texts differ at all, with both
    sides from sources that they may come from, and a chosen response that is good enough."""
    chosen_from, rejected_from = sides
    pairs = []
    for couple in combinations(responses, 2):
        better, worse = sorted(couple, key=lambda response: response.score, reverse=True)
        counts["pairs_all"] += 1
        # Said so, as the difference of two infinite scores is no number.
        if not better.score - worse.score >= min_difference * (1 - _ROUNDING):
            counts["pairs_small_difference"] += 1
        elif better.text.strip() == worse.text.strip():
            counts["pairs_same_text"] += 1
        elif not (_is_from(better, chosen_from) and _is_from(worse, rejected_from)):
            counts[_OTHER_SOURCE] += 1
        elif chosen_at_least is not None and better.score < chosen_at_least:
            counts[_CHOSEN_TOO_LOW] += 1
        else:
            pairs.append(
                Pair(
                    better.prompt_id,
                    chosen=better.text,
                    rejected=worse.text,
                    chosen_sample=better.sample,
                    rejected_sample=worse.sample,
                    chosen_score=better.score,
                    rejected_score=worse.score,
                )
            )
    return sorted(pairs, key=_samples)


def _is_from(response: ScoredResponse, sources: Sequence[str] | None) -> bool:
    return sources is None or response.source in sources


def _samples(pair: Pair) -> tuple[int, int]:
    return pair.chosen_sample, pair.rejected_sample


def _sample(pairs: Sequence[Pair], limit: int | None, key: tuple[int, int, str]) -> list[Pair]:
    """At most `limit` pairs, uniformly at random by `key`, in their old order.

    The pairs with the smallest hashes are a uniform sample without replacement. Unlike a random
    generator's, it is the same in every version of every library.
    """
    if limit is None or len(pairs) <= limit:
        return list(pairs)

    def draw(pair: Pair) -> bytes:
        return hashlib.sha256(canonical_json([*key, *_samples(pair)]).encode()).digest()

    return sorted(sorted(pairs, key=draw)[:limit], key=_samples)


def length_balance(
    pairs: Sequence[Pair], mode: Balance = "rlaif_v"
) -> tuple[list[Pair], float | None]:
    """Drop pairs so that chosen and rejected texts are equally long on average, in words.

    "rlaif_v": for r = 0.00, 0.02, ..., 0.98 drop the pairs of which the chosen text is shorter
    than the rejected one by more than the share r of the rejected one; take the r whose pairs
    have the smallest |mean chosen - mean rejected| / mean rejected, the smallest such r. It can
    only lengthen the chosen texts, and where these are longer already it removes a few pairs in
    vain. An r that leaves no pair is no candidate; an empty rejected text is never too long.

    "symmetric": looks first which side is longer on average and applies that rule to it, so that
    pairs of which the *chosen* text is much longer can go too. It may keep everything (r = 1),
    and of equally balanced sets it takes the largest.

    "none": keeps everything.

    Returns:
      The pairs that stay, in order, and the threshold r; None in mode "none" or without pairs.
    """
    return _BALANCES[mode](list(pairs))


def _no_balance(pairs: list[Pair]) -> tuple[list[Pair], float | None]:
    return pairs, None


def _rlaif_v_balance(pairs: list[Pair]) -> tuple[list[Pair], float | None]:
    lengths = [(_words(pair.chosen), _words(pair.rejected)) for pair in pairs]
    return _best_threshold(pairs, lengths, range(_LENGTH_STEPS))


def _symmetric_balance(pairs: list[Pair]) -> tuple[list[Pair], float | None]:
    lengths = [(_words(pair.chosen), _words(pair.rejected)) for pair in pairs]
    if sum(chosen for chosen, _ in lengths) > sum(rejected for _, rejected in lengths):
        lengths = [(rejected, chosen) for chosen, rejected in lengths]
    return _best_threshold(pairs, lengths, range(_LENGTH_STEPS, -1, -1))


_BALANCES: Mapping[str, Callable[[list[Pair]], tuple[list[Pair], float | None]]] = {
    "rlaif_v": _rlaif_v_balance,
    "symmetric": _symmetric_balance,
    "none": _no_balance,
}


def _words(text: str) -> int:
    return len(text.split())


def _best_threshold(
    pairs: list[Pair], lengths: list[tuple[int, int]], steps: Iterable[int]
) -> tuple[list[Pair], float | None]:
    """The pairs left by the first of `steps` (in 1/50) with the smallest imbalance.

    `lengths` holds (short side, long side) in words. All in whole numbers and fractions: at the
    edge of a threshold floats would decide by their rounding.
    """
    best: tuple[Fraction | float, int] | None = None
    for step in steps:
        kept = [pair for pair in lengths if _short_enough(pair, step)]
        if kept:
            imbalance = _imbalance(kept)
            if best is None or imbalance < best[0]:
                best = imbalance, step
    if best is None:
        return [], None
    kept_pairs = [
        pair for pair, size in zip(pairs, lengths, strict=True) if _short_enough(size, best[1])
    ]
    return kept_pairs, best[1] / _LENGTH_STEPS


def _short_enough(lengths: tuple[int, int], step: int) -> bool:
    short, long = lengths
    return (long - short) * _LENGTH_STEPS <= step * long


def _imbalance(lengths: Sequence[tuple[int, int]]) -> Fraction | float:
    short, long = (sum(side) for side in zip(*lengths, strict=True))
    if long == 0:
        return 0 if short == 0 else math.inf
    return abs(Fraction(short - long, long))
