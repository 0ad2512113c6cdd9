"""Rotary frequencies against transformers' own, and their position axes."""

import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from mmpo_jax.models.rope import ROPE_TYPES, Rope, read_rope, rope_tables, rotate

PARAMETERS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 1024},
    "dynamic": {"factor": 2.0},
}
YARN_CHANGES = (
    {"attention_factor": 1.3},
    {"beta_fast": 16.0, "beta_slow": 2.0},
    {"mscale": 0.7, "mscale_all_dim": 1.1},
    {"truncate": False},
)
OF_LLAMA = [kind for kind in ROPE_TYPES if kind != "proportional"]
"""That of Gemma 4 alone is held against it in `tests/parity/test_gemma4.py`."""
CASES = [(kind, {}) for kind in OF_LLAMA] + [("yarn", change) for change in YARN_CHANGES]


@pytest.mark.parity
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
@pytest.mark.parametrize(("kind", "change"), CASES)
def test_frequencies(kind, change, theta):
    pytest.importorskip("torch")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": kind, "rope_theta": theta, **PARAMETERS[kind], **change}
    config = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        max_position_embeddings=4096,
        rope_parameters=parameters,
    )
    theirs = LlamaRotaryEmbedding(config)
    rope = read_rope(config.rope_parameters, 64, 4096)
    np.testing.assert_allclose(rope.frequencies, theirs.inv_freq.numpy(), rtol=1e-6)
    assert rope.scale == pytest.approx(theirs.attention_scaling, rel=1e-9)
    assert rope.limit == (4096 if kind == "dynamic" else None)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "longrope"}, "'longrope'.*default, linear, llama3, yarn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_implemented_is_refused(parameters, message):
    with pytest.raises(ValueError, match=message):
        read_rope({"rope_theta": 1e4, **parameters}, 64, 4096)


def test_a_rotation_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    query, key = rng.standard_normal((2, 1, 1, 1, 8))
    rope = read_rope({"rope_theta": 100.0}, 8, 64)

    def score(at, seen):
        turned = [
            rotate(jnp.array(x), rope_tables(jnp.full((1, 1, 1), place), rope))
            for x, place in ((query, at), (key, seen))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(7, 3) == pytest.approx(score(24, 20), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)
    assert score(0, 0) == pytest.approx(float((query * key).sum()), abs=1e-6)


def test_each_section_follows_its_own_axis():
    rope = Rope((1.0, 0.5, 0.25, 0.125), 1.0, (1, 2, 1))
    assert rope.axes == 3
    cos, sin = rope_tables(jnp.array([[[3], [5], [7]]]), rope)
    np.testing.assert_allclose(cos.ravel(), np.cos([3.0, 2.5, 1.25, 0.875]), rtol=1e-6)
    np.testing.assert_allclose(sin.ravel(), np.sin([3.0, 2.5, 1.25, 0.875]), rtol=1e-6)
