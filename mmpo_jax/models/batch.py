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
    """int32[B, P]; every image is a run of `image_token_id`, one per image feature."""
    prompt_mask: jax.Array
    """bool[B, P]; True at real tokens."""
    pixel_values: jax.Array
    """float32[B, I, C, H, W]; the images in prompt order, rows with fewer padded with zeros."""
    response_ids: jax.Array
    """int32[B, R, T]; the first token is predicted from the prompt's last one."""
    response_mask: jax.Array
    """bool[B, R, T]; True at real tokens."""
    loss_mask: jax.Array
    """bool[B, R, T]; True at the tokens a loss counts: the assistant's, with the final EOS."""
    weights: jax.Array
    """float32[B]; 1 for a real row, 0 for one that only fills the batch."""
