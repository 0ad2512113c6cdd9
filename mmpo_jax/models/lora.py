"""Low-rank adapters: y = x W + scale * dropout(x) A B beside a frozen W, scale = alpha / rank.

Hu et al. 2021 (arXiv 2106.09685), section 4.1. DoRA, Liu et al. 2024 (arXiv 2402.09353), trains the
lengths of columns apart from their directions: of every output, W + scale A B is scaled to a
magnitude m, (W + scale A B) m / ||W + scale A B||. No gradient is taken of the norm (section 4.3).

The leaves of an adapter lie in the parameter tree beside the kernel that they adapt:

    .../q_proj/kernel      [L, inputs, outputs]
    .../q_proj/lora_a      [L, inputs, r]
    .../q_proj/lora_b      [L, r, outputs], zero at first
    .../q_proj/lora_scale  float32[L], 0 in layers without an adapter
    .../q_proj/lora_magnitude  float32[L, outputs], of DoRA: ||W|| at first

and for experts [L, E, ...], all of a layer or none.

So placing, saving and training them is like any parameter's, and the tree says what a model
computes: with these leaves the adapted model, without them the base. Layers that are not stacked
lack the axis L.
"""

from __future__ import annotations

import difflib
import math
import re
import zlib
from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pydantic
from jax.sharding import PartitionSpec
from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Section
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models import reward_head
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.merging import (
    MAGNITUDE,
    SCALE,
    A,
    B,
    column_norms,
    kernel_and_adapter,
    merge,
)
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.quantized import SCALES, Quantization, QuantizedKernel, dequantize


class Lora(Section):
    """Low-rank adapters, trained beside frozen weights."""

    target: str = "language_model/layers/.*"
    """Regular expression over whole paths of dense layers, such as
    `language_model/layers/self_attn/q_proj`; what `freeze` matches gets no adapter."""
    rank: PositiveInt = 16
    alpha: float = Field(32.0, gt=0)
    """Adapters count alpha / rank times."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Share of an adapter's inputs that training zeroes."""
    dora: bool = False
    """Trains the magnitudes of a kernel's columns apart from their directions (DoRA)."""
    quantize_base: Quantization | None = None
    """What the decoder's frozen kernels are kept in (QLoRA); by default they are as the files have
    them."""

    @pydantic.field_validator("target")
    @classmethod
    def _compiles(cls, target: str) -> str:
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return target


KEY, RATE, NORM = "lora_key", "lora_rate", "lora_norm"
"""Leaves that a forward puts beside an adapter's: what dropout needs, and what DoRA divides by."""
EXACT = (SCALE, MAGNITUDE, NORM, SCALES)
"""Leaves that stay float32 whatever is computed in."""

EXPERTS = "/experts/"
"""What the paths of experts have in them."""

WITHOUT = r"language_model/lm_head|.*/patch_embedding|.*/mlp/gate|.*/conv1d|" + reward_head.LAYERS
"""Dense layers that can have no adapter: the head is applied in chunks, by its kernel alone, patch
embeddings are convolutions for PEFT, as those of delta nets are, the router of experts is none of
its layers, and a reward head is trained whole."""


def dense_layers(model: Model) -> dict[str, tuple[int, ...]]:
    """Path of every layer that can have an adapter -> its kernel's shape: [inputs, outputs], of a
    stack [L, inputs, outputs], of experts [L, E, inputs, outputs]."""
    abstract = flatten(model.abstract_params())
    kernels = {p.removesuffix("/kernel"): p for p in abstract if p.endswith("/kernel")}
    return {
        layer: abstract[path].shape
        for layer, path in kernels.items()
        if not re.fullmatch(WITHOUT, layer)
    }


def targeted_layers(model: Model, target: str, frozen: tuple[str, ...]) -> list[str]:
    """The layers whose path `target` matches as a whole, but for those that `frozen` freezes.

    Args:
      model: the architecture.
      target: regular expression over paths such as `language_model/layers/self_attn/q_proj`.
      frozen: regular expressions over parameter paths.

    Raises:
      ValueError: none is left; names what is nearest to the pattern.
    """
    layers = list(dense_layers(model))
    matched = [layer for layer in layers if re.fullmatch(target, layer)]
    if not matched:
        nearest = difflib.get_close_matches(target, layers, n=3, cutoff=0)
        raise ValueError(f"{target!r} matches no dense layer; the nearest are {', '.join(nearest)}")
    kept = [
        layer
        for layer in matched
        if not any(re.fullmatch(pattern, f"{layer}/kernel") for pattern in frozen)
    ]
    if not kept:
        raise ValueError(f"all that {target!r} matches is frozen by {list(frozen)}")
    return kept


def check_experts(layers: Iterable[str], lora: Lora) -> None:
    """
    Raises:
      ValueError: some of the layers are experts, whose adapters have no dropout and no magnitudes
        in PEFT, and there is either.
    """
    experts = next((layer for layer in layers if EXPERTS in layer), None)
    if experts is None:
        return
    if lora.dropout:
        raise ValueError(
            f"lora.dropout is {lora.dropout}, and adapters of experts, such as {experts}, have "
            "none: make it 0, or leave experts out of lora.target"
        )
    if lora.dora:
        raise ValueError(
            f"lora.dora: adapters of experts, such as {experts}, have no magnitudes: leave experts "
            "out of lora.target"
        )


def add_adapters(
    params: Params, model: Model, lora: Lora, frozen: tuple[str, ...], seed: int
) -> Params:
    """The parameters with a fresh adapter beside every kernel of the targeted layers.

    B is zero, so the model computes what it did; A is uniform in +-1/sqrt(inputs), as PEFT has it.
    Parameters that have adapters, those of a run above a quantised base, stay as they are.

    Raises:
      ValueError: see `targeted_layers` and `check_experts`.
      ModelError: the adapters that are there are others than these options make.
    """
    shapes = dense_layers(model)
    flat = flatten(params)
    targeted = targeted_layers(model, lora.target, frozen)
    check_experts(targeted, lora)
    if adapted_layers(params):
        _check_adapters(params, targeted, lora)
        return params
    for layer in targeted:
        *stack, inputs, outputs = shapes[layer]
        rng = np.random.default_rng([seed, zlib.crc32(layer.encode())])
        a = rng.uniform(-1, 1, (*stack, inputs, lora.rank)) / np.sqrt(inputs)
        flat[f"{layer}/{A}"] = a.astype(np.float32)
        flat[f"{layer}/{B}"] = np.zeros((*stack, lora.rank, outputs), np.float32)
        flat[f"{layer}/{SCALE}"] = np.full(stack, lora.alpha / lora.rank, np.float32)
        if lora.dora:
            parts = kernel_and_adapter(flat, f"{layer}/kernel")
            flat[f"{layer}/{MAGNITUDE}"] = column_norms(*parts)
    return unflatten(flat)


def _check_adapters(params: Params, targeted: Collection[str], lora: Lora) -> None:
    """
    Raises:
      ModelError: the adapters among the parameters are not those of the options.
    """
    flat, found = flatten(params), adapted_layers(params)
    if others := sorted({*found} ^ {*targeted}):
        has = "has an adapter" if others[0] in found else "has none"
        raise ModelError(f"training.lora.target: {others[0]} {has} in the run that is gone on with")
    for layer in found:
        rank = flat[f"{layer}/{A}"].shape[-1]
        alpha = float(np.asarray(flat[f"{layer}/{SCALE}"]).flat[0]) * rank
        known = {
            "rank": (rank, lora.rank),
            "alpha": (alpha, lora.alpha),
            "dora": (f"{layer}/{MAGNITUDE}" in flat, lora.dora),
        }
        for name, (there, asked) in known.items():
            if not math.isclose(there, asked, rel_tol=1e-6):
                raise ModelError(
                    f"training.lora.{name} is {asked}, and the adapters of the run that is gone on "
                    f"with have {there}"
                )


def adapted_layers(params: Params) -> list[str]:
    """Paths of the layers that have an adapter."""
    return [path.removesuffix(f"/{A}") for path in flatten(params) if path.endswith(f"/{A}")]


def described_by(path: str) -> str:
    """The parameter whose sharding rule decides about this one's: an adapter's kernel."""
    layer, _, name = path.rpartition("/")
    return f"{layer}/kernel" if name in (A, B, *EXACT) else path


def adapter_spec(path: str, kernel: PartitionSpec, ndim: int) -> PartitionSpec:
    """How a leaf beside a kernel is split: inputs and outputs as the kernel's, ranks not at all."""
    name = path.rpartition("/")[2]
    if name == SCALE:
        return PartitionSpec()
    if name in (MAGNITUDE, NORM):
        axes = [*kernel, *[None] * (ndim + 1 - len(kernel))]
        return PartitionSpec(*axes[:-2], axes[-1])
    if name not in (A, B):
        return kernel
    axes = [*kernel, *[None] * (ndim - len(kernel))]
    axes[-1 if name == A else -2] = None
    return PartitionSpec(*axes)


def is_adapter(path: str) -> bool:
    """Whether a parameter is one that training an adapter changes."""
    return path.endswith((f"/{A}", f"/{B}", f"/{MAGNITUDE}"))


def is_exact(path: str) -> bool:
    """Whether a parameter is float32 whatever is computed in: of factors and norms that outputs are
    multiplied by, bfloat16 would keep three digits."""
    return path.rpartition("/")[2] in EXACT


def without_adapters(params: Params) -> Params:
    """The base model's parameters: the reference while adapters are trained. Nothing is copied."""
    leaves = (A, B, SCALE, MAGNITUDE, KEY, RATE, NORM)
    flat = flatten(params).items()
    return unflatten({path: leaf for path, leaf in flat if path.rpartition("/")[2] not in leaves})


def merge_adapters(params: Params, *, in_place: bool = False) -> Params:
    """Parameters without adapters that compute the same: W + scale A B, with DoRA's columns, in W's
    place and in float32, see `merging.merge`. So are kernels that were quantised.

    Args:
      params: with adapters.
      in_place: makes the sums in the memory of the kernels, one after another. The adapted ones of
        `params` cannot be used any more.
    """
    flat = flatten(params)
    merged = flatten(without_adapters(params))
    for layer in adapted_layers(params):
        path = f"{layer}/kernel"
        merged[path] = merge(*kernel_and_adapter(flat, path), in_place=in_place)
        merged.pop(f"{layer}/{SCALES}", None)
    return dequantize_base(unflatten(merged))


def dequantize_base(params: Params) -> Params:
    """The parameters with kernels of float32 in place of quantised ones."""
    flat = flatten(params)
    for path in [path for path in flat if path.endswith(f"/{SCALES}")]:
        kernel = f"{path.removesuffix(SCALES)}kernel"
        flat[kernel] = dequantize(QuantizedKernel(flat[kernel], flat.pop(path)))
    return unflatten(flat)


def with_dropout(params: Params, rate: float, key: jax.Array) -> Params:
    """Parameters whose adapters drop inputs at this rate: for the training forward only.

    Every layer has a key of its own, folded from `key` by its place in the order of paths.
    """
    flat = flatten(params)
    for index, layer in enumerate(sorted(adapted_layers(params)) if rate else ()):
        scale = flat[f"{layer}/{SCALE}"]
        own = jax.random.fold_in(key, index)
        flat[f"{layer}/{KEY}"] = jax.random.split(own, scale.shape[0]) if scale.ndim else own
        flat[f"{layer}/{RATE}"] = jnp.full(scale.shape, rate, jnp.float32)
    return unflatten(flat)


def cast_params(params: Params, dtype: Any) -> Params:
    """The parameters as a forward takes them: in the compute dtype, but for what `is_exact` and
    quantised kernels, and with the norms that DoRA divides by, of the parameters as they were
    before."""
    flat = flatten(params)

    def as_computed(path: str, leaf: Any) -> Any:
        is_kept = is_exact(path) or jnp.issubdtype(leaf.dtype, jnp.integer)  # quantised kernels
        return leaf if is_kept else leaf.astype(dtype)

    cast = {path: as_computed(path, leaf) for path, leaf in flat.items()}
    for layer in adapted_layers(params):
        if f"{layer}/{MAGNITUDE}" in flat and f"{layer}/{NORM}" not in flat:
            kernel, a, b, scale, _ = kernel_and_adapter(flat, f"{layer}/kernel")
            factors = map(jax.lax.stop_gradient, (a, b))
            cast[f"{layer}/{NORM}"] = column_norms(kernel, *factors, scale)
    return unflatten(cast)
