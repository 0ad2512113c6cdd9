"""A model's frozen weights with quantised kernels, beside which adapters are trained (QLoRA).

Quantised are the dense layers of the decoder. What `lora.dense_layers` leaves out is as the files
have it, and so are embeddings, norms, biases, and the vision half, a small part of a model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding

from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.layers import divisible
from mmpo_jax.models.lora import EXPERTS, dense_layers
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.quantized import (
    SCALES,
    Quantization,
    QuantizedKernel,
    quantize,
)

LAYERS = "language_model/layers/"


def quantized_paths(model: Model) -> frozenset[str]:
    """Paths of the kernels that are quantised.

    Raises:
      ModelError: the decoder has experts, which are multiplied by kernels of their own.
    """
    layers = [layer for layer in dense_layers(model) if layer.startswith(LAYERS)]
    if any(EXPERTS in layer for layer in layers):
        raise ModelError(
            "lora.quantize_base: a mixture of experts is not quantised; leave the option out"
        )
    return frozenset(f"{layer}/kernel" for layer in layers)


def quantize_base(params: Params, model: Model, kind: Quantization) -> Params:
    """The parameters with quantised kernels, one after another; those that are quantised stay.

    Raises:
      ModelError: see `quantized_paths`.
    """
    paths = quantized_paths(model)
    flat = flatten(params)
    for path in paths:
        if scales_of(path) not in flat:
            flat |= quantized_leaves(path, flat.pop(path), kind)
    return unflatten(flat)


def quantized_leaves(path: str, kernel: Any, kind: Quantization) -> dict[str, Any]:
    """The leaves of a quantised kernel by path, split as the kernel was."""
    run: Callable[[Any], QuantizedKernel] = functools.partial(quantize, kind=kind)
    is_array = isinstance(kernel, jax.Array) and not isinstance(kernel, jax.core.Tracer)
    if is_array and isinstance(kernel.sharding, NamedSharding):
        places = kernel.sharding
        spec = divisible(places.spec, jax.eval_shape(run, kernel).scales.shape, places.mesh)
        run = jax.jit(run, out_shardings=QuantizedKernel(places, NamedSharding(places.mesh, spec)))
    made = run(kernel)
    return {path: made.values, scales_of(path): made.scales}


def as_quantized(model: Model, kind: Quantization) -> Callable[[str, Any], dict[str, Any]]:
    """(path, array) -> what `quantize_base` makes of it, by path.

    Raises:
      ModelError: see `quantized_paths`.
    """
    paths = quantized_paths(model)

    def change(path: str, leaf: Any) -> dict[str, Any]:
        return quantized_leaves(path, leaf, kind) if path in paths else {path: leaf}

    return change


def is_quantized(paths: Iterable[str]) -> bool:
    """Whether any of the kernels among these parameters is quantised."""
    return any(path.endswith(f"/{SCALES}") for path in paths)


def scales_of(path: str) -> str:
    """The path of the scales beside a kernel, if it is quantised."""
    return f"{path.removesuffix('/kernel')}/{SCALES}"
