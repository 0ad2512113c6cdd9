"""Moments in 8 bits and in bfloat16: what rounding does to numbers, and to training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmpo_jax.recipes.optimizers import AdamW, Linear, Lion, Muon
from mmpo_jax.training import moments
from mmpo_jax.training.moments import Blocks, block_size, quantized, restored
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.rounding import round_stochastically, rounding_key

KEY = jax.random.key(0)


def example(signed, shape=(3, 5, 640), seed=0):
    """Numbers of eight orders of magnitude, with outliers and zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) * 10 ** rng.uniform(-6, 2, shape)
    x[..., 7] = 0
    return np.float32(x if signed else x**2)


def codes_of(signed):
    """The values that codes stand for, ascending, from their definition in NumPy."""
    whole = np.arange(128 if signed else 256)
    return (whole / 127.0) ** 2 if signed else (whole / 255.0) ** 4


@pytest.mark.parametrize("signed", [True, False])
def test_a_number_becomes_one_of_its_two_neighbours(signed):
    x = example(signed)
    blocks = jax.jit(quantized, static_argnums=2)(x, KEY, signed)
    assert blocks.codes.shape == x.shape
    assert blocks.codes.dtype == (jnp.int8 if signed else jnp.uint8)
    size = 640 // blocks.scales.shape[-1]
    scales = np.repeat(np.abs(x).reshape(*x.shape[:-1], -1, size).max(-1), size, axis=-1)
    found, values = np.float64(restored(blocks)), codes_of(signed)
    share = np.abs(np.float64(x)) / scales
    above = np.clip(np.searchsorted(values, share), 1, len(values) - 1)
    low, high = values[above - 1], values[above]
    ours = np.abs(found) / scales
    near = np.minimum(np.abs(ours - low), np.abs(ours - high))
    smallest = values[1] if not signed else 0  # a second moment stays above zero
    assert np.all((near < 1e-6) | ((share > 0) & (np.abs(ours - smallest) < 1e-6)))
    assert np.all(np.sign(found) * np.sign(x) >= 0)
    np.testing.assert_array_equal(found[..., 7], 0)
    if not signed:
        assert np.all((found > 0) == (x > 0))
    largest = share == 1
    np.testing.assert_allclose(found[largest], x[largest], rtol=1e-6)


@pytest.mark.parametrize("signed", [True, False])
def test_the_mean_over_keys_is_the_number(signed):
    x = np.float32([[0.01, 0.2, 0.5, 0.77, 1.0] + [0.3] * 27])
    keys = jax.random.split(KEY, 20000)
    found = jax.vmap(lambda key: restored(quantized(x, key, signed)))(keys)
    steps = np.diff(codes_of(signed)).max()
    # The chance is one of 256, and a mean of 20,000 has a 141st of the deviation.
    np.testing.assert_allclose(found.mean(0), x, atol=steps * (1 / 512 + 4 * 0.5 / 141))


def test_what_is_rounded_once_stays():
    """Codes of codes are the same, but for the rounding of float32."""
    once = restored(quantized(example(True), KEY, True))
    twice = restored(quantized(once, jax.random.key(1), True))
    np.testing.assert_allclose(twice, once, rtol=2e-2, atol=0)
    assert np.mean(np.asarray(once) == np.asarray(twice)) > 0.95


@pytest.mark.parametrize("width", [1, 31, 33, 300])
def test_widths_that_blocks_do_not_divide(width):
    x = example(True, (20, width)) if width > 7 else np.ones((20, width), np.float32)
    blocks = quantized(x, KEY, True)
    assert blocks.scales.shape == (20, -(-width // block_size(width)))
    assert restored(blocks).shape == x.shape


def test_an_outlier_spoils_its_block_alone():
    x = np.full((1, 4096), 1e-3, np.float32)
    x[0, 0] = 1e3
    found = np.asarray(restored(quantized(x, KEY, True)))
    size = block_size(4096)
    np.testing.assert_allclose(found[0, size:], 1e-3, rtol=1e-6)


def test_eight_devices_have_whole_blocks():
    assert block_size(4096) == 256
    assert block_size(11008) == 32  # 1,376 on each of eight
    assert block_size(14336) == 256
    assert block_size(32003) == 32


def test_bfloat16_rounds_to_its_neighbours_and_the_mean_is_right():
    x = np.float32([1.001, -1.001, 3.14159, 1e-30, 0.0, 1.0])
    keys = jax.random.split(KEY, 20000)
    found = np.float64(jax.vmap(lambda key: round_stochastically(jnp.asarray(x), key))(keys))
    below = np.float64((x.view(np.uint32) & 0xFFFF0000).view(np.float32))
    above = np.float64(((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32))
    assert np.all((found == below) | (found == above))
    np.testing.assert_allclose(found.mean(0), x, rtol=2e-4)
    assert np.all(found[:, 4:] == [0, 1])
    odd = round_stochastically(jnp.float32([np.nan, np.inf, -np.inf]), KEY)
    np.testing.assert_array_equal(np.float32(odd), [np.nan, np.inf, -np.inf])


def test_keys_are_of_step_and_name():
    data = {
        tuple(np.asarray(jax.random.key_data(rounding_key(seed, jnp.int32(step), name))))
        for seed in (0, 1)
        for step in (0, 1)
        for name in ("a", "b")
    }
    assert len(data) == 8
    again = rounding_key(1, jnp.int32(1), "b")
    assert tuple(np.asarray(jax.random.key_data(again))) in data


def descend(config, steps=200):
    """The loss of a linear regression of 64 outputs, step by step."""
    rng = np.random.default_rng(0)
    inputs = jnp.float32(rng.standard_normal((256, 64)))
    target = inputs @ jnp.float32(rng.standard_normal((64, 64)))
    params = {
        "dense/kernel": np.zeros((64, 64), np.float32),
        "dense/bias": np.zeros(64, np.float32),
    }
    optimizer = make_optimizer(config, make_schedule(Linear(), config.learning_rate, steps))

    @jax.jit
    def step(params, state, key):
        rows = jax.random.permutation(key, 256)[:64]

        def loss(params):
            out = inputs[rows] @ params["dense/kernel"] + params["dense/bias"]
            return jnp.mean((out - target[rows]) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state, losses = optimizer.init(params), []
    for key in jax.random.split(KEY, steps):
        params, state, value = step(params, state, key)
        losses.append(float(value))
    return np.array(losses), state


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize(
    "make",
    [
        lambda kind: AdamW(learning_rate=5e-2, weight_decay=0, moments=kind),
        lambda kind: Lion(learning_rate=3e-2, weight_decay=0, moments=kind),
        lambda kind: Muon(learning_rate=1e-1, weight_decay=0, moments=kind),
    ],
    ids=["adamw", "lion", "muon"],
)
def test_training_is_close_to_that_with_whole_moments(make, kind):
    exact, _ = descend(make("float32"))
    ours, state = descend(make(kind))
    assert exact[-1] < exact[0] / 20
    # The last twenty steps: single ones are of few rows.
    assert ours[-20:].mean() == pytest.approx(exact[-20:].mean(), rel=0.03)
    trees = [
        tree["dense/kernel"] for _, tree in optax.tree_utils.tree_get_all_with_path(state, "mu")
    ]
    (kernel,) = (leaf for leaf in trees if not isinstance(leaf, optax.MaskedNode))
    if kind == "int8":
        assert isinstance(kernel, Blocks)
        assert kernel.codes.dtype == jnp.int8
    else:
        assert kernel.dtype == jnp.bfloat16


def test_a_second_moment_follows_where_the_nearest_number_would_not():
    """Gradients that stop: 1,000 steps of 0.999 leave 37 % of the second moment."""
    config = AdamW(moments="bfloat16", weight_decay=0, max_grad_norm=1e9)
    optimizer = make_optimizer(config, lambda step: 1e-3)
    params = {"dense/kernel": np.ones((64, 64), np.float32)}
    _, state = optimizer.update(params, optimizer.init(params), params)

    def silent(_, state):
        return optimizer.update(jax.tree.map(jnp.zeros_like, params), state, params)[1]

    state = jax.jit(lambda state: jax.lax.fori_loop(0, 1000, silent, state))(state)
    second = np.float64(optax.tree_utils.tree_get(state, "nu")["dense/kernel"])
    assert second.mean() == pytest.approx(0.001 * 0.999**1000, rel=0.02)


def test_bytes_of_a_parameter():
    params = {
        "layers/kernel": jax.ShapeDtypeStruct((4, 512, 1024), jnp.float32),
        "layers/bias": jax.ShapeDtypeStruct((4, 1024), jnp.float32),
    }

    def size(config):
        state = jax.eval_shape(make_optimizer(config, lambda step: 0.0).init, params)
        leaves = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 4 * 1024]
        return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / (4 * 512 * 1024)

    assert size(AdamW()) == 8
    assert size(AdamW(moments="bfloat16")) == 4
    assert size(Lion()) == 4
    assert size(Muon(moments="int8")) == pytest.approx(1 + 4 / block_size(1024))
    assert size(AdamW(moments="int8")) == pytest.approx(2 + 8 / block_size(1024))
    assert moments.SMALL == 4096  # biases are whole
