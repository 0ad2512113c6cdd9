"""Gradients of image features, by what makes them on TPUs and by what makes them elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmpo_jax.models import mixing
from mmpo_jax.models.mixing import by_products, by_scatter, mixed


@pytest.fixture(params=[(5, 7), (20, 30)], ids=["one block", "several"])
def given(request, monkeypatch):
    """(pool, index, weight, gradient of the mixture), with vectors that nobody reads."""
    monkeypatch.setattr(mixing, "BLOCK", 8)
    size, tokens = request.param
    random = np.random.default_rng(0)
    pool, grad = random.standard_normal((2, size, 3)), random.standard_normal((2, tokens, 3))
    index = random.integers(-1, size - 1, (2, tokens, 4))
    weight = np.where(index < 0, 0, random.uniform(size=index.shape))
    return pool, index, weight, grad


def expected(pool, index, weight, grad):
    total = np.zeros_like(pool)
    for row, token, k in np.ndindex(*index.shape):
        total[row, max(index[row, token, k], 0)] += weight[row, token, k] * grad[row, token]
    return total


@pytest.mark.parametrize("function", [by_scatter, by_products])
def test_either_way_is_the_sum_over_readers(given, function):
    pool, index, weight, grad = given
    with jax.enable_x64(True):
        found = function(*map(jnp.asarray, (grad, index, weight)), size=pool.shape[1])
    np.testing.assert_allclose(found, expected(*given), rtol=1e-12, atol=1e-12)


def test_it_is_the_gradient_of_the_mixture(given):
    pool, index, weight, grad = given
    with jax.enable_x64(True):
        made, pull_back = jax.vjp(lambda pool: mixed(pool, index, weight), jnp.asarray(pool))
        found = pull_back(jnp.asarray(grad))[0]
    read = np.stack([rows[np.maximum(at, 0)] for rows, at in zip(pool, index, strict=True)])
    np.testing.assert_allclose(made, (read * weight[..., None]).sum(axis=2), rtol=1e-12)
    np.testing.assert_allclose(found, expected(*given), rtol=1e-12, atol=1e-12)
