"""What holds for every objective in the registry: a test of its formula, and what it needs."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import pytest
from helpers import numeric, rankings
from objectives import (
    test_distillation,
    test_image_aware,
    test_on_policy,
    test_pairwise_formulas,
    test_rankings,
    test_reward_model,
    test_supervised,
    test_token_level,
    test_unpaired,
)

from mmpo_jax.objectives.advantages import Aggregation, Scale
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.listing import render_objectives
from mmpo_jax.objectives.registry import (
    FIELDS,
    HEADS,
    REFERENCES,
    TEACHERS,
    VIEWS,
    Divergence,
    Rows,
    Scored,
)
from mmpo_jax.objectives.terms import make_term, rows_read

TABLES = {
    *(name for name, _ in test_pairwise_formulas.CASES),
    *test_token_level.CASES,
    *test_image_aware.CASES,
}
"""Objectives that stand beside their formula in a table whose every entry is tested."""


def only_good_samples(name: str) -> None:
    """The test of several objectives, on the first case of this one."""
    (mark,) = test_unpaired.test_only_good_samples_are_learned.pytestmark
    case = next(case for case in mark.args[1] if case[0] == name)
    test_unpaired.test_only_good_samples_are_learned(*case)


def on_rankings(test: Callable[..., None], ranks: Any, *args: Any) -> None:
    """A test whose responses are a fixture."""
    with jax.enable_x64(True):
        test(rankings.ranked(ranks), *args)


TESTS: dict[str, Callable[[], None]] = {
    "anchored_sft": functools.partial(
        test_token_level.test_anchored_sft_weighs_tokens_by_their_probability, 0.3
    ),
    "apo_zero_unpaired": test_unpaired.test_apo_zero,
    "bco": test_unpaired.test_bco_has_no_gradient_through_its_shift,
    "bradley_terry": lambda: test_reward_model.test_bradley_terry(
        {"margin": 0.7, "tie_weight": 0.3, "centring": 0.01}
    ),
    "critique": test_reward_model.test_critique_is_learned_token_by_token,
    "cispo": lambda: test_on_policy.test_cispo(1.1),
    "distillation": lambda: test_distillation.test_the_loss_is_the_mean_over_tokens(),
    "grpo": lambda: test_on_policy.test_policy_gradients("dapo", "token", "grpo", 0.3, "k3", True),
    "kto": lambda: test_unpaired.test_kto(0),
    "nsft": lambda: test_token_level.TestNsft().test_value_and_gradient(0.3),
    "papo": lambda: test_on_policy.test_papo(None),
    "plackett_luce": lambda: test_rankings.test_rankings_without_ties(0.7),
    "poft": test_unpaired.test_poft,
    "reinforce": lambda: test_on_policy.test_policy_gradients(
        "dapo", "token", "reinforce", 0.3, "k3", True
    ),
    "rejection_sampling": lambda: only_good_samples("rejection_sampling"),
    "sapo": lambda: test_on_policy.test_policy_gradients("grpo", "token", "sapo", 0.3, "k3", True),
    "selm": lambda: on_rankings(
        test_pairwise_formulas.test_selm_is_dpo_of_the_others_and_an_extra_response,
        test_pairwise_formulas.RANKS,
    ),
    "sft": lambda: on_rankings(
        test_supervised.test_sft_is_the_mean_over_the_tokens_of_all_responses,
        test_supervised.RANKS,
    ),
    "triple_po": lambda: on_rankings(
        test_pairwise_formulas.test_triple_po_learns_the_gold_response_and_pairs_the_others,
        test_pairwise_formulas.RANKS,
        {},
    ),
    "verified_sft": lambda: only_good_samples("verified_sft"),
}
"""The others, and a test that works out the formula, with arguments of its own."""


def test_every_objective_has_a_test_of_its_formula():
    assert TABLES | TESTS.keys() == OBJECTIVES.keys()
    assert not TABLES & TESTS.keys()


@pytest.fixture
def compiled_anew(monkeypatch):
    """Losses that are compiled by an objective's name are compiled here, and forgotten after it."""
    monkeypatch.setattr(rankings, "COMPILED", {})
    numeric.evaluate.clear_cache()
    yield
    numeric.evaluate.clear_cache()


@pytest.mark.parametrize("name", TESTS)
def test_a_test_of_a_formula_sees_another_loss(monkeypatch, compiled_anew, name):
    """A loss that is wrong by a thousandth."""
    objective = OBJECTIVES[name]

    def wrong(*args):
        sums, state = objective.apply(*args)
        return dataclasses.replace(sums, loss=1.001 * sums.loss), state

    monkeypatch.setitem(OBJECTIVES, name, dataclasses.replace(objective, apply=wrong))
    with pytest.raises(AssertionError):
        TESTS[name]()


@pytest.mark.parametrize("name", TESTS)
def test_a_test_of_a_formula_sees_the_loss(name):
    TESTS[name]()


@pytest.mark.parametrize(
    ("name", "options", "more"),
    [
        ("dpo", {}, set()),
        ("dpo", {"ld_alpha": 0.0}, {"reference_tokens"}),
        ("dpo", {"ld_alpha": 0.4, "wpo": True}, {"reference_tokens", "collision"}),
        ("simpo", {"ld_alpha": 0.4}, set()),
        ("grpo", {}, set()),
        ("grpo", {"beta": 0.1}, {"reference_model"}),
        ("cispo", {"top_entropy_quantile": 0.2}, {"entropy"}),
        ("papo", {}, {"other_image"}),
        ("nsft", {}, set()),
        ("nsft", {"kl_weight": 0.1}, {"kl", "reference_model"}),
        ("anchored_sft", {}, {"kl", "reference_model"}),
        ("anchored_sft", {"kl_weight": 0.0}, set()),
        ("bradley_terry", {"margin": 0.5}, {"score"}),
    ],
)
def test_options_need_more(name, options, more):
    assert make_term(name, **options).needs == OBJECTIVES[name].needs | more


@pytest.mark.parametrize(
    ("name", "options", "rows"),
    [
        ("dpo", {}, Rows()),
        ("mdpo", {}, Rows(other_image="crop", noise_step=500)),
        ("povid", {"noise_step": 7}, Rows(other_image="noise", noise_step=7)),
        ("re_align", {"image": "data"}, Rows(other_image="data", noise_step=500)),
        ("papo", {}, Rows(other_image="masked", noise_step=500, mask_share=0.6)),
        ("distillation", {"beta": 0.5, "top_k": 4}, Rows(divergence=Divergence(0.5, 4))),
        ("jpo", {}, Rows(joint=True)),
        ("jpo", {"joint": False}, Rows()),
        ("kto", {}, Rows(mismatched=True)),
        ("bco", {}, Rows()),
        ("bradley_terry", {}, Rows(scored=Scored())),
        ("critique", {"prompt": "and ?"}, Rows(scored=Scored("and ?"))),
        (
            "critique",
            {"prompt": "{question} {response}", "layout": "one_turn"},
            Rows(scored=Scored("{question} {response}", layout="one_turn")),
        ),
    ],
)
def test_rows_that_an_objective_reads(name, options, rows):
    term = make_term(name, **options)
    assert term.rows == rows
    views = {"other_image"} if rows.other_image else {"mismatched"} if rows.mismatched else set()
    assert term.needs & VIEWS.keys() == views


def test_rows_read_a_list():
    """One other image for all of its terms, and whatever else one of them reads."""
    terms = [make_term(name) for name in ("dpo", "mdpo", "jpo", "kto")]
    assert rows_read(terms) == Rows("crop", 500, joint=True, mismatched=True)
    assert rows_read(terms[:1]) == Rows()
    terms = [make_term("bradley_terry"), make_term("critique", prompt="and ?", markers=True)]
    assert rows_read(terms) == Rows(scored=Scored("and ?", True))


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
    assert "options: beta=0.1, dimensions (required), ld_alpha=None" in blocks["modpo"]
    assert "SPIN" in blocks["dpo"]
    assert "Args:" not in text
    assert "needs: ranks, reward_head; score with margin" in blocks["bradley_terry"]
    assert "options: prompt=" in blocks["critique"]
    shared = blocks["Options of many objectives:"]
    for name in ("ld_alpha", "wpo", "divergence", "image", "joint"):
        assert f"\n  {name}: " in shared
    legend = blocks["What objectives need:"]
    for name, meaning in {**FIELDS, **REFERENCES, **VIEWS, **HEADS, **TEACHERS}.items():
        assert f"\n  {name}: {meaning}" in legend


def test_the_listing_of_some():
    text = render_objectives(["mdpo", "kto"])
    assert [line for line in text.splitlines() if line in OBJECTIVES] == ["mdpo", "kto"]
