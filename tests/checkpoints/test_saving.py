"""Checkpoint folders out: files of a size, one tensor at a time, whole or not at all."""

import errno
import json
import os
import weakref

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import yaml
from helpers import meshes

from mmpo_jax.checkpoints import fetching, safetensors_writing
from mmpo_jax.checkpoints.cards import make_card, render_card
from mmpo_jax.checkpoints.huggingface import load_model, new_tensors, save_model
from mmpo_jax.checkpoints.rounding import stored_dtype
from mmpo_jax.checkpoints.safetensors_files import INDEX_FILE, SINGLE_FILE, read_header
from mmpo_jax.checkpoints.safetensors_writing import NewTensor, split_into_files, write_files
from mmpo_jax.core import progress
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.precision import weights_dtype
from mmpo_jax.parallel.mesh import put_params
from mmpo_jax.recipes.train_recipe import TrainRecipe

SIZE = 20_000
PAIR = {"source": "file", "path": "pairs.jsonl"}


@pytest.fixture(scope="module")
def placed(tiny_model):
    """The tiny model's parameters on eight devices."""
    mesh = meshes.mesh_of(1, 4, 2)
    return put_params(tiny_model[1], tiny_model[0].rules, mesh)


def read_all(folder):
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    return tensors


def test_files_of_a_size(tiny_folder, tiny_model, placed, tmp_path):
    save_model(tmp_path / "out", tiny_model[0], placed, tiny_folder, max_shard_bytes=SIZE)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ]
    index = json.loads((tmp_path / "out" / INDEX_FILE).read_text())
    expected = safetensors.numpy.load_file(tiny_folder / SINGLE_FILE)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())
    assert not (tmp_path / "out" / SINGLE_FILE).exists()
    for file in files:
        held = safetensors.numpy.load_file(file)
        assert {key for key, name in index["weight_map"].items() if name == file.name} == set(held)
        assert sum(tensor.nbytes for tensor in held.values()) <= SIZE
        with safetensors.safe_open(file, framework="numpy") as handle:
            assert handle.metadata() == {"format": "pt"}
        for key, tensor in held.items():
            np.testing.assert_array_equal(tensor, expected.pop(key), err_msg=key)
    assert not expected


@pytest.mark.parametrize("size", [SIZE, 10**9], ids=["sharded", "single"])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_round_trips_keep_every_bit(tiny_folder, tiny_model, tmp_path, dtype, size):
    model, params = tiny_model
    half = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
    save_model(tmp_path / "first", model, half, tiny_folder, max_shard_bytes=size)
    again, loaded = load_model(tmp_path / "first")
    assert again == model
    for path, leaf in flatten(half).items():
        assert flatten(loaded)[path].tobytes() == leaf.tobytes(), path
    save_model(tmp_path / "second", model, loaded, tmp_path / "first", max_shard_bytes=size)
    names = {file.name for file in (tmp_path / "first").iterdir()}
    assert names == {file.name for file in (tmp_path / "second").iterdir()}
    for name in names:
        first, second = (tmp_path / folder / name for folder in ("first", "second"))
        assert first.read_bytes() == second.read_bytes(), name


def test_cast_while_saving(tiny_folder, tiny_model, placed, tmp_path):
    model, params = tiny_model
    save_model(tmp_path / "out", model, placed, tiny_folder, dtype="bfloat16")
    _, loaded = load_model(tmp_path / "out")
    for path, leaf in flatten(params).items():
        expected = leaf.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(flatten(loaded)[path], expected, err_msg=path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "bfloat16" in (config.get("dtype"), config.get("torch_dtype"))


def test_the_dtype_that_holds_all_matrices():
    """Norms are kept in float32 beside bfloat16; of a run, what was trained is float32."""
    trained, frozen = np.zeros((1, 3), np.float32), np.zeros((9, 9), ml_dtypes.bfloat16)
    norms = {"a": {"scale": np.zeros(99, np.float32)}, "b": {"kernel": frozen}}
    assert weights_dtype(norms).name == "bfloat16"
    assert weights_dtype({**norms, "c": {"kernel": trained}}).name == "float32"
    assert weights_dtype({**norms, "b": {"kernel": frozen, "lora_a": trained}}).name == "float32"
    assert stored_dtype("float16").name == "float16"
    assert stored_dtype("bfloat16_stochastic").name == "bfloat16"


def test_one_tensor_in_memory_at_a_time(tiny_model, placed, tmp_path):
    """What was fetched is let go before the next is, and by the devices' arrays too."""
    alive = []

    def watched(tensor):
        def fetch():
            assert not any(reference() is not None for reference in alive)
            array = np.array(tensor.fetch())
            alive.append(weakref.ref(array))
            return array

        return NewTensor(tensor.name, tensor.dtype, tensor.shape, fetch)

    tensors = [watched(tensor) for tensor in new_tensors(placed, tiny_model[0])]
    write_files(str(tmp_path), split_into_files(tensors, SIZE))
    assert len(alive) == len(tensors) == len(read_all(tmp_path))
    assert all(leaf._npy_value is None for leaf in flatten(placed).values())


@pytest.mark.parametrize("devices", [1, 8])
def test_large_tensors_are_written_in_strips(
    tiny_folder, tiny_model, placed, tmp_path, monkeypatch, devices
):
    """Of those that are not stacked; the files are the same."""
    model, params = tiny_model
    params = placed if devices == 8 else jax.tree.map(jax.numpy.asarray, params)
    save_model(tmp_path / "whole", model, params, tiny_folder)
    monkeypatch.setattr(fetching, "STRIP_BYTES", 700)
    monkeypatch.setattr(fetching, "READ_BYTES", 200)
    sizes = []

    def watched(*args):
        array = on_host(*args)
        sizes.append((array.nbytes, args[0].nbytes))
        return array

    on_host = fetching.on_host
    monkeypatch.setattr(fetching, "on_host", watched)
    save_model(tmp_path / "strips", model, params, tiny_folder)
    assert len(sizes) > 20 and all(own <= 700 < whole for own, whole in sizes)
    whole, strips = ((tmp_path / name / SINGLE_FILE) for name in ("whole", "strips"))
    assert strips.read_bytes() == whole.read_bytes()
    assert all(leaf._npy_value is None for leaf in flatten(placed).values())


def new(name, dtype, size):
    array = np.arange(size).astype(dtype)
    return NewTensor(name, array.dtype, array.shape, lambda: array)


def test_how_files_are_filled():
    tensors = [new("c", np.float16, 9), new("a", np.float16, 3), new("b", np.float16, 3)]
    files = split_into_files(tensors, 12)
    names = [[tensor.name for tensor in file] for file in files.values()]
    assert names == [["a", "b"], ["c"]]  # one that is too large has a file of its own
    assert list(split_into_files(tensors, 30)) == [SINGLE_FILE]
    assert len(split_into_files(tensors, 29)) == 2


def test_how_far_writing_is_can_be_told(tmp_path):
    told = []

    def telling(name):
        def fetch():
            told.append(progress.describe())
            return np.zeros(500_000, np.float32)

        return NewTensor(name, np.dtype(np.float32), (500_000,), fetch)

    write_files(str(tmp_path), split_into_files(map(telling, "abc"), 4_000_000))
    assert [line.partition(",")[0] for line in told] == [
        "writing weights: 0 of 6 MB",
        "writing weights: 2 of 6 MB",
        "writing weights: 4 of 6 MB",
    ]
    assert told[2].endswith(" left")


def test_tensors_begin_where_their_dtype_wants(tmp_path):
    tensors = [new("a", np.float16, 3), new("b", np.float32, 3), new("c", ml_dtypes.bfloat16, 1)]
    write_files(str(tmp_path), split_into_files(tensors, 1000))
    for tensor in read_header(str(tmp_path / SINGLE_FILE)):
        assert tensor.offset % (4 if tensor.dtype == "F32" else 2) == 0
    read = read_all(tmp_path)
    for tensor in tensors:
        np.testing.assert_array_equal(read[tensor.name], tensor.fetch())


def test_a_full_disk(tiny_folder, tiny_model, tmp_path, monkeypatch):
    """The message says so, nothing is left behind, and what was there stays."""
    save_model(tmp_path / "out", *tiny_model, tiny_folder)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    synced = []

    def fail_later(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(safetensors_writing.os, "fsync", fail_later)
    told = r"model-00002-of-\d+\.safetensors: cannot be written: No space left.* need 0\.00 GB"
    with pytest.raises(ModelError, match=told):
        save_model(tmp_path / "out", *tiny_model, tiny_folder, max_shard_bytes=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_dtype_that_files_cannot_have(tiny_folder, tiny_model, tmp_path):
    with pytest.raises(ModelError, match="float64; weights are written as float32, bfloat16, fl"):
        save_model(tmp_path / "out", *tiny_model, tiny_folder, dtype="float64")
    assert not list(tmp_path.iterdir())


def card(model="llava-hf/llava-1.5-7b-hf@v1", output="somewhere", from_hub=True):
    values = {"output": output, "model": model, "data": PAIR, "seed": 7}
    recipe = TrainRecipe.model_validate(values)
    return recipe, lambda net: make_card(recipe, net, {"loss": 0.25, "step": 8}, from_hub=from_hub)


def test_the_model_card(tiny_folder, tiny_model, tmp_path):
    recipe, make = card()
    save_model(tmp_path / "out", *tiny_model, tiny_folder, card=make(tiny_model[0]))
    text = (tmp_path / "out" / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmpo_jax", "dpo"],
        "base_model": "llava-hf/llava-1.5-7b-hf",
    }
    assert "`llava-hf/llava-1.5-7b-hf@v1` after DPO" in body
    assert "| loss | 0.25 |" in body
    data, written = (yaml.safe_load(part.split("```")[0]) for part in body.split("```yaml\n")[1:])
    assert data == recipe.model_dump(mode="json")["data"]
    assert TrainRecipe.model_validate(written | {"output": "somewhere"}) == recipe
    assert render_card(card(output="elsewhere")[1](tiny_model[0])) == text


@pytest.mark.parametrize("folder", ["/checkpoints/llava", "runs/model"])
def test_a_card_names_only_what_the_hub_knows(tiny_model, folder):
    text = render_card(card(model=folder, from_hub=False)[1](tiny_model[0]))
    assert "base_model" not in text
    assert f"`{folder}` after DPO" in text


def test_the_order_of_parameters_does_not_matter(tiny_folder, tiny_model, tmp_path):
    model, params = tiny_model
    backwards = unflatten(dict(reversed(flatten(params).items())))
    save_model(tmp_path / "a", model, params, tiny_folder)
    save_model(tmp_path / "b", model, backwards, tiny_folder)
    assert (tmp_path / "a" / SINGLE_FILE).read_bytes() == (
        tmp_path / "b" / SINGLE_FILE
    ).read_bytes()
