"""Recipes of several sources of responses: defaults, names, and those that could make no pair."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

import mmpo_jax
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.files import RecipeError, load_recipe

CONFIGS = Path(mmpo_jax.__file__).parent.parent / "configs"
GOOD = {"output": "out", "model": "DIR", "data": {"source": "file", "path": "a.jsonl"}}
POLICY, GREEDY, DATA = {"type": "policy"}, {"type": "greedy"}, {"type": "data"}
EDITED = {"type": "edited_image"}
OTHER = {"type": "checkpoint", "model": "OTHER"}
SERVED = {"type": "served", "url": "http://host:8000/v1", "model": "policy"}


def recipe(*candidates, **changes) -> AlignRecipe:
    return AlignRecipe.model_validate(GOOD | {"candidates": list(candidates)} | changes)


def problem(*candidates, **changes) -> str:
    with pytest.raises(ValidationError) as caught:
        recipe(*candidates, **changes)
    (error,) = caught.value.errors()
    return error["msg"]


def test_the_policy_alone_by_default():
    assert AlignRecipe.model_validate(GOOD) == recipe(POLICY)
    one = AlignRecipe.model_validate(GOOD | {"candidates": DATA})  # without the list's brackets
    assert one == recipe(DATA)


def test_what_a_source_does_not_say_is_that_of_sampling():
    sampling = {"num_samples": 4, "temperature": 0.7, "top_p": 0.9, "max_new_tokens": 32}
    changes = {"temperature": 1.2, "max_new_tokens": 48, "batch_size": 3}
    loaded = recipe(POLICY, GREEDY, OTHER | changes, EDITED | {"temperature": 0}, sampling=sampling)
    policy, greedy, other, edited = (one.drawn(loaded.sampling) for one in loaded.candidates)
    assert policy == loaded.sampling
    assert (greedy.num_samples, greedy.temperature, greedy.max_new_tokens) == (1, 0, 32)
    assert (other.num_samples, other.top_p) == (4, 0.9)
    assert (other.temperature, other.max_new_tokens, other.batch_size) == (1.2, 48, 3)
    assert (edited.num_samples, edited.temperature, edited.top_p) == (1, 0, 0.9)


def test_names_tell_sources_apart():
    twice = OTHER, OTHER | {"model": "THIRD"}
    assert "two sources are called 'checkpoint'" in problem(*twice)
    assert "two sources are called 'policy'" in problem(POLICY, POLICY)
    loaded = recipe(OTHER, OTHER | {"model": "THIRD", "name": "third"})
    assert [source.name for source in loaded.candidates] == ["checkpoint", "third"]
    assert "string should match pattern" in problem(OTHER | {"name": "a/b"}).lower()


@pytest.mark.parametrize(
    ("candidates", "sampling"),
    [
        ([POLICY], {"num_samples": 1}),
        ([GREEDY], {}),
        ([EDITED | {"temperature": 0}], {}),
        ([POLICY, GREEDY], {"temperature": 0}),
        ([OTHER | {"num_samples": 1}], {}),
    ],
)
def test_responses_that_would_all_be_the_same(candidates, sampling):
    told = problem(*candidates, sampling=sampling)
    assert "sampling: pairs are made of different responses to a prompt" in told


@pytest.mark.parametrize(
    ("candidates", "sampling"),
    [
        ([POLICY, GREEDY], {"num_samples": 1}),
        ([GREEDY, EDITED | {"temperature": 0}], {}),
        ([POLICY, OTHER], {"temperature": 0}),
        ([DATA], {}),
    ],
)
def test_one_of_each_of_two_sources_makes_a_pair(candidates, sampling):
    recipe(*candidates, sampling=sampling)


ORDER = {"type": "source", "order": ["greedy", "edited_image"]}


@pytest.mark.parametrize(
    ("candidates", "changes", "told"),
    [
        (
            [POLICY],
            {"pairing": {"rejected_from": ["greedy"]}},
            "pairing.rejected_from: there is no source 'greedy'; candidates: policy",
        ),
        (
            [POLICY, EDITED],
            {"feedback": ORDER},
            "feedback.order: there is no source 'greedy'; candidates: policy, edited_image",
        ),
        (
            [POLICY, GREEDY, EDITED],
            {"feedback": ORDER},
            "feedback.order: name every source once: policy, greedy, edited_image",
        ),
        (
            [GREEDY, EDITED],
            {"feedback": ORDER, "pairing": {"chosen_from": ["edited_image"]}},
            "feedback.order: no pair has its chosen response from edited_image",
        ),
        (
            [GREEDY, EDITED],
            {"feedback": ORDER, "pairing": {"min_difference": 2}},
            "2 places between them",
        ),
        (
            [POLICY, GREEDY],
            {"feedback": {"type": "scores"}},
            "candidates: feedback of type scores knows responses of the data alone",
        ),
        (
            [POLICY, DATA],
            {"feedback": {"type": "scores"}, "pairing": {"rejected_from": ["policy"]}},
            "pairing.rejected_from: feedback of type scores knows",
        ),
        ([DATA], {"feedback": {"type": "scores", "by": "rank", "name": "a"}}, "name: ranks have"),
        ([DATA], {"data": {"source": "picture_world"}}, "the picture world's prompts have none"),
        (
            [POLICY, EDITED | {"max_new_tokens": 65}],
            {},
            "candidates: edited_image: max_new_tokens 65 is more than training keeps",
        ),
        ([POLICY, EDITED | {"step": 1000}], {}, "less than 1000"),
        ([POLICY, {**SERVED, "start_timeout": 9}], {}, "start_timeout: it is about the server"),
        ([POLICY, {**SERVED, "shares_devices": False}], {}, "shares_devices: it is about"),
    ],
)
def test_recipes_that_could_make_no_pair(candidates, changes, told):
    assert told in problem(*candidates, **changes)


def test_mistakes_are_told_by_their_path(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(GOOD | {"candidates": [POLICY, OTHER | {"modle": 1}]}))
    with pytest.raises(RecipeError, match=r"candidates\.1\.modle: unknown key; did you mean model"):
        load_recipe(AlignRecipe, path)


@pytest.mark.parametrize(
    ("name", "sources"),
    [
        ("mixed_candidates", ["policy", "qwen", "llava_next"]),
        ("sima", ["greedy", "policy"]),
        ("seva_7b", ["greedy", "edited_image"]),
        ("noisy_image_pairs", ["data", "edited_image"]),
        ("rlaif_v_7b_vllm", ["served"]),
        ("hidden_image_pairs", ["data", "hidden_image"]),
        ("sentinel", ["policy"]),
    ],
)
def test_recipes_of_the_methods(name, sources):
    loaded = load_recipe(AlignRecipe, CONFIGS / f"{name}.yaml")
    assert [source.name for source in loaded.candidates] == sources


def test_the_served_copy_of_the_docs():
    page = (CONFIGS.parent / "docs" / "feedback.md").read_text()
    section = page.partition("### A served copy")[2]
    example = yaml.safe_load(section.partition("```yaml")[2].partition("```")[0])
    (source,) = recipe(*example["candidates"]).candidates
    ours = load_recipe(AlignRecipe, CONFIGS / "rlaif_v_7b_vllm.yaml").candidates[0]
    assert source.command == ours.command


def test_how_a_server_draws():
    sampling = {"num_samples": 4, "temperature": 0.7, "top_k": 50, "max_new_tokens": 32}
    loaded = recipe(POLICY, SERVED | {"temperature": 0, "top_p": 0.9}, sampling=sampling)
    drawn = loaded.candidates[1].drawn(loaded.sampling)
    assert (drawn.num_samples, drawn.temperature, drawn.top_p, drawn.top_k) == (1, 0, 0.9, 50)
    assert loaded.candidates[1].name == "served"


def test_the_example_of_the_docs():
    page = (CONFIGS.parent / "docs" / "feedback.md").read_text()
    section = page.partition("## Where responses come from")[2]
    example = yaml.safe_load(section.partition("```yaml")[2].partition("```")[0])
    names = [source.name for source in recipe(*example["candidates"]).candidates]
    expected = ["policy", "greedy", "edited_image", "hidden_image", "qwen", "served", "data"]
    assert names == expected
