"""The central data structure: B prompts with R responses each."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B prompts (with images) and R responses to each, padded to static sizes.

    Prompts and responses are padded on the right. Padding is never attended and never scored.
    """

    prompt_ids: jax.Array
    """int32[B, P]; every image feature has its placeholder token."""
    prompt_mask: jax.Array
    """bool[B, P]; True at real tokens."""
    positions: jax.Array
    """int32[B, A, P]; rotary positions, A = 3 axes in some families and else 1."""
    next_position: jax.Array
    """int32[B]; where the first token of every response stands, on all axes."""
    pixel_values: jax.Array
    """float32[B, I, ...]; the prompts' images as slots, tiles [C, H, W] or groups of patches
    [S, C*t*h*w], in the order of the prompt, rows with fewer padded with zeros."""
    patches: dict[str, jax.Array]
    """What the vision half needs to know of them, each [B, I, ...]; empty in most families."""
    feature_index: jax.Array
    """int32[B, P, K]; which vectors of the row's image features a token reads, -1 at text."""
    feature_weight: jax.Array
    """float32[B, P, K]; how much of each."""
    response_ids: jax.Array
    """int32[B, R, T]; the first token is predicted from the prompt's last one."""
    response_mask: jax.Array
    """bool[B, R, T]; True at real tokens."""
    loss_mask: jax.Array
    """bool[B, R, T]; True at the tokens a loss counts: the assistant's, with the final EOS."""
    weights: jax.Array
    """float32[B]; 1 for a real row, 0 for one that only fills the batch."""
    shown: Shown | None = None
    """What responses show that go on with turns of the user; None where none shows anything."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shown:
    """Images in responses: the same fields of their tokens as `Batch` has of the prompt's."""

    positions: jax.Array
    """int32[B, A, R, T]."""
    feature_index: jax.Array
    """int32[B, R, T, K]."""
    feature_weight: jax.Array
    """float32[B, R, T, K]."""
