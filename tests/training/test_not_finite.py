"""Who is to blame for a step that is not finite; the rows are in test_loop.py."""

import types

import jax.numpy as jnp
import pytest

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.training.plan import TrainingError
from mmpo_jax.training.reports import Window


def test_weights_that_are_not_finite_are_not_blamed_on_rows():
    weights = jnp.array([1.0, jnp.inf])
    state = TrainState(jnp.int32(0), {"a": jnp.ones(2)}, {"b/kernel": weights}, ())
    window = Window(types.SimpleNamespace(describe_latest=lambda: "none was saved yet"))
    window.add(1, ("row-1",), {"finite": False, "loss": jnp.nan, "grad_norm": jnp.nan})
    with pytest.raises(TrainingError, match="step 1: the weights themselves are not") as caught:
        window.close(state)
    assert "b/kernel; last good checkpoint: none" in str(caught.value)
    assert "row-1" not in str(caught.value)
