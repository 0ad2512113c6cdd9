"""Text-only decoders against transformers."""

import pytest

pytest.importorskip("torch")
import transformers
from helpers import checks

pytestmark = pytest.mark.parity

IDS = checks.token_ids()
SIZES = checks.TEXT | {
    "vocab_size": len(IDS) + 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
GROWING = YARN | {"original_max_position_embeddings": 8, "llama_4_scaling_beta": 0.5}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
CASES = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama-3": transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama-biases-linear-tied": transformers.LlamaConfig(
        **SIZES | {"tie_word_embeddings": True, "num_key_value_heads": 4},
        attention_bias=True,
        mlp_bias=True,
        rope_parameters=LINEAR,
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "mistral-window": transformers.MistralConfig(**SIZES, sliding_window=7),
    "mistral-head-dim": transformers.MistralConfig(
        **SIZES | {"num_key_value_heads": 1}, head_dim=16, sliding_window=None
    ),
    "ministral3": transformers.Ministral3Config(**SIZES, head_dim=16, rope_parameters=GROWING),
    "ministral3-window-tied": transformers.Ministral3Config(
        **SIZES | {"tie_word_embeddings": True},
        head_dim=8,
        sliding_window=6,
        rope_parameters=GROWING | {"mscale": 0.5, "mscale_all_dim": 1.0},
    ),
    "qwen2": transformers.Qwen2Config(**SIZES),
    "qwen2-yarn-tied": transformers.Qwen2Config(
        **SIZES | {"tie_word_embeddings": True}, rope_parameters=YARN
    ),
    "qwen2-some-windows": transformers.Qwen2Config(
        **SIZES | {"num_hidden_layers": 3},
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen2-two-segments": transformers.Qwen2Config(
        **SIZES | {"num_hidden_layers": 7},
        use_sliding_window=True,
        sliding_window=5,
        layer_types=[
            "full_attention" if number in (2, 5) else "sliding_attention" for number in range(7)
        ],
    ),
    "gemma2": transformers.Gemma2Config(
        **SIZES | {"num_hidden_layers": 3},
        head_dim=16,
        query_pre_attn_scalar=20,
        sliding_window=5,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "gemma2-no-limits-tied": transformers.Gemma2Config(
        **SIZES | {"tie_word_embeddings": True},
        head_dim=8,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        attention_bias=True,
        hidden_activation="silu",
    ),
    "gemma3": transformers.Gemma3TextConfig(
        **SIZES | {"num_hidden_layers": 8},
        head_dim=8,
        query_pre_attn_scalar=12,
        sliding_window=5,
        sliding_window_pattern=3,
        rope_parameters={
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "gemma3-capped-tied": transformers.Gemma3TextConfig(
        **SIZES | {"tie_word_embeddings": True},
        head_dim=16,
        sliding_window=7,
        layer_types=["full_attention", "sliding_attention"],
        final_logit_softcapping=2.0,
        attention_bias=True,
        hidden_activation="silu",
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=16),
    "qwen3-tied-biases": transformers.Qwen3Config(
        **SIZES | {"tie_word_embeddings": True}, head_dim=8, attention_bias=True
    ),
    "qwen3-window": transformers.Qwen3Config(
        **SIZES, head_dim=8, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3_moe": transformers.Qwen3MoeConfig(
        **SIZES, **checks.EXPERTS, head_dim=16, norm_topk_prob=True
    ),
    "qwen3_moe-tied-biases": transformers.Qwen3MoeConfig(
        **SIZES | {"tie_word_embeddings": True},
        **checks.EXPERTS | {"num_experts": 5, "num_experts_per_tok": 5},
        head_dim=8,
        attention_bias=True,
        norm_topk_prob=False,
    ),
    "qwen3_moe-dense-layers": transformers.Qwen3MoeConfig(
        **SIZES | {"num_hidden_layers": 4},
        **checks.EXPERTS,
        head_dim=8,
        mlp_only_layers=[1],
        decoder_sparse_step=1,
        norm_topk_prob=True,
    ),
    "qwen3_moe-every-other-layer": transformers.Qwen3MoeConfig(
        **SIZES | {"num_hidden_layers": 4},
        **checks.EXPERTS,
        head_dim=8,
        decoder_sparse_step=2,
    ),
    "qwen3_moe-window-one-expert": transformers.Qwen3MoeConfig(
        **SIZES,
        **checks.EXPERTS | {"num_experts_per_tok": 1},
        head_dim=8,
        use_sliding_window=True,
        sliding_window=6,
        norm_topk_prob=False,
    ),
}
RECORDS = [
    checks.record("0", "what is this ?", (), "a red star", "two blue ring and a green star"),
    checks.record(
        "1", "red green blue " * 4 + "what is this ?", (), "a ring", "a red red red green ring"
    ),
    checks.record("2", "blue", (), "star", "is this a star ?"),
]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text") / request.param
    checks.save_tokenizer(folder)
    config = CASES[request.param]
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    return checks.make_case(folder, theirs)


def test_logits(case):
    checks.check_logits(case, RECORDS)


def test_greedy_decoding(case):
    checks.check_greedy(case, RECORDS)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
