"""The decoder of Llama and its kin: stacks of layers, scanned, with the attention passed in.

The same layers serve training (one prompt and many responses), prefill and decoding: what differs
is only what a query attends to, so each caller hands `Decoder` its own attention.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mmpo_jax.models.config import DecoderConfig, ModelError
from mmpo_jax.models.delta_net import GatedDeltaNet
from mmpo_jax.models.experts import SHARDING_RULES as OF_EXPERTS
from mmpo_jax.models.experts import Experts, Routing, ScaledRouter, SparseMlp
from mmpo_jax.models.layer_kinds import (
    LAYERS,
    AttentionConfig,
    DeltaNetConfig,
    ExpertsConfig,
    LayerConfig,
    Stack,
)
from mmpo_jax.models.layers import (
    GatedMlp,
    constrain_batch,
    gather_tokens,
    keep_dtype,
    linear,
    promote,
    rematerialise,
    rms_norm,
    scatter_tokens,
    split_tokens,
    spread_gradient,
    stack_layers,
    unit_norm,
    with_expert,
)
from mmpo_jax.models.rope import Rope, Tables, rope_tables, rotate
from mmpo_jax.models.scanning import scan_segment

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"language_model/embed_tokens/embedding", PartitionSpec("tensor", "fsdp")),
    (r"language_model/lm_head/kernel", PartitionSpec("fsdp", "tensor")),
    (
        r"language_model/layers/(\w+/)?"
        r"(self_attn/[qkv]_proj|linear_attn/in_proj_\w+|mlp/(gate|up)_proj)/kernel",
        PartitionSpec(None, "fsdp", "tensor"),
    ),
    (
        r"language_model/layers/(\w+/)?(self_attn/o_proj|linear_attn/out_proj|mlp/down_proj)/kernel",
        PartitionSpec(None, "tensor", "fsdp"),
    ),
    (r"language_model/.*/linear_attn/(conv1d/kernel|dt_bias|A_log)", PartitionSpec()),
    (
        r"language_model/.*/bias|language_model/(.*/)?[a-z_]*norm(_\d)?/scale"
        r"|language_model/layers/(\w+/)?layer_scalar",
        PartitionSpec(),
    ),
    *OF_EXPERTS,
)

Attention = Callable[[Any, Stack, Any, Any], tuple[jax.Array, Any, Any]]
"""attend(made, stack, carry, layer_inputs) -> (out, carry, outputs).

`made` is what the layer's mixer makes of its tokens, of attention `QueryKeyValue` and of a delta
net `DeltaTokens`; `stack` says of which layers it is one; what comes out is [B, S, H, d].
"""

Observer = Callable[[Routing, Any], Any]
"""observe(routing, carry) -> carry: is shown where a layer's tokens go."""


@dataclasses.dataclass(frozen=True)
class Added:
    """What is added to the hidden states behind each of the first layers."""

    layers: int
    """Their number."""
    of: Callable[[Int[Array, ""]], Float[Array, "B S D"]]
    """Number of a layer -> [B, S, D]."""


QueryKeyValue = tuple[Float[Array, "B S H d"], Float[Array, "B S K d"], Float[Array, "B S K d"]]


def _spreading(parameters: Any) -> Any:
    """The parameters of one layer, whose kernels' gradients are spread, see `spread_gradient`."""

    def of(keys: Any, leaf: jax.Array) -> jax.Array:
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        path = "/".join(["language_model/layers", *names])
        spec = next((spec for rule, spec in SHARDING_RULES if re.fullmatch(rule, path)), None)
        if spec is None or "expert" in spec:  # gradients of experts are summed where they are
            return leaf
        return leaf if not spec else spread_gradient(leaf, PartitionSpec(*spec[1:]))

    return jax.tree_util.tree_map_with_path(of, parameters)


class SelfAttention(nnx.Module):
    """The projections of grouped-query attention; what is attended to is the caller's."""

    def __init__(self, decoder: DecoderConfig, config: AttentionConfig, rngs: nnx.Rngs):
        self.config, self.epsilon = config, decoder.rms_norm_eps
        size, head_dim, bias = decoder.hidden_size, config.head_dim, config.qkv_bias
        queries, keys = config.num_heads * head_dim, config.num_kv_heads * head_dim
        self.q_proj = linear(size, queries * (2 if config.gated else 1), bias, rngs)
        self.k_proj = linear(size, keys, bias, rngs)
        if not config.keys_are_values:
            self.v_proj = linear(size, keys, bias, rngs)
        residual_layers = 2 * decoder.num_layers
        self.o_proj = linear(queries, size, config.out_bias, rngs, residual_layers)
        if config.qk_norm:
            norm = decoder.rms_norm_eps, decoder.norm_offset, rngs
            self.q_norm = rms_norm(head_dim, *norm)
            self.k_norm = rms_norm(head_dim, *norm)

    def project(
        self, x: Float[Array, "B S D"], ropes: Mapping[Rope, Tables]
    ) -> tuple[QueryKeyValue, Float[Array, "B S H d"] | None]:
        """[B, S, D] -> (query [B, S, H, d], key and value [B, S, K, d], rotated; the gate)."""
        heads, gate = (*x.shape[:2], -1, self.config.head_dim), None
        if self.config.gated:
            both = self.q_proj(x).reshape(*x.shape[:2], -1, 2 * self.config.head_dim)
            query, gate = jnp.split(both, 2, axis=-1)
        else:
            query = self.q_proj(x).reshape(heads)
        key = self.k_proj(x).reshape(heads)
        value = key if self.config.keys_are_values else self.v_proj(x).reshape(heads)
        if self.config.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        if self.config.value_norm:
            value = unit_norm(value, self.epsilon)
        of_query, of_key = (ropes[rope] for rope in self.config.ropes)
        return (rotate(query, of_query), rotate(key, of_key), value), gate

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
    ) -> tuple[Float[Array, "B S D"], Any, Any]:
        gather, scatter = (gather_tokens, scatter_tokens) if split else (constrain_batch,) * 2
        read = gather(self.input_layernorm(x))
        mixer: Any = self.linear_attn if self.is_delta_net else self.self_attn
        made, gate = mixer.project(read, ropes)
        attended, carry, outputs = attend(made, stack, carry, inputs)
        added = scatter(mixer.merge(attended, gate))
        if not self.sandwich:
            x = x + added
            more, carry = self._mlp(gather(self.post_attention_layernorm(x)), carry, observe)
            return x + scatter(more), carry, outputs
        x = x + self.post_attention_layernorm(added)
        more, carry = self._mlp(gather(self.pre_feedforward_layernorm(x)), carry, observe)
        more = scatter(more)
        if self.has_experts:
            found, carry = self._experts(gather(x), carry, observe)
            more = self.post_feedforward_layernorm_1(more)
            more = more + self.post_feedforward_layernorm_2(scatter(found))
        x = x + self.post_feedforward_layernorm(more)
        if self.scaled:
            x = x * self.layer_scalar[...].astype(x.dtype)
        return x, carry, outputs

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


class Decoder(nnx.Module):
    """Token embedding, layers, final norm and head; the parameter names are Hugging Face's."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nnx.initializers.normal(config.hidden_size**-0.5),
            promote_dtype=keep_dtype,
            rngs=rngs,
        )
        made = {}
        for stack in config.stacks:
            make = functools.partial(DecoderLayer, config, stack.layer)
            made[stack.path] = stack_layers(make, len(stack.numbers), rngs)
        self.layers: Any = made.get(LAYERS) or nnx.Dict(
            {path.removeprefix(f"{LAYERS}/"): layers for path, layers in made.items()}
        )
        self.norm = rms_norm(config.hidden_size, config.rms_norm_eps, config.norm_offset, rngs)
        self.tied = config.tie_word_embeddings
        self.speaks = self.tied or config.language_head
        if self.speaks and not self.tied:
            self.lm_head = linear(config.hidden_size, config.vocab_size, False, rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        positions: Int[Array, "B A S"],
        attend: Attention,
        *,
        carry: Any = None,
        layer_inputs: Mapping[str, Any] | None = None,
        remat: str = "none",
        split: bool = True,
        added: Added | None = None,
        in_place: bool = False,
        observe: Observer | None = None,
    ) -> tuple[Float[Array, "B S D"], Any, dict[str, Any]]:
        """Runs the layers and the final norm over embedded tokens.

        Args:
          x: [B, S, D].
          positions: int32[B, A, S], rotary positions.
          attend: see `Attention`; called once per layer.
          carry: state that `attend` threads through the layers (a cache it writes to).
          layer_inputs: by the path of a stack, a pytree with a leading layer axis, sliced for
            `attend`.
          remat: rematerialisation policy, see `layers.rematerialise`.
          split: whether tokens are spread over the mesh's axis `tensor` between two products, see
            `layers.gather_tokens`.
          added: to the outputs of the first layers, before the next ones read them.
          in_place: for few tokens and no gradients, see `scanning.scan_segment`.
          observe: see `Observer`; called once per layer with experts, behind `attend`.

        Returns:
          (hidden states [B, S, D], the final carry, `attend`'s outputs by the path of a stack,
          stacked over its layers).
        """
        used = (rope for attention in self.config.attentions for rope in attention.ropes)
        ropes = {rope: rope_tables(positions, rope) for rope in dict.fromkeys(used)}
        x = split_tokens(x) if split else constrain_batch(x)
        state: Any = (x, carry)
        outputs: dict[str, Any] = {}
        for segment in self.config.segments:
            bodies, given = {}, {}
            for stack in segment.stacks:
                graphdef, parameters = nnx.split(self._stack(stack))
                more = added if added and min(stack.numbers) < added.layers else None
                run = functools.partial(
                    _run_layer, graphdef, ropes, attend, stack, split, more, observe
                )
                bodies[stack.path] = rematerialise(run, remat)
                inputs = (layer_inputs or {}).get(stack.path)
                numbers = jnp.array(stack.numbers) if more else None
                given[stack.path] = parameters, inputs, numbers
            state, made = scan_segment(segment, bodies, state, given, in_place=in_place)
            outputs |= made
        x, carry = state
        x = self.norm(x)
        return gather_tokens(x) if split else constrain_batch(x), carry, outputs

    def _stack(self, stack: Stack) -> DecoderLayer:
        *_, name = stack.path.split("/")
        layers: DecoderLayer = self.layers if stack.path == LAYERS else self.layers[name]
        return layers

    def embed(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Embeddings of tokens, times the config's factor.

        On a mesh every device looks up its part of the width for the rows of all that share the
        axis `fsdp`, and they exchange what they have found: left to itself, the compiler makes it
        whole on every device.
        """
        found = self.embed_tokens(ids)
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            split = with_expert(PartitionSpec("data", None, "fsdp"), mesh)
            found = jax.lax.with_sharding_constraint(found, split)
        found = constrain_batch(found)
        factor = self.config.embedding_scale
        return found if factor == 1 else found * jnp.asarray(factor, found.dtype)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The language-model head as [D, V].

        Raises:
          ModelError: there is none.
        """
        if not self.speaks:
            raise ModelError("this reward model has no language-model head, so it writes nothing")
        return self.embed_tokens.embedding[...].T if self.tied else self.lm_head.kernel[...]


def _run_layer(
    graphdef: Any,
    ropes: Mapping[Rope, Tables],
    attend: Attention,
    stack: Stack,
    split: bool,
    added: Added | None,
    observe: Observer | None,
    state: tuple[jax.Array, Any],
    given: tuple[Any, Any, Any],
) -> tuple[tuple[jax.Array, Any], Any]:
    """The body of a scan over the layers of a stack."""
    x, carry = state
    parameters, inputs, number = given
    layer = nnx.merge(graphdef, _spreading(parameters))
    x, carry, outputs = layer(x, ropes, attend, stack, carry, inputs, split, observe)
    if added is not None:
        place = split_tokens if split else constrain_batch
        x = jax.lax.cond(
            number < added.layers, lambda x: x + place(added.of(number)), lambda x: x, x
        )
    return (x, carry), outputs
