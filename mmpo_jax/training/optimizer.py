"""The optimizers and schedules of recipes, from optax.

Layers are stacked ([L, inputs, outputs], `models/layers.py`), and every optimizer does to a layer
what it would do to it alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax import contrib

from mmpo_jax.models import reward_head
from mmpo_jax.models.vocabulary import TABLES
from mmpo_jax.recipes.optimizers import Adafactor, AdamW, Lion, Muon, Optimizer, Schedule
from mmpo_jax.training.moments import with_moments_as
from mmpo_jax.training.offload import STACKED, streamed

NO_HIDDEN_MATRIX = (
    rf"language_model/lm_head/.*|.*/patch_embedding/.*|.*/conv1d/.*|({reward_head.LAYERS})/.*"
)
"""Matrices that are the first or the last of a model, and filters of channels, which Muon leaves to
AdamW."""

MUON_RMS = 0.2
"""Root mean square of AdamW's steps, in learning rates (Liu et al. 2025, arXiv 2502.16982)."""

DECAYS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "linear": lambda progress: 1 - progress,
    "cosine": lambda progress: 0.5 * (1 + jnp.cos(jnp.pi * progress)),
    "1-sqrt": lambda progress: 1 - jnp.sqrt(progress),
}
"""What is left of the learning rate at a share of the way down."""


def make_schedule(config: Schedule, learning_rate: float, steps: int) -> optax.Schedule:
    """The learning rate by step: up in a line, then as the recipe says.

    From the end of the warm-up on it is transformers' at every step; what is left at the end would
    be the rate of the step behind the last. Warm-up of w steps takes i + 1 of w + 1 equal stairs,
    transformers' i of w: there the first step changes nothing, and a run of one step as little.

    Args:
      config: the recipe's section.
      learning_rate: the highest.
      steps: of the whole run.
    """
    warmup = begin = math.ceil(steps * config.warmup_ratio)
    least = 0.0 if config.type == "constant" else config.min_ratio
    decay: str = config.type
    if config.type == "warmup_stable_decay":
        begin = max(warmup, steps - math.ceil(steps * config.decay_ratio))
        decay = config.decay

    def schedule(step: jax.Array) -> jax.Array:
        rising = (step + 1) / (warmup + 1)
        progress = jnp.clip((step - begin) / max(1, steps - begin), 0, 1)
        falling = least + (1 - least) * DECAYS[decay](progress)
        return learning_rate * jnp.where(step < warmup, rising, falling)

    return schedule


def make_optimizer(
    config: Optimizer, schedule: optax.Schedule, vocab_size: int | None = None
) -> optax.GradientTransformation:
    """Clips the global norm, then takes the recipe's direction, with decoupled weight decay of all
    but biases and norm scales. Parameters are a flat path -> float32 array.

    Args:
      config: the recipe's section.
      schedule: the learning rate.
      vocab_size: of the model; moments of what a mesh adds to it (`models/vocabulary.py`) are zero.
        None where nothing is added.
    """
    direction = _direction(config)
    if vocab_size is not None:
        direction = without_added_moments(direction, vocab_size)
    clip = optax.clip_by_global_norm(config.max_grad_norm)
    offload = not isinstance(config, Adafactor) and config.offload
    chain = optax.chain(
        optax.identity() if offload else clip,  # which keep as little
        direction,
        optax.add_decayed_weights(config.weight_decay, _decayed),
        optax.scale_by_learning_rate(schedule),
    )
    return streamed(chain, clip) if offload else chain


def _direction(config: Optimizer) -> optax.GradientTransformation:
    """Gradients -> what the learning rate is multiplied with."""
    match config:
        case AdamW():
            return _adam(config)
        case Lion():
            lion = optax.scale_by_lion(config.beta1, config.beta2)
            return with_moments_as(config.moments, lion, _is_matrix)
        case Adafactor():
            return over_layers(_adafactor(config))
        case Muon():
            parts = {"muon": _muon(config), "adamw": _adam(config)}
            return optax.partition(parts, _muon_or_adamw)


def _adam(config: AdamW | Muon) -> optax.GradientTransformation:
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.epsilon)
    return with_moments_as(config.moments, adam, _is_matrix)


def _adafactor(config: Adafactor) -> optax.GradientTransformation:
    """The direction for one layer; of a tree, for every array of it."""
    scaled = optax.scale_by_param_block_rms() if config.scale_parameter else optax.identity()
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=config.decay_rate, min_dim_size_to_factor=config.min_dim_size_to_factor
        ),
        optax.clip_by_block_rms(config.clipping_threshold),
        scaled,
    )


def _muon(config: Muon) -> optax.GradientTransformation:
    """The direction for stacked and single matrices, all [..., inputs, outputs]."""

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda _: contrib.MuonDimensionNumbers(-2, -1), tree)

    muon = contrib.scale_by_muon(
        ns_steps=config.steps,
        beta=config.momentum,
        nesterov=config.nesterov,
        weight_dimension_numbers=matrices,
    )
    return optax.chain(
        with_moments_as(config.moments, muon, _is_matrix),
        optax.stateless(lambda updates, _: jax.tree.map(_as_large_as_adamw, updates)),
    )


def _as_large_as_adamw(orthogonal: Float[Array, "*S N M"]) -> Float[Array, "*S N M"]:
    """An orthogonal matrix of this shape has a root mean square of 1 / sqrt(max(N, M))."""
    return MUON_RMS * math.sqrt(max(orthogonal.shape[-2:])) * orthogonal


def over_layers(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transformation on every layer of stacked parameters as if it were alone.

    For what looks at whole arrays, such as their root mean square. Its state has a part for the
    parameters that are not stacked, and one for each number of layers, with that as a leading axis.
    """

    def parts(tree: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for path, leaf in tree.items():
            name = f"layers_{leaf.shape[0]}" if STACKED in path else "single"
            found.setdefault(name, {})[path] = leaf
        return found

    def of(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        return function if name == "single" else jax.vmap(function)

    def init(params: Any) -> Any:
        return {name: of(inner.init, name)(part) for name, part in parts(params).items()}

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates: dict[str, Any] = {}
        after, weights = {}, parts(params)
        for name, part in parts(grads).items():
            found, after[name] = of(inner.update, name)(part, state[name], weights[name])
            updates |= found
        return {path: updates[path] for path in grads}, after

    return optax.GradientTransformation(init, update)


def without_added_moments(
    inner: optax.GradientTransformation, vocab_size: int
) -> optax.GradientTransformation:
    """The transformation with zeros in its state for tokens that are none of the model's.

    Their gradients are zero, and so are most moments of them. But Adafactor adds a little to each
    square, which would be another array on each mesh.
    """

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, after = inner.update(grads, state, params)

        def cleared(keys: Any, leaf: jax.Array) -> jax.Array:
            names = [getattr(key, "key", getattr(key, "name", None)) for key in keys]
            path = next((name for name in names if name in TABLES and name in grads), None)
            if path is None:
                return leaf
            axis = _token_axis(path, grads[path].shape, leaf.shape, "v_col" in names)
            if axis is None or leaf.shape[axis] <= vocab_size:
                return leaf
            places = jax.lax.broadcasted_iota(jnp.int32, leaf.shape, axis)
            return jnp.where(places < vocab_size, leaf, jnp.zeros_like(leaf))

        return updates, jax.tree_util.tree_map_with_path(cleared, after)

    return optax.GradientTransformation(inner.init, update)


def _token_axis(
    path: str, whole: tuple[int, ...], shape: tuple[int, ...], is_column: bool
) -> int | None:
    """The axis of a table's moments that has a place for every token; None where none has."""
    if len(shape) == len(whole):
        return TABLES[path] if shape[TABLES[path]] == whole[TABLES[path]] else None
    if len(shape) != 1 or len(whole) != 2:
        return None
    # A row has the shorter side of the matrix, of equal ones the former, and a column the other.
    shorter = int(whole[1] < whole[0])
    kept = 1 - shorter if is_column else shorter
    return 0 if kept == TABLES[path] and shape[0] == whole[kept] else None


def _muon_or_adamw(params: Mapping[str, Any]) -> dict[str, str]:
    """Which part of Muon takes a parameter."""

    def is_hidden_matrix(path: str) -> bool:
        is_product = path.endswith(("/kernel", "/lora_a", "/lora_b"))
        return is_product and not re.fullmatch(NO_HIDDEN_MATRIX, path)

    return {path: "muon" if is_hidden_matrix(path) else "adamw" for path in params}


def _is_matrix(path: str) -> bool:
    return not path.endswith(("/bias", "/scale", "/A_log", "/dt_bias", "/lora_magnitude"))


def _decayed(params: Mapping[str, jax.Array]) -> dict[str, bool]:
    return {path: _is_matrix(path) for path in params}
