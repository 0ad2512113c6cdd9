"""One kernel and the adapter beside it, summed: W + scale A B. See `lora`."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

A, B, SCALE = "lora_a", "lora_b", "lora_scale"
"""What an adapter's leaves beside a kernel are called."""


def kernel_and_adapter(flat: Mapping[str, Any], path: str) -> tuple[Any, ...]:
    """(kernel, A, B, scale) of the kernel at `path`; any other parameter, or a kernel without an
    adapter, alone."""
    layer, _, name = path.rpartition("/")
    if name != "kernel" or f"{layer}/{A}" not in flat:
        return (flat[path],)
    return (flat[path], *(flat[f"{layer}/{part}"] for part in (A, B, SCALE)))


def merge(kernel: Any, a: Any, b: Any, scale: Any, *, in_place: bool = False) -> Any:
    """The sum in the kernel's place, in float32 whatever the kernel has: an update is small beside
    a weight, and of its sum in bfloat16 little would be left. Layer by layer.

    Args:
      kernel: [inputs, outputs], [L, inputs, outputs] or [L, E, inputs, outputs], of NumPy or on
        devices.
      a: [(L, E,) inputs, r].
      b: [(L, E,) r, outputs].
      scale: float32[], float32[L] or float32[L, E].
      in_place: uses the memory of the kernel, which is gone then, if that is as wide.
    """
    dtype = wide(kernel.dtype)
    in_place = in_place and kernel.dtype == dtype
    if isinstance(kernel, jax.Array):
        return _on_devices(kernel.sharding, in_place)(kernel, a, b, scale)
    if not in_place or not kernel.flags.writeable:
        kernel = kernel.astype(dtype)
    layers = zip(kernel, a, b, scale, strict=True) if kernel.ndim > 2 else [(kernel, a, b, scale)]
    for layer, *adapter in layers:
        layer[...] = _sum(layer, *adapter)
    return kernel


@functools.cache
def _on_devices(sharding: jax.sharding.Sharding, in_place: bool) -> Any:
    """The sum as a compiled function of arrays with this sharding."""

    def run(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):  # as on the host; TPUs round by default
            if kernel.ndim == 2:
                return _sum(kernel, a, b, scale)
            return jax.lax.fori_loop(
                0,
                kernel.shape[0],
                lambda i, stack: stack.at[i].set(_sum(stack[i], a[i], b[i], scale[i])),
                kernel.astype(wide(kernel.dtype)),
            )

    return jax.jit(run, out_shardings=sharding, donate_argnums=(0,) if in_place else ())


def wide(dtype: Any) -> Any:
    """What sums of kernels of this dtype are made in: float32, or float64."""
    return jnp.promote_types(dtype, jnp.float32)


def _sum(kernel: Any, a: Any, b: Any, scale: Any) -> Any:
    dtype = wide(kernel.dtype)
    return (kernel.astype(dtype) + scale[..., None, None] * (a @ b)).astype(dtype)
