"""Rotary position embeddings: the published variants as one table of frequencies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from mmpo_jax.models.layers import promote

ROPE_TYPES = ("default", "linear", "llama3", "yarn", "dynamic", "proportional")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Which angle each pair of channels turns by per position."""

    frequencies: tuple[float, ...]
    """d/2 radians per position."""
    scale: float = 1.0
    """Factor of cosine and sine (YaRN's attention temperature)."""
    sections: tuple[int, ...] = ()
    """Number of frequencies, in turn, of each position axis (time, height, width; Qwen2-VL, section
    2.1). Empty for the one axis of text."""
    limit: int | None = None
    """How many tokens these frequencies hold for; None for any number."""
    interleaved: bool = False
    """Whether axes take turns, each as often as its section says and the first one else (Qwen3-VL),
    instead of having their frequencies in a row."""
    growth: tuple[float, float] | None = None
    """(b, n) of a factor 1 + b log(1 + floor(position / n)) of cosine and sine, by which later
    queries are longer (Llama 4); None for none."""

    @property
    def axes(self) -> int:
        """A: how many positions a token has."""
        return max(1, len(self.sections))


def read_rope(parameters: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    """The rotary embedding of a transformers config's `rope_parameters`.

    "dynamic" changes the frequencies with the length of what is longer than `max_positions`, so
    that cached keys would no longer hold. Up to there it is the plain kind, which is implemented.

    Args:
      parameters: `rope_theta`, `rope_type` and the type's own numbers.
      head_dim: d.
      max_positions: the config's `max_position_embeddings`.

    Raises:
      ValueError: a type that is not implemented.
    """
    kind = parameters.get("rope_type", "default")
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_type is {kind!r}; this version implements {', '.join(ROPE_TYPES)}")
    share = parameters.get("partial_rotary_factor", 1.0)
    if share != 1.0 and kind != "proportional":
        raise ValueError("partial_rotary_factor other than 1 is not implemented")
    # In float32, as torch does: positions in the thousands show the difference.
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = 1 / np.float32(parameters["rope_theta"]) ** exponents
    sections = tuple(parameters.get("mrope_section") or ())
    scale = 1.0
    if kind == "linear":
        plain = plain / np.float32(parameters["factor"])
    elif kind == "llama3":
        plain = _llama3(plain, parameters)
    elif kind == "proportional":  # the last pairs do not turn
        turns = np.arange(head_dim // 2) < int(share * head_dim // 2)
        plain = np.where(turns, plain / np.float32(parameters.get("factor", 1.0)), 0)
    elif kind == "yarn":
        plain, scale = _yarn(plain, parameters, head_dim, max_positions)
    limit = max_positions if kind == "dynamic" else None
    return Rope(tuple(map(float, plain)), scale, sections, limit)


def _llama3(plain: np.ndarray, parameters: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: long waves are slowed by `factor`, short ones kept, those between blended."""
    factor = parameters["factor"]
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    turns = parameters["original_max_position_embeddings"] * plain / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return (kept * plain + (1 - kept) * plain / factor).astype(np.float32)


def _yarn(
    plain: np.ndarray, parameters: Mapping[str, Any], head_dim: int, max_positions: int
) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, section 3.2 to 3.4), with DeepSeek's `mscale`.

    Returns:
      (frequencies, factor of cosine and sine).
    """
    original = parameters.get("original_max_position_embeddings") or max_positions
    factor = parameters.get("factor") or max_positions / original
    theta = parameters["rope_theta"]

    def channel(turns: float) -> float:
        """The channel pair that turns so often within the original length."""
        waves = math.log(original / (turns * 2 * math.pi))
        return head_dim * waves / (2 * math.log(theta))

    first = channel(parameters.get("beta_fast") or 32)
    last = channel(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (np.arange(head_dim // 2, dtype=np.float32) - first) / max(last - first, 0.001)
    slowed = np.clip(ramp, 0, 1).astype(np.float32)
    frequencies = slowed * plain / np.float32(factor) + (1 - slowed) * plain

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0

    scale = parameters.get("attention_factor")
    if scale is None:
        mscale, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
        if mscale and all_dims:
            scale = temperature(mscale) / temperature(all_dims)
        else:
            scale = temperature(1)
    return frequencies.astype(np.float32), float(scale)


Tables = tuple[Float[Array, "B S 1 c"], Float[Array, "B S 1 c"]]
"""Cosine and sine for c = d/2 pairs of channels."""


def rope_tables(positions: Int[Array, "B A S"], rope: Rope) -> Tables:
    """Cosine and sine of rotary embeddings (Su et al. 2021, eq. 34).

    Args:
      positions: int32[B, A, S].
      rope: the frequencies and, with A > 1 axes, which axis each belongs to.

    Returns:
      float32[B, S, 1, d/2] each.
    """
    axis = frequency_axes(rope)
    frequencies = jnp.array(rope.frequencies, jnp.float32)
    angles = positions.astype(jnp.float32)[:, axis].swapaxes(1, 2) * frequencies
    scale: float | jax.Array = rope.scale
    if rope.growth is not None:
        growth, length = rope.growth
        passed = jnp.floor(positions[:, 0].astype(jnp.float32) / length)
        scale *= (1 + growth * jnp.log1p(passed))[..., None]
    cos, sin = jnp.cos(angles) * scale, jnp.sin(angles) * scale
    return cos[:, :, None], sin[:, :, None]


def frequency_axes(rope: Rope) -> Int[np.ndarray, " c"]:
    """int[d/2]: the position axis of every frequency."""
    axes = np.zeros(len(rope.frequencies), int)
    if rope.interleaved:
        for axis, size in enumerate(rope.sections[1:], 1):
            axes[axis : len(rope.sections) * size : len(rope.sections)] = axis
    elif rope.sections:
        axes[:] = np.repeat(np.arange(len(rope.sections)), rope.sections)
    return axes


def rotate(x: Float[Array, "B S H d"], tables: Tables) -> Float[Array, "B S H d"]:
    """Rotates [B, S, heads, d] by halves, Hugging Face's order of the rotary pairs; channels
    behind those that have frequencies stay as they are."""
    cos, sin = tables
    turned = 2 * cos.shape[-1]
    first, second = jnp.split(promote(x[..., :turned]), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    rotated = rotated.astype(x.dtype)
    if turned == x.shape[-1]:
        return rotated
    return jnp.concatenate([rotated, x[..., turned:]], axis=-1)
