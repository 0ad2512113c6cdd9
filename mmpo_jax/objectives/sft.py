"""Supervised fine-tuning."""

from __future__ import annotations

import jax

from mmpo_jax.objectives.sums import Sums, weighted


def sft(log_probs: jax.Array, loss_mask: jax.Array, weights: jax.Array) -> Sums:
    """Negative log-likelihood per token, averaged over the tokens of the global batch.

    Args:
      log_probs: float32[B, R, T].
      loss_mask: bool[B, R, T], the tokens that count.
      weights: float32[B], 0 for rows that only fill the batch.

    Returns:
      Sums over tokens.
    """
    counted = loss_mask * weights[:, None, None]
    total, tokens = weighted(-log_probs, counted)
    return Sums(total, tokens, {"nll_loss": (total, tokens)})
