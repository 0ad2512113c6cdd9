"""Building blocks shared by vision towers and decoders."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}
"""Activations by their Hugging Face names."""

ATTENDED = "attended"
"""The name under which rematerialisation knows attention's results."""


def linear(
    inputs: int, outputs: int, use_bias: bool, rngs: nnx.Rngs, residual_layers: int = 1
) -> nnx.Linear:
    """A dense layer [inputs, outputs], initialised by its fan-in.

    Hugging Face's fixed 0.02 suits widths in the thousands; models from random weights are small
    here, and with it they take hundreds of steps more to look at the image at all.

    Args:
      residual_layers: how many such layers add to one residual stream; their variance is divided
        by it (Radford et al. 2019, section 2.3), else they drown the embeddings they add to.
    """
    init = nnx.initializers.variance_scaling(1 / residual_layers, "fan_in", "truncated_normal")
    return nnx.Linear(
        inputs, outputs, use_bias=use_bias, kernel_init=init, dot_general=_matmul, rngs=rngs
    )


def matmul(x: jax.Array, kernel: jax.Array, dtype: Any = None) -> jax.Array:
    """[..., D] @ [D, F] as one product of two matrices, with results of `dtype`.

    The kernel's gradient would else contract several axes at once, for half the speed on CPU.
    """
    flat = x.reshape(-1, x.shape[-1])
    product = jnp.matmul(flat, kernel, preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])


def _matmul(x: jax.Array, kernel: jax.Array, dimensions: Any, **options: Any) -> jax.Array:
    del dimensions, options  # nnx.Linear's are always those of `matmul`
    return matmul(x, kernel)


def keep_dtype(arrays: Any, /, **_: Any) -> Any:
    """For `nnx.Embed`, which otherwise casts its table back to the dtype it was created in."""
    return arrays


def layer_norm(size: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """Layer norm with statistics in two passes: the fast one loses digits on large means."""
    return nnx.LayerNorm(size, epsilon=epsilon, use_fast_variance=False, rngs=rngs)


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
            policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENDED)
        )
        return jax.checkpoint(function, policy=saved, prevent_cse=False)
    if policy == "full":
        return jax.checkpoint(function, prevent_cse=False)
    raise ValueError(f"unknown rematerialisation policy {policy!r}")


def constrain_batch(x: jax.Array) -> jax.Array:
    """Keeps axis 0 of an activation sharded over the mesh's batch axes, if a mesh is in use."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    spec = jax.sharding.PartitionSpec(batch_axes(mesh), *([None] * (x.ndim - 1)))
    return jax.lax.with_sharding_constraint(x, spec)


def batch_axes(mesh: jax.sharding.AbstractMesh) -> tuple[str, ...]:
    """The mesh's axes that the rows of a batch are split over."""
    return tuple(axis for axis in ("data", "fsdp") if axis in mesh.axis_names)


def promote(x: jax.Array) -> jax.Array:
    """float32 for lower precisions, unchanged above: log-probs and norms are taken in this."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
