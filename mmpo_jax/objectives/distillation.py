"""Distillation: the distributions of a teacher are learned at every token of a response.

On-policy where the student samples the responses, as they are then those it will be asked to go on
from (Agarwal et al. 2024, arXiv 2306.13649).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmpo_jax.objectives.registry import Count, Divergence, Rows, Share
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.rollouts import TokenLoss, of_tokens
from mmpo_jax.objectives.sums import weighted


def token_divergence(
    student: Float[Array, "*b V"], teacher: Float[Array, "*b V"], how: Divergence
) -> Float[Array, "*b"]:
    """The generalized Jensen-Shannon divergence of two distributions from their log-probs.

    Agarwal et al. 2024 (arXiv 2306.13649), eq. 1: b KL(teacher || m) + (1 - b) KL(student || m),
    m = b teacher + (1 - b) student. 0 and 1 stand for KL(teacher || student) and KL(student ||
    teacher), what it goes to there when it is divided by b and by 1 - b. With `top_k` it is that of
    coarser distributions, in which all tokens but the teacher's k most probable ones are one: never
    more, and 0 where the full one is.

    Args:
      student, teacher: log-probs over V tokens.
      how: which.
    """
    each = _divergence_of_token(student, teacher, how.beta)
    if how.top_k is None or how.top_k >= student.shape[-1]:
        return each.sum(axis=-1)
    # By places and not by values, of which the compiler may round a second copy differently.
    first = jax.lax.top_k(teacher, how.top_k)[1]
    rest = jnp.put_along_axis(jnp.ones(teacher.shape, bool), first, False, axis=-1, inplace=False)
    tails = [_log_sum(jnp.where(rest, x, -jnp.inf)) for x in (student, teacher)]
    of_rest = jnp.where(rest.any(axis=-1), _divergence_of_token(tails[0], tails[1], how.beta), 0)
    return jnp.where(rest, 0, each).sum(axis=-1) + of_rest


def _log_sum(values: Float[Array, "*b V"]) -> Float[Array, "*b"]:
    """Log of the sum of probabilities; of nothing a number without a gradient."""
    nothing = jnp.isneginf(values).all(axis=-1, keepdims=True)
    return jax.nn.logsumexp(jnp.where(nothing, 0.0, values), axis=-1)


def _divergence_of_token(
    student: Float[Array, "*b"], teacher: Float[Array, "*b"], beta: float
) -> Float[Array, "*b"]:
    """What one token adds to the divergence."""
    if beta == 0:
        return jnp.exp(teacher) * (teacher - student)
    if beta == 1:
        return jnp.exp(student) * (student - teacher)
    mixture = jnp.logaddexp(student + jnp.log1p(-beta), teacher + jnp.log(beta))
    of_teacher = jnp.exp(teacher) * (teacher - mixture)
    return beta * of_teacher + (1 - beta) * jnp.exp(student) * (student - mixture)


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
