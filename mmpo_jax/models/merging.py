"""One kernel and the adapter beside it, summed: W + scale A B. With magnitudes, the sum with its
columns scaled to them. See `lora`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmpo_jax.models.quantized import SCALES, QuantizedKernel, dequantize

A, B, SCALE, MAGNITUDE = "lora_a", "lora_b", "lora_scale", "lora_magnitude"
"""What an adapter's leaves beside a kernel are called; the last is DoRA's."""


def kernel_and_adapter(flat: Mapping[str, Any], path: str) -> tuple[Any, ...]:
    """(kernel, A, B, scale) of the kernel at `path`, and its magnitudes if there are any; any other
    parameter, or a kernel without an adapter, alone. A quantised kernel is a `QuantizedKernel`."""
    layer, _, name = path.rpartition("/")
    if name != "kernel":
        return (flat[path],)
    scales = flat.get(f"{layer}/{SCALES}")
    kernel = flat[path] if scales is None else QuantizedKernel(flat[path], scales)
    leaves = (f"{layer}/{part}" for part in (A, B, SCALE, MAGNITUDE))
    return (kernel, *(flat[leaf] for leaf in leaves if leaf in flat))


def merge(kernel: Any, *adapter: Any, in_place: bool = False) -> Any:
    """The sum in the kernel's place, in float32 whatever the kernel has: an update is small beside
    a weight, and of its sum in bfloat16 little would be left. Layer by layer.

    Args:
      kernel: [inputs, outputs], [L, inputs, outputs] or [L, E, inputs, outputs], of NumPy or on
        devices, or quantised.
      adapter: A [(L, E,) inputs, r], B [(L, E,) r, outputs] and the scale, float32[], float32[L] or
        float32[L, E]; of DoRA also the magnitudes, float32[(L,) outputs].
      in_place: uses the memory of the kernel, which is gone then, if that is as wide.
    """
    if isinstance(kernel, QuantizedKernel):
        kernel, in_place = dequantize(kernel), True
    dtype = wide(kernel.dtype)
    in_place = in_place and kernel.dtype == dtype
    if isinstance(kernel, jax.Array):
        return _on_devices(kernel.sharding, in_place)(kernel, *adapter)
    if not in_place or not kernel.flags.writeable:
        kernel = kernel.astype(dtype)
    parts = (kernel, *adapter)
    for layer, *own in zip(*parts, strict=True) if kernel.ndim > 2 else [parts]:
        layer[...] = _sum(layer, *own)
    return kernel


@functools.cache
def _on_devices(sharding: jax.sharding.Sharding, in_place: bool) -> Any:
    """The sum as a compiled function of arrays with this sharding."""

    def run(kernel: jax.Array, *adapter: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # as on the host; TPUs round by default
            if kernel.ndim == 2:
                return _sum(kernel, *adapter)
            return jax.lax.fori_loop(
                0,
                kernel.shape[0],
                lambda i, stack: stack.at[i].set(_sum(stack[i], *(part[i] for part in adapter))),
                kernel.astype(wide(kernel.dtype)),
            )

    return jax.jit(run, out_shardings=sharding, donate_argnums=(0,) if in_place else ())


def wide(dtype: Any) -> Any:
    """What sums of kernels of this dtype are made in: float32, or float64."""
    return jnp.promote_types(dtype, jnp.float32)


@jax.jit
def column_norms(kernel: Any, a: Any, b: Any, scale: Any) -> jax.Array:
    """||W + scale A B|| of every output, float32[(L,) outputs], by which DoRA divides: layer by
    layer, so that one sum is in memory. 1 where there is nothing to scale: in layers without an
    adapter, and where the norm is 0.

    Args:
      kernel, a, b, scale: see `merge`; of no experts.
    """

    def of_layer(parts: tuple[Any, ...]) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return _norms(_sum(*parts), parts[-1])

    parts = (kernel, a, b, scale)
    return of_layer(parts) if a.ndim == 2 else jax.lax.map(of_layer, parts)


def _sum(kernel: Any, a: Any, b: Any, scale: Any, magnitude: Any = None) -> Any:
    if isinstance(kernel, QuantizedKernel):
        kernel = dequantize(kernel)
    dtype = wide(kernel.dtype)
    total = (kernel.astype(dtype) + scale[..., None, None] * (a @ b)).astype(dtype)
    if magnitude is not None:
        total = (total * (magnitude / _norms(total, scale))).astype(dtype)
    return total


def _norms(total: Any, scale: Any) -> Any:
    """See `column_norms`; of the sum of one layer."""
    if isinstance(total, jax.Array):
        norms = jnp.linalg.norm(total, axis=0)
        return jnp.where((scale != 0) & (norms > 0), norms, 1)
    norms = np.linalg.norm(total.astype(np.float64), axis=0)  # NumPy adds row to row
    return np.where((scale != 0) & (norms > 0), norms, 1)
