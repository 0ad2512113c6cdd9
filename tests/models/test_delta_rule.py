"""The gated delta rule and the convolution before it against formulas written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmpo_jax.models.delta_rule import (
    causal_conv,
    delta_step,
    gated_delta_rule,
    last_tokens,
    unit,
    unit_lower_inverse,
)

TOKENS = (1, 3, 64, 65, 150)
chunked = jax.jit(gated_delta_rule)


def draw(tokens, rows=2, keys=2, values=4, e=6, f=5, seed=0):
    """Arguments of `gated_delta_rule` in float64; some tokens forget next to all."""
    rng = np.random.default_rng(seed)
    query, key = rng.normal(size=(2, rows, tokens, keys, e))
    value = rng.normal(size=(rows, tokens, values, f))
    log_decay = -rng.exponential(0.2, size=(rows, tokens, values))
    log_decay[rng.uniform(size=log_decay.shape) < 0.1] -= 300
    strength = rng.uniform(size=(rows, tokens, values))
    state = rng.normal(size=(rows, values, e, f))
    query, key = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (query, key))
    return query, key, value, log_decay, strength, state


def written_out(query, key, value, log_decay, strength, state):
    """The paper's equation 10, in NumPy."""
    out, state = np.zeros_like(value), state.copy()
    for row, token, head in np.ndindex(value.shape[:3]):
        of_keys = head * key.shape[2] // value.shape[2]
        q, k = query[row, token, of_keys], key[row, token, of_keys]
        a, b = np.exp(log_decay[row, token, head]), strength[row, token, head]
        matrix = a * state[row, head] @ np.eye(value.shape[-1])
        matrix = (np.eye(len(k)) - b * np.outer(k, k)) @ matrix
        matrix += b * np.outer(k, value[row, token, head])
        state[row, head] = matrix
        out[row, token, head] = matrix.T @ q / np.sqrt(len(q))
    return out, state


def by_tokens(query, key, value, log_decay, strength, state):
    """`gated_delta_rule`, a token after the other."""

    def step(state, token):
        out, state = delta_step(*token, state)
        return state, out

    tokens = (x.swapaxes(0, 1) for x in (query, key, value, log_decay, strength))
    state, out = jax.lax.scan(step, state, tuple(tokens))
    return out.swapaxes(0, 1), state


def assert_close(actual, expected, tolerance):
    for mine, other in zip(actual, expected, strict=True):
        assert mine.shape == other.shape
        scale = max(1, np.abs(other).max(initial=0))
        np.testing.assert_allclose(mine, other, rtol=0, atol=tolerance * scale)


@functools.partial(jax.jit, static_argnums=0)
def gradients(rule, arrays):
    def total(arrays):
        return sum(jnp.sum(jnp.sin(2 * x)) for x in rule(*arrays))

    return jax.grad(total)(arrays)


@pytest.mark.parametrize("tokens", TOKENS)
def test_outputs_and_state_are_the_equations(tokens):
    arrays = draw(tokens)
    with jax.enable_x64(True):
        expected = written_out(*arrays)
        assert_close(chunked(*arrays), expected, 1e-12)
        assert_close(by_tokens(*map(jnp.asarray, arrays)), expected, 1e-12)


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("wide", "tolerance"), [(True, 1e-9), (False, 1e-5)])
def test_gradients_are_those_of_single_steps(tokens, wide, tolerance):
    with jax.enable_x64(wide):
        arrays = tuple(jnp.asarray(x) for x in draw(tokens))
        assert_close(chunked(*arrays), by_tokens(*arrays), tolerance)
        actual, expected = (gradients(rule, arrays) for rule in (chunked, by_tokens))
        assert_close(actual, expected, tolerance)
        assert all(np.abs(x).max() > 1e-2 for x in expected)


def test_equal_keys_do_not_lose_digits():
    """Every token corrects what all before it wrote: the largest numbers there can be."""
    query, key, value, log_decay, strength, state = draw(64, rows=1)
    key = np.broadcast_to(key[:, :1], key.shape)
    arrays = query, key, value, 0 * log_decay, 0 * strength + 1, state
    with jax.enable_x64(False):
        actual = chunked(*map(jnp.asarray, arrays))
    assert_close(actual, written_out(*arrays), 1e-5)


def test_a_prompt_is_run_once_and_its_state_forked():
    prompt, first, second = (draw(tokens, seed=seed) for seed, tokens in enumerate((70, 9, 20)))
    with jax.enable_x64(True):
        _, state = chunked(*prompt)
        for own in (first, second):
            joined = [np.concatenate(x, axis=1) for x in zip(prompt[:5], own[:5], strict=True)]
            out, after = chunked(*joined, prompt[5])
            assert_close(chunked(*own[:5], state), (out[:, 70:], after), 1e-11)


def test_padding_leaves_the_state():
    arrays = draw(30)
    padded = [np.pad(x, [(0, 0), (5, 40)] + [(0, 0)] * (x.ndim - 2)) for x in arrays[:5]]
    rng = np.random.default_rng(1)
    for x in padded[:3]:
        x[:, :5], x[:, 35:] = (rng.normal(size=x[:, at].shape) for at in np.s_[:5, 35:])
    with jax.enable_x64(True):
        out, state = chunked(*padded, arrays[5])
        assert_close((out[:, 5:35], state), written_out(*arrays), 1e-12)


@pytest.mark.parametrize("size", [1, 2, 8, 64])
def test_inverse_and_its_gradient(size):
    lower = np.tril(np.random.default_rng(size).normal(size=(3, size, size)), -1) / size**0.5
    with jax.enable_x64(True):
        expected = np.linalg.inv(np.eye(size) + lower)
        np.testing.assert_allclose(unit_lower_inverse(lower), expected, rtol=0, atol=1e-11)

        def total(inverse):
            return lambda lower: jnp.sum(jnp.sin(inverse(lower)))

        actual = jax.grad(total(unit_lower_inverse))(lower)
        expected = jax.grad(total(lambda x: jnp.linalg.inv(jnp.eye(size) + x)))(lower)
        below = np.tril(np.ones((size, size)), -1)
        np.testing.assert_allclose(actual * below, expected * below, rtol=0, atol=1e-11)


def test_convolution_and_what_is_carried_over():
    rng = np.random.default_rng(0)
    x, earlier = rng.normal(size=(2, 9, 3)), rng.normal(size=(2, 3, 3))
    kernel, length = rng.normal(size=(4, 3)), np.array([9, 2])
    with jax.enable_x64(True):
        out = causal_conv(x, kernel, earlier)
        tokens = np.concatenate([earlier, x], axis=1)
        expected = [
            [np.convolve(tokens[row, :, at], kernel[::-1, at], "valid") for at in range(3)]
            for row in range(2)
        ]
        np.testing.assert_allclose(out, np.swapaxes(expected, 1, 2), rtol=0, atol=1e-12)
        carried = last_tokens(x, earlier, length)
        for row, count in enumerate(length):
            np.testing.assert_array_equal(carried[row], tokens[row, count : count + 3])
        beginning = causal_conv(x[:1, 5:], kernel, last_tokens(x, earlier, np.array([5, 5]))[:1])
        np.testing.assert_allclose(beginning, out[:1, 5:], rtol=0, atol=1e-12)


def test_unit_vectors():
    x = np.random.default_rng(0).normal(size=(4, 6))
    x[0] = 0
    with jax.enable_x64(True):
        expected = x / np.sqrt((x**2).sum(axis=-1, keepdims=True) + 1e-6)
        np.testing.assert_allclose(unit(x), expected, rtol=0, atol=1e-12)
