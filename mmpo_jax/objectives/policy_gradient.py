"""Policy gradients: importance weights, KL penalty and chosen tokens, which objectives share.

w is pi / pi_old of a token, A its response's advantage (`advantages`). log pi_old is the field
`old_log_probs`, and without it the policy itself, as in the first update with a rollout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmpo_jax.objectives.registry import NonNegative, PositiveShare, check_nothing
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.rollouts import Normalization, TokenLoss, of_tokens
from mmpo_jax.objectives.sums import WeightedSum, weighted

Ratio = Literal["token", "sequence", "sequence_token", "trajectory"]
Estimator = Literal["k2", "k3"]

EXPONENT_LIMIT = 40.0
"""Largest x of which e^x is taken, so that sums over many tokens stay finite in float32."""

OF_RESPONSES = ("sequence", "trajectory")
"""Ratios that all tokens of a response have in common."""


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Sampled tokens with what a policy gradient weighs them by."""

    tokens: Responses
    weight: Float[Array, "N S T"]
    """w."""
    advantage: Float[Array, "N S 1"]
    """A; never has a gradient."""


Flags = Callable[[Weighted, Mapping[str, Any]], Mapping[str, Bool[Array, "N S T"]]]
"""(tokens, options) -> which of them something holds for, by the names of metrics."""


def _no_flags(sampled: Weighted, options: Mapping[str, Any]) -> Mapping[str, Bool[Array, "N S T"]]:
    return {}


def policy_gradient(
    normalization: Normalization = "dapo",
    flags: Flags = _no_flags,
    check: Callable[[Mapping[str, Any]], None] = check_nothing,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function (sampled: Weighted, **options) -> loss float32[N, S, T].

    Options that all have: `ratio` (see `log_weights`), `beta` with `kl` and `bias_corrected_kl`
    (see `kl_estimate`), `top_entropy_quantile` (see `uncertain_tokens`), `max_log_ratio`,
    `normalization` and `max_tokens` (see `rollouts.normalized`).

    Args:
      normalization: the default.
      flags: metrics, the shares of tokens that something holds for, or of responses where they
        have one ratio each.
      check: see `Objective.check`.
    """
    options: dict[str, tuple[Any, Any]] = {
        "beta": (NonNegative, 0.0),
        "kl": (Estimator, "k3"),
        "bias_corrected_kl": (bool, True),
        "ratio": (Ratio, "token"),
        "max_log_ratio": (NonNegative | None, None),
        "top_entropy_quantile": (PositiveShare | None, None),
    }

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def losses(
            tokens: Responses, weights: Float[Array, " N"], given: Mapping[str, Any]
        ) -> TokenLoss:
            shared = {*options, "normalization", "max_tokens"}
            own = {name: value for name, value in given.items() if name not in shared}
            weight = jnp.exp(log_weights(tokens, given["ratio"], given["max_log_ratio"]))
            advantage = jax.lax.stop_gradient(tokens.fields["advantages"])[..., None]
            sampled = Weighted(tokens, weight, advantage)
            counted = weights[:, None, None] * tokens.mask
            metrics: dict[str, WeightedSum] = {}
            loss = function(sampled, **own)
            if given["top_entropy_quantile"] is not None:
                loss = loss * uncertain_tokens(tokens, counted, given["top_entropy_quantile"])
                metrics["entropy"] = weighted(tokens.statistics["entropy"], counted)
            if given["beta"]:
                kl = kl_estimate(tokens, given["kl"])
                kl = kl * weight if given["bias_corrected_kl"] else kl
                loss = loss + given["beta"] * kl
                metrics["kl"] = weighted(kl, counted)
            of_one = tokens.length[..., None] if given["ratio"] in OF_RESPONSES else 1
            for name, held in flags(sampled, own).items():
                metrics[name] = weighted(held, counted / of_one)
            return TokenLoss(loss, metrics)

        of_tokens(
            function,
            losses,
            {"advantages"},
            normalization=normalization,
            options=options,
            option_needs={
                "beta": ("reference_model",),
                "top_entropy_quantile": ("entropy",),
            },
            coupled_by={"top_entropy_quantile"},
            check=check,
        )
        return function

    return decorate


def log_weights(
    responses: Responses, ratio: Ratio, limit: float | None = None
) -> Float[Array, "N S T"]:
    """float32[N, S, T]: log w of every token, within plus and minus a limit.

    `token`: log pi - log pi_old of the token. `sequence`: their mean over the response (GSPO, Zheng
    et al. 2025, arXiv 2507.18071, eq. 7). `sequence_token`: that value, with the gradient of the
    token's own log pi (GSPO-token, eq. 14). `trajectory`: their sum over the response (RLOO, as
    TRL's `RLOOTrainer` has it).
    """
    old = jax.lax.stop_gradient(responses.fields.get("old_log_probs", responses.log_probs))
    gap = (responses.log_probs - old) * responses.mask
    if ratio != "token":
        total = gap.sum(axis=-1, keepdims=True)
        mean = total / responses.length[..., None]
        common = jnp.broadcast_to(total if ratio == "trajectory" else mean, gap.shape)
        if ratio == "sequence_token":
            common = jax.lax.stop_gradient(common - gap) + gap
        gap = common
    gap = gap if limit is None else jnp.clip(gap, -limit, limit)
    return jnp.minimum(gap, EXPONENT_LIMIT)


def kl_estimate(responses: Responses, estimator: Estimator = "k3") -> Float[Array, "N S T"]:
    """float32[N, S, T]: an estimate of KL(policy || reference) that is never negative.

    Schulman 2020, "Approximating KL divergence", with d = log ref - log p: `k3` is e^d - d - 1,
    whose gradient is that of the divergence with w as a factor (`bias_corrected_kl`, DeepSeek-V3.2,
    arXiv 2512.02556); `k2` is d^2 / 2, whose gradient is that on-policy and without the factor
    (REINFORCE++-baseline, arXiv 2501.03262).
    """
    gap = -responses.token_ratios
    return gap**2 / 2 if estimator == "k2" else k3(gap)


def k3(gap: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """e^d - d - 1 of differences d of log-probs, see `kl_estimate`."""
    return jnp.exp(jnp.minimum(gap, EXPONENT_LIMIT)) - gap - 1


def uncertain_tokens(
    responses: Responses, counted: Float[Array, "N S T"], share: float
) -> Bool[Array, "N S T"]:
    """bool[N, S, T]: the share of the batch's tokens at which the policy is least certain.

    Those whose entropy is at least the (1 - share) quantile of all that count, linearly
    interpolated (Wang et al. 2025, arXiv 2506.01939; TRL's `top_entropy_quantile`).

    Args:
      responses: [N, S], with the statistic `entropy`.
      counted: float32[N, S, T], over 0 where a token counts.
      share: of tokens.
    """
    entropy, counts = jax.lax.stop_gradient(responses.statistics["entropy"]), counted > 0
    ordered = jnp.sort(jnp.where(counts, entropy, jnp.inf).ravel())
    place = (1 - share) * jnp.maximum(counts.sum() - 1, 0)
    below = jnp.floor(place).astype(int)
    above = jnp.ceil(place).astype(int)
    threshold = ordered[below] + (place - below) * jnp.where(
        above > below, ordered[above] - ordered[below], 0
    )
    return counts & (entropy >= threshold)
