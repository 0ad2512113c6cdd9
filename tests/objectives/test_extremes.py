"""Losses of tokens and single responses wherever log-probs lie, and whether that would be seen."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.numeric import check_extremes, random_responses

from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.registry import Objective
from mmpo_jax.objectives.sums import Sums

RANK = [[1, 2], [2, 1], [1, 1]]
SCORE = [[1, 3], [2, 2], [-5, -4]]
TURN = np.broadcast_to([0, 0, 1, 1, 2], (3, 2, 5))
SPAN = np.broadcast_to([0, 0, 1, 1, 1], (3, 2, 5))

CASES = [
    ("sft", {}, {}),
    ("sft", {"rank": RANK}, {}),
    ("nsft", {"turn": TURN}, {}),
    ("nsft", {"turn": TURN, "rank": RANK}, {"kl_weight": 0.3}),
    ("nsft", {"turn": 0 * TURN}, {}),
    ("anchored_sft", {}, {}),
    ("anchored_sft", {"rank": RANK}, {"kl_weight": 0.0}),
    ("poft", {"other_models": np.full((3, 2), -1000)}, {}),
    ("poft", {"other_models": np.zeros((3, 2))}, {}),
    ("rejection_sampling", {"score": SCORE}, {}),
    ("rejection_sampling", {"score": 1e30 * np.sign(SCORE)}, {}),
    ("rejection_sampling", {"score": SCORE}, {"min_score": 10.0}),
    ("verified_sft", {"desirable": [[1, 0], [0, 1], [1, 1]]}, {}),
    ("verified_sft", {"desirable": np.zeros((3, 2))}, {}),
    ("critique", {"critique": SPAN}, {}),
    ("critique", {"critique": 0 * SPAN}, {}),
]


@pytest.mark.parametrize("divergence", [0.0, 1000.0])
@pytest.mark.parametrize(("name", "fields", "options"), CASES)
def test_losses_of_tokens_are_finite(name, fields, options, divergence):
    """A missing response included."""

    def make():
        made = random_responses(3, 2, reference=False, **fields)
        mask = made.mask.copy()
        mask[0, 0] = False
        kl = np.full(mask.shape, divergence)
        return dataclasses.replace(made, mask=mask, statistics={"kl": kl})

    check_extremes(name, make, **options)


@pytest.mark.parametrize("sign", [1, -1])
def test_an_unsafe_loss_is_seen_either_way(monkeypatch, sign):
    """-log sigmoid of a margin, worked out in two steps; responses are equally long."""

    def apply(responses, weights, state, options):
        margin = sign * (responses.ratio[:, 0] - responses.ratio[:, 1])
        loss = -jax.numpy.log(jax.nn.sigmoid(margin))
        return Sums((loss * weights).sum(), weights.sum(), {}), state

    name = f"unsafe_{sign}"
    unsafe = Objective(name, "pairs", lambda responses: None, apply, frozenset())
    monkeypatch.setitem(OBJECTIVES, name, unsafe)

    def make():
        made = random_responses(1, 2)
        return dataclasses.replace(made, mask=np.ones_like(made.mask))

    with pytest.raises(AssertionError):
        check_extremes(name, make)
