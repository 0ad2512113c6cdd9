"""One layer of a decoder: how its tokens read one another, and what is made of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.models.delta_net import GatedDeltaNet
from mmpo_jax.models.experts import Experts, SparseMlp
from mmpo_jax.models.layer_kinds import (
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    Stack,
)
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    GatedMlp,
    constrain_batch,
    gather_tokens,
    promote,
    rms_norm,
    scatter_tokens,
    unit_norm,
)
from mmpo_jax.models.linear import linear
from mmpo_jax.models.rope import Rope, Tables, rotate
from mmpo_jax.models.routing import Routing, ScaledRouter

Attention = Callable[[Any, Stack, Any, Any], tuple[jax.Array, Any, Any]]
"""attend(made, stack, carry, layer_inputs) -> (out, carry, outputs).

`made` is what the layer's mixer makes of its tokens, of attention `QueryKeyValue` and of a delta
net `DeltaTokens`; `stack` says of which layers it is one; what comes out is [B, S, H, d].
"""

Observer = Callable[[Routing, Any], Any]
"""observe(routing, carry) -> carry: is shown where a layer's tokens go."""


KeyValue = tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]]
QueryKeyValue = tuple[Float[Array, "B S H d"], Float[Array, "B S K d"], Float[Array, "B S K d"]]


class SelfAttention(nnx.Module):
    """The projections of grouped-query attention; what is attended to is the caller's."""

    def __init__(self, decoder: DecoderConfig, config: AttentionConfig, rngs: nnx.Rngs):
        self.config, self.epsilon = config, decoder.rms_norm_eps
        size, head_dim, bias = decoder.hidden_size, config.head_dim, config.qkv_bias
        queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.q_proj = linear(size, queries * (2 if config.gated else 1), bias, rngs)
        has_keys = config.kv_source is None
        if has_keys:
            self.k_proj = linear(size, keys, bias, rngs)
        if has_keys and not config.keys_are_values:
            self.v_proj = linear(size, keys, bias, rngs)
        residual_layers = 2 * decoder.num_layers
        self.o_proj = linear(queries, size, config.out_bias, rngs, residual_layers)
        if config.qk_norm:
            norm = decoder.rms_norm_eps, decoder.norm_offset, rngs
            self.q_norm = rms_norm(head_dim, *norm)
            if has_keys:
                self.k_norm = rms_norm(head_dim, *norm)

    def project(
        self, x: Float[Array, "B S D"], ropes: Mapping[Rope, Tables], source: KeyValue | None = None
    ) -> tuple[QueryKeyValue, Float[Array, "B S H d"] | None]:
        """[B, S, D] -> (query [B, S, H, d], key and value [B, S, K, d], rotated; the gate).

        Keys and values are those of `source`, another layer, if it is given.
        """
        heads, gate = (*x.shape[:2], -1, self.config.head_dim), None
        if self.config.gated:
            both = self.q_proj(x).reshape(*x.shape[:2], -1, 2 * self.config.head_dim)
            query, gate = jnp.split(both, 2, axis=-1)
        else:
            query = self.q_proj(x).reshape(heads)
        if self.config.qk_norm:
            query = self.q_norm(query)
        of_query, of_key = (ropes[rope] for rope in self.config.ropes)
        query = rotate(query, of_query)
        if source is not None:
            return (query, *source), gate
        key = self.k_proj(x).reshape(heads)
        value = key if self.config.keys_are_values else self.v_proj(x).reshape(heads)
        if self.config.qk_norm:
            key = self.k_norm(key)
        if self.config.value_norm:
            value = unit_norm(value, self.epsilon)
        return (query, rotate(key, of_key), value), gate

    def merge(
        self, attended: Float[Array, "B S H d"], gate: Float[Array, "B S H d"] | None
    ) -> Float[Array, "B S D"]:
        """What heads read, as it is added to the residual stream."""
        if gate is not None:
            attended = attended * jax.nn.sigmoid(promote(gate)).astype(attended.dtype)
        return self.o_proj(attended.reshape(*attended.shape[:2], -1))


class DecoderLayer(nnx.Module):
    """One pre-norm layer; `attend` decides what is seen."""

    def __init__(self, decoder: DecoderConfig, config: LayerConfig, rngs: nnx.Rngs):
        self.sandwich = config.sandwich
        size = decoder.hidden_size

        def norm() -> Any:
            return rms_norm(size, decoder.rms_norm_eps, decoder.norm_offset, rngs)

        self.input_layernorm = norm()
        if isinstance(config.mixer, DeltaNetConfig):
            self.linear_attn = GatedDeltaNet(decoder, config.mixer, rngs)
        else:
            self.self_attn = SelfAttention(decoder, config.mixer, rngs)
        self.is_delta_net = isinstance(config.mixer, DeltaNetConfig)
        self.is_kv_source = isinstance(config.mixer, AttentionConfig) and config.mixer.is_kv_source
        self.post_attention_layernorm = norm()
        if config.sandwich:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        mlp, residual_layers = config.mlp, 2 * decoder.num_layers
        self.mlp: GatedMlp | SparseMlp
        if isinstance(mlp, ExpertsConfig):
            self.mlp = SparseMlp(size, mlp, residual_layers, rngs)
        else:
            self.mlp = GatedMlp(
                size, mlp.intermediate_size, mlp.hidden_act, mlp.bias, residual_layers, rngs
            )
        self.has_experts = config.experts is not None
        if config.experts is not None:
            self.router = ScaledRouter(size, config.experts, decoder.rms_norm_eps, rngs)
            self.experts = Experts(size, config.experts, residual_layers, rngs)
            self.pre_feedforward_layernorm_2 = norm()
            self.post_feedforward_layernorm_1 = norm()
            self.post_feedforward_layernorm_2 = norm()
        self.per_layer_act: str | None = None
        if config.per_layer is not None:
            self.per_layer_act, inner = mlp.hidden_act, config.per_layer.size
            self.per_layer_input_gate = linear(size, inner, False, rngs)
            self.per_layer_projection = linear(inner, size, False, rngs, residual_layers)
            self.post_per_layer_input_norm = norm()
        self.scaled = config.scaled
        if config.scaled:
            self.layer_scalar = nnx.Param(jnp.ones(1))

    def __call__(
        self,
        x: Float[Array, "B S D"],
        ropes: Mapping[Rope, Tables],
        attend: Attention,
        stack: Stack,
        carry: Any,
        inputs: Any,
        split: bool,
        observe: Observer | None,
        source: KeyValue | None,
        per_layer: Float[Array, "B S p"] | None,
    ) -> tuple[Float[Array, "B S D"], Any, Any, KeyValue | None]:
        """(hidden states, the carry, `attend`'s outputs, keys and values if others read them)."""
        gather, scatter = (gather_tokens, scatter_tokens) if split else (constrain_batch,) * 2
        read = gather(self.input_layernorm(x))
        mixer: Any = self.linear_attn if self.is_delta_net else self.self_attn
        made, gate = (
            mixer.project(read, ropes) if source is None else mixer.project(read, ropes, source)
        )
        own = made[1:] if self.is_kv_source else None
        attended, carry, outputs = attend(made, stack, carry, inputs)
        added = scatter(mixer.merge(attended, gate))
        if not self.sandwich:
            x = x + added
            more, carry = self._mlp(gather(self.post_attention_layernorm(x)), carry, observe)
            return x + scatter(more), carry, outputs, own
        x = x + self.post_attention_layernorm(added)
        more, carry = self._mlp(gather(self.pre_feedforward_layernorm(x)), carry, observe)
        more = scatter(more)
        if self.has_experts:
            found, carry = self._experts(gather(x), carry, observe)
            more = self.post_feedforward_layernorm_1(more)
            more = more + self.post_feedforward_layernorm_2(scatter(found))
        x = x + self.post_feedforward_layernorm(more)
        if self.per_layer_act is not None:
            assert per_layer is not None
            gate = ACTIVATIONS[self.per_layer_act](self.per_layer_input_gate(x))
            x = x + self.post_per_layer_input_norm(self.per_layer_projection(gate * per_layer))
        if self.scaled:
            x = x * self.layer_scalar[...].astype(x.dtype)
        return x, carry, outputs, own

    def _mlp(
        self, x: Float[Array, "B S D"], carry: Any, observe: Observer | None
    ) -> tuple[Float[Array, "B S D"], Any]:
        """(what the MLP makes of tokens, the carry)."""
        if not isinstance(self.mlp, SparseMlp):
            return self.mlp(x), carry
        routing = self.mlp.route(x)
        if observe is not None:
            carry = observe(routing, carry)
        return self.mlp.mix(x, routing), carry

    def _experts(
        self, x: Float[Array, "B S D"], carry: Any, observe: Observer | None
    ) -> tuple[Float[Array, "B S D"], Any]:
        """(what experts beside the MLP make of tokens, the carry)."""
        routing = self.router(x)
        if observe is not None:
            carry = observe(routing, carry)
        read = self.pre_feedforward_layernorm_2(x)
        return self.experts(read, routing.chosen, routing.weights), carry
