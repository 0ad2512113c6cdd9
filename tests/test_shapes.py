"""Shapes in annotations hold in the tests, and cost nothing outside of them."""

import importlib
import pkgutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from helpers import shapes
from jaxtyping import TypeCheckError

from mmpo_jax.objectives.advantages import advantages
from mmpo_jax.objectives.batch_rules import quantile_gap


def test_a_wrong_number_of_axes_is_refused():
    assert advantages(jnp.ones((2, 3, 1)), [1.0]).shape == (2, 3)
    with pytest.raises(TypeCheckError, match="N S K"):
        advantages(jnp.ones((2, 3)), [1.0])


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap])
def test_one_letter_is_one_size_while_jax_traces_too(transform):
    def gap(second):
        return quantile_gap(jnp.ones((2, 3)), second, jnp.ones((2, 3)))

    second = jnp.ones((2, 3)) if transform is not jax.vmap else jnp.ones((5, 2, 3))
    assert transform(gap)(second).shape == second.shape
    with pytest.raises(TypeCheckError, match="second"):
        transform(gap)(second[..., :1])


def test_a_wrong_kind_of_number_is_refused():
    with pytest.raises(TypeCheckError, match="N S K"):
        advantages(jnp.ones((2, 3, 1), int), [1.0])


def test_every_module_of_the_packages_is_checked():
    """They were imported after the hook, whatever a test imports first."""
    for package in map(importlib.import_module, shapes.CHECKED):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            loader = importlib.import_module(module.name).__loader__
            assert type(loader).__module__.startswith("jaxtyping"), module.name


def test_a_run_checks_nothing():
    program = (
        "import sys, jax.numpy as jnp\n"
        "from mmpo_jax.objectives.advantages import advantages\n"
        "assert advantages(jnp.ones((2, 3, 1), int), [1.0]).shape == (2, 3)\n"
        "assert 'beartype' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
