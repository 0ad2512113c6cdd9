"""Binds an objective of a recipe to a model: (parameters, batch) -> sums."""

from __future__ import annotations

from typing import Any

import jax

from mmpo_jax.models.batch import Batch
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.models.model import Model, Params
from mmpo_jax.objectives.dpo import dpo
from mmpo_jax.objectives.sft import sft
from mmpo_jax.objectives.sums import Sums
from mmpo_jax.recipe import Dpo, Sft
from mmpo_jax.training.step import LossFunction

REFERENCE = "reference_log_probs"
"""Name of the per-response field with the reference's summed log-probs."""


def make_loss(model: Model, objective: Dpo | Sft, remat: str) -> LossFunction:
    """The loss of one micro-batch: shared-prompt log-probs, then the objective."""

    def loss(params: Params, inputs: tuple[Batch, dict[str, jax.Array]]) -> Sums:
        batch, fields = inputs
        log_probs = response_log_probs(model, params, batch, remat=remat)
        if isinstance(objective, Sft):
            return sft(log_probs, batch.loss_mask, batch.weights)
        return dpo(
            sum_log_probs(log_probs, batch),
            fields[REFERENCE],
            batch.weights,
            beta=objective.beta,
            label_smoothing=objective.label_smoothing,
        )

    return loss


def sum_log_probs(log_probs: jax.Array, batch: Batch) -> jax.Array:
    """float32[B, R]: log-prob of every response, over the tokens its loss counts."""
    return (log_probs * batch.loss_mask).sum(axis=-1)


def needs_reference(objective: Any) -> bool:
    """Whether the objective compares with a frozen reference model."""
    return isinstance(objective, Dpo)
