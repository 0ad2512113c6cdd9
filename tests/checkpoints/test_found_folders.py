"""Folders as other tools leave them: several sets of weights, foreign tensors, numbers that are not
finite, weights that a dtype does not hold."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import tiny

from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.fingerprints import fingerprint_model
from mmpo_jax.checkpoints.huggingface import load_model, load_params, save_model
from mmpo_jax.checkpoints.locations import checkpoint_folders, locate
from mmpo_jax.checkpoints.orbax import save_base, save_start
from mmpo_jax.checkpoints.safetensors_files import INDEX_FILE, SINGLE_FILE, all_finite
from mmpo_jax.commands.convert import convert
from mmpo_jax.core.trees import flatten
from mmpo_jax.models.config import ModelError

KEY = "language_model.model.layers.1.self_attn.k_proj.weight"
PATH = "language_model/layers/self_attn/k_proj/kernel"


@pytest.fixture
def folder(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def tensors(folder):
    return safetensors.numpy.load_file(folder / SINGLE_FILE)


def write(folder, tensors, name=SINGLE_FILE):
    safetensors.numpy.save_file(tensors, folder / name)


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def kernel(folder):
    return flatten(load_model(folder)[1])[PATH][1].T


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_numbers_that_are_not_finite(folder, tensors, dtype, number):
    tensors = {key: value.astype(dtype) for key, value in tensors.items()}
    assert all(map(all_finite, tensors.values()))
    write(folder, tensors)
    load_start(str(folder))
    tensors[KEY][-1, -1] = number
    write(folder, tensors)
    with pytest.raises(
        ModelError, match=rf"{SINGLE_FILE}: tensor {KEY} has numbers that are not f"
    ):
        load_start(str(folder))


def test_runs_that_are_not_finite(tiny_folder, tiny_model, tmp_path):
    _, params = tiny_model
    broken = jax.tree.map(np.copy, params)
    broken["language_model"]["norm"]["scale"][3] = np.nan
    save_base(tmp_path / "run", tiny_folder)
    save_start(tmp_path / "run", broken)
    with pytest.raises(ModelError, match="language_model/norm/scale has numbers that are not fin"):
        load_start(str(tmp_path / "run"))


@pytest.mark.slow
def test_float16_does_not_hold_all(folder, tensors, tmp_path):
    """65,519 rounds to its largest number, 65,520 does not."""
    tensors[KEY][0, 1] = 65_519
    write(folder, tensors)
    model, params = load_model(folder)
    save_model(tmp_path / "half", model, params, folder, dtype=np.float16)
    assert load_params(folder, model, dtype=np.float16)
    params["language_model"]["layers"]["self_attn"]["k_proj"]["kernel"][1, 1, 0] = -65_520
    told = rf"{KEY}: -65520 is beyond the range of float16; save as float32 or bfloat16"
    with pytest.raises(ModelError, match=told):
        save_model(tmp_path / "out", model, params, folder, dtype=np.float16)
    assert not (tmp_path / "out").exists()
    tensors[KEY][0, 1] = 65_520
    write(folder, tensors)
    told = rf"{KEY} is not finite as float16, whose largest number is 65504; bfloat16 and float32"
    with pytest.raises(ModelError, match=told):
        convert(str(folder), str(tmp_path / "out"), "float16")
    convert(str(folder), str(tmp_path / "run"))
    with pytest.raises(ModelError, match=rf"{KEY}: 65520 is beyond the range of float16"):
        convert(str(tmp_path / "run"), str(tmp_path / "out"), "float16")


def test_a_single_file_comes_before_an_index(folder, tensors, caplog):
    """As in transformers; the fingerprint follows."""
    old = {key: value + 1 for key, value in tensors.items()}
    write(folder, old, "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(old, "model-00001-of-00001.safetensors")}
    before = fingerprint_model(folder)
    (folder / INDEX_FILE).write_text(json.dumps(index))
    np.testing.assert_array_equal(kernel(folder), tensors[KEY])
    assert f"is read and not what {INDEX_FILE} names" in caplog.text
    assert fingerprint_model(folder) == before
    (folder / SINGLE_FILE).unlink()
    np.testing.assert_array_equal(kernel(folder), old[KEY])
    assert fingerprint_model(folder) != before


def test_weights_that_the_config_names(folder, tensors):
    write(folder, {key: value + 1 for key, value in tensors.items()}, "other.safetensors")
    change_config(folder, transformers_weights="other.safetensors")
    np.testing.assert_array_equal(kernel(folder), tensors[KEY] + 1)
    change_config(folder, transformers_weights="third.safetensors")
    with pytest.raises(ModelError, match=r"third.safetensors: not found; transformers_weights in"):
        load_model(folder)
    change_config(folder, transformers_weights="../other.safetensors")
    with pytest.raises(ModelError, match="is not the name of a file beside it"):
        load_model(folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("v_head.summary.weight", "value head of a PPO model of TRL; save the model inside of it"),
        ("score.weight", "head of a reward or classification model"),
        (f"{KEY.removesuffix('.weight')}.base_layer.weight", "a PEFT model that is not merged"),
        (f"{KEY.removesuffix('.weight')}.lora_A.default.weight", "merge_and_unload"),
        (f"{KEY.removesuffix('.weight')}.qweight", "quantised weights"),
    ],
)
def test_extra_tensors(folder, tensors, name, told):
    write(folder, tensors | {name: np.zeros((2, 2), np.float32)})
    with pytest.raises(ModelError, match=rf"unexpected tensor {name}: .*{told}"):
        load_model(folder)


@pytest.mark.parametrize(
    ("prefix", "told"),
    [
        ("module.", "prefix of DistributedDataParallel or DeepSpeed"),
        ("base_model.model.", "a PEFT model that is not merged"),
        ("_orig_mod.", "torch.compile"),
    ],
)
def test_prefixes(folder, tensors, prefix, told):
    write(folder, {prefix + key: value for key, value in tensors.items()})
    with pytest.raises(ModelError, match=rf"unexpected tensor {prefix}.*: .*{told}"):
        load_model(folder)


def test_a_run_keeps_its_own_head(folder, tensors, tmp_path, caplog):
    """The config says tied; what is written says what is there."""
    change_config(folder, tie_word_embeddings=True)
    start = load_start(str(folder))
    assert "tie_word_embeddings is true, but a head with other values" in caplog.text
    head = start.params["language_model"]["lm_head"]["kernel"].T
    np.testing.assert_array_equal(head, tensors["language_model.lm_head.weight"])
    convert(str(folder), str(tmp_path / "run"))
    run = load_start(str(tmp_path / "run"))
    assert run.model == start.model
    convert(str(tmp_path / "run"), str(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert not written["tie_word_embeddings"]
    again = load_start(str(tmp_path / "back")).params["language_model"]["lm_head"]["kernel"].T
    np.testing.assert_array_equal(again, head)


@pytest.mark.slow
def test_random_weights_of_a_tied_config_without_files(tmp_path):
    tied = tiny.make_folder(tmp_path / "tied", tiny.make_config(tie_word_embeddings=True))
    (tied / SINGLE_FILE).unlink()
    assert load_start(str(tied), random_seed=0).model.config.decoder.tie_word_embeddings


@pytest.mark.parametrize(
    ("left", "changes", "told"),
    [
        ("pytorch_model.bin", {}, r"there is pytorch_model\.bin, a pickle"),
        (None, {}, r"model\.safetensors: not found; weights are read from safetensors files only"),
        (None, {"transformers_weights": "other.safetensors"}, r"other\.safetensors: not found"),
    ],
)
def test_a_model_beside_an_adapter_is_never_another(folder, tiny_folder, left, changes, told):
    """Where its weights cannot be read, the base that the adapter names does not stand in."""
    base = {"base_model_name_or_path": str(tiny_folder), "peft_type": "LORA"}
    (folder / "adapter_config.json").write_text(json.dumps(base))
    (folder / SINGLE_FILE).unlink()
    if left:
        (folder / left).write_bytes(b"")
    change_config(folder, **changes)
    assert checkpoint_folders(str(folder)) == [str(folder)] * 2
    with pytest.raises(ModelError, match=told):
        load_start(str(folder))


def test_the_output_of_an_alignment_is_its_model(folder, caplog):
    caplog.set_level("INFO")
    assert locate(str(folder.parent)) == locate(str(folder))
    assert f"{folder.parent}: its model is {folder}" in caplog.text
    (folder / "config.json").unlink()
    assert locate(str(folder.parent)).weights == str(folder.parent)
