"""The Llama decoder: stacked layers, scanned, with the attention passed in.

The same layers serve training (one prompt and many responses), prefill and decoding: what differs
is only what a query attends to, so each caller hands `Decoder` its own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    constrain_batch,
    keep_dtype,
    linear,
    promote,
    rematerialise,
    stack_layers,
)

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"language_model/embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),
    (r"language_model/lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (
        r"language_model/layers/(self_attn/[qkv]_proj|mlp/(gate|up)_proj)/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (
        r"language_model/layers/(self_attn/o_proj|mlp/down_proj)/kernel",
        PartitionSpec(None, "tensor", "fsdp"),
    ),
    (r"language_model/.*/bias|language_model/(.*/)?[a-z_]*norm/scale", PartitionSpec()),
)

Attention = Callable[..., tuple[jax.Array, Any, Any]]
"""attend(query [B,S,H,d], key [B,S,K,d], value, carry, layer_inputs) -> (out, carry, outputs)."""


class SelfAttention(nnx.Module):
    """The projections of grouped-query attention; what is attended to is the caller's."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = config.attention_bias
        self.q_proj = linear(config.hidden_size, queries, bias, rngs)
        self.k_proj = linear(config.hidden_size, keys, bias, rngs)
        self.v_proj = linear(config.hidden_size, keys, bias, rngs)
        self.o_proj = linear(queries, config.hidden_size, bias, rngs, 2 * config.num_layers)

    def project(self, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        """[B, S, D] -> query [B, S, H, d], key and value [B, S, K, d], rotated."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (f(x).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        return rotate(query, rope), rotate(key, rope), value


class Mlp(nnx.Module):
    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.act = config.hidden_act
        wide, narrow = config.intermediate_size, config.hidden_size
        self.gate_proj = linear(narrow, wide, config.mlp_bias, rngs)
        self.up_proj = linear(narrow, wide, config.mlp_bias, rngs)
        self.down_proj = linear(wide, narrow, config.mlp_bias, rngs, 2 * config.num_layers)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.act](self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One pre-norm layer; `attend` decides what is seen."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)
        self.self_attn = SelfAttention(config, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)
        self.mlp = Mlp(config, rngs)

    def __call__(
        self, x: jax.Array, rope: Any, attend: Attention, carry: Any, inputs: Any
    ) -> tuple[jax.Array, Any, Any]:
        query, key, value = self.self_attn.project(self.input_layernorm(x), rope)
        attended, carry, outputs = attend(query, key, value, carry, inputs)
        x = x + self.self_attn.o_proj(attended.reshape(*x.shape[:2], -1))
        return x + self.mlp(self.post_attention_layernorm(x)), carry, outputs


class Decoder(nnx.Module):
    """Token embedding, layers, final norm and head; the parameter names are Hugging Face's."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.head_dim, self.rope_theta = config.head_dim, config.rope_theta
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(config.hidden_size**-0.5),
            promote_dtype=keep_dtype,
            rngs=rngs,
        )
        self.layers = stack_layers(lambda r: DecoderLayer(config, r), config.num_layers, rngs)
        self.norm = nnx.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.lm_head = linear(config.hidden_size, config.vocab_size, False, rngs)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        attend: Attention,
        *,
        carry: Any = None,
        layer_inputs: Any = None,
        remat: str = "none",
    ) -> tuple[jax.Array, Any, Any]:
        """Runs the layers and the final norm over embedded tokens.

        Args:
          x: [B, S, D].
          positions: int32[B, S], rotary positions.
          attend: see `Attention`; called once per layer.
          carry: state that `attend` threads through the layers (a cache it writes to).
          layer_inputs: pytree with a leading layer axis, sliced for `attend`.
          remat: rematerialisation policy, see `layers.rematerialise`.

        Returns:
          (hidden states [B, S, D], the final carry, `attend`'s outputs stacked over layers).
        """
        rope = rope_tables(positions, self.head_dim, self.rope_theta)
        graphdef, parameters = nnx.split(self.layers)

        def body(state: tuple, inputs: tuple) -> tuple[tuple, Any]:
            x, carry = state
            layer = nnx.merge(graphdef, inputs[0])
            x, carry, outputs = layer(x, rope, attend, carry, inputs[1])
            return (constrain_batch(x), carry), outputs

        (x, carry), outputs = jax.lax.scan(
            rematerialise(body, remat), (constrain_batch(x), carry), (parameters, layer_inputs)
        )
        return self.norm(x), carry, outputs

    def head_kernel(self) -> jax.Array:
        """The language-model head as [D, V]."""
        return self.embed_tokens.embedding[...].T if self.tied else self.lm_head.kernel[...]


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of rotary embeddings, float32[B, S, 1, d/2] (Su et al. 2021, eq. 34)."""
    frequencies = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates [B, S, heads, d] by halves, Hugging Face's order of the rotary pairs."""
    cos, sin = rope
    first, second = jnp.split(promote(x), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
