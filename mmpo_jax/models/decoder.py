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
from mmpo_jax.models.decoder_layer import Attention, DecoderLayer, KeyValue, Observer
from mmpo_jax.models.experts import SHARDING_RULES as OF_EXPERTS
from mmpo_jax.models.layer_kinds import LAYERS, PerLayerConfig, Stack
from mmpo_jax.models.layers import (
    constrain_batch,
    gather_tokens,
    keep_dtype,
    rematerialise,
    rms_norm,
    split_tokens,
    spread_gradient,
    stack_layers,
    with_expert,
)
from mmpo_jax.models.linear import linear
from mmpo_jax.models.rope import Rope, Tables, rope_tables
from mmpo_jax.models.scanning import scan_segment

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"language_model/embed_tokens(_per_layer)?/embedding", PartitionSpec("tensor", "fsdp")),
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
    # What is read and given is of single tokens, which `tensor` splits.
    (r"language_model/per_layer_model_projection/kernel", PartitionSpec("fsdp", None)),
    (r"language_model/.*/per_layer_input_gate/kernel", PartitionSpec(None, "fsdp", None)),
    (r"language_model/.*/per_layer_projection/kernel", PartitionSpec(None, None, "fsdp")),
    (r"language_model/.*/linear_attn/(conv1d/kernel|dt_bias|A_log)", PartitionSpec()),
    (
        r"language_model/.*/bias|language_model/(.*/)?[a-z_]*norm(_\d)?/scale"
        r"|language_model/layers/(\w+/)?layer_scalar",
        PartitionSpec(),
    ),
    *OF_EXPERTS,
)


@dataclasses.dataclass(frozen=True)
class Added:
    """What is added to the hidden states behind each of the first layers."""

    layers: int
    """Their number."""
    of: Callable[[Int[Array, ""]], Float[Array, "B S D"]]
    """Number of a layer -> [B, S, D]."""


def _spreading(parameters: Any) -> Any:
    """The parameters of one layer, whose kernels' gradients are spread, see `spread_gradient`."""

    def of(keys: Any, leaf: jax.Array) -> jax.Array:
        names = [str(key.key) for key in keys if isinstance(key, jax.tree_util.DictKey)]
        path = "/".join(["language_model/layers", *names])
        spec = next((spec for rule, spec in SHARDING_RULES if re.fullmatch(rule, path)), None)
        if spec is None or "expert" in spec:  # gradients of experts are summed where they are
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.floating):  # quantised, and without a gradient
            return leaf
        return leaf if not spec else spread_gradient(leaf, PartitionSpec(*spec[1:]))

    return jax.tree_util.tree_map_with_path(of, parameters)


class Decoder(nnx.Module):
    """Token embedding, layers, final norm and head; the parameter names are Hugging Face's."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = _table(config.vocab_size, config.hidden_size, rngs)
        if config.per_layer is not None:
            inner, depth = config.per_layer.size, config.num_layers
            self.embed_tokens_per_layer = _table(config.per_layer.vocab_size, inner * depth, rngs)
            self.per_layer_model_projection = linear(config.hidden_size, inner * depth, False, rngs)
            self.per_layer_projection_norm = rms_norm(
                inner, config.rms_norm_eps, config.norm_offset, rngs
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
        per_layer: Float[Array, "B S L p"] | None = None,
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
          per_layer: see `per_layer_inputs`; None of a decoder that has none.
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
        sources: dict[str, KeyValue] = {}
        for segment in self.config.segments:
            bodies, given = {}, {}
            for stack in segment.stacks:
                graphdef, parameters = nnx.split(self._stack(stack))
                more = added if added and min(stack.numbers) < added.layers else None
                source = sources.get(self.config.kv_source(stack).path)
                run = functools.partial(
                    _run_layer, graphdef, ropes, attend, stack, split, more, observe, source
                )
                bodies[stack.path] = rematerialise(run, remat)
                inputs = (layer_inputs or {}).get(stack.path)
                numbers = jnp.array(stack.numbers) if more else None
                own = None
                if per_layer is not None:
                    own = jnp.moveaxis(per_layer[:, :, jnp.array(stack.numbers)], 2, 0)
                given[stack.path] = parameters, inputs, numbers, own
            state, made = scan_segment(segment, bodies, state, given, in_place=in_place)
            for path, (of_attend, read) in made.items():
                outputs[path] = of_attend
                if read is not None:  # of the one layer of its stack
                    sources[path] = jax.tree.map(lambda x: x[0], read)
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
        return _looked_up(self.embed_tokens, ids, self.config.embedding_scale)

    def per_layer_inputs(
        self, ids: Int[Array, "B S"], x: Float[Array, "B S D"], split: bool = True
    ) -> Float[Array, "B S L p"] | None:
        """What every layer reads of tokens beside the hidden states: its part of an embedding of
        their own, and of what a matrix makes of the decoder's inputs. None where there is none.

        Args:
          ids: int32[B, S]; the config's `pad_id` where an image is shown.
          x: [B, S, D], the decoder's inputs.
          split: see `__call__`.
        """
        config: PerLayerConfig | None = self.config.per_layer
        if config is None:
            return None
        place = split_tokens if split else constrain_batch
        told = place(_looked_up(self.embed_tokens_per_layer, ids, config.size**0.5))
        made = self.per_layer_model_projection(place(x)) * x.shape[-1] ** -0.5
        shape = (*x.shape[:2], self.config.num_layers, config.size)
        made = self.per_layer_projection_norm(made.reshape(shape))
        return (made + told.reshape(shape)) * 2**-0.5

    def head_kernel(self) -> Float[Array, "D V"]:
        """The language-model head as [D, V].

        Raises:
          ModelError: there is none.
        """
        if not self.speaks:
            raise ModelError("this reward model has no language-model head, so it writes nothing")
        return self.embed_tokens.embedding[...].T if self.tied else self.lm_head.kernel[...]


def _table(rows: int, size: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        rows,
        size,
        embedding_init=nnx.initializers.normal(size**-0.5),
        promote_dtype=keep_dtype,
        rngs=rngs,
    )


def _looked_up(table: nnx.Embed, ids: Int[Array, "B S"], factor: float) -> Float[Array, "B S D"]:
    """Rows of a table times a factor, see `Decoder.embed`."""
    found = table(ids)
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty:
        split = with_expert(PartitionSpec("data", None, "fsdp"), mesh)
        found = jax.lax.with_sharding_constraint(found, split)
    found = constrain_batch(found)
    return found if factor == 1 else found * jnp.asarray(factor, found.dtype)


def _run_layer(
    graphdef: Any,
    ropes: Mapping[Rope, Tables],
    attend: Attention,
    stack: Stack,
    split: bool,
    added: Added | None,
    observe: Observer | None,
    source: KeyValue | None,
    state: tuple[jax.Array, Any],
    given: tuple[Any, Any, Any, Any],
) -> tuple[tuple[jax.Array, Any], tuple[Any, KeyValue | None]]:
    """The body of a scan over the layers of a stack."""
    x, carry = state
    parameters, inputs, number, per_layer = given
    place = split_tokens if split else constrain_batch
    if per_layer is not None:
        per_layer = place(per_layer)
    layer = nnx.merge(graphdef, _spreading(parameters))
    x, carry, outputs, own = layer(
        x, ropes, attend, stack, carry, inputs, split, observe, source, per_layer
    )
    if added is not None:
        x = jax.lax.cond(
            number < added.layers, lambda x: x + place(added.of(number)), lambda x: x, x
        )
    return (x, carry), (outputs, own)
