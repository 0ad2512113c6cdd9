"""Adapters of experts in PEFT's format, which names them in `target_parameters`.

Beside `experts.gate_up_proj` and `experts.down_proj` of a layer lie `lora_A` [r E, inputs], expert
by expert, and `lora_B` [outputs, r E], of which every rank has all experts behind each other. Of
two parameters the second is wrapped around the first, whose tensors have `base_layer` in their
names. Gates and what they multiply have one A. Ours have their own, so where these differ an
adapter is written with twice the rank and with zeros in B; what it computes is the same, and read
again it is what it was.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmpo_jax.checkpoints.peft_names import alpha_of, module_name, rank_of, scale_of
from mmpo_jax.checkpoints.safetensors_writing import NewTensor
from mmpo_jax.checkpoints.tensor_names import path_of
from mmpo_jax.core.trees import flatten, to_host
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.lora import EXPERTS, SCALE, A, B, adapted_layers
from mmpo_jax.models.model import Model, Params

PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""transformers' parameters in the order in which PEFT wraps them -> our layers."""
MODULE = re.compile(r"(?P<experts>.*\.experts)(?P<wrapped>(\.base_layer)*)")

Factors = tuple[np.ndarray, np.ndarray, np.ndarray]
"""A [E, inputs, r], B [E, r, outputs] and the scale [E] of a layer."""


def is_of_experts(module: str) -> bool:
    """Whether a module that has an adapter is what holds experts, or PEFT's wrapper of it."""
    return MODULE.fullmatch(module) is not None


def read_experts(
    file: str,
    found: Mapping[str, Mapping[str, np.ndarray]],
    config: dict[str, Any],
    model: Model,
    shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, np.ndarray]:
    """The leaves of experts' adapters by path.

    Args:
      file: for errors.
      found: module -> "A" and "B" -> tensor.
      config: PEFT's.
      model: the architecture.
      shapes: path of a layer -> its kernel's shape.

    Raises:
      ModelError: a module is unknown, or its tensors are not those that the config names.
    """
    layers: dict[str, dict[int, Factors]] = collections.defaultdict(dict)
    modules: dict[str, dict[int, str]] = collections.defaultdict(dict)
    for module in found:
        match = MODULE.fullmatch(module)
        assert match is not None
        modules[match["experts"]][match["wrapped"].count(".")] = module
    for experts, wrapped in modules.items():
        path, layer = path_of(f"{experts}.down_proj.weight", model)
        if path is None or path.removesuffix("/kernel") not in shapes or layer is None:
            raise ModelError(f"{file}: {experts} is no layer of this model that has experts")
        names = [name for name in PARAMETERS if _is_target(config, f"{experts}.{name}")]
        if sorted(wrapped) != list(range(len(names))):
            raise ModelError(
                f"{file}: {experts} has {len(wrapped)} adapters, target_parameters names "
                f"{len(names)} of its parameters"
            )
        stem = path.removesuffix("down_proj/kernel")
        for depth, name in enumerate(reversed(names)):  # the last one is outside
            ours = [f"{stem}{part}" for part in PARAMETERS[name]]
            kernels, whole = [shapes[each] for each in ours], f"{experts}.{name}"
            factors = _read(file, whole, found[wrapped[depth]], kernels, rank_of(config, whole))
            scale = np.full(kernels[0][1], scale_of(config, whole), np.float32)
            for each, pair in zip(ours, factors, strict=True):
                layers[each][layer] = (*pair, scale)
    leaves = {}
    for path, named in layers.items():
        for name, leaf in zip((A, B, SCALE), _stacked(named, shapes[path]), strict=True):
            leaves[f"{path}/{name}"] = leaf
    return leaves


def _is_target(config: dict[str, Any], name: str) -> bool:
    targets = config.get("target_parameters") or ()
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _read(
    file: str,
    name: str,
    found: Mapping[str, np.ndarray],
    kernels: Sequence[tuple[int, ...]],
    rank: int,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(A, B) of each of our layers that are one parameter of transformers.

    Raises:
      ModelError: one of them is missing or does not fit.
    """
    _, experts, inputs, outputs = kernels[0]
    for factor, shape in (
        ("A", (rank * experts, inputs)),
        ("B", (outputs * len(kernels), rank * experts)),
    ):
        if factor not in found:
            raise ModelError(f"{file}: {name} has no lora_{factor}")
        if found[factor].shape != shape:
            raise ModelError(
                f"{file}: {name}: lora_{factor} has shape {found[factor].shape}, the model and the "
                f"adapter's config give {shape}"
            )
    a = found["A"].reshape(experts, rank, inputs).swapaxes(1, 2)
    b = found["B"].reshape(-1, rank, experts).transpose(2, 1, 0)
    parts = np.split(b, len(kernels), axis=-1)
    half = rank // 2
    of_each = len(parts) == 2 and rank % 2 == 0 and b.any()
    if of_each and not parts[0][:, half:].any() and not parts[1][:, :half].any():
        return [(a[..., :half], parts[0][:, :half]), (a[..., half:], parts[1][:, half:])]
    return [(a, part) for part in parts]


def _stacked(layers: Mapping[int, Factors], kernel: tuple[int, ...]) -> Factors:
    """([L, E, inputs, r], [L, E, r, outputs], [L, E]), zero where nothing is."""
    depth, experts, inputs, outputs = kernel
    rank = max(a.shape[-1] for a, _, _ in layers.values())
    stacked_a = np.zeros((depth, experts, inputs, rank), np.float32)
    stacked_b = np.zeros((depth, experts, rank, outputs), np.float32)
    scales = np.zeros((depth, experts), np.float32)
    for layer, (a, b, scale) in layers.items():
        stacked_a[layer, ..., : a.shape[-1]] = a
        stacked_b[layer, :, : b.shape[1]] = b
        scales[layer] = scale
    return stacked_a, stacked_b, scales


@dataclasses.dataclass(frozen=True)
class ExpertAdapter:
    """What is written of the adapter beside one parameter."""

    tensors: tuple[NewTensor, ...]
    rank: int
    alpha: float


def expert_adapters(model: Model, params: Params) -> dict[str, ExpertAdapter]:
    """Name of transformers' parameter -> its adapter, of all layers with experts."""
    flat = flatten(params)
    stacks: dict[str, dict[str, list[np.ndarray]]] = collections.defaultdict(dict)
    for path in adapted_layers(params):
        if EXPERTS in path:
            stem, _, name = path.rpartition("/")
            stacks[stem][name] = [to_host(flat[f"{path}/{leaf}"]) for leaf in (A, B, SCALE)]
    made: dict[str, ExpertAdapter] = {}
    for stem, parts in stacks.items():
        depth = len(next(iter(parts.values()))[0])
        for layer in range(depth):
            own = {
                name: (a[layer], b[layer], scale[layer])
                for name, (a, b, scale) in parts.items()
                if scale[layer].any()
            }
            experts = module_name(f"{stem}/down_proj", layer, model).removesuffix(".down_proj")
            made |= _of_layer(experts, own)
    return made


def _of_layer(experts: str, own: Mapping[str, Factors]) -> dict[str, ExpertAdapter]:
    """The adapters of one layer's parameters, by name."""
    named = {
        name: factors
        for name, layers in PARAMETERS.items()
        if (factors := _joined([own.get(layer) for layer in layers])) is not None
    }
    made = {}
    for number, (name, (a, b, scale)) in enumerate(named.items()):
        rank = a.shape[-1]
        wrapped = ".base_layer" * (len(named) - 1 - number)
        arrays = {
            "A": a.swapaxes(1, 2).reshape(-1, a.shape[1]),
            "B": b.transpose(2, 1, 0).reshape(b.shape[-1], -1),
        }
        tensors = [
            NewTensor(
                f"base_model.model.{experts}{wrapped}.lora_{factor}.weight",
                array.dtype,
                array.shape,
                functools.partial(np.ascontiguousarray, array),
            )
            for factor, array in arrays.items()
        ]
        made[f"{experts}.{name}"] = ExpertAdapter(tuple(tensors), rank, alpha_of(scale[0], rank))
    return made


def _joined(parts: Sequence[Factors | None]) -> Factors | None:
    """The adapter of layers that lie side by side in one parameter; None where there is none."""
    there = [part for part in parts if part is not None]
    if not there:
        return None
    first = there[0]
    if len(parts) == 1:
        return first
    if len(there) == 1:
        zeros = np.zeros_like(first[1])
        sides = [zeros if part is None else part[1] for part in parts]
        return first[0], np.concatenate(sides, axis=-1), first[2]
    (a, b, scale), (other_a, other_b, other_scale) = there
    other_b = other_b * (other_scale / scale)[:, None, None].astype(np.float32)
    if np.array_equal(a, other_a):
        return a, np.concatenate([b, other_b], axis=-1), scale
    above = np.concatenate([b, np.zeros_like(b)], axis=-1)
    below = np.concatenate([np.zeros_like(other_b), other_b], axis=-1)
    return np.concatenate([a, other_a], axis=-1), np.concatenate([above, below], axis=1), scale
