"""Experts of a layer in one tensor, in both of its layouts, and one by one: the same parameters."""

import numpy as np
import pytest

pytest.importorskip("torch")
import safetensors.numpy
from helpers import families

from mmpo_jax.checkpoints.expert_tensors import join_experts
from mmpo_jax.checkpoints.huggingface import load_model, load_params, new_tensors
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.lora import Lora, add_adapters
from mmpo_jax.parallel.mesh import make_mesh, put_params

EXPERTS = "model.layers.{}.mlp.experts"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return families.make_case("qwen3_moe", tmp_path_factory.mktemp("mixture") / "one").folder


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(folder)


@pytest.fixture(scope="module")
def stored(loaded):
    """name -> tensor of the oldest layout."""
    model, params = loaded
    return {tensor.name: tensor.fetch() for tensor in new_tensors(params, model)}


def in_memory(stored):
    """The layout that transformers 5 has in memory."""
    tensors = {name: value for name, value in stored.items() if ".experts." not in name}
    layers = {name.split(".")[2] for name in stored if ".experts." in name}
    for stem in map(EXPERTS.format, layers):
        count = sum(name.startswith(f"{stem}.") for name in stored) // 3
        parts = {
            part: np.stack([stored[f"{stem}.{e}.{part}_proj.weight"] for e in range(count)])
            for part in ("gate", "up", "down")
        }
        tensors[f"{stem}.gate_up_proj"] = np.concatenate([parts["gate"], parts["up"]], axis=1)
        tensors[f"{stem}.down_proj"] = parts["down"]
    return tensors


def read(folder, tensors, model):
    folder.mkdir()
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    safetensors.numpy.save_file(whole, folder / "model.safetensors")
    return flatten(load_params(folder, model))


def check_same(found, params):
    expected = flatten(params)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(found[path], leaf, err_msg=path)


@pytest.mark.parametrize("inputs_first", [False, True])
def test_joined_experts_are_read(loaded, stored, tmp_path, inputs_first):
    model, params = loaded
    tensors = in_memory(stored)
    if inputs_first:
        tensors = {n: v.swapaxes(1, 2) if v.ndim == 3 else v for n, v in tensors.items()}
    check_same(read(tmp_path / "joined", tensors, model), params)


def test_joined_experts_are_written(loaded, stored, tmp_path):
    """As Qwen3-VL has them: inputs first."""
    model, params = loaded
    tensors = {
        tensor.name: tensor for tensor in join_experts(new_tensors(params, model), "inputs_first")
    }
    expected = {n: v.swapaxes(1, 2) if v.ndim == 3 else v for n, v in in_memory(stored).items()}
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        fetched = tensor.fetch()
        assert fetched.shape == tensor.shape
        np.testing.assert_array_equal(fetched, expected[name], err_msg=name)


def test_experts_of_a_mesh_are_written(loaded, stored):
    """Split by expert, fsdp and tensor, and with an adapter merged."""
    model, params = loaded
    lora = Lora(target=".*experts.*", rank=2)
    flat = flatten(add_adapters(params, model, lora, (), 0))
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        if path.endswith("/lora_b"):
            flat[path] = rng.standard_normal(leaf.shape).astype(np.float32)
    mesh = make_mesh(fsdp=2, expert=2, tensor=2)
    for tree in (params, unflatten(flat)):
        expected = {tensor.name: tensor.fetch() for tensor in new_tensors(tree, model)}
        for tensor in new_tensors(put_params(tree, model.rules, mesh), model):
            np.testing.assert_allclose(
                tensor.fetch(), expected[tensor.name], rtol=0, atol=1e-6, err_msg=tensor.name
            )
    assert any(np.abs(value - stored[name]).max() > 0.1 for name, value in expected.items())


def test_what_does_not_fit(loaded, stored, tmp_path):
    model, _ = loaded
    lost = EXPERTS.format(1) + ".3.up_proj.weight"
    without = {name: value for name, value in stored.items() if name != lost}
    with pytest.raises(ModelError, match="no expert 3 in layer 1"):
        read(tmp_path / "without", without, model)
    one_more = stored | {EXPERTS.format(0) + ".8.up_proj.weight": stored[lost]}
    with pytest.raises(ModelError, match="has an expert 8 in layer 0"):
        read(tmp_path / "more", one_more, model)
    narrow = stored | {lost: stored[lost][:, 1:]}
    with pytest.raises(ModelError, match=r"experts.3.up_proj.weight has shape \(24, 31\)"):
        read(tmp_path / "narrow", narrow, model)
