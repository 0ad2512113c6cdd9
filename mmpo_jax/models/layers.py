"""Building blocks shared by vision towers and decoders."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.models.linear import ADAPTED, Linear, linear

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Activations by their Hugging Face names."""

SEVERAL_SIDES = 64
"""Devices on `fsdp` from which on they take up more than one side of a torus."""
ATTENDED = "attended"
"""The name under which rematerialisation knows attention's results."""


class GatedMlp(nnx.Module):
    """Two dense layers, the first multiplied by a gate (Shazeer 2020)."""

    def __init__(
        self,
        size: int,
        wide: int,
        act: str,
        bias: bool,
        residual_layers: int,
        rngs: nnx.Rngs,
        kind: type[Linear] = Linear,
    ):
        self.act = act
        self.gate_proj = linear(size, wide, bias, rngs, kind=kind)
        self.up_proj = linear(size, wide, bias, rngs, kind=kind)
        self.down_proj = linear(wide, size, bias, rngs, residual_layers, kind)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return self.down_proj(ACTIVATIONS[self.act](self.gate_proj(x)) * self.up_proj(x))


class Mlp(nnx.Module):
    """Two dense layers with biases, an activation between."""

    def __init__(self, size: int, wide: int, act: str, residual_layers: int, rngs: nnx.Rngs):
        self.act = act
        self.fc1 = linear(size, wide, True, rngs)
        self.fc2 = linear(wide, size, True, rngs, residual_layers)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        return self.fc2(ACTIVATIONS[self.act](self.fc1(x)))


def keep_dtype(arrays: Any, /, **_: Any) -> Any:
    """The arrays as they are; `nnx.Embed` otherwise casts its table to the dtype it was made in."""
    return arrays


def layer_norm(size: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm with statistics in two passes: the fast one loses digits on large means."""
    return nnx.LayerNorm(size, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


class OffsetRmsNorm(nnx.Module):
    """RMS norm [..., D] that multiplies by 1 + scale, in float32 (Gemma)."""

    def __init__(self, size: int, epsilon: float):
        self.epsilon = epsilon
        self.scale = nnx.Param(jnp.zeros(size))

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        normed = unit_norm(promote(x), self.epsilon)
        return (normed * (1 + promote(self.scale[...]))).astype(x.dtype)


def unit_norm(x: Float[Array, "*b D"], epsilon: float) -> Float[Array, "*b D"]:
    """An RMS norm over the last axis that has no scale."""
    wide = promote(x)
    mean = jnp.square(wide).mean(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(mean + epsilon)).astype(x.dtype)


def rms_norm(size: int, epsilon: float, offset: bool, rngs: nnx.Rngs) -> Any:
    """An RMS norm over the last axis; with `offset` it multiplies by 1 + its scale."""
    if offset:
        return OffsetRmsNorm(size, epsilon)
    return nnx.RMSNorm(size, epsilon=epsilon, rngs=rngs)


def stack_layers(make: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Any:
    """`depth` layers as one module whose parameters have a leading axis, ready for `scan`."""

    @nnx.split_rngs(splits=depth)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def build(rngs: nnx.Rngs) -> nnx.Module:
        return make(rngs)

    return build(rngs)


def rematerialise(function: Callable, policy: str) -> Callable:
    """Wraps one layer's forward so that its activations are recomputed in the backward pass.

    Args:
      function: the layer's body, as `jax.lax.scan` takes it.
      policy: "none" keeps everything; "dots" keeps the results of dense layers and of attention;
        "full" keeps the inputs only.
    """
    if policy == "none":
        return function
    if policy == "dots":
        policies = jax.checkpoint_policies
        saved = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(ATTENDED, ADAPTED),
        )
        return jax.checkpoint(function, policy=saved, prevent_cse=False)
    if policy == "full":
        return jax.checkpoint(function, prevent_cse=False)
    raise ValueError(f"unknown rematerialisation policy {policy!r}")


def constrain_batch(x: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """Keeps axis 0 of an activation sharded over the mesh's batch axes, if a mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = PartitionSpec(batch_axes(mesh), *([None] * (x.ndim - 1)))
    return jax.lax.with_sharding_constraint(x, spec)


def split_tokens(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Spreads the tokens of an activation over the mesh's axis `tensor`, which has them whole else.

    Where `tensor` does not divide them, they stay whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty else mesh.shape.get("tensor", 1)
    if tensor == 1 or x.shape[1] % tensor:
        return constrain_batch(x)
    spec = PartitionSpec(batch_axes(mesh), "tensor", None)
    return jax.lax.with_sharding_constraint(x, spec)


@jax.custom_vjp
def gather_tokens(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """Tokens that are spread over `tensor`, for a product that reads all of them.

    What lies between two products of a layer, residual stream and norms, is computed for a token at
    a time, so no device needs more than its share of them; the products gather what they read
    (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2: this is their g, `scatter_tokens`
    the other). What travels is the same: a sum over devices is a sum that is spread, and a
    gathering. Both say what they are backwards too, which the compiler does not find by itself.
    """
    # Split at first, or the compiler gathers the float32 of a norm before it is cast.
    return constrain_batch(split_tokens(x))


@jax.custom_vjp
def scatter_tokens(x: Float[Array, "B S D"]) -> Float[Array, "B S D"]:
    """A product's sums over the devices of `tensor`, spread over them; see `gather_tokens`."""
    return split_tokens(x)


def _gathered(x: jax.Array) -> tuple[jax.Array, None]:
    return constrain_batch(split_tokens(x)), None


def _scattered(x: jax.Array) -> tuple[jax.Array, None]:
    return split_tokens(x), None


def _gathered_back(_: None, gradient: jax.Array) -> tuple[jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    shards = 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in batch_axes(mesh))
    if gradient.shape[0] <= shards:
        # With one row a device the partitioner merges rows and tokens, and its sums are wrong (jax
        # 0.10.2): summed whole at first, they are right.
        gradient = constrain_batch(gradient)
    return (split_tokens(gradient),)


gather_tokens.defvjp(_gathered, _gathered_back)
scatter_tokens.defvjp(_scattered, lambda _, gradient: _gathered(gradient)[:1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def spread_gradient(x: Float[Array, "*d"], spec: PartitionSpec) -> Float[Array, "*d"]:
    """What products of all devices on `fsdp` read, a kernel or what the head is given, whose
    gradient they sum over one side of their torus after the other.

    A sum of which every device keeps a part is half as much traffic as one that all have whole. For
    TPUs libtpu (0.0.52) makes the one of the other where it goes over both sides of a torus at
    once, which also takes seconds to compile for each product. So on many devices the sum over one
    side is asked for first, with the gradient split by the other; what is left is a sum over the
    other side. Computed is the same.

    Args:
      x: the array.
      spec: how it is split, by the axes of the mesh.
    """
    return x


def _spread(spec: PartitionSpec, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    mesh = jax.sharding.get_abstract_mesh()
    spec = with_expert(spec, mesh)
    fsdp = 1 if mesh.empty else mesh.shape.get("fsdp", 1)
    inner = 1 << fsdp.bit_length() // 2
    if fsdp < SEVERAL_SIDES or fsdp % inner:
        return (gradient,)
    axes = [named_axes(entry) for entry in spec]
    ways = [math.prod(mesh.shape[axis] for axis in over) for over in axes]
    if any(size % over for size, over in zip(gradient.shape, ways, strict=False)):
        return (gradient,)
    sides = {"fsdp": (("fsdp_outer", fsdp // inner), ("fsdp_inner", inner))}
    refined = [part for axis in mesh.shape.items() for part in sides.get(axis[0], (axis,))]
    names, lengths = zip(*refined, strict=True)
    by_side = NamedSharding(
        AbstractMesh(lengths, names, axis_types=(AxisType.Auto,) * len(names)),
        PartitionSpec(
            *(tuple("fsdp_outer" if axis == "fsdp" else axis for axis in over) for over in axes)
        ),
    )
    gradient = jax.lax.with_sharding_constraint(gradient, by_side)
    return (jax.lax.with_sharding_constraint(gradient, spec),)


spread_gradient.defvjp(lambda x, spec: (x, None), _spread)


def batch_axes(mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh) -> tuple[str, ...]:
    """The mesh's axes that the rows of a batch are split over."""
    return tuple(axis for axis in ("data", "fsdp", "expert") if axis in mesh.axis_names)


def named_axes(entry: Any) -> tuple[str, ...]:
    """The axes of the mesh that an entry of a `PartitionSpec` names."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def with_expert(
    spec: PartitionSpec, mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh
) -> PartitionSpec:
    """The split of what is no expert's on a mesh that splits experts: what is over `fsdp` is over
    `expert` too."""
    if "expert" in spec or "expert" not in mesh.axis_names:
        return spec
    return PartitionSpec(*(("fsdp", "expert") if axis == "fsdp" else axis for axis in spec))


def divisible(
    spec: PartitionSpec,
    shape: Sequence[int],
    mesh: jax.sharding.AbstractMesh | jax.sharding.Mesh,
) -> PartitionSpec:
    """The split of an array without the axes that do not divide its dimensions, which stay whole.

    Of several axes of one dimension, the first ones that divide it together count; those that the
    mesh does not have split nothing.
    """

    def of(size: int, axes: Any) -> Any:
        names = [name for name in named_axes(axes) if name in mesh.axis_names]
        while names and size % math.prod(mesh.shape[name] for name in names):
            names.pop()
        return (names[0] if len(names) == 1 else tuple(names)) if names else None

    return PartitionSpec(*(of(*pair) for pair in zip(shape, spec, strict=False)))


def promote(x: Float[Array, "*d"]) -> Float[Array, "*d"]:
    """float32 for lower precisions, unchanged above: log-probs and norms are taken in this."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
