"""Objectives of reward models, whose head gives every response a reward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from mmpo_jax.core.sections import CritiqueLayout
from mmpo_jax.objectives.rankings import worse_ones
from mmpo_jax.objectives.registry import (
    NonNegative,
    Objective,
    RowOptions,
    Rows,
    Scored,
    State,
    register,
)
from mmpo_jax.objectives.responses import Responses
from mmpo_jax.objectives.sums import Sums, weighted
from mmpo_jax.objectives.supervised import tokenwise

HEAD = "reward_head"
"""What these objectives need of a model."""

CRITIQUE_PROMPT = (
    "Judge this answer to the question before it. What in it is right, what is wrong or missing, "
    "and is it clear?"
)
"""What the user says behind a response by default, upon which a critique follows."""

EVALUATION_PROMPT = """\
Here are a question about what is shown and the answer of a model. Judge the answer: what in it is \
right, what is wrong or missing, and is it clear?

[Question]: {question}
[LMM Response]: {response}

[Evaluation]:"""
"""The same where response and question stand within it; its sections are MM-RLHF's."""


def bradley_terry(
    responses: Responses,
    *,
    margin: NonNegative = 0.0,
    tie_weight: NonNegative = 1.0,
    centring: NonNegative = 0.01,
) -> tuple[Float[Array, "3 N S S"], Float[Array, "3 N S S"]]:
    """Bradley-Terry: mean of -log sigmoid(R_w - R_l - m (s_w - s_l)) + t mean of (R_i - R_j)^2 over
    ties + c mean of (R_i + R_j)^2 over both.

    Bradley and Terry 1952; m = margin times the difference of scores is Touvron et al. 2023 (arXiv
    2307.09288), eq. 2, c = centring Eisenstein et al. 2023 (arXiv 2312.09244); t = tie_weight, with
    a mean of their own, is that of MM-RLHF's code (arXiv 2502.10391). All pairs of a ranking count.

    R is what the head says after the last token of a response: after its critique, where the list
    has the objective `critique` and the data have one.

    Args:
      responses: [N, S] with the field `rank`, and `score` where there is a margin.

    Returns:
      (loss, weight), float32[3, N, S, S] each: of ordered pairs, of ties, and of all, for every two
      responses of a row once.
    """
    reward = responses.rewards
    assert reward is not None
    difference = reward[:, :, None] - reward[:, None, :]
    needed: jax.Array | float = 0.0
    if margin:
        score = jax.lax.stop_gradient(responses.fields["score"])
        needed = margin * (score[:, :, None] - score[:, None, :])
    ordered, tied = worse_ones(responses), _ties(responses)
    loss = [
        -jax.nn.log_sigmoid(difference - needed),
        tie_weight * difference**2,
        centring * (reward[:, :, None] + reward[:, None, :]) ** 2,
    ]
    counted = jnp.stack([ordered, tied, ordered | tied])
    return jnp.stack(loss), counted.astype(jnp.float32)


def _ties(responses: Responses) -> Shaped[Array, "N S S"]:
    """bool[N, S, S]: whether two responses are there and equally good, the first before the other
    in their row."""
    rank, present = responses.fields["rank"], responses.present > 0
    both = present[:, :, None] & present[:, None, :]
    first = jnp.triu(jnp.ones(rank.shape[1:] * 2, bool), k=1)
    return both & first & (rank[:, :, None] == rank[:, None, :])


def _apply(
    responses: Responses, weights: Float[Array, " N"], state: State, options: Mapping[str, Any]
) -> tuple[Sums, State]:
    assert responses.rewards is not None
    loss, counted = bradley_terry(responses, **options)
    counted = counted * weights[:, None, None]
    difference = responses.rewards[:, :, None] - responses.rewards[:, None, :]
    ordered = counted[0]
    metrics = {
        "rewards/accuracies": weighted((difference > 0).astype(jnp.float32), ordered),
        "rewards/margins": weighted(difference, ordered),
        "rewards/chosen": weighted(responses.rewards[:, :, None], ordered),
        "rewards/rejected": weighted(responses.rewards[:, None, :], ordered),
    }
    axes = (-3, -2, -1)
    return Sums((loss * counted).sum(axis=axes), counted.sum(axis=axes), metrics), state


register(
    Objective(
        name="bradley_terry",
        kind="rewards",
        function=bradley_terry,
        apply=_apply,
        needs=frozenset({"ranks", HEAD}),
        option_needs={"margin": ("score",)},
        rows=lambda options: Rows(scored=Scored()),
    )
)


def _with_critiques(options: Mapping[str, Any]) -> Rows:
    prompt, layout = options["prompt"], options["layout"]
    within = layout == "one_turn"
    if prompt is None:
        prompt = EVALUATION_PROMPT if within else CRITIQUE_PROMPT
    lacking = [place for place in ("{question}", "{response}") if within and place not in prompt]
    if lacking:
        raise ValueError(f"critique: prompt: it has no {lacking[0]}, which layout one_turn needs")
    return Rows(scored=Scored(prompt, options["markers"], layout))


@tokenwise(
    HEAD,
    "critique",
    rows=RowOptions(
        {
            "prompt": (str | None, None),
            "layout": (CritiqueLayout, "turns"),
            "markers": (bool, False),
        },
        _with_critiques,
    ),
)
def critique(responses: Responses) -> tuple[Float[Array, "N S T"], Shaped[Array, "N S T"]]:
    """Critique: -log p per token of a judge's critique of the response.

    MM-RLHF's critique-based reward model (arXiv 2502.10391, section 3), which learns to write the
    critique before the head gives the reward: the two losses count the same. The critique is the
    assistant's answer to `prompt`, which the user says behind the response; the response itself is
    not learned, and one without a critique costs nothing. With `layout` one_turn, the released
    code's, response and question stand within `prompt`, as {response} and {question}, so that
    responses share no prompt. With `markers` the tokens that the chat
    template writes around these turns are learned too, as in the released code. That code adds up
    the means of chosen and rejected critiques, which is a weight of 2 here.
    """
    return -responses.log_probs, responses.mask * responses.fields["critique"]
