"""Checkpoint folders that do not fit, and what the errors name."""

import json
import shutil

import numpy as np
import pytest
import safetensors.numpy
from helpers import tiny

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.checkpoints.huggingface import load_model, to_huggingface
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError


@pytest.fixture
def folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tensors(folder):
    return safetensors.numpy.load_file(folder / "model.safetensors")


def write(folder, tensors):
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")


KEY = "language_model.model.layers.1.self_attn.k_proj.weight"


def test_missing_tensor(folder, tensors):
    write(folder, {key: value for key, value in tensors.items() if key != KEY})
    with pytest.raises(ModelError, match=r"layers/self_attn/k_proj/kernel has no layer 1.*2 layer"):
        load_model(folder)
    write(folder, {key: value for key, value in tensors.items() if "lm_head" not in key})
    with pytest.raises(ModelError, match="no weights for language_model/lm_head/kernel"):
        load_model(folder)


def test_unexpected_tensor(folder, tensors):
    write(folder, tensors | {"language_model.model.extra.weight": np.zeros(3, np.float32)})
    with pytest.raises(ModelError, match=r"unexpected tensor language_model\.model\.extra"):
        load_model(folder)
    write(folder, tensors | {KEY.replace("layers.1", "layers.7"): tensors[KEY]})
    with pytest.raises(ModelError, match="has a layer 7; the config has 2 layers"):
        load_model(folder)


def test_wrong_shape_is_named_as_the_file_has_it(folder, tensors):
    write(folder, tensors | {KEY: np.zeros((16, 31), np.float32)})
    with pytest.raises(ModelError, match=r"k_proj.*\(16, 31\), the config gives \(16, 32\)"):
        load_model(folder)
    patches = next(key for key in tensors if "patch_embedding" in key)
    write(folder, tensors | {patches: np.zeros((16, 3, 4, 4), np.float32)})
    with pytest.raises(ModelError, match=r"patch_embedding.*\(16, 3, 4, 4\), the config gives"):
        load_model(folder)


def test_buffers_of_old_versions_are_skipped(folder, tensors, tiny_model):
    old = {
        "vision_tower.vision_model.embeddings.position_ids": np.arange(5)[None],
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    write(folder, tensors | old)
    assert flatten(load_model(folder)[1]).keys() == flatten(tiny_model[1]).keys()


def test_missing_and_damaged_files(folder):
    (folder / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
    with pytest.raises(ModelError, match=r"model\.safetensors: not a readable safetensors"):
        load_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: not found"):
        load_model(folder)
    index = {"weight_map": {KEY: "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors: not found"):
        load_model(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=r"config\.json: not found"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mllama"}, "model_type is 'mllama'.*implements.*llava"),
        ({"vision_feature_layer": -9}, "vision_feature_layer -9 is outside"),
        ({"text_config": {"model_type": "gemma"}}, r"text_config\.model_type is 'gemma'"),
        ({"vision_config": {"model_type": "siglip_vision_model"}}, "vision_use_head is True"),
        (
            {"text_config": {"rope_parameters": {"rope_type": "spiral", "factor": 2.0}}},
            "rope_type is 'spiral'",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(folder, changes, message):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    with pytest.raises(ModelError, match=message) as caught:
        load_config(folder)
    assert str(path) in str(caught.value)


def test_stacked_layers_keep_their_order(tiny_model, tensors):
    model, params = tiny_model
    written = dict(to_huggingface(params, model))
    assert written.keys() == tensors.keys()
    for layer in range(2):
        key = KEY.replace("layers.1", f"layers.{layer}")
        stacked = params["language_model"]["layers"]["self_attn"]["k_proj"]["kernel"]
        np.testing.assert_array_equal(written[key], stacked[layer].T)
    assert flatten(unflatten(flatten(params))).keys() == flatten(params).keys()
    assert written["language_model.lm_head.weight"].shape[0] == tiny.VOCAB_SIZE
