"""Recipes: an experiment as typed data, checked when it is loaded."""

import mmpo_jax.picture_world.registration  # noqa: F401 (sections are made of registries)
