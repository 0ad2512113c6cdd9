"""The gated delta net of Qwen3.5: projections, and how a prompt's state is forked per response.

A mask does not isolate responses from one another here, as they would read one state. So a prompt
is run once, and each of its responses begins with the state that it has left.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.models.delta_rule import (
    causal_conv,
    delta_step,
    gated_delta_rule,
    last_tokens,
    unit,
)
from mmpo_jax.models.layer_kinds import DeltaNetConfig
from mmpo_jax.models.layers import ACTIVATIONS, ATTENDED, batch_axes, promote
from mmpo_jax.models.linear import linear


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaTokens:
    """What a gated delta net makes of its tokens before they read one another."""

    channels: jax.Array
    """[B, S, c]; queries, keys and values, in front of the convolution."""
    kernel: jax.Array
    """[w, c], of the convolution."""
    log_decay: jax.Array
    """float32[B, S, H]."""
    strength: jax.Array
    """float32[B, S, H]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaState:
    """What a gated delta net knows of the tokens before."""

    recent: jax.Array
    """[..., v, c]; channels of the last v = w - 1 tokens."""
    memory: jax.Array
    """float32[..., H, e, f]; see `delta_rule`."""


class ShortConv(nnx.Module):
    """The kernel [w, c] of a convolution with a filter of its own for every channel."""

    def __init__(self, size: int, channels: int, rngs: nnx.Rngs):
        init = nnx.initializers.normal(size**-0.5)
        self.kernel = nnx.Param(init(rngs.params(), (size, channels)))


class GatedDeltaNet(nnx.Module):
    """The projections of a gated delta net; which state a token reads is the caller's."""

    def __init__(self, decoder: DecoderConfig, config: DeltaNetConfig, rngs: nnx.Rngs):
        size, heads = decoder.hidden_size, config.num_value_heads
        self.heads, self.value_dim = heads, config.value_dim
        self.in_proj_qkv = linear(size, config.channels, False, rngs)
        self.in_proj_z = linear(size, heads * config.value_dim, False, rngs)
        self.in_proj_b = linear(size, heads, False, rngs)
        self.in_proj_a = linear(size, heads, False, rngs)
        self.conv1d = ShortConv(config.conv_size, config.channels, rngs)
        self.dt_bias = nnx.Param(jnp.ones(heads))
        rates = jax.random.uniform(rngs.params(), (heads,), minval=0.01, maxval=16)
        self.A_log = nnx.Param(jnp.log(rates))
        self.norm = nnx.RMSNorm(config.value_dim, epsilon=decoder.rms_norm_eps, rngs=rngs)
        residual_layers = 2 * decoder.num_layers
        self.out_proj = linear(heads * config.value_dim, size, False, rngs, residual_layers)

    def project(
        self, x: Float[Array, "B S D"], ropes: Any
    ) -> tuple[DeltaTokens, Float[Array, "B S H f"]]:
        """(what the delta rule reads, the gate of what it gives); there are no positions."""
        del ropes
        gate = self.in_proj_z(x).reshape(*x.shape[:2], self.heads, self.value_dim)
        steps = jax.nn.softplus(promote(self.in_proj_a(x)) + promote(self.dt_bias[...]))
        tokens = DeltaTokens(
            self.in_proj_qkv(x),
            self.conv1d.kernel[...],
            -jnp.exp(promote(self.A_log[...])) * steps,
            jax.nn.sigmoid(promote(self.in_proj_b(x))),
        )
        return tokens, gate

    def merge(
        self, read: Float[Array, "B S H f"], gate: Float[Array, "B S H f"]
    ) -> Float[Array, "B S D"]:
        """What heads read, normalised and then gated, as it is added to the residual stream."""
        gated = (self.norm(read) * jax.nn.silu(promote(gate))).astype(gate.dtype)
        return self.out_proj(gated.reshape(*gated.shape[:2], -1))


def shared_prompt_delta(
    tokens: DeltaTokens,
    config: DeltaNetConfig,
    prompt_mask: Bool[Array, "B P"],
    response_mask: Bool[Array, "B R T"],
) -> tuple[Float[Array, "B S H f"], DeltaState, DeltaState]:
    """What tokens of a prompt and of R responses to it read, laid out as one sequence.

    Args:
      tokens: of S = P + R * T: the prompt, then the responses one after another.
      config: of the layer.
      prompt_mask, response_mask: True from their start on and False from their end on; R may be 0.

    Returns:
      (what is read [B, S, H, f], the state behind every prompt [B, ...], and behind every response
      [B, R, ...]).
    """
    (b, p), (r, t) = prompt_mask.shape, response_mask.shape[1:]
    prompt = jax.tree.map(lambda x: x if x.ndim < 3 else x[:, :p], tokens)
    read, state = run(prompt, config, prompt_mask, empty_state(tokens, config))

    def to_all(x: jax.Array) -> jax.Array:
        every = jnp.broadcast_to(x[:, None], (b, r, *x.shape[1:]))
        return every.reshape(b * r, *x.shape[1:])

    def per_response(x: jax.Array) -> jax.Array:
        return x.reshape(b, r, *x.shape[1:])

    forked = jax.tree.map(to_all, state)
    if not r * t:
        return checkpoint_name(read, ATTENDED), state, jax.tree.map(per_response, forked)
    responses = jax.tree.map(
        lambda x: x if x.ndim < 3 else x[:, p:].reshape(b * r, t, *x.shape[2:]), tokens
    )
    own, ends = run(responses, config, response_mask.reshape(b * r, t), forked)
    read = jnp.concatenate([read, own.reshape(b, r * t, *own.shape[2:])], axis=1)
    return checkpoint_name(read, ATTENDED), state, jax.tree.map(per_response, ends)


def empty_state(tokens: DeltaTokens, config: DeltaNetConfig) -> DeltaState:
    """The state in front of the first token of every row."""
    rows = len(tokens.channels)
    recent = (rows, config.conv_size - 1, config.channels)
    memory = rows, config.num_value_heads, config.key_dim, config.value_dim
    dtype = tokens.log_decay.dtype
    return DeltaState(jnp.zeros(recent, tokens.channels.dtype), jnp.zeros(memory, dtype))


def run(
    tokens: DeltaTokens, config: DeltaNetConfig, mask: Bool[Array, "B S"], state: DeltaState
) -> tuple[Float[Array, "B S H f"], DeltaState]:
    """Rows of tokens one behind the other.

    Args:
      tokens: of B rows.
      config: of the layer.
      mask: bool[B, S], True from the start of a row on and False from its end on.
      state: in front of the rows.

    Returns:
      (what is read [B, S, H, f], the state behind the last real token of every row).
    """
    channels = causal_conv(tokens.channels, tokens.kernel, state.recent)
    channels = ACTIVATIONS[config.hidden_act](channels)
    keys = config.num_key_heads * config.key_dim

    def heads(x: jax.Array, size: int) -> jax.Array:
        return split_heads(x.reshape(*x.shape[:2], -1, size))

    query, key, value = jnp.split(channels, (keys, 2 * keys), axis=-1)
    query, key = heads(query, config.key_dim), heads(key, config.key_dim)
    value = heads(value, config.value_dim)
    real = mask[..., None]
    query, key, value = unit(query), unit(key), jnp.where(real[..., None], value, 0)
    log_decay, strength = (
        split_heads(jnp.where(real, x, 0)) for x in (tokens.log_decay, tokens.strength)
    )
    if mask.shape[1] == 1:
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
        log_decay, strength = log_decay[:, 0], strength[:, 0]
        read, memory = delta_step(query, key, value, log_decay, strength, state.memory)
        read = read[:, None]
    else:
        read, memory = gated_delta_rule(query, key, value, log_decay, strength, state.memory)
    recent = last_tokens(tokens.channels, state.recent, mask.sum(axis=1))
    return read, DeltaState(recent, memory)


def split_heads(x: Float[Array, "B S H *d"]) -> Float[Array, "B S H *d"]:
    """Spreads heads over the mesh's axis `tensor`, if one is in use and divides them."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    tensor = mesh.shape.get("tensor", 1)
    over = "tensor" if tensor > 1 and x.shape[2] % tensor == 0 else None
    return jax.lax.with_sharding_constraint(x, PartitionSpec(batch_axes(mesh), None, over))
