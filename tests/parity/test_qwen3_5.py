"""Qwen3.5 and its mixtures against transformers: its layers, whole decoders, folders."""

import re
import shutil

import numpy as np
import pytest

pytest.importorskip("torch")
import safetensors.torch
import torch
import transformers
from helpers import checks, deep_media, qwen_media
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs_in_torch

from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.core.trees import flatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.delta_rule import gated_delta_rule, unit
from mmpo_jax.models.model import read_config

pytestmark = pytest.mark.parity

LINEAR, FULL = "linear_attention", "full_attention"
SIZES = checks.TEXT | {
    "vocab_size": len(checks.token_ids()) + 2,
    "max_position_embeddings": 512,
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
EXPERTS = checks.EXPERTS | {"shared_expert_intermediate_size": 40}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
CASES = {
    "as-published": {"num_hidden_layers": 8},
    "uneven-tied": {
        "num_hidden_layers": 5,
        "layer_types": [FULL, LINEAR, LINEAR, FULL, LINEAR],
        "tie_word_embeddings": True,
        "linear_num_key_heads": 4,
        "linear_conv_kernel_dim": 2,
        "rope_parameters": ROPE,
    },
    "biases-yarn-one-key-head": {
        "num_hidden_layers": 4,
        "layer_types": [LINEAR, FULL] * 2,
        "attention_bias": True,
        "linear_num_key_heads": 1,
        "linear_conv_kernel_dim": 5,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-3,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": YARN,
    },
    "mixture": {"num_hidden_layers": 4} | EXPERTS,
    # 2 F is D: axes of joined experts cannot be told apart.
    "mixture-uneven-tied-one-expert": {
        "num_hidden_layers": 3,
        "layer_types": [FULL, LINEAR, FULL],
        "tie_word_embeddings": True,
        "num_experts": 5,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 8,
    },
    "mixture-biases-yarn-all-experts": {
        "num_hidden_layers": 4,
        "layer_types": [LINEAR, FULL] * 2,
        "attention_bias": True,
        "hidden_act": "gelu_pytorch_tanh",
        "rope_parameters": YARN,
        "num_experts": 3,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 32,
    },
}
RECORDS = [
    checks.record("0", "what is this ?", (), "a red star", "two blue ring and a green star"),
    checks.record(
        "1", "red green blue " * 30 + "what is this ?", (), "a ring", "a red red red green ring"
    ),
    checks.record("2", "blue", (), "star", "is this a star ?"),
]


def weights_of(name):
    """Norms of mixtures multiply by around 1: by 2, routers tell experts apart by differences that
    float32 rounds."""
    return {"norm": 0.0} if name.startswith("mixture") else {}


def config_of(name):
    kind = transformers.Qwen3_5TextConfig
    if name.startswith("mixture"):
        kind = transformers.Qwen3_5MoeTextConfig
    config = kind(**SIZES | CASES[name])
    config._attn_implementation = "eager"
    return config


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_5") / request.param
    checks.save_tokenizer(folder)
    theirs = transformers.AutoModelForCausalLM.from_config(config_of(request.param))
    return checks.make_case(folder, theirs, **weights_of(request.param))


def vlm_config(text=(), vision=(), kind=transformers.Qwen3_5Config, **switches):
    text = SIZES | {"vocab_size": len(deep_media.IDS) + 2, "num_hidden_layers": 4} | dict(text)
    return qwen_media.make_config(kind, deep_media.IDS, text, VISION | dict(vision), **switches)


def mixture_config(text=(), vision=(), **switches):
    kind = transformers.Qwen3_5MoeConfig
    return vlm_config(EXPERTS | dict(text), vision, kind, **switches)


VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 8,
    "num_position_embeddings": 25,
}
VLM_CASES = {
    "as-published": vlm_config({"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}),
    "tied-biases-large-sections": vlm_config(
        {"attention_bias": True, "rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
        {"hidden_act": "gelu", "num_position_embeddings": 9, "num_heads": 4},
        tie_word_embeddings=True,
    ),
    "merge-of-three": vlm_config(
        {"layer_types": [LINEAR, FULL, FULL, LINEAR], "rope_parameters": ROPE},
        {"patch_size": 4, "spatial_merge_size": 3, "depth": 3},
    ),
    "mixture": mixture_config({"rope_parameters": ROPE | {"mrope_section": [2, 1, 1]}}),
    "mixture-tied-biases-one-expert": mixture_config(
        {"attention_bias": True, "num_experts_per_tok": 1, "rope_parameters": ROPE},
        {"hidden_act": "gelu", "num_position_embeddings": 9, "num_heads": 4},
        tie_word_embeddings=True,
    ),
    "mixture-merge-of-three": mixture_config(
        {"layer_types": [LINEAR, FULL, FULL, LINEAR], "rope_parameters": ROPE}
        | {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 3},
        {"patch_size": 4, "spatial_merge_size": 3, "depth": 3},
    ),
}


@pytest.fixture(scope="module", params=VLM_CASES)
def vlm(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3_5_vlm") / request.param
    return deep_media.make_case(folder, VLM_CASES[request.param], **weights_of(request.param))


@pytest.mark.parametrize("tokens", [1, 60, 130])
def test_delta_rule_is_that_of_torch(tokens):
    rng = np.random.default_rng(0)
    query, key = rng.normal(size=(2, 2, tokens, 2, 8)).astype(np.float32)
    value = rng.normal(size=(2, tokens, 4, 6)).astype(np.float32)
    log_decay = -rng.exponential(size=(2, tokens, 4)).astype(np.float32)
    strength = rng.uniform(size=(2, tokens, 4)).astype(np.float32)
    state = rng.normal(size=(2, 4, 8, 6)).astype(np.float32)
    ours = gated_delta_rule(unit(query), unit(key), value, log_decay, strength, state)
    arrays = map(torch.tensor, (query, key, value, log_decay, strength))
    theirs = theirs_in_torch.torch_chunk_gated_delta_rule(
        *arrays,
        initial_state=torch.tensor(state),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other.numpy(), rtol=0, atol=1e-5)


def tolerance_of(case):
    """Random embeddings make logits sqrt(D) times as large as random heads do, and with them what
    float32 rounds: transformers' tied logits of up to 43 are 9e-4 from those in float64, ours 5e-4.
    """
    decoder = case.model.config.decoder
    return checks.TOLERANCE * (decoder.hidden_size**0.5 if decoder.tie_word_embeddings else 1)


def reference(case):
    """transformers in float64, from which its own float32 is up to 4e-4 away, and ours 7e-5."""
    return checks.in_float64(case)


def test_logits(case):
    checks.check_logits(reference(case), RECORDS, tolerance=tolerance_of(case))


def test_greedy_decoding(case):
    checks.check_greedy(reference(case), RECORDS)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")


def test_logits_about_images_and_videos(vlm):
    records = [*qwen_media.RECORDS, *qwen_media.VIDEOS, *qwen_media.TIMED]
    checks.check_logits(reference(vlm), records, deep_media.their_inputs(vlm), tolerance_of(vlm))


@pytest.mark.slow
def test_greedy_decoding_about_images_and_videos(vlm):
    records = [*qwen_media.RECORDS, *qwen_media.TIMED]
    checks.check_greedy(reference(vlm), records, deep_media.their_inputs(vlm))


def test_folders_of_models_with_a_tower(vlm, tmp_path):
    checks.check_round_trip(vlm, tmp_path / "out")
    checks.check_layout_in_memory(vlm, tmp_path / "memory")


def test_weights_that_transformers_does_not_read(case, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(case.folder, folder)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["mtp.layers.0.self_attn.q_proj.weight"] = torch.zeros(2, 2)
    tensors["mtp.fc.weight"] = torch.zeros(2, 2)
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    found = flatten(load_model(folder)[1])
    for path, leaf in flatten(case.params).items():
        np.testing.assert_array_equal(found.pop(path), leaf, err_msg=path)
    assert not found


@pytest.mark.parametrize(
    ("switches", "told"),
    [
        ({"layer_types": [LINEAR] * 4}, "layer_types has no full_attention"),
        ({"layer_types": [FULL] * 3 + ["sliding_attention"]}, "layer_types is 'sliding_attention'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish'"),
        ({"linear_num_key_heads": 3}, "linear_num_value_heads is 4, no multiple"),
        ({"rope_parameters": ROPE | {"mrope_interleaved": False}}, "mrope_interleaved is False"),
        ({"rope_parameters": ROPE | {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
    ],
)
def test_switches_that_are_refused(switches, told):
    config = transformers.Qwen3_5TextConfig(**SIZES | {"num_hidden_layers": 4})
    for name, value in switches.items():
        setattr(config, name, value)
    with pytest.raises(ModelError, match=re.escape(told)):
        read_config(config)
