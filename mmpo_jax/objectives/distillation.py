"""Distillation: the distributions of a teacher are learned at every token of a response.

On-policy where the student samples the responses, as they are then those it will be asked to go on
from (Agarwal et al. 2024, arXiv 2306.13649).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Array, Float

from mmpo_jax.objectives.registry import Count, Divergence, Rows, Share
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.rollouts import TokenLoss, of_tokens
from mmpo_jax.objectives.sums import weighted


def distillation(
    responses: Responses, *, beta: Share = 1.0, top_k: Count | None = None
) -> Float[Array, "N S T"]:
    """Distillation: b KL(t || m) + (1 - b) KL(p || m) of the teacher t, m = b t + (1 - b) p.

    On-policy distillation, or GKD (Agarwal et al. 2024, arXiv 2306.13649), as TRL's
    `DistillationTrainer` has it; t and p are distributions at a token. b is `beta`: 1 is the
    reverse KL divergence KL(p || t), 0 the forward one, 0.5 the Jensen-Shannon divergence. `top_k`
    tells so many of the teacher's most probable tokens apart and takes all others for one. The
    teacher is that of `training.teacher`; the rollout's `on_policy` (GKD's lambda) is the share of
    the batches whose responses are sampled.

    Args:
      responses: [N, S], with the statistic `divergence`.
    """
    return responses.statistics["divergence"]


def _losses(
    responses: Responses, weights: Float[Array, " N"], options: Mapping[str, Any]
) -> TokenLoss:
    loss = distillation(responses)
    counted = weights[:, None, None] * responses.mask
    return TokenLoss(loss, {"divergence": weighted(loss, counted)})


def _rows(options: Mapping[str, Any]) -> Rows:
    return dataclasses.replace(Rows(), divergence=Divergence(options["beta"], options["top_k"]))


of_tokens(distillation, _losses, {"teacher", "divergence"}, rows=_rows)
