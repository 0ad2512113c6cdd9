"""Which tokens see which, beyond that none sees a later one: windows, and images."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


@dataclasses.dataclass(frozen=True)
class Images:
    """Which image every token of a batch shows, for layers in which an image sees all of itself."""

    tokens: Int[Array, "B S"]
    """`image_numbers` of prompts or of packed rows."""
    longest: int
    """No image has more tokens."""
    responses: Int[Array, "B R T"] | None = None
    """`image_numbers` of the responses to prompts; None where none of them shows any."""


def in_window(
    distance: Int[Array, "*d"], window: int | None, same: Bool[Array, "..."] | None = None
) -> Bool[Array, "..."]:
    """Whether a query sees the key that stands `distance` tokens before it, as bool.

    Args:
      distance: int32[...].
      window: of it; None for all.
      same: whether both are of an image whose tokens see one another; None where none is.
    """
    seen = distance >= 0
    if same is not None:
        seen = seen | same
    return seen if window is None else seen & (distance < window)


def image_numbers(
    is_image: Bool[Array, "*b S"], begins: Bool[Array, "*b S"] | None = None
) -> Int[Array, "*b S"]:
    """Which image of its row a token shows: int32[..., S], -1 for text.

    Args:
      is_image: bool[..., S]; between two images there is text.
      begins: bool[..., S], where something else begins, if rows hold several things.
    """
    before = jnp.pad(is_image[..., :-1], [(0, 0)] * (is_image.ndim - 1) + [(1, 0)])
    first = is_image & (~before if begins is None else ~before | begins)
    return jnp.where(is_image, jnp.cumsum(first, axis=-1, dtype=jnp.int32) - 1, -1)


def same_image(query: Int[Array, "*b T"], key: Int[Array, "*b S"]) -> Bool[Array, "*b T S"]:
    """Whether tokens are of one image, by their `image_numbers`."""
    return (query[..., :, None] == key[..., None, :]) & (query[..., :, None] >= 0)
