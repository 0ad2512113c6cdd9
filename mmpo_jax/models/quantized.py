"""Kernels in int8 or int4, as frozen weights are kept beside adapters (QLoRA).

Dettmers et al. 2023 (arXiv 2305.14314), section 3, with integers in place of NormalFloat: a kernel
is values * scales, rounded to the nearest, with a scale for the greatest number of every output of
a group of inputs, of all of them in int8 and of `GROUP` in int4. The arithmetic is qwix's
(https://github.com/google/qwix), which is imported where it is called: it takes two seconds.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Quantization = Literal["int8", "int4"]
GROUP = 64
"""Inputs that share the scales of int4, as the numbers of a block do in the paper; fewer where they
do not divide the inputs."""
SCALES = "kernel_scale"
"""What the leaf beside a quantised kernel is called."""


class QuantizedKernel(NamedTuple):
    """A kernel as integers and their scales."""

    values: Any
    """int8 or int4 [(L,) inputs, outputs]."""
    scales: Any
    """float32[(L,) groups, outputs]."""


def itemsize(dtype: Any) -> float:
    """Bytes that a number takes on a TPU, which packs two of int4 into one."""
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return 8
    return 0.5 if dtype == jnp.int4 else np.dtype(dtype).itemsize


@functools.partial(jax.jit, static_argnames="kind")
def quantize(kernel: Float[Array, "L D F"], kind: Quantization) -> QuantizedKernel:
    """A stack of kernels, quantised in float32, one layer after another."""
    import qwix

    dtype = {"int8": jnp.int8, "int4": jnp.int4}[kind]
    groups = {0: math.gcd(kernel.shape[1], GROUP)} if kind == "int4" else {}

    def of_layer(layer: jax.Array) -> QuantizedKernel:
        layer = layer.astype(jnp.float32)
        made = qwix.quantize(layer, dtype, channelwise_axes=[1], tiled_axes=groups)
        return QuantizedKernel(made.qvalue, made.scale)

    return jax.lax.map(of_layer, kernel)


def dequantize(kernel: QuantizedKernel) -> Float[Array, "*L D F"]:
    """values * scales, float32."""
    import qwix

    return qwix.dequantize(qwix.QArray(*map(jnp.asarray, kernel)))


@jax.custom_vjp
def quantized_matmul(x: Float[Array, "N D"], kernel: QuantizedKernel) -> Float[Array, "N F"]:
    """x times a kernel that is made in x's dtype where it is multiplied, forward and backward: what
    is kept between the two is the quantised one, which has no gradient."""
    return x @ dequantize(kernel).astype(x.dtype)


def _forward(x: jax.Array, kernel: QuantizedKernel) -> tuple[jax.Array, QuantizedKernel]:
    return quantized_matmul(x, kernel), kernel


def _backward(kernel: QuantizedKernel, gradient: jax.Array) -> tuple[jax.Array, None]:
    return gradient @ dequantize(kernel).astype(gradient.dtype).T, None


quantized_matmul.defvjp(_forward, _backward)
