"""Decoders with gated delta nets: prompts that are run once, against plain rows of text."""

import functools
import logging
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from helpers import tiny

from mmpo_jax.core.trees import flatten
from mmpo_jax.inference import plan
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.delta_net import DeltaTokens
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.models.model import Model, read_config
from mmpo_jax.parallel.mesh import make_mesh

VOCABULARY = 41
PROMPTS, RESPONSES = (1, 2, 90), ((5, 1, 7), (2, 7, 3), (7, 4, 1))
LINEAR, FULL = "linear_attention", "full_attention"
CONFIG = transformers.Qwen3_5TextConfig(
    vocab_size=VOCABULARY,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    layer_types=[LINEAR, LINEAR, FULL, LINEAR],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    linear_key_head_dim=6,
    linear_value_head_dim=5,
)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def model():
    return Model.create(read_config(CONFIG))


@pytest.fixture(scope="module")
def params(model):
    with jax.enable_x64(True):
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), tiny.random_params(model))


def text_batch(prompts, responses):
    """Random tokens, behind the real ones too."""
    rng = np.random.default_rng(0)
    sizes = np.array(responses).reshape(len(prompts), -1)
    b, r = sizes.shape
    p, t = max(prompts) + 3, sizes.max() + 2
    prompt_mask = np.arange(p) < np.array(prompts)[:, None]
    mask = np.arange(t) < sizes[..., None]
    prompt_ids = rng.integers(0, VOCABULARY, (b, p)).astype(np.int32)
    response_ids = rng.integers(0, VOCABULARY, (b, r, t)).astype(np.int32)
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        positions=np.broadcast_to(np.arange(p, dtype=np.int32), (b, 1, p)),
        next_position=np.array(prompts, np.int32),
        pixel_values=np.zeros((b, 0, 1), np.float32),
        patches={},
        feature_index=np.full((b, p, 1), -1, np.int32),
        feature_weight=np.zeros((b, p, 1), np.float32),
        response_ids=response_ids,
        response_mask=mask,
        loss_mask=mask,
        weights=np.ones(b, np.float32),
    )


def by_tokens(tokens, config):
    """A gated delta net on one row of tokens without padding, token by token."""
    keys, heads = config.num_key_heads, config.num_value_heads
    split, width = keys * config.key_dim, config.conv_size - 1

    def step(carry, token):
        earlier, state = carry
        channels, log_decay, strength = token
        seen = jnp.concatenate([earlier, channels[None]])
        mixed = jax.nn.silu((seen * tokens.kernel).sum(axis=0))
        query, key = (
            jnp.repeat(x.reshape(keys, -1), heads // keys, axis=0)
            for x in (mixed[:split], mixed[split : 2 * split])
        )
        query, key = (x / jnp.sqrt((x * x).sum(axis=1, keepdims=True) + 1e-6) for x in (query, key))
        state = state * jnp.exp(log_decay)[:, None, None]
        missing = mixed[2 * split :].reshape(heads, -1) - jnp.einsum("hef,he->hf", state, key)
        state = state + jnp.einsum("he,hf->hef", key, strength[:, None] * missing)
        read = jnp.einsum("hef,he->hf", state, query) / math.sqrt(config.key_dim)
        return (seen[1:], state), read

    first = (
        jnp.zeros((width, config.channels)),
        jnp.zeros((heads, config.key_dim, config.value_dim)),
    )
    row = tokens.channels[0], tokens.log_decay[0], tokens.strength[0]
    return jax.lax.scan(step, first, row)[1][None]


@functools.partial(jax.jit, static_argnames="model")
def plain(model, params, ids, weights):
    """Log-probs of a row's tokens but the first, and the gradients of their weighted sum."""

    def attend(made, stack, carry, inputs):
        if isinstance(made, DeltaTokens):
            return by_tokens(made, stack.layer.mixer), carry, None
        query, key, value = made
        key, value = (jnp.repeat(x, query.shape[2] // x.shape[2], axis=2) for x in (key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        scores = jnp.where(np.tri(len(ids), dtype=bool), scores, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value), carry, None

    def total(params):
        decoder = model.bind(params).language_model
        x, _, _ = decoder(decoder.embed(ids[None]), jnp.arange(len(ids))[None, None], attend)
        scores = jax.nn.log_softmax(x[0] @ decoder.head_kernel())
        found = jnp.take_along_axis(scores[:-1], ids[1:, None], axis=1)[:, 0]
        return (found * weights).sum(), found

    return jax.grad(total, has_aux=True)(params)


def weights_of(count):
    """Of a response's tokens in the sum that gradients are taken of."""
    return jnp.cos(1.0 + jnp.arange(count))


@functools.partial(jax.jit, static_argnames=("model", "remat"))
def shared(model, params, batch, remat="none"):
    def total(params):
        found = response_log_probs(model, params, batch, remat=remat)
        return (found * weights_of(found.shape[-1])).sum(), found

    return jax.grad(total, has_aux=True)(params)


@pytest.mark.slow
def test_a_shared_prompt_equals_separate_rows(model, params):
    batch = text_batch(PROMPTS, RESPONSES)
    gradient, log_probs = shared(model, params, batch)
    assert log_probs.dtype == jnp.float64
    total = jax.tree.map(jnp.zeros_like, params)
    longest = max(PROMPTS) + batch.response_ids.shape[2]
    for i, j in np.ndindex(log_probs.shape[:2]):
        size, start = int(batch.response_mask[i, j].sum()), PROMPTS[i]
        ids, weights = np.zeros(longest, np.int32), np.zeros(longest - 1)
        ids[:start] = batch.prompt_ids[i, :start]
        ids[start : start + size] = batch.response_ids[i, j, :size]
        weights[start - 1 : start - 1 + size] = weights_of(size)
        own, expected = plain(model, params, ids, weights)
        expected = expected[start - 1 : start - 1 + size]
        np.testing.assert_allclose(log_probs[i, j, :size], expected, rtol=0, atol=1e-9)
        assert not np.any(log_probs[i, j, size:])
        total = jax.tree.map(jnp.add, total, own)
    actual = flatten(gradient)
    for path, leaf in flatten(total).items():
        np.testing.assert_allclose(actual[path], leaf, rtol=0, atol=1e-9, err_msg=path)
        assert np.abs(leaf).max() > 1e-4, path


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.slow
def test_rematerialisation_changes_nothing(model, params, remat):
    batch = text_batch((3,), ((4, 2),))
    expected, actual = (flatten(shared(model, params, batch, name)[0]) for name in ("none", remat))
    for path, leaf in expected.items():
        np.testing.assert_allclose(actual[path], leaf, rtol=0, atol=1e-11, err_msg=path)


def test_such_rows_are_never_packed(model, caplog):
    plan._say_padded.cache_clear()
    with caplog.at_level(logging.INFO):
        assert plan.packed_over(model, make_mesh()) is None
        assert plan.packed_over(model, make_mesh()) is None
    own = [record.message for record in caplog.records if record.name == plan.__name__]
    assert own == [
        "rows are padded and not packed: the model's delta nets have a state per response"
    ]
