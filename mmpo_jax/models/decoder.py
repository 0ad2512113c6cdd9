"""The decoder of Llama and its kin: stacked layers, scanned, with the attention passed in.

The same layers serve training (one prompt and many responses), prefill and decoding: what differs
is only what a query attends to, so each caller hands `Decoder` its own attention.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mmpo_jax.models.config import DecoderConfig, ModelError
from mmpo_jax.models.layers import (
    GatedMlp,
    constrain_batch,
    gather_tokens,
    keep_dtype,
    linear,
    rematerialise,
    scatter_tokens,
    split_tokens,
    spread_gradient,
    stack_layers,
)
from mmpo_jax.models.rope import Tables, rope_tables, rotate

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
"""attend(query, key, value, window, carry, layer_inputs) -> (out, carry, outputs).

Queries and what comes out are [B, S, H, d], keys and values [B, S, K, d]. `window` is None, or
how many tokens a query sees, itself included: an int where all layers have the same.
"""


def _spreading(parameters: Any) -> Any:
    """The parameters of one layer, whose kernels' gradients are spread, see `spread_gradient`."""

    def of(keys: Any, leaf: jax.Array) -> jax.Array:
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        path = "/".join(["language_model/layers", *names])
        spec = next((spec for rule, spec in SHARDING_RULES if re.fullmatch(rule, path)), None)
        return leaf if not spec else spread_gradient(leaf, PartitionSpec(*spec[1:]))

    return jax.tree_util.tree_map_with_path(of, parameters)


class SelfAttention(nnx.Module):
    """The projections of grouped-query attention; what is attended to is the caller's."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.head_dim = config.head_dim
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        bias = config.qkv_bias
        self.q_proj = linear(config.hidden_size, queries, bias, rngs)
        self.k_proj = linear(config.hidden_size, keys, bias, rngs)
        self.v_proj = linear(config.hidden_size, keys, bias, rngs)
        residual_layers = 2 * config.num_layers
        self.o_proj = linear(queries, config.hidden_size, config.out_bias, rngs, residual_layers)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, rngs=rngs)
            self.k_norm = nnx.RMSNorm(config.head_dim, epsilon=config.rms_norm_eps, rngs=rngs)

    def project(
        self,
        x: Float[Array, "B S D"],
        rope: Tables,
    ) -> tuple[Float[Array, "B S H d"], Float[Array, "B S K d"], Float[Array, "B S K d"]]:
        """[B, S, D] -> query [B, S, H, d], key and value [B, S, K, d], rotated."""
        heads = (*x.shape[:2], -1, self.head_dim)
        query, key, value = (f(x).reshape(heads) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.qk_norm:
            query, key = self.q_norm(query), self.k_norm(key)
        return rotate(query, rope), rotate(key, rope), value


class DecoderLayer(nnx.Module):
    """One pre-norm layer; `attend` decides what is seen."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        size, epsilon = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)
        self.self_attn = SelfAttention(config, rngs)
        self.post_attention_layernorm = nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)
        self.mlp = GatedMlp(
            size,
            config.intermediate_size,
            config.hidden_act,
            config.mlp_bias,
            2 * config.num_layers,
            rngs,
        )

    def __call__(
        self,
        x: Float[Array, "B S D"],
        rope: Any,
        attend: Attention,
        window: Any,
        carry: Any,
        inputs: Any,
        split: bool,
    ) -> tuple[Float[Array, "B S D"], Any, Any]:
        gather, scatter = (gather_tokens, scatter_tokens) if split else (constrain_batch,) * 2
        read = gather(self.input_layernorm(x))
        query, key, value = self.self_attn.project(read, rope)
        attended, carry, outputs = attend(query, key, value, window, carry, inputs)
        x = x + scatter(self.self_attn.o_proj(attended.reshape(*x.shape[:2], -1)))
        read = gather(self.post_attention_layernorm(x))
        return x + scatter(self.mlp(read)), carry, outputs


class Decoder(nnx.Module):
    """Token embedding, layers, final norm and head; the parameter names are Hugging Face's."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.rope, self.windows = config.rope, config.windows
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
        layer_inputs: Any = None,
        remat: str = "none",
        split: bool = True,
    ) -> tuple[Float[Array, "B S D"], Any, Any]:
        """Runs the layers and the final norm over embedded tokens.

        Args:
          x: [B, S, D].
          positions: int32[B, A, S], rotary positions.
          attend: see `Attention`; called once per layer.
          carry: state that `attend` threads through the layers (a cache it writes to).
          layer_inputs: pytree with a leading layer axis, sliced for `attend`.
          remat: rematerialisation policy, see `layers.rematerialise`.
          split: whether tokens are spread over the mesh's axis `tensor` between two products, see
            `layers.gather_tokens`.

        Returns:
          (hidden states [B, S, D], the final carry, `attend`'s outputs stacked over layers).
        """
        rope = rope_tables(positions, self.rope)
        graphdef, parameters = nnx.split(self.layers)
        common, own = self._windows()

        def body(state: tuple, inputs: tuple) -> tuple[tuple, Any]:
            x, carry = state
            parameters, own, layer_inputs = inputs
            layer = nnx.merge(graphdef, _spreading(parameters))
            window = common if own is None else own
            x, carry, outputs = layer(x, rope, attend, window, carry, layer_inputs, split)
            return (x, carry), outputs

        inputs = parameters, own, layer_inputs
        x = split_tokens(x) if split else constrain_batch(x)
        (x, carry), outputs = jax.lax.scan(rematerialise(body, remat), (x, carry), inputs)
        x = self.norm(x)
        return gather_tokens(x) if split else constrain_batch(x), carry, outputs

    def embed(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
        """Embeddings of tokens.

        On a mesh every device looks up its part of the width for the rows of all that share the
        axis `fsdp`, and they exchange what they have found: left to itself, the compiler makes it
        whole on every device.
        """
        found = self.embed_tokens(ids)
        mesh = jax.sharding.get_abstract_mesh()
        if not mesh.empty:
            found = jax.lax.with_sharding_constraint(found, PartitionSpec("data", None, "fsdp"))
        return constrain_batch(found)

    def _windows(self) -> tuple[int | None, Int[Array, " L"] | None]:
        """(the window that all layers have in common, or each layer's own: int32[L])."""
        if len(set(self.windows)) == 1:
            return self.windows[0] or None, None
        unlimited = jnp.iinfo(jnp.int32).max
        return None, jnp.array([window or unlimited for window in self.windows], jnp.int32)

    def head_kernel(self) -> Float[Array, "D V"]:
        """The language-model head as [D, V].

        Raises:
          ModelError: there is none.
        """
        if not self.speaks:
            raise ModelError("this reward model has no language-model head, so it writes nothing")
        return self.embed_tokens.embedding[...].T if self.tied else self.lm_head.kernel[...]
