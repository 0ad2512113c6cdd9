"""Damaged and hostile checkpoint folders of every family: the error names the file and what was
expected, and nothing in them runs."""

import json
import pickle
import re
from pathlib import Path

import pytest

pytest.importorskip("torch")
import safetensors.numpy

from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_params, save_model
from mmpo_jax.checkpoints.safetensors_files import INDEX_FILE
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import FAMILIES


@pytest.fixture(params=FAMILIES)
def case(request, family_case):
    return family_case(request.param)


@pytest.fixture
def folder(case, tmp_path):
    """A sharded checkpoint, to be damaged."""
    save_model(tmp_path / "model", case.model, case.params, case.folder, max_shard_bytes=20_000)
    return tmp_path / "model"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def refused(folder, told, model=None):
    """With the model's architecture, only its weights are read."""
    with pytest.raises(ModelError, match=told):
        load_params(folder, model) if model else load_start(str(folder))


def edit(path, *keys, **changes):
    """Changes keys of a JSON object, or of one inside of it."""
    values = json.loads(path.read_text())
    part = values
    for key in keys:
        part = part[key]
    part.update(changes)
    path.write_text(json.dumps(values))


def test_damaged_weights(folder, case):
    first, *_, last = shards(folder)
    original = last.read_bytes()
    last.write_bytes(b"\xff" * 8 + original[8:])
    refused(
        folder,
        rf"{last.name}: not a readable safetensors file: a header of \d+ bytes in a",
        case.model,
    )
    last.write_bytes(original[:8] + b"(" + original[9:])
    refused(folder, rf"{last.name}: not a readable safetensors file: ", case.model)
    last.write_bytes(original[:-100])
    refused(
        folder, rf"{last.name}: not a readable .*: truncated: tensor \S+ ends at byte", case.model
    )
    last.unlink()
    refused(folder, rf"{last.name}: not found; {INDEX_FILE} names it", case.model)
    last.write_bytes(original)
    load_params(folder, case.model)
    # What the index names, but no shard has.
    tensors = safetensors.numpy.load_file(first)
    lost = sorted(tensors)[0]
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != lost}, first)
    assert lost in json.loads((folder / INDEX_FILE).read_text())["weight_map"]
    layer = re.search(r"\.(\d+)\.", lost)
    named = f"has no layer {layer[1]}; the config has" if layer else rf"\({re.escape(lost)}\)"
    refused(folder, rf"{INDEX_FILE}: .*{named}", case.model)
    (folder / INDEX_FILE).write_text("{")
    refused(folder, rf"{INDEX_FILE}: not an index of safetensors files", case.model)


def text_section(config):
    return ("text_config",) if "text_config" in config else ()


@pytest.mark.parametrize("kind", ["longrope", "spiral"])
def test_rope_types_that_are_not_implemented(folder, kind):
    path = folder / "config.json"
    section = text_section(json.loads(path.read_text()))
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    rope |= {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "mrope_section": [1, 1, 2]}
    rope["original_max_position_embeddings"] = 16  # which transformers wants of longrope
    values = json.loads(path.read_text())
    ropes = (values[section[0]] if section else values)["rope_parameters"]
    by_layer = "full_attention" in ropes
    edit(path, *section, rope_parameters=ropes | {"full_attention": rope} if by_layer else rope)
    where = ".".join((*section, "rope_parameters")) if section else r"config\.json\.rope_parameters"
    told = rf"{where}: rope_type is '{kind}'; this version implements def"
    gemma4 = "gemma4", "gemma4_unified"
    if values["model_type"] in gemma4 and kind == "longrope":  # whose heads are not all alike
        told = rf"transformers cannot read it as a {values['model_type']}: .*head_dim"
    refused(folder, rf"config\.json: {told}")
    if by_layer:
        return
    # As transformers 4 wrote it.
    values = json.loads(path.read_text())
    part = values[section[0]] if section else values
    del part["rope_parameters"]
    part |= {"rope_theta": 1e4, "rope_scaling": {"type": kind, "factor": 2.0} | rope}
    del part["rope_scaling"]["rope_type"], part["rope_scaling"]["rope_theta"]
    path.write_text(json.dumps(values))
    refused(folder, rf"config\.json: {where}: rope_type is '{kind}'")


def test_architectures_that_are_not_implemented(folder):
    path = folder / "config.json"
    original = path.read_text()
    values = json.loads(original)
    # transformers takes these towers, and both parts of Gemma 4, to be its own whatever the file
    # calls them.
    qwen = "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"
    towers = dict.fromkeys((*qwen, "idefics3", "smolvlm"), ("vision_config",))
    unnamed = towers | dict.fromkeys(("gemma4", "gemma4_unified"), ("text_config", "vision_config"))
    for part in ("text_config", "vision_config"):
        if part not in values or part in unnamed.get(values["model_type"], ()):
            continue
        for kind in ("gpt2", "evil"):
            edit(path, part, model_type=kind)
            refused(folder, rf"config\.json: .*{kind}")
            path.write_text(original)
    for kind in ("gpt2", "evil", None):
        edit(path, model_type=kind)
        refused(folder, rf"config\.json: model_type is {kind!r}; this version implements .*llava")
    path.write_text("[]")
    refused(folder, r"config\.json: cannot be read as a model config")


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickles_are_not_loaded(folder, case, tmp_path):
    harm = tmp_path / "harm"
    data = pickle.dumps(Harm(harm))
    names = [file.name.replace(".safetensors", ".bin") for file in shards(folder)]
    index = json.loads((folder / INDEX_FILE).read_text())
    for name, file in zip(names, shards(folder), strict=True):
        (folder / name).write_bytes(data)
        file.unlink()
    refused(
        folder,
        rf"{min(index['weight_map'].values())}: not found; {INDEX_FILE} names it",
        case.model,
    )
    index["weight_map"] = {
        key: name.replace(".safetensors", ".bin") for key, name in index["weight_map"].items()
    }
    (folder / INDEX_FILE).write_text(json.dumps(index))
    refused(folder, rf"{names[0]}: not a readable safetensors file", case.model)
    (folder / INDEX_FILE).rename(folder / "pytorch_model.bin.index.json")
    refused(
        folder,
        rf"model\.safetensors: not found; there is {names[0]}, a pickle, which may run",
        case.model,
    )
    assert not harm.exists()
    pickle.loads(data)
    assert harm.exists()  # it would have


AUTO_MAP = {
    "AutoConfig": "evil.Evil",
    "AutoModel": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoModelForImageTextToText": "evil.Evil",
    "AutoProcessor": "evil.Evil",
    "AutoImageProcessor": "evil.Evil",
    "AutoVideoProcessor": "evil.Evil",
    "AutoTokenizer": ["evil.Evil", "evil.Evil"],
}


def test_code_is_not_run(folder, tmp_path):
    """Whatever file asks for it, `trust_remote_code` in a file included."""
    harm = tmp_path / "harm"
    code = f"import pathlib\npathlib.Path({str(harm)!r}).touch()\nclass Evil: pass\n"
    for name in ("evil.py", "__init__.py", "modeling_llava.py"):
        (folder / name).write_text(code)
    if not (folder / "processor_config.json").exists():
        (folder / "processor_config.json").write_text("{}")
    for file in folder.glob("*.json"):
        if file.name not in (INDEX_FILE, "tokenizer.json"):
            edit(file, auto_map=AUTO_MAP, trust_remote_code=True)
    start = load_start(str(folder))
    assert start.processor.encode("red")
    saved = tmp_path / "saved"
    save_model(saved, start.model, start.params, folder)
    assert not list(saved.glob("*.py"))
    edit(folder / "config.json", model_type="evil")
    refused(folder, r"config\.json: model_type is 'evil'")
    assert not harm.exists()
