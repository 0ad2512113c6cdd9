"""Pairwise objectives: what they read of a pair, and rankings as all their pairs.

The family is z = beta M - o with a loss of z: an objective says what the margin M, the offset o and
the loss are. See `preference`.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmpo_jax.objectives.registry import (
    Objective,
    Positive,
    RowOptions,
    Share,
    State,
    call,
    register,
)
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, WeightedSum, weighted

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]

EXPONENT_LIMIT = 80.0
"""Largest x of which e^x is taken in float32, as TRL has it."""


@dataclasses.dataclass(frozen=True)
class Side:
    """The chosen or the rejected responses of K pairs of N records; arrays are float32[N, K]."""

    tokens: Responses
    total: Float[Array, "N K"]
    """Log-prob under the policy."""
    reference: Float[Array, "N K"]
    """Log-prob under the reference; 0 for objectives without one."""
    length: Float[Array, "N K"]
    """Tokens that count."""
    ratio: Float[Array, "N K"]
    """Log-ratio of policy and reference, or f' of the ratio where a divergence is chosen."""

    @property
    def average(self) -> Float[Array, "N K"]:
        """Log-prob per token."""
        return self.total / self.length

    def field(self, name: str) -> Float[Array, "N K *T"]:
        """What the data say; never has a gradient."""
        return jax.lax.stop_gradient(self.tokens.fields[name])


def pairwise(
    *needs: str,
    coupled: bool = False,
    state: Mapping[str, float] | None = None,
    divergences: bool = False,
    ld_alpha: bool = True,
    wpo: bool = True,
    averages: bool = False,
    rows: RowOptions | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function (chosen: Side, rejected: Side, **options) -> loss float32[N, K].

    Rows with ranks give a pair for every two responses whose ranks differ, and the batch's loss is
    the mean over all pairs.

    Args:
      *needs: names, see `Objective.needs`; `rank` goes without saying. With `gold` the function
        also takes the Side of the row's gold response, which then stands in no pair.
      coupled: the loss of a pair depends on others: the function also takes weights float32[N, K].
      state: first values of what it keeps; then it also takes a state and gives (loss, state).
      divergences: whether its log-ratios may be those of another f-divergence, an option then.
      ld_alpha: whether all that its loss has of responses are the sums of a Side or averages of
        whole responses, so that LD-DPO's weights of tokens make sense; an option then.
      wpo: whether a loss is of its pair's own responses, so that WPO may weigh it; an option then.
      averages: whether its rewards are of log-probs per token, as in TRL's CPO and ORPO trainers,
        and not of sums.
      rows: options that say which rows it reads, such as `registry.other_image`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        reference = any(need.startswith("reference") for need in needs)
        shared: dict[str, tuple[Any, Any]] = {}
        option_needs: dict[str, tuple[str, ...]] = {}
        if ld_alpha:
            shared["ld_alpha"] = (Share | None, None)
            option_needs["ld_alpha"] = ("reference_tokens",) if "reference" in needs else ()
        if wpo:
            shared["wpo"] = (bool, False)
            option_needs["wpo"] = ("collision",)
        if divergences:
            shared |= {
                "divergence": (Divergence, "reverse_kl"),
                "divergence_alpha": (Positive, 0.5),
            }
        read = rows or RowOptions()
        shared |= read.options

        def apply(
            responses: Responses,
            weights: Float[Array, " N"],
            old_state: State,
            given: Mapping[str, Any],
        ) -> tuple[Sums, State]:
            own = {name: value for name, value in given.items() if name not in shared}
            first, second, counted = all_pairs(responses, weights)
            chosen, rejected = sides(first, second, reference, given)
            arguments: list[Any] = [chosen, rejected]
            if "gold" in needs:
                gold, counted = gold_of_pairs(responses, counted)
                arguments.append(_side(gold, None, reference, given))
            loss, new_state = call(
                function,
                arguments,
                counted,
                old_state,
                own,
                coupled=coupled,
                stateful=state is not None,
            )
            if given.get("wpo"):
                loss = loss * confidence(first) * confidence(second)
            beta = given.get("beta", 1.0)
            metrics = pair_metrics(chosen, rejected, beta, counted, averages)
            return Sums(*weighted(loss, counted), metrics), new_state

        register(
            Objective(
                name=function.__name__,
                kind="pairs",
                function=function,
                apply=apply,
                needs=frozenset({"rank", *needs}),
                coupled=coupled or state is not None,
                state=state or {},
                shared_options=shared,
                option_needs=option_needs,
                rows=read.rows,
            )
        )
        return function

    return decorate


def all_pairs(
    responses: Responses, weights: Float[Array, " N"]
) -> tuple[Responses, Responses, Float[Array, "N K"]]:
    """Every two responses of a row, the better one first.

    Args:
      responses: [N, S], with the field `rank`.
      weights: float32[N].

    Returns:
      (chosen [N, K], rejected [N, K], weights float32[N, K]), K = S (S - 1) / 2; the weight is 0
      where ranks are equal or a response is missing.
    """
    rank, present = responses.fields["rank"], responses.present
    i, j = _slots(rank.shape[1])
    first_is_better = rank[:, i] <= rank[:, j]
    better, worse = jnp.where(first_is_better, i, j), jnp.where(first_is_better, j, i)
    counted = weights[:, None] * present[:, i] * present[:, j] * (rank[:, i] != rank[:, j])
    return responses.take(better), responses.take(worse), counted


def _slots(count: int) -> tuple[Int[Array, " K"], Int[Array, " K"]]:
    """Every two of S places, int32[K] each; with one response, that one against itself, a tie."""
    places = list(itertools.combinations(range(count), 2)) or [(0, 0)]
    first, second = (jnp.array(column) for column in zip(*places, strict=True))
    return first, second


def gold_of_pairs(
    responses: Responses, counted: Float[Array, "N K"]
) -> tuple[Responses, Float[Array, "N K"]]:
    """The row's gold response for each of its pairs, [N, K], and the weights of the pairs without
    it."""
    gold = responses.fields["gold"]
    i, j = _slots(gold.shape[1])
    place = jnp.broadcast_to(jnp.argmax(gold, axis=1)[:, None], counted.shape)
    return responses.take(place), counted * (1 - gold[:, i]) * (1 - gold[:, j])


def sides(
    chosen: Responses, rejected: Responses, reference: bool, options: Mapping[str, Any]
) -> tuple[Side, Side]:
    """Tokens to sums, as the options `ld_alpha` and `divergence` say.

    LD-DPO (Liu et al. 2024, arXiv 2409.06411): tokens beyond the shorter response's length count
    `ld_alpha` times, under policy and reference.
    """
    alpha = options.get("ld_alpha")
    shorter = jnp.minimum(chosen.length, rejected.length)[..., None]

    def side(tokens: Responses) -> Side:
        share = None
        if alpha is not None:
            share = jnp.where(jnp.cumsum(tokens.mask, axis=-1) <= shorter, 1.0, alpha)
        return _side(tokens, share, reference, options)

    return side(chosen), side(rejected)


def _side(
    tokens: Responses,
    share: Float[Array, "N K T"] | None,
    reference: bool,
    options: Mapping[str, Any],
) -> Side:
    total, sums = tokens.total, tokens.reference
    if share is not None:
        total = (tokens.log_probs * tokens.mask * share).sum(axis=-1)
        if reference:
            assert tokens.reference_log_probs is not None
            sums = (tokens.reference_log_probs * tokens.mask * share).sum(axis=-1)
    if not reference or sums is None:
        sums = jnp.zeros_like(total)
    ratio = divergence(
        total - sums, options.get("divergence", "reverse_kl"), options.get("divergence_alpha", 0.5)
    )
    return Side(tokens, total, sums, tokens.length, ratio)


def divergence(ratio: Float[Array, "N K"], kind: Divergence, alpha: float) -> Float[Array, "N K"]:
    """f' of the ratio u = pi / ref, up to a constant for reverse KL, from its logarithm.

    Wang et al. 2023 (arXiv 2309.16240); constants as TRL 1.16 has them, so that all are 0 at u = 1:
    reverse KL log u, forward KL 1 - 1/u, Jensen-Shannon log 2 + log sigmoid(log u), alpha
    (u^(alpha - 1) - 1) / (alpha - 1).
    """
    if kind == "forward_kl":
        return 1 - jnp.exp(jnp.minimum(-ratio, EXPONENT_LIMIT))
    if kind == "js":
        return jnp.log(2.0) + jax.nn.log_sigmoid(ratio)
    if kind == "alpha":
        if alpha == 1:
            return ratio
        return (jnp.exp(jnp.minimum((alpha - 1) * ratio, EXPONENT_LIMIT)) - 1) / (alpha - 1)
    return ratio


def confidence(responses: Responses) -> Float[Array, "N K"]:
    """WPO's weight exp(mean_t(log p_t - log sum_v p_v^2)), without gradient.

    Zhou et al. 2024 (arXiv 2406.11827), eq. 5, aligned to the sampled distribution.
    """
    surprise = (responses.log_probs - responses.statistics["collision"]) * responses.mask
    return jax.lax.stop_gradient(jnp.exp(surprise.sum(axis=-1) / responses.length))


def pair_metrics(
    chosen: Side, rejected: Side, beta: float, weights: Float[Array, "N K"], averages: bool = False
) -> dict[str, WeightedSum]:
    """TRL's names: rewards are beta times the plain log-ratio whatever the loss, per token
    with `averages`; log-probs are sums."""
    rewards = [
        beta * (side.total - side.reference) / (side.length if averages else 1)
        for side in (chosen, rejected)
    ]
    values = {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/accuracies": (rewards[0] > rewards[1]).astype(jnp.float32),
        "rewards/margins": rewards[0] - rewards[1],
        "logps/chosen": chosen.total,
        "logps/rejected": rejected.total,
    }
    return {name: weighted(value, weights) for name, value in values.items()}
