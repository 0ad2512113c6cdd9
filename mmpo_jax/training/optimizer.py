"""AdamW with clipping, warm-up and cosine decay, from optax."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import optax

from mmpo_jax.recipes.training import Optimizer


def make_schedule(config: Optimizer, steps: int) -> optax.Schedule:
    """Linear warm-up over `warmup_ratio` of the steps, then cosine to zero, as transformers has it.

    The first step's rate is not zero: warm-up of w steps takes i + 1 of w + 1 equal stairs.
    """
    warmup = math.ceil(steps * config.warmup_ratio)

    def schedule(step: jax.Array) -> jax.Array:
        rising = (step + 1) / (warmup + 1)
        progress = jnp.clip((step - warmup) / max(1, steps - warmup), 0, 1)
        falling = 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(step < warmup, rising, falling)

    return schedule


def make_optimizer(config: Optimizer, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Clips the global norm, then AdamW; biases and norm scales are not decayed."""
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(
            schedule,
            b1=config.beta1,
            b2=config.beta2,
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params: dict[str, jax.Array]) -> dict[str, bool]:
    return {path: not path.endswith(("/bias", "/scale")) for path in params}
