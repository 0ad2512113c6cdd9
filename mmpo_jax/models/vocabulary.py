"""Vocabularies that devices share.

Where they do not share them evenly, zeros behind the last token fill their tables up: InternVL3's
151,674 tokens are no multiple of four, LLaVA-1.5's 32,064 none of 128. What is added exists on the
devices alone. No id points to it, logits end before it (`head.project`), so that it has no gradient
and is never sampled, and files end before it too.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

TABLES = {"language_model/embed_tokens/embedding": 0, "language_model/lm_head/kernel": 1}
"""Parameters that have a row or a column for every token, and which axis that is."""


def filled_shape(path: str, shape: tuple[int, ...], devices: int) -> tuple[int, ...]:
    """The shape of a parameter whose tokens so many devices share."""
    if path not in TABLES:
        return tuple(shape)
    sizes = list(shape)
    sizes[TABLES[path]] += -sizes[TABLES[path]] % devices
    return tuple(sizes)


def filled(path: str, leaf: Any, devices: int) -> Any:
    """The parameter with zeros for the tokens that are added to it; a NumPy array stays one."""
    shape = filled_shape(path, leaf.shape, devices)
    if shape == leaf.shape:
        return leaf
    numpy = jnp if isinstance(leaf, jax.Array) else np
    return numpy.pad(leaf, [(0, size - own) for size, own in zip(shape, leaf.shape, strict=True)])


def without_added(path: str, array: np.ndarray, vocab_size: int) -> np.ndarray:
    """The parameter without the tokens that were added to it; a view."""
    if path not in TABLES:
        return array
    return array[:vocab_size] if TABLES[path] == 0 else array[:, :vocab_size]


def split_vocabulary(x: Float[Array, "*d V"]) -> Float[Array, "*d V"]:
    """Spreads the last axis of the head [D, V] or of logits [B, R, t, V] over the mesh, if one is
    in use; rows stay where their axis `data` puts them."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, vocabulary_spec(x))


def vocabulary_spec(x: Float[Array, "*d V"]) -> PartitionSpec:
    """How `split_vocabulary` spreads an array over the mesh in use."""
    axes = jax.sharding.get_abstract_mesh().axis_names
    rows = "data" if x.ndim > 2 and "data" in axes else None
    over = tuple(axis for axis in axes if axis != "data")
    return PartitionSpec(rows, *[None] * (x.ndim - 2), over)


def vocabulary_parts() -> int:
    """Over how many devices of the mesh in use, if one is, tokens are spread."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh.axis_names if axis != "data")
