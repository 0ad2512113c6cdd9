"""A sparse block of experts: every token passes a few of many gated MLPs, and none is dropped.

Tokens are sorted by expert, so that each expert's are a group of rows (`grouped`). On a mesh the
axis `expert` splits the experts; devices that share it gather each other's tokens, compute what
their own experts make of them, and add up. With top-8 routing that sends no more than every token
to its experts' devices would, and shapes do not depend on where tokens go.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from mmpo_jax.models.grouped import grouped_matmul
from mmpo_jax.models.layer_kinds import ExpertsConfig
from mmpo_jax.models.layers import (
    ACTIVATIONS,
    GatedMlp,
    batch_axes,
    divisible,
    named_axes,
)
from mmpo_jax.models.linear import ADAPTED, linear
from mmpo_jax.models.routing import Routing, most_probable

IN, OUT = PartitionSpec("expert", "fsdp", "tensor"), PartitionSpec("expert", "tensor", "fsdp")
"""How kernels [E, D, F] and [E, F, D] are split."""

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r".*/experts/(gate|up)_proj/kernel", PartitionSpec(None, *IN)),
    (r".*/experts/down_proj/kernel", PartitionSpec(None, *OUT)),
    (r".*/mlp/shared_expert/(gate|up)_proj/kernel", PartitionSpec(None, "fsdp", "tensor")),
    (r".*/mlp/shared_expert/down_proj/kernel", PartitionSpec(None, "tensor", "fsdp")),
    (r".*/(mlp/(gate|shared_expert_gate)|router/proj)/kernel", PartitionSpec()),
    (r".*/router/(scale|per_expert_scale)", PartitionSpec()),
)
"""Of a stack of layers, whatever it is called."""


class ExpertLinear(nnx.Module):
    """A dense layer without bias for each of E experts, and the leaves of an adapter if there is
    one, see `layers.Linear`."""

    lora_a: Any = None
    """[E, inputs, r]"""
    lora_b: Any = None
    """[E, r, outputs]"""
    lora_scale: Any = None
    """float32[E]"""

    def __init__(
        self, experts: int, inputs: int, outputs: int, residual_layers: int, rngs: nnx.Rngs
    ):
        init = nnx.initializers.variance_scaling(
            1 / residual_layers, "fan_in", "truncated_normal", batch_axis=0
        )
        self.kernel = nnx.Param(init(rngs.params(), (experts, inputs, outputs)))

    def leaves(self) -> dict[str, jax.Array]:
        """The arrays of the layer by their names."""
        names = ("kernel", "lora_a", "lora_b", "lora_scale")
        found = {name: getattr(self, name) for name in names}
        return {name: leaf[...] for name, leaf in found.items() if leaf is not None}


class Experts(nnx.Module):
    """E gated MLPs."""

    def __init__(self, size: int, config: ExpertsConfig, residual_layers: int, rngs: nnx.Rngs):
        self.act = config.hidden_act
        count, wide = config.num_experts, config.intermediate_size
        self.gate_proj = ExpertLinear(count, size, wide, 1, rngs)
        self.up_proj = ExpertLinear(count, size, wide, 1, rngs)
        self.down_proj = ExpertLinear(count, wide, size, residual_layers, rngs)

    def __call__(
        self,
        x: Float[Array, "B S D"],
        chosen: Int[Array, "B S k"],
        weights: Float[Array, "B S k"],
    ) -> Float[Array, "B S D"]:
        """Sums over the chosen experts, by their weights.

        Args:
          x: [B, S, D].
          chosen: int32[B, S, k], experts of every token.
          weights: [B, S, k], theirs.
        """
        layers = {"gate": self.gate_proj, "up": self.up_proj, "down": self.down_proj}
        leaves = {name: layer.leaves() for name, layer in layers.items()}
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return _mixed(x, chosen, weights, leaves, lambda _, leaf: leaf, self.act)
        rows = divisible(PartitionSpec(batch_axes(mesh)), x.shape, mesh)
        # What devices with the same rows have of kernels is gathered before, so that it is known
        # to be the same.
        fsdp = "fsdp" if "fsdp" in named_axes(rows[0]) else None
        own = {
            name: {
                part: divisible(_spec(part, name, fsdp), leaf.shape, mesh)
                for part, leaf in named.items()
            }
            for name, named in leaves.items()
        }
        run = functools.partial(_on_device, own=own, rows=rows, act=self.act)
        place = jax.shard_map(run, in_specs=(rows, rows, rows, own), out_specs=rows)
        return place(x, chosen, weights, leaves)


def _spec(part: str, layer: str, fsdp: str | None) -> PartitionSpec:
    """How a leaf of a layer is split: an adapter's as the kernel's experts, inputs and outputs."""
    experts, inputs, outputs = (
        fsdp if axis == "fsdp" else axis for axis in (OUT if layer == "down" else IN)
    )
    axes = {
        "kernel": (experts, inputs, outputs),
        "lora_a": (experts, inputs, None),
        "lora_b": (experts, None, outputs),
        "lora_scale": (experts,),
    }
    return PartitionSpec(*axes[part])


def _on_device(
    x: Float[Array, "b S D"],
    chosen: Int[Array, "b S k"],
    weights: Float[Array, "b S k"],
    leaves: Mapping[str, Mapping[str, jax.Array]],
    *,
    own: Mapping[str, Mapping[str, PartitionSpec]],
    rows: PartitionSpec,
    act: str,
) -> Float[Array, "b S D"]:
    """What one device of the mesh computes of `Experts.__call__`: its rows, and those of all that
    share the axis `expert` while they are at its experts.

    Args:
      x, chosen, weights: the device's rows.
      leaves: by layer and name, the device's parts.
      own: how these are split.
      rows: how rows are split.
      act: of the experts.
    """
    experts, _, wide = own["gate"]["kernel"]
    of_rows = named_axes(rows[0])
    over = {*of_rows} | ({experts, wide} - {None})
    gathers = experts is not None and experts in of_rows

    def varying(leaf: jax.Array) -> jax.Array:
        missing = tuple(sorted(over - jax.typeof(leaf).manual_axis_type.varying))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    def whole(spec: PartitionSpec, leaf: jax.Array) -> jax.Array:
        for axis, split in enumerate(spec):
            if split == "fsdp":
                leaf = jax.lax.all_gather(leaf, "fsdp", axis=axis, tiled=True)
        return varying(leaf)

    if gathers:
        x, chosen, weights = (
            jax.lax.all_gather(part, "expert", axis=0, tiled=True) for part in (x, chosen, weights)
        )
    x, chosen, weights = varying(x), varying(chosen), varying(weights)
    y = _mixed(
        x,
        chosen,
        weights,
        leaves,
        lambda name, leaf: whole(own[name[0]][name[1]], leaf),
        act,
        None if experts is None else jax.lax.axis_index("expert"),
    )
    if wide is not None:
        y = jax.lax.psum(y, wide)
    if gathers:
        return jax.lax.psum_scatter(y, "expert", scatter_dimension=0, tiled=True)
    return y if experts is None else jax.lax.psum(y, "expert")


def _mixed(
    x: Float[Array, "b S D"],
    chosen: Int[Array, "b S k"],
    weights: Float[Array, "b S k"],
    leaves: Mapping[str, Mapping[str, jax.Array]],
    whole: Callable[[tuple[str, str], jax.Array], jax.Array],
    act: str,
    shard: jax.Array | None = None,
) -> Float[Array, "b S D"]:
    """Sums over the chosen experts of those that are here.

    Args:
      x, chosen, weights: see `Experts.__call__`.
      leaves: by layer and name; E experts of them.
      whole: (layer and name, leaf) -> the leaf as products take it.
      act: of the experts.
      shard: which E of all experts these are; None for all.
    """
    count, (k, size) = len(leaves["gate"]["kernel"]), (chosen.shape[-1], x.shape[-1])
    expert = chosen.reshape(-1)
    if shard is not None:  # those of others come last
        expert = expert - shard * count
        expert = jnp.where((expert >= 0) & (expert < count), expert, count)
    order = jnp.argsort(expert)
    back = jnp.zeros_like(order).at[order].set(jnp.arange(len(order), dtype=order.dtype))
    # A token goes to an expert once, so no more of its choices than there are experts are here.
    order = order[: len(order) // k * min(k, count)]
    sizes = jnp.bincount(expert, length=count).astype(jnp.int32)

    def product(name: str, rows: jax.Array) -> jax.Array:
        def multiply(rows: jax.Array, layer: Mapping[str, jax.Array]) -> jax.Array:
            held = {part: whole((name, part), leaf) for part, leaf in layer.items()}
            return _adapted(rows, held, sizes, shard is None)

        # Kernels are gathered again in the backward pass, as XLA does it for those of other layers.
        return jax.checkpoint(multiply, prevent_cse=False)(rows, leaves[name])

    rows = _sent(x.reshape(-1, size), order, back, k)
    gate, up = (checkpoint_name(product(name, rows), ADAPTED) for name in ("gate", "up"))
    # Weighted where rows are narrow: what comes out is linear in it.
    share = _sent(weights.reshape(-1, 1), order, back, 1)
    y = product("down", ACTIVATIONS[act](gate) * up * share)
    return _returned(y, order, back, k).reshape(x.shape)


def _adapted(
    rows: jax.Array, layer: Mapping[str, jax.Array], sizes: jax.Array, whole: bool
) -> jax.Array:
    """x W, and with an adapter x W + scale x a b, of every row's expert."""
    y = grouped_matmul(rows, layer["kernel"], sizes, whole)
    if "lora_a" not in layer:
        return y
    factor = layer["lora_b"] * layer["lora_scale"][:, None, None].astype(rows.dtype)
    return y + grouped_matmul(
        grouped_matmul(rows, layer["lora_a"], sizes, whole), factor, sizes, whole
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _sent(x: jax.Array, order: jax.Array, back: jax.Array, k: int) -> jax.Array:
    """Rows [n, D], each k times, in the order of experts: the first m of [n * k, D]. Its gradient
    is `_returned`: XLA would scatter rows, one by one on CPU.

    Args:
      x: the rows.
      order: int[m], the choice of which token stands in which place.
      back: int[n * k], the place of every choice.
      k: choices of a token.
    """
    return x[order // k]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _returned(y: jax.Array, order: jax.Array, back: jax.Array, k: int) -> jax.Array:
    """Rows [m, D] back in the order of tokens, and those of each added up: [n, D]."""
    found = y.at[back].get(mode="fill", fill_value=0)
    return found.reshape(-1, k, y.shape[-1]).sum(axis=1)


_sent.defvjp(
    lambda x, order, back, k: (_sent(x, order, back, k), (order, back)),
    lambda k, kept, gradient: (_returned(gradient, *kept, k), None, None),
)
_returned.defvjp(
    lambda y, order, back, k: (_returned(y, order, back, k), (order, back)),
    lambda k, kept, gradient: (_sent(gradient, *kept, k), None, None),
)


class SparseMlp(nnx.Module):
    """A router, experts, and where there is one an expert that all tokens pass, behind a gate of
    its own (Qwen2-MoE)."""

    def __init__(self, size: int, config: ExpertsConfig, residual_layers: int, rngs: nnx.Rngs):
        self.top_k, self.normalised = config.top_k, config.normalised
        self.gate = linear(size, config.num_experts, False, rngs)
        self.experts = Experts(size, config, residual_layers, rngs)
        self.shared = bool(config.shared_size)
        if self.shared:
            wide, act = config.shared_size, config.hidden_act
            self.shared_expert = GatedMlp(size, wide, act, False, residual_layers, rngs)
            self.shared_expert_gate = linear(size, 1, False, rngs)

    def route(self, x: Float[Array, "B S D"]) -> Routing:
        """The experts of every token, and their shares, see `most_probable`."""
        probs, chosen, weights = most_probable(self.gate(x), self.top_k, self.normalised)
        return Routing(probs, chosen, weights.astype(x.dtype))

    def mix(self, x: Float[Array, "B S D"], routing: Routing) -> Float[Array, "B S D"]:
        """What the experts make of tokens that go there."""
        y = self.experts(x, routing.chosen, routing.weights)
        if self.shared:
            y = y + jax.nn.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y

    def __call__(self, x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
        return self.mix(x, self.route(x))
