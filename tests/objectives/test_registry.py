"""What holds for every objective in the registry: a test of its formula, and what it needs."""

import inspect
from collections.abc import Callable
from typing import get_args

import pytest
from objectives import (
    test_image_aware,
    test_on_policy,
    test_pairwise_formulas,
    test_rankings,
    test_reward_model,
    test_supervised,
    test_token_level,
    test_unpaired,
)

from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.listing import render_objectives
from mmpo_jax.objectives.on_policy import Aggregation, Scale
from mmpo_jax.objectives.registry import FIELDS, HEADS, REFERENCES, VIEWS
from mmpo_jax.objectives.terms import make_term

TABLES = {
    *(name for name, _ in test_pairwise_formulas.CASES),
    *test_token_level.CASES,
    *test_image_aware.CASES,
}
"""Objectives that stand beside their formula in a table whose every entry is tested."""

TESTS: dict[str, Callable[..., None]] = {
    "anchored_sft": test_token_level.test_anchored_sft_weighs_tokens_by_their_probability,
    "apo_zero_unpaired": test_unpaired.test_apo_zero,
    "bco": test_unpaired.test_bco_has_no_gradient_through_its_shift,
    "bradley_terry": test_reward_model.test_bradley_terry,
    "critique": test_reward_model.test_critique_is_learned_token_by_token,
    "grpo": test_on_policy.test_grpo,
    "jpo": test_token_level.test_joint_preferences_are_dpo_of_longer_texts,
    "kto": test_unpaired.test_kto,
    "nsft": test_token_level.TestNsft.test_value_and_gradient,
    "plackett_luce": test_rankings.test_rankings_without_ties,
    "poft": test_unpaired.test_poft,
    "rejection_sampling": test_unpaired.test_only_good_samples_are_learned,
    "selm": test_pairwise_formulas.test_selm_is_dpo_of_the_others_and_an_extra_response,
    "sft": test_supervised.test_sft_is_the_mean_over_the_tokens_of_all_responses,
    "triple_po": (
        test_pairwise_formulas.test_triple_po_learns_the_gold_response_and_pairs_the_others
    ),
    "verified_sft": test_unpaired.test_only_good_samples_are_learned,
}
"""The others, and the test that works out the formula."""


def test_every_objective_has_a_test_of_its_formula():
    assert TABLES | TESTS.keys() == OBJECTIVES.keys()
    assert not TABLES & TESTS.keys()


@pytest.mark.parametrize("name", TESTS)
def test_a_test_of_a_formula_asks_for_the_objective(name):
    assert f'"{name}"' in inspect.getsource(TESTS[name])


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("dpo", {}, set()),
        ("dpo", {"ld_alpha": 0.0}, {"reference_tokens"}),
        ("dpo", {"ld_alpha": 0.4, "wpo": True}, {"reference_tokens", "collision"}),
        ("simpo", {"ld_alpha": 0.4}, set()),
        ("grpo", {}, set()),
        ("grpo", {"beta": 0.1}, {"reference_model"}),
        ("nsft", {}, set()),
        ("nsft", {"kl_weight": 0.1}, {"kl", "reference_model"}),
        ("anchored_sft", {}, {"kl", "reference_model"}),
        ("anchored_sft", {"kl_weight": 0.0}, set()),
        ("bradley_terry", {"margin": 0.5}, {"score"}),
    ],
)
def test_options_need_more(name, options, more):
    assert make_term(name, **options).needs == OBJECTIVES[name].needs | more


def test_dimensions_name_the_scores_that_are_needed():
    needs = make_term("modpo", dimensions={"safe": 0.3, "short": 0.2}).needs
    assert {"scores/safe", "scores/short"} <= needs
    assert "scores" not in needs


def test_the_listing_says_what_is_needed_and_what_that_means():
    text = render_objectives()
    blocks = {block.partition("\n")[0]: block for block in text.split("\n\n")}
    assert OBJECTIVES.keys() <= blocks.keys()
    assert "needs: advantages; reference_model with beta" in blocks["grpo"]
    assert "needs: turn; reference_model with kl_weight" in blocks["nsft"]
    assert "needs: rank, reference; reference_tokens with ld_alpha" in blocks["dpo"]
    assert blocks["simpo"].endswith("needs: rank")
    for option in ("scale", "aggregation", *get_args(Scale), *get_args(Aggregation)):
        assert f"`{option}`" in blocks["grpo"]
    legend = blocks["What objectives need:"]
    for name, meaning in {**FIELDS, **REFERENCES, **VIEWS, **HEADS}.items():
        assert f"\n  {name}: {meaning}" in legend
