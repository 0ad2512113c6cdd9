"""Temperature, top-k and top-p against transformers' logits warpers."""

import jax.numpy as jnp
import numpy as np
import pytest

from mmpo_jax.generation.sampler import truncate

torch = pytest.importorskip("torch")
from transformers import (  # noqa: E402
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

pytestmark = pytest.mark.parity


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 7, 500])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.4, 1e-4])
def test_truncate_equals_transformers(temperature, top_k, top_p):
    logits = np.float32(3 * np.random.default_rng(0).standard_normal((16, 50)))
    expected = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    actual = truncate(jnp.asarray(logits) / temperature, top_k, top_p)
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-6)


def test_ties_at_the_edge_of_top_k():
    logits = np.float32([[1, 3, 2, 2, 0], [1, 1, 1, 1, 1]])
    expected = TopKLogitsWarper(2)(None, torch.tensor(logits))
    np.testing.assert_array_equal(truncate(jnp.asarray(logits), 2, 1.0), expected.numpy())
