"""Searches on simulated devices that are said to have peaks and limits."""

import dataclasses
import math

import pytest

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.models.layer_kinds import ExpertsConfig
from mmpo_jax.parallel import chips
from mmpo_jax.parallel.mesh import AXES_OF_EXPERTS
from mmpo_jax.planning import search
from mmpo_jax.planning.stages import Assumed
from mmpo_jax.planning.topology import find_topology
from mmpo_jax.recipes.command_recipes import ScoreRecipe
from mmpo_jax.recipes.train_recipe import TrainRecipe

ASSUMED = Assumed(rows=64)


@pytest.fixture
def devices(monkeypatch):
    """Eight devices with so many bytes each."""

    def devices(memory):
        chip = chips.Chip("cpu", memory, flops=1e9, bandwidth=1e8, link=1e6)
        monkeypatch.setitem(chips.CHIPS, "cpu", chip)
        return find_topology("cpu:8")

    return devices


@pytest.fixture
def recipe(tiny_folder):
    def recipe(kind, **values):
        return kind.model_validate(
            {
                "output": "out",
                "model": str(tiny_folder),
                "data": {"source": "file", "path": "none.jsonl"},
                "lengths": {"prompt": [24], "response": [16]},
                **values,
            }
        )

    return recipe


def test_meshes_of_eight_devices(tiny_model):
    decoder = tiny_model[0].config.decoder
    found = [tuple(sizes.values()) for sizes in search.meshes(8, decoder)]
    assert len(found) == len(set(found)) == 10
    assert all(data * fsdp * tensor == 8 for data, fsdp, tensor in found)
    many = [tuple(sizes.values()) for sizes in search.meshes(256, decoder)]
    assert all(tensor <= search.MOST_TENSOR for _, _, tensor in many)


def test_meshes_of_a_mixture(tiny_model):
    """`expert` divides the experts, and is not more than a token's."""
    decoder = tiny_model[0].config.decoder
    experts = ExpertsConfig(12, 4, 8, "silu", normalised=True)
    layers = tuple(dataclasses.replace(layer, mlp=experts) for layer in decoder.layers)
    found = list(search.meshes(8, dataclasses.replace(decoder, layers=layers)))
    sizes = [tuple(each[f"devices.{axis}"] for axis in AXES_OF_EXPERTS) for each in found]
    assert len(sizes) == len(set(sizes))
    assert all(math.prod(each) == 8 for each in sizes)
    assert {expert for _, _, expert, _ in sizes} == {1, 2, 4}


@pytest.mark.slow
def test_all_choices_are_counted(devices, recipe):
    training = {"objective": {"type": "dpo"}, "batch_size": 8, "remat": "full"}
    topology = devices(1e9)
    found = search.counted_choices(recipe(TrainRecipe, training=training), topology, ASSUMED)
    changed = {choice.overrides for choice in found}
    assert len(changed) == len(found)
    assert "devices.data=1 devices.fsdp=8 devices.tensor=1" in changed
    one = "devices.data=1 devices.fsdp=8 devices.tensor=1"
    two = f"{one} training.micro_batch_size=8 training.remat=none"
    by_name = {choice.overrides: choice for choice in found}
    if two in by_name:  # where the mesh is one of the fastest
        assert by_name[two].recipe.training.remat == "none"
    # Weights are gathered as often as there are micro-batches.
    full = [choice for choice in found if choice.recipe.training.remat == "full"]
    whole = min(choice.seconds for choice in full if not choice.recipe.training.micro_batch_size)
    assert whole <= min(choice.seconds for choice in full)


def test_the_fastest_that_fits_comes_first(devices, recipe):
    topology = devices(1e9)
    scoring = recipe(ScoreRecipe, scoring={"batch_size": 8})
    options = {"compilations": 3, "wanted": 2, "optimised": False}
    found = search.search(scoring, topology, ASSUMED, **options)
    assert len(found) == 2
    assert all(choice.planned.fits and choice.compiled for choice in found)
    assert found[0].seconds <= found[1].seconds


def test_no_more_is_compiled_than_may_be(devices, recipe, monkeypatch):
    topology = devices(1e9)
    compiled, compile_program = [], search.compile_program
    monkeypatch.setattr(
        search,
        "compile_program",
        lambda program, optimised: compiled.append(1) or compile_program(program, optimised),
    )
    scoring = recipe(ScoreRecipe, scoring={"batch_size": 8})
    options = {"compilations": 1, "wanted": 5, "optimised": False}
    assert len(search.search(scoring, topology, ASSUMED, **options)) == len(compiled) == 1


def test_what_cannot_fit_is_not_compiled(devices, recipe, monkeypatch):
    topology = devices(1000.0)
    monkeypatch.setattr(search, "compile_program", lambda *_: pytest.fail("it is compiled"))
    scoring = recipe(ScoreRecipe, scoring={"batch_size": 8})
    with pytest.raises(MmpoError, match="can fit cpu:8"):
        search.search(scoring, topology, ASSUMED, compilations=3)


def test_devices_without_peaks_are_refused(recipe):
    scoring = recipe(ScoreRecipe, scoring={"batch_size": 8})
    with pytest.raises(MmpoError, match="ranks by rooflines"):
        search.search(scoring, find_topology("cpu:8"), ASSUMED, compilations=3)
