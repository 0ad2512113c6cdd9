"""Adapters in and out of PEFT's format: logits and gradients are PEFT's."""

import dataclasses
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
from helpers import checks, families  # noqa: E402

from mmpo_jax.checkpoints.checkpoint import load_start  # noqa: E402
from mmpo_jax.checkpoints.peft import CONFIG_FILE, load_adapter, save_adapter, with_adapter  # noqa: E402
from mmpo_jax.commands.convert import convert  # noqa: E402
from mmpo_jax.core.trees import flatten, unflatten  # noqa: E402
from mmpo_jax.models.log_probs import response_log_probs  # noqa: E402
from mmpo_jax.models.lora import (  # noqa: E402
    MAGNITUDE,
    A,
    B,
    Lora,
    add_adapters,
    cast_params,
    is_adapter,
    merge_adapters,
    without_adapters,
)

pytestmark = pytest.mark.parity

CONFIGS = {
    "llava-short-names": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "llava-everything": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": "all-linear",
        "rank_pattern": {"linear_1": 2, "layers.0.self_attn.q_proj": 5, "mlp.fc[12]": 1},
        "alpha_pattern": {"language_model.*down_proj": 8, "linear_2": 1},
        "use_rslora": True,
    },
    "llava-some-layers": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "fc1"],
        "layers_to_transform": [1],
    },
    "llava-regular-expression": {
        "r": 2,
        "lora_alpha": 3,
        "target_modules": r".*language_model.*\.(o_proj|gate_proj)|.*linear_2",
        "exclude_modules": ["layers.0.mlp.gate_proj"],
    },
    "qwen2-ranks-by-layer": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": "all-linear",
        "rank_pattern": {r"^model\.layers\.1\..*": 2},
        "alpha_pattern": {"0.mlp.up_proj": 7},
        "lora_dropout": 0.1,
    },
    "llava_next-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"linear_1": 2, "layers.0.self_attn.q_proj": 5},
    },
    "llava_onevision-one-layer-of-the-decoder": {
        "r": 2,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "fc2", "down_proj"],
        "layers_to_transform": 0,
        "layers_pattern": ["language_model.layers"],
    },
    "internvl-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"layer.1.attention.projection_layer": 2},
    },
    "idefics3-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"connector.modality_projection.proj": 2, "vision_model.*q_proj": 5},
    },
    "mistral3-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"patch_merger.merging_layer": 2, "attention.q_proj": 5},
    },
    "qwen2_5_vl-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"attn.qkv": 5, r"merger.mlp\.0": 2},
    },
    "qwen2_5_vl-one-block-of-the-tower": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["qkv", "attn.proj", "gate_proj", "mlp.2"],
        "layers_to_transform": [1],
        "layers_pattern": "blocks",
    },
    "qwen3_vl-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"attn.qkv": 5, r"deepstack_merger_list\.0\.linear_fc1": 2},
    },
    "llava-dora-everything": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": "all-linear",
        "use_dora": True,
        "rank_pattern": {"linear_1": 2, "layers.0.self_attn.q_proj": 5, "mlp.fc[12]": 1},
        "alpha_pattern": {"language_model.*down_proj": 8, "linear_2": 1},
        "use_rslora": True,
    },
    "qwen2_5_vl-dora-everything": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "use_dora": True,
    },
    "qwen2-dora-some-layers": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [1],
        "use_dora": True,
    },
    "llama-attention": {"r": 2, "lora_alpha": 4, "target_modules": r".*\.self_attn\..*"},
    "mistral-rank-stabilised": {
        "r": 4,
        "lora_alpha": 2,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "use_rslora": True,
    },
    "qwen3-everything": {"r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
    "qwen3_moe-attention-and-experts": {
        "r": 3,
        "lora_alpha": 5,
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {r"layers.1.mlp.experts.gate_up_proj": 2},
        "alpha_pattern": {"experts.down_proj": 4},
    },
    "qwen3_moe-experts-of-one-layer": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["v_proj"],
        "target_parameters": ["layers.1.mlp.experts.down_proj"],
        "use_rslora": True,
    },
    "qwen3_5-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"in_proj_qkv": 5, r"layers\.1\.self_attn\.q_proj": 2},
    },
    "qwen3_5_moe-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "rank_pattern": {"shared_expert.down_proj": 2},
    },
    "qwen3_5_moe_text-shared-expert": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["shared_expert.gate_proj", "shared_expert_gate", "q_proj"],
        "target_parameters": ["mlp.experts.down_proj"],
    },
    "gemma4_26b-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": r".*language_model.*(_proj|\.proj)",
        "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        "rank_pattern": {"experts.down_proj": 2, "router.proj": 1},
    },
    "gemma4_e2b-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"per_layer_input_gate": 2, "per_layer_model_projection": 1},
    },
    "gemma4_unified-everything": {
        "r": 3,
        "lora_alpha": 4,
        "target_modules": "all-linear",
        "rank_pattern": {"patch_dense": 2, "embedding_projection": 1},
    },
    "gemma4_26b-experts-of-one-layer": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": r".*language_model.*q_proj",
        "target_parameters": ["layers.2.experts.gate_up_proj"],
    },
    "qwen3_5_text-delta-nets": {
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj"],
    },
}
"""Names begin with the family's."""


@pytest.fixture(scope="module")
def base(family_case):
    """Family -> its checkpoint, with a model of transformers that nobody else has."""

    def base(name):
        case = family_case(name)
        return dataclasses.replace(case, theirs=load_theirs(case))

    return base


def load_theirs(case):
    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return type(case.theirs).from_pretrained(case.folder, **options).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def trained_elsewhere(request, base, tmp_path_factory):
    """(our base, PEFT's model with a random adapter, the folder where PEFT saved it)."""
    case = base(request.param.split("-")[0])
    config = peft.LoraConfig(**CONFIGS[request.param], base_model_name_or_path=str(case.folder))
    theirs = peft.get_peft_model(case.theirs, config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in sorted(theirs.named_parameters()):
            if ".lora_" in name:
                drawn = 0.3 * torch.randn(tensor.shape, generator=generator)
                tensor.copy_(tensor * (1 + drawn) if "magnitude" in name else drawn)
    folder = tmp_path_factory.mktemp("adapter") / request.param
    theirs.save_pretrained(folder)
    return case, theirs, folder


def compare(case, theirs, params, tolerance):
    """Our logits against theirs, every response in a row of its own there."""
    records = families.records(case.model.config.family)
    tokenized, batch = checks.batch_of(case, records)
    params = cast_params(params, np.float32)
    ours = np.asarray(checks.response_logits(case.model, params, batch))
    for row, tokens in enumerate(tokenized):
        for column, response in enumerate(tokens.responses):
            expected = their_logits(case, theirs, records[row], tokens, response)
            actual = ours[row, column, : len(response.ids)]
            assert expected.std() > 0.5
            np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=tolerance)


def their_logits(case, theirs, record, tokens, response):
    """What predicts each token of a response, [T, V]."""
    ids = np.concatenate([tokens.prompt_ids, response.ids])
    made = theirs(input_ids=torch.tensor(ids[None]).long(), **families.inputs(case)(record, ids))
    return made.logits[0, len(tokens.prompt_ids) - 1 : -1]


@pytest.mark.slow
def test_logits_of_an_adapter_trained_elsewhere(trained_elsewhere):
    case, theirs, folder = trained_elsewhere
    params = with_adapter(case.params, folder, case.model)
    compare(case, theirs, params, 1e-4)
    with theirs.disable_adapter():
        compare(case, theirs, without_adapters(params), 1e-4)
        with pytest.raises(AssertionError):
            compare(case, theirs, params, 1e-2)


def test_merging_changes_nothing(trained_elsewhere):
    """With weights as a new model has them and adapters smaller than these: with the large ones of
    the other tests the float32 forward, merged or not, is 1e-5 away from one in float64, and a sum
    in float64 brings it no nearer (`test_lora.py` computes all of it in float64)."""
    case, _, folder = trained_elsewhere
    base = jax.tree.map(np.asarray, case.model.init(0))
    flat = flatten(with_adapter(base, folder, case.model))
    params = unflatten({p: 0.2 * leaf if p.endswith(B) else leaf for p, leaf in flat.items()})
    _, batch = checks.batch_of(case, families.records(case.model.config.family))
    without, apart, merged = (
        np.asarray(checks.response_logits(case.model, cast_params(tree, np.float32), batch))[
            batch.response_mask
        ]
        for tree in (base, params, merge_adapters(params))
    )
    assert np.abs(apart - without).max() > 0.1
    # Delta nets carry rounding from token to token. Gemma 4's norms enlarge what is small, where
    # adapters move logits by 4; in float64 merging them moves these by 5e-14.
    atol = {"qwen3_5": 3e-5, "qwen3_5_moe": 3e-5, "gemma4": 2e-4, "gemma4_unified": 2e-4}
    family = case.model.config.family.removesuffix("_text")
    np.testing.assert_allclose(merged, apart, rtol=0, atol=atol.get(family, 1e-5))


def test_a_recipe_can_name_an_adapter(trained_elsewhere):
    case, theirs, folder = trained_elsewhere
    start = load_start(str(folder))
    assert (start.folder, start.model) == (str(folder), case.model)
    compare(case, theirs, start.params, 1e-4)
    assert start.fingerprint != load_start(str(case.folder)).fingerprint


@pytest.mark.parametrize("trained_elsewhere", ["llava-everything"], indirect=True)
def test_converting_an_adapter_merges_it(trained_elsewhere, tmp_path, caplog):
    """Into a folder that transformers loads, which computes what PEFT does; in another dtype the
    log says how much of the adapter is left."""
    case, theirs, folder = trained_elsewhere
    assert convert(str(folder), str(tmp_path / "out")) == f"Hugging Face folder: {tmp_path / 'out'}"
    merged = dataclasses.replace(case, folder=tmp_path / "out")
    compare(case, theirs, load_start(str(merged.folder)).params, 1e-4)
    compare(case, load_theirs(merged), merge_adapters(load_start(str(folder)).params), 1e-4)
    assert not (merged.folder / CONFIG_FILE).exists()
    with caplog.at_level("INFO"):
        convert(str(folder), str(tmp_path / "half"), "bfloat16")
    assert "of the update is in the saved weights." in caplog.text
    run = tmp_path / "run"
    assert convert(str(merged.folder), str(run)) == f"Orbax checkpoint: {run}"


@pytest.mark.parametrize(
    "trained_elsewhere",
    [
        "llava-everything",
        "qwen2-ranks-by-layer",
        "qwen2_5_vl-everything",
        "qwen3_vl-everything",
        "llava-dora-everything",
        "qwen2-dora-some-layers",
    ],
    indirect=True,
)
@pytest.mark.slow
def test_gradients(trained_elsewhere):
    """Of the summed log-probs of all responses."""
    case, theirs, folder = trained_elsewhere
    params = flatten(with_adapter(case.params, folder, case.model))
    records = families.records(case.model.config.family)
    tokenized, batch = checks.batch_of(case, records)
    trained = {path: leaf for path, leaf in params.items() if is_adapter(path)}

    @jax.jit
    @jax.grad
    def gradient(trained, params):
        tree = cast_params(unflatten({**params, **trained}), np.float32)
        return response_log_probs(case.model, tree, batch).sum()

    ours = flatten(gradient(trained, params))
    theirs.zero_grad()
    for row, tokens in enumerate(tokenized):
        for response in tokens.responses:
            scores = their_logits(case, theirs, records[row], tokens, response).log_softmax(-1)
            labels = torch.tensor(response.ids).long()[:, None]
            scores.gather(1, labels).sum().backward()
    compared = 0
    for name, tensor in theirs.named_parameters():
        if ".lora_" not in name or tensor.grad is None:  # what no feature has passed
            continue
        path, layer = our_path(case.model, name)
        expected = tensor.grad.numpy().T
        actual = np.asarray(ours[path] if layer is None else ours[path][layer])
        padded = np.zeros_like(actual)
        padded[tuple(map(slice, expected.shape))] = expected
        np.testing.assert_allclose(
            actual, padded, rtol=1e-3, atol=1e-4 * np.abs(expected).max(), err_msg=name
        )
        compared += np.abs(expected).max() > 1e-3
    assert compared >= 4


def our_path(model, name):
    """(path, layer) of a parameter of PEFT's model."""
    from mmpo_jax.checkpoints.tensor_names import path_of

    module, factor = name.removesuffix(".default.weight").rsplit(".lora_", 1)
    path, layer = path_of(module.removeprefix("base_model.model.") + ".weight", model)
    leaf = {"A": A, "B": B, "magnitude_vector": MAGNITUDE}[factor]
    return f"{path.removesuffix('/kernel')}/{leaf}", layer


def check_loads_in_peft(folder, case):
    """PEFT's model with the adapter of a folder, all of it read and nothing missing."""
    theirs = peft.PeftModel.from_pretrained(load_theirs(case), folder)
    again = theirs.load_adapter(str(folder), "again")
    assert not again.unexpected_keys
    assert not [key for key in again.missing_keys if "again" in key]
    theirs.set_adapter("default")
    return theirs.eval()


def test_saved_again_it_is_the_same_adapter(trained_elsewhere, tmp_path):
    case, _, folder = trained_elsewhere
    params = with_adapter(case.params, folder, case.model)
    target = tmp_path / "again"
    save_adapter(target, case.model, params, base=str(case.folder), dropout=0.1)
    compare(case, check_loads_in_peft(target, case), params, 1e-4)
    before, after = load_adapter(folder, case.model), load_adapter(target, case.model)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_allclose(after[path], leaf, rtol=1e-6, err_msg=path)


@pytest.mark.parametrize(
    ("family", "target", "dora"),
    [
        *((name, ".*", False) for name in families.FAMILIES),
        ("llava", "language_model/layers/self_attn/[qv]_proj", False),
        ("llava", ".*", True),
        ("qwen3_5", ".*", True),
    ],
)
def test_ours_loads_in_peft(base, tmp_path, family, target, dora):
    case = base(family)
    lora = Lora(target=target, rank=4, alpha=6, dora=dora)
    flat = flatten(add_adapters(case.params, case.model, lora, (), 0))
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        drawn = (0.3 * rng.standard_normal(leaf.shape)).astype(np.float32)
        if path.endswith(B):
            flat[path] = drawn
        elif path.endswith(MAGNITUDE):
            flat[path] = np.asarray(leaf * (1 + drawn))
    params = unflatten(flat)
    save_adapter(tmp_path / "a", case.model, params, base=str(case.folder), dropout=0.0)
    compare(case, check_loads_in_peft(tmp_path / "a", case), params, 1e-4)
    config = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["use_dora"]) == (4, 6, dora)
    # Gates of experts and what they multiply have one A there, so it takes both of ours.
    assert set(config["rank_pattern"].values()) <= {8}
    assert all(name.endswith("experts.gate_up_proj") for name in config["rank_pattern"])
    if target == ".*":  # but for the head, all that PEFT calls linear
        linear = [n for n, part in case.theirs.named_modules() if isinstance(part, torch.nn.Linear)]
        assert sorted(config["target_modules"]) == sorted(set(linear) - {"lm_head"})
    # It is one of PEFT's own options that this names, in its words.
    assert config.keys() <= set(peft.LoraConfig().to_dict())
    for path, leaf in load_adapter(tmp_path / "a", case.model).items():
        np.testing.assert_array_equal(leaf, flat[path], err_msg=path)
