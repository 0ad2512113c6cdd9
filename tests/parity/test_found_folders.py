"""Folders whose files contradict each other are to us what they are to transformers."""

import dataclasses
import json
import re
import shutil

import pytest

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402
from helpers import checks, families  # noqa: E402

from mmpo_jax.checkpoints.checkpoint import load_start  # noqa: E402
from mmpo_jax.checkpoints.huggingface import load_model, save_model  # noqa: E402
from mmpo_jax.models.families import FAMILIES  # noqa: E402

pytestmark = pytest.mark.parity


def as_loaded(case, folder):
    """A folder in transformers and here."""
    theirs = type(case.theirs).from_pretrained(folder, attn_implementation="eager").eval()
    model, params = load_model(folder)
    return dataclasses.replace(case, theirs=theirs, model=model, params=params)


@pytest.mark.parametrize("stored", ["own", "equal", "alone"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_head_beside_a_config_that_says_tied(family_case, tmp_path, name, stored):
    """Its own is used, an equal one is tied, one without an embedding is both."""
    case = family_case(name, True)
    folder = tmp_path / "model"
    save_model(folder, case.model, case.params, case.folder)
    file = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    (embedding,) = (key for key in tensors if key.endswith("embed_tokens.weight"))
    outer = re.fullmatch(r"model\.((language|text)_model\.)?embed_tokens\.weight", embedding)
    head = "lm_head.weight" if outer else embedding.replace("model.embed_tokens", "lm_head")
    tensors[head] = tensors[embedding].clone()
    if stored == "own":
        tensors[head] = 0.3 * tensors[head].flip(0)
    if stored == "alone":
        del tensors[embedding]
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    loaded = as_loaded(case, folder)
    assert loaded.model.config.decoder.tie_word_embeddings == (stored != "own")
    checks.check_logits(loaded, families.records(name), families.inputs(loaded))


@pytest.mark.parametrize("name", [name for name in FAMILIES if families.FAMILIES[name].media])
@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (None, True)])
def test_switches_that_differ(family_case, tmp_path, name, outer, inner):
    """With a head that is stored and not the embedding."""
    case = family_case(name)
    folder = tmp_path / "model"
    shutil.copytree(case.folder, folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["tie_word_embeddings"] = inner
    config.pop("tie_word_embeddings", None)
    if outer is not None:
        config["tie_word_embeddings"] = outer
    path.write_text(json.dumps(config))
    loaded = as_loaded(case, folder)
    assert not loaded.model.config.decoder.tie_word_embeddings
    checks.check_logits(loaded, families.records(name), families.inputs(loaded))


@pytest.mark.parametrize("name", ["qwen2", "llava"])
def test_an_adapter_beside_a_whole_model(family_case, tmp_path, name):
    """It is added to the model in its folder, whatever model its config names."""
    peft = pytest.importorskip("peft")
    case = family_case(name)
    base = type(case.theirs).from_pretrained(case.folder)
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, options)
    folder = tmp_path / "model"
    shutil.copytree(case.folder, folder)
    adapted.save_pretrained(folder)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": "elsewhere/unknown"}
    path.write_text(json.dumps(config))
    theirs = type(case.theirs).from_pretrained(folder, attn_implementation="eager").eval()
    start = load_start(str(folder))
    loaded = dataclasses.replace(case, theirs=theirs, params=start.params)
    checks.check_logits(loaded, families.records(name), families.inputs(loaded))
    with pytest.raises(AssertionError):
        checks.check_logits(
            dataclasses.replace(loaded, params=case.params),
            families.records(name),
            families.inputs(loaded),
        )
    assert start.fingerprint != load_start(str(case.folder)).fingerprint
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(Exception, match=r"merged into it, remove adapter_config\.json"):
        load_start(str(folder))
