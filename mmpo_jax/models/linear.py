"""Dense layers: with adapters beside their kernels, and with kernels that are quantised."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from mmpo_jax.models.quantized import QuantizedKernel, quantized_matmul

ADAPTED = "adapted"
"""The name under which rematerialisation knows the results of dense layers that have an adapter."""


class Linear(nnx.Linear):
    """A dense layer; with the leaves of an adapter beside its kernel (see `lora`) it computes

    x kernel + bias + scale * dropout(x) a b,

    and with DoRA's magnitudes, of f = magnitude / norm,

    x kernel + bias + dropout(x) kernel (f - 1) + scale * dropout(x) a b f.
    """

    kernel_scale: Any = None
    """float32[groups, outputs] beside a kernel of integers, see `quantized`."""
    lora_a: Any = None
    """[inputs, r]"""
    lora_b: Any = None
    """[r, outputs]"""
    lora_scale: Any = None
    """float32[]"""
    lora_key: Any = None
    """A PRNG key; None switches dropout off."""
    lora_rate: Any = None
    """float32[]: the share of inputs that dropout zeroes."""
    lora_magnitude: Any = None
    """float32[outputs], of DoRA."""
    lora_norm: Any = None
    """float32[outputs], beside magnitudes: what `lora.cast_params` makes of them."""

    def __call__(self, x: Float[Array, "*b D"], out_sharding: Any = None) -> Float[Array, "*b F"]:
        if self.lora_a is None:
            return self._with_bias(self._product(x))
        dropped = self._dropped(x)
        # Scaled between the two products, where it is cheap to do it in float32.
        low = matmul(dropped, self.lora_a[...], jnp.promote_types(x.dtype, jnp.float32))
        low = (low * self.lora_scale[...]).astype(x.dtype)
        update = matmul(low, self.lora_b[...])
        if self.lora_magnitude is not None:
            return self._decomposed(x, dropped, update)
        # Rematerialisation keeps the sum instead of both of its terms.
        return checkpoint_name(self._with_bias(self._product(x)) + update, ADAPTED)

    def _product(self, x: Float[Array, "*b D"]) -> Float[Array, "*b F"]:
        """x times the kernel."""
        if self.kernel_scale is None:
            return matmul(x, self.kernel[...])
        kernel = QuantizedKernel(self.kernel[...], self.kernel_scale[...])
        product = quantized_matmul(x.reshape(-1, x.shape[-1]), kernel)
        return product.reshape(*x.shape[:-1], product.shape[-1])

    def _with_bias(self, product: Float[Array, "*b F"]) -> Float[Array, "*b F"]:
        return product if self.bias is None else product + self.bias[...]

    def _dropped(self, x: Float[Array, "*b D"]) -> Float[Array, "*b D"]:
        """dropout(x); x itself where dropout is off."""
        if self.lora_key is None:
            return x
        kept = 1 - self.lora_rate[...]
        mask = jax.random.bernoulli(self.lora_key[...], kept, x.shape)
        return jnp.where(mask, x / kept, 0).astype(x.dtype)

    def _decomposed(
        self, x: Float[Array, "*b D"], dropped: Float[Array, "*b D"], update: Float[Array, "*b F"]
    ) -> Float[Array, "*b F"]:
        """DoRA's outputs of those of the adapter, as PEFT has them where there is dropout."""
        factor = self.lora_magnitude[...] / self.lora_norm[...]  # float32, and stays that
        product = self._product(dropped)
        y = factor * checkpoint_name(product + update, ADAPTED)
        if dropped is not x:
            y = y + self._product(x) - product
        return self._with_bias(y.astype(x.dtype))


def linear(
    inputs: int,
    outputs: int,
    use_bias: bool,
    rngs: nnx.Rngs,
    residual_layers: int = 1,
    kind: type[Linear] = Linear,
) -> Linear:
    """A dense layer [inputs, outputs], initialised by its fan-in.

    Hugging Face's fixed 0.02 suits widths in the thousands; models from random weights are small
    here, and with it they take hundreds of steps more to look at the image at all.

    Args:
      residual_layers: how many such layers add to one residual stream; their variance is divided
        by it (Radford et al. 2019, section 2.3), else they drown the embeddings they add to.
      kind: of the layer.
    """
    init = nnx.initializers.variance_scaling(1 / residual_layers, "fan_in", "truncated_normal")
    return kind(inputs, outputs, use_bias=use_bias, kernel_init=init, rngs=rngs)


def matmul(
    x: Float[Array, "*b D"], kernel: Float[Array, "D F"], dtype: Any = None
) -> Float[Array, "*b F"]:
    """[..., D] @ [D, F] as one product of two matrices, with results of `dtype`.

    The kernel's gradient would else contract several axes at once, for half the speed on CPU.
    """
    flat = x.reshape(-1, x.shape[-1])
    product = jnp.matmul(flat, kernel, preferred_element_type=dtype)
    return product.reshape(*x.shape[:-1], kernel.shape[-1])
