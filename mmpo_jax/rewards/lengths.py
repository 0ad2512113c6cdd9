"""Rewards of how long a sample is, and of what it repeats; of tokens, as limits and lengths are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.objectives.registry import Count, NonNegative
from mmpo_jax.rewards.registry import Silent, reward_of_tokens


def _check_buffer(options: Mapping[str, Any]) -> None:
    buffer, limit = options["buffer"], options["max_tokens"]
    if buffer > limit:
        raise ValueError(f"buffer {buffer} is more than max_tokens, {limit}")


def _before_the_buffer(options: Mapping[str, Any]) -> Silent:
    return Silent(options["max_tokens"] - options["buffer"], "max_tokens less buffer")


def _one_ngram(options: Mapping[str, Any]) -> Silent:
    return Silent(options["ngram_size"], "ngram_size")


@reward_of_tokens(check=_check_buffer, silent=_before_the_buffer)
def soft_overlong(ids: Sequence[int], *, max_tokens: Count, buffer: Count) -> float:
    """0 up to max_tokens - buffer tokens, then down in a straight line to -1 at max_tokens, and -1
    beyond.

    DAPO (Yu et al. 2025, arXiv 2503.14476), eq. 13.
    """
    return -min(max(len(ids) - (max_tokens - buffer), 0) / buffer, 1.0)


@reward_of_tokens()
def length(ids: Sequence[int], *, target: Count, alpha: NonNegative = 0.0003) -> float:
    """-alpha |target - tokens|.

    LCPO-Exact beside the reward of an answer (Aggarwal and Welleck 2025, arXiv 2503.04697), eq. 1,
    with one target for all prompts.
    """
    return -alpha * abs(target - len(ids))


@reward_of_tokens(silent=_one_ngram)
def repetition(ids: Sequence[int], *, ngram_size: Count = 3, penalty: NonNegative = 1.0) -> float:
    """-penalty times the share of the n-grams of tokens that were there before.

    Yeo et al. 2025 (arXiv 2502.03373), appendix C.2, over the whole response; 0 for one shorter
    than an n-gram.
    """
    ngrams = list(zip(*(ids[start:] for start in range(ngram_size)), strict=False))
    return -penalty * (1 - len(set(ngrams)) / len(ngrams)) if ngrams else 0.0
