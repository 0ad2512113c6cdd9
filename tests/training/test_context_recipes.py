"""Recipes whose objectives cannot see one batch, or lack the reference they need, are refused."""

import pydantic
import pytest

from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.recipes.align_recipe import PreferenceTraining
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.examples import tokenizer_for


def refused(match, objective, reference="cached", section=Training):
    with pytest.raises(pydantic.ValidationError, match=match):
        section.model_validate({"objective": objective, "reference": {"type": reference}})


def accepted(objective, reference="cached"):
    Training.model_validate({"objective": objective, "reference": {"type": reference}})


def test_one_other_image_for_all():
    mdpo, vdpo = {"type": "mdpo"}, {"type": "vdpo"}
    refused("the same image, noise_step and mask_share", [mdpo, vdpo])
    accepted([mdpo, vdpo | {"image": "crop"}])
    noise = {"image": "noise", "noise_step": 300}
    refused("the same image", [mdpo | noise, vdpo | noise | {"noise_step": 500}])
    refused("less than 1000", mdpo | noise | {"noise_step": 1000})
    known = "'crop', 'rotate', 'black', 'blank', 'noise', 'masked' or 'data'"
    refused(known, mdpo | {"image": "mirror"})


def test_whole_instructions_are_read_alone():
    jpo, dpo = {"type": "jpo"}, {"type": "dpo"}
    refused("jpo with joint reads rows otherwise", [jpo, dpo])
    accepted([jpo | {"joint": False}, dpo])


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "sparse_po", "rrpo", "chip", "povid"])
def test_whole_distributions_need_a_reference_that_runs(name):
    refused("needs a reference that runs in the step", {"type": name})
    accepted({"type": name}, "online")
    accepted({"type": name}, "ema")


def test_what_the_data_give_of_a_reference():
    refused("log-probs", {"type": "mdpo"}, "given")
    refused("token by token", {"type": "ddpo"}, "given")
    refused("counts prompts too", {"type": "jpo"}, "given")
    accepted({"type": "jpo", "joint": False}, "given")


def test_a_kl_term_needs_a_reference_that_runs():
    accepted({"type": "nsft"}, "none")
    refused("runs in the step", {"type": "nsft", "kl_weight": 0.1}, "none")


def test_pairs_of_an_alignment_have_no_other_image():
    refused("image", {"type": "re_align"}, section=PreferenceTraining)
    PreferenceTraining.model_validate({"objective": {"type": "re_align", "image": "crop"}})
    PreferenceTraining.model_validate({"objective": {"type": "ddpo"}})


def test_what_the_terms_ask_for_is_what_the_tokenizer_makes():
    plain = tokenizer_for([make_term("dpo")], 3).keywords
    assert plain == {"other": None, "joint": False}
    other = tokenizer_for([make_term("dpo"), make_term("povid", noise_step=7)], 3).keywords["other"]
    assert (other.kind, other.step, other.seed) == ("noise", 7, 3)
    assert tokenizer_for([make_term("re_align")], 3).keywords["other"].kind is None
    assert tokenizer_for([make_term("jpo")], 3).keywords["joint"]


def test_every_image_aware_objective_has_the_option():
    for objective in OBJECTIVES.values():
        other = objective.rows(objective.defaults).other_image
        assert other == objective.defaults.get("image"), objective.name
