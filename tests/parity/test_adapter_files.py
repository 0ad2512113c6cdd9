"""Files of adapters: names of every layout, halved precision, and what is refused."""

import json
import shutil

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402

from mmpo_jax.checkpoints.checkpoint import load_start  # noqa: E402
from mmpo_jax.checkpoints.peft import (  # noqa: E402
    CONFIG_FILE,
    WEIGHTS_FILE,
    load_adapter,
    save_adapter,
    with_adapter,
)
from mmpo_jax.core.trees import flatten  # noqa: E402
from mmpo_jax.models.config import ModelError  # noqa: E402
from mmpo_jax.models.lora import (  # noqa: E402
    Lora,
    adapted_layers,
    add_adapters,
)

pytestmark = pytest.mark.parity

LAYOUTS = {
    "llava in transformers 4": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ),
    "llava in transformers 4.52": (("model.vision_tower.", "model.vision_tower.vision_model."),),
    "internvl in transformers 4": (("model.language_model.", "language_model.model."),),
    "qwen2_5_vl in transformers 4": (
        ("model.language_model.", "model."),
        ("model.visual.", "visual."),
    ),
}
"""How modules were called once; before a space, the family."""


@pytest.fixture
def adapter(family_case, tmp_path):
    """(model, a folder with an adapter of a LLaVA, to be edited)."""
    return make_adapter(family_case("llava"), tmp_path / "adapter", ".*/q_proj|.*/linear_1")


def make_adapter(case, folder, target, dora=False):
    lora = Lora(target=target, rank=2, alpha=4, dora=dora)
    adapted = add_adapters(case.params, case.model, lora, (), 0)
    save_adapter(folder, case.model, adapted, base=str(case.folder), dropout=0.0)
    return case.model, folder


def edit(folder, rename=lambda key: key, change=lambda key, tensor: tensor, **config):
    """Edits an adapter's folder; tensors for which `change` gives None are left out."""
    file = folder / WEIGHTS_FILE
    tensors = {rename(k): change(k, t) for k, t in safetensors.torch.load_file(file).items()}
    safetensors.torch.save_file({k: t for k, t in tensors.items() if t is not None}, file)
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_module_names_of_every_layout(family_case, tmp_path, layout):
    case = family_case(layout.split()[0])
    model, folder = make_adapter(case, tmp_path / "adapter", ".*/(q_proj|qkv|linear_1|down_proj)")
    expected = load_adapter(folder, model)
    renamed = set()

    def rename(key):
        for new, old in LAYOUTS[layout]:
            if key.startswith(f"base_model.model.{new}"):
                renamed.add(new)
                return key.replace(new, old, 1)
        return key

    edit(folder, rename, target_modules=["q_proj", "qkv", "linear_1", "mlp.0", "down_proj"])
    assert renamed == {new for new, _ in LAYOUTS[layout]}
    actual = load_adapter(folder, model)
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_array_equal(actual[path], leaf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files(adapter, dtype):
    model, folder = adapter
    expected = load_adapter(folder, model)
    edit(folder, change=lambda key, tensor: tensor.to(dtype))
    for path, leaf in load_adapter(folder, model).items():
        assert leaf.dtype == np.float32
        np.testing.assert_allclose(leaf, expected[path], rtol=0.01, atol=1e-3)


Q = "base_model.model.model.language_model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        ({"peft_type": "IA3"}, r"adapter_config\.json: peft_type is 'IA3'"),
        ({"use_qalora": True}, r"adapter_config\.json: use_qalora is True"),
        ({"lora_bias": True}, r"adapter_config\.json: lora_bias is True"),
        ({"use_dora": True}, r"q_proj has no lora_magnitude_vector"),
        (
            {"use_dora": True, "target_parameters": ["mlp.experts.down_proj"]},
            "use_dora with target_parameters, of which PEFT has no DoRA",
        ),
        ({"modules_to_save": ["linear_2"]}, "modules_to_save has .linear_2., and only rew"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"base_model_name_or_path": "/none"}, "the model of this adapter: /none"),
        ({"r": 3}, r"safetensors: model\..*: lora_A has shape \(2, \d+\), .* give \(3, "),
        (
            {"change": lambda key, tensor: tensor[:, :7].clone() if Q in key else tensor},
            r"1\.self_attn\.q_proj: lora_A has shape \(2, 7\), .* give \(2, 32\)",
        ),
        (
            {"change": lambda key, tensor: None if key == f"{Q}.lora_B.weight" else tensor},
            r"1\.self_attn\.q_proj has no lora_B",
        ),
        (
            {"change": lambda key, tensor: None if key.startswith(Q) else tensor},
            r"1\.self_attn\.q_proj has none, against target_modules",
        ),
        (
            {"target_modules": ["linear_1"]},
            r"q_proj has an adapter, against target_modules",
        ),
        (
            {"rename": lambda key: key.replace("layers.0.", "layers.3.")},
            r"language_model\.layers\.0\.self_attn\.q_proj has none, against target_modules",
        ),
        (
            {"rename": lambda key: key.replace("vision_tower", "visual")},
            r"model\.visual\..* is no layer of this llava",
        ),
        (
            {"rename": lambda key: key.replace("q_proj", "query")},
            r"self_attn\.query is no layer of this llava",
        ),
        (
            {"rename": lambda key: key.replace(Q, "base_model.model.lm_head")},
            "lm_head is no layer of this llava that can be adapted",
        ),
        (
            {"rename": lambda key: key.replace("lora_A.weight", "lora_magnitude_vector")},
            "unexpected tensor .*lora_magnitude_vector",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(adapter, edits, told):
    _, folder = adapter
    edit(folder, **edits)
    with pytest.raises(ModelError, match=told) as caught:
        load_start(str(folder))
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("edits", "told"),
    [
        (
            {"change": lambda key, t: t[:5].clone() if key.endswith("_vector") and Q in key else t},
            r"1\.self_attn\.q_proj: lora_magnitude_vector has shape \(5,\), .* give \(32,\)",
        ),
        (
            {"change": lambda key, t: None if key.endswith("_vector") and Q in key else t},
            r"1\.self_attn\.q_proj has no lora_magnitude_vector",
        ),
        (
            {"use_dora": False},
            r"unexpected tensor .*lora_magnitude_vector; only lora_A, lora_B and",
        ),
    ],
)
def test_magnitudes_that_do_not_fit_are_refused(family_case, tmp_path, edits, told):
    _, folder = make_adapter(family_case("llava"), tmp_path / "adapter", ".*/q_proj", dora=True)
    load_start(str(folder))
    edit(folder, **edits)
    with pytest.raises(ModelError, match=told):
        load_start(str(folder))


@pytest.mark.parametrize(
    ("theirs", "ours", "told"),
    [
        ("qwen2_5_vl", "llava", r"model\.visual\.\S+ is no layer of this llava"),
        ("internvl", "llava_next", r"attention\.\S+ is no layer of this llava_next"),
        ("llava", "qwen2_5_vl", r"model\.\S+ is no layer of this qwen2_5_vl"),
        ("llama", "internvl", r"model\.layers\.\S+ is no layer of this internvl"),
        ("llava_next", "mistral", r"model\.\S+ is no layer of this mistral"),
        ("qwen3", "qwen2", r"_proj: lora_[AB] has shape .*, the model and .* give"),
    ],
)
def test_an_adapter_for_another_model(family_case, tmp_path, theirs, ours, told):
    make_adapter(family_case(theirs), tmp_path / "adapter", ".*")
    edit(tmp_path / "adapter", base_model_name_or_path=str(family_case(ours).folder))
    with pytest.raises(ModelError, match=rf"{WEIGHTS_FILE}: .*{told}"):
        load_start(str(tmp_path / "adapter"))


def test_broken_files_are_refused(adapter):
    model, folder = adapter
    (folder / WEIGHTS_FILE).write_bytes(b"\x00" * 20)
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors: not a readable"):
        load_adapter(folder, model)
    (folder / WEIGHTS_FILE).rename(folder / "adapter_model.bin")
    with pytest.raises(ModelError, match="not found; adapters are read from safetensors files"):
        load_adapter(folder, model)
    (folder / CONFIG_FILE).write_text("{")
    with pytest.raises(ModelError, match="cannot be read as an adapter's config"):
        load_adapter(folder, model)


def test_an_adapter_of_an_adapter(adapter, tmp_path):
    """Both count; one that names itself is refused."""
    model, folder = adapter
    edit(folder, change=lambda key, tensor: torch.full_like(tensor, 0.1))
    second = shutil.copytree(folder, tmp_path / "second")
    edit(second, base_model_name_or_path=str(folder))
    once, twice = (flatten(load_start(str(name)).params) for name in (folder, second))
    base = flatten(
        load_start(json.loads((folder / CONFIG_FILE).read_text())["base_model_name_or_path"]).params
    )
    for path, leaf in base.items():
        np.testing.assert_allclose(twice[path] - leaf, 2 * (once[path] - leaf), atol=1e-6)
    moved = [path for path in base if np.abs(once[path] - base[path]).max() > 1e-3]
    assert len(moved) == len(adapted_layers(with_adapter({}, folder, model))) == 3
    edit(folder, base_model_name_or_path=str(second))
    with pytest.raises(ModelError, match="named as its own base"):
        load_start(str(folder))
