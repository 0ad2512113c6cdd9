"""Adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

PEFT calls tensors after transformers' modules: `base_model.model.<module>.lora_A.weight` is
[r, inputs], `lora_B` [outputs, r], and DoRA's `lora_magnitude_vector` [outputs]. What modules are
called has changed with transformers' versions; all of their names are read, those of transformers 5
are written.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import re
from typing import Any

import numpy as np
from etils import epath

from mmpo_jax.checkpoints.folders import ADAPTER_CONFIG as CONFIG_FILE
from mmpo_jax.checkpoints.folders import ADAPTER_WEIGHTS as WEIGHTS_FILE
from mmpo_jax.checkpoints.folders import is_on_hub, split_hub_id
from mmpo_jax.checkpoints.huggingface import new_tensors, write_folder
from mmpo_jax.checkpoints.peft_experts import expert_adapters, is_of_experts, read_experts
from mmpo_jax.checkpoints.peft_names import alpha_of, is_target, module_name, rank_of, scale_of
from mmpo_jax.checkpoints.safetensors_files import read_header, read_tensor
from mmpo_jax.checkpoints.safetensors_writing import NewTensor
from mmpo_jax.checkpoints.tensor_names import layer_numbers, path_of
from mmpo_jax.core.trees import flatten, to_host, unflatten
from mmpo_jax.models.config import ModelError, RewardHead
from mmpo_jax.models.lora import EXPERTS, adapted_layers, dense_layers
from mmpo_jax.models.merging import MAGNITUDE, SCALE, A, B
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.reward_head import (
    KEY,
    MODULES,
    parse_reward_head,
    reward_head_entries,
)
from mmpo_jax.models.reward_head import is_reward_head as is_head

PREFIX = "base_model.model."
MAGNITUDES = "lora_magnitude_vector"
TENSOR = re.compile(
    rf"base_model\.model\.(?P<module>.+)\.(?P<leaf>lora_A\.weight|lora_B\.weight|{MAGNITUDES})"
)

UNSUPPORTED = (
    "alora_invocation_tokens",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "use_bdlora",
    "use_qalora",
)
"""Options of `LoraConfig` that change what is computed, beyond the product of two factors."""

HEADS = {"score", "rm_head", "classifier"}
"""`modules_to_save` that may stand there: heads of reward models, by whatever name PEFT lists."""

INITS = (True, False, None, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` that leave the base weights alone."""


def is_adapter_folder(folder: str | os.PathLike[str]) -> bool:
    return (epath.Path(folder) / CONFIG_FILE).exists()


def has_model(folder: str | os.PathLike[str]) -> bool:
    """Whether an adapter's folder is a model's too, by its `config.json`, as transformers decides;
    whether there are weights that can be read is not asked."""
    return (epath.Path(folder) / "config.json").exists()


def read_adapter_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`adapter_config.json`, with PEFT's defaults for what it leaves out.

    Raises:
      ModelError: it cannot be read, or asks for what is not implemented.
    """
    path = os.path.join(folder, CONFIG_FILE)
    try:
        given = json.loads(epath.Path(path).read_bytes())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as an adapter's config: {error}") from error
    if not isinstance(given, dict) or given.get("peft_type") != "LORA":
        kind = given.get("peft_type") if isinstance(given, dict) else given
        raise ModelError(f"{path}: peft_type is {kind!r}; this version implements LORA")
    for key in UNSUPPORTED:
        if given.get(key):
            raise ModelError(
                f"{path}: {key} is {given[key]!r}, which this version does not implement; "
                "merge the adapter with PEFT and load the whole model"
            )
    if given.get("use_dora") and given.get("target_parameters"):
        raise ModelError(f"{path}: use_dora with target_parameters, of which PEFT has no DoRA")
    others = sorted({*(given.get("modules_to_save") or ())} - HEADS)
    if others:
        raise ModelError(
            f"{path}: modules_to_save has {others[0]!r}, and only reward heads are read; merge the "
            "adapter with PEFT and load the whole model"
        )
    if given.get("init_lora_weights", True) not in INITS:
        raise ModelError(
            f"{path}: init_lora_weights {given['init_lora_weights']!r} changes the base weights; "
            "merge the adapter with PEFT and load the whole model"
        )
    defaults = {"r": 8, "lora_alpha": 8, "target_modules": []}
    defaults |= {"use_rslora": False, "use_dora": False}
    return defaults | {key: value for key, value in given.items() if value is not None}


def base_model(folder: str | os.PathLike[str]) -> str:
    """The checkpoint an adapter belongs to, as its config names it: `organisation/name@revision`
    where it names the revision of a repository.

    Raises:
      ModelError: it names none.
    """
    config = read_adapter_config(folder)
    name, revision = (config.get(key) for key in ("base_model_name_or_path", "revision"))
    if not name:
        path = os.path.join(folder, CONFIG_FILE)
        raise ModelError(f"{path}: base_model_name_or_path is missing; write there what it adapts")
    return f"{name}@{revision}" if revision and is_on_hub(f"{name}@{revision}") else str(name)


def adapter_head(folder: str | os.PathLike[str]) -> RewardHead | None:
    """The reward head that an adapter brings along; None where it brings none.

    Raises:
      ModelError: its config cannot be read.
    """
    config = read_adapter_config(folder)
    if config.get(KEY) is not None:
        return parse_reward_head(config[KEY])
    return RewardHead("linear") if "score" in (config.get("modules_to_save") or ()) else None


def load_adapter(folder: str | os.PathLike[str], model: Model) -> dict[str, np.ndarray]:
    """Reads an adapter for a model.

    Layers of one stack may differ in rank: smaller factors are filled up with zeros, which change
    nothing and get no gradient.

    Args:
      folder: PEFT's.
      model: the architecture of the base.

    Returns:
      Leaves by path, float32, as `lora` puts them beside the kernels, and those of the reward head
      that the adapter brings.

    Raises:
      ModelError: naming the file and the module that is unknown, missing or of another shape.
    """
    config = read_adapter_config(folder)
    file = os.path.join(folder, WEIGHTS_FILE)
    if not epath.Path(file).exists():
        told = f"{file}: not found; adapters are read from safetensors files only"
        if has_model(folder):
            told += f". If the model beside it has the adapter merged into it, remove {CONFIG_FILE}"
        raise ModelError(told)
    shapes = dense_layers(model)
    factors: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    modules: dict[str, dict[int, str]] = collections.defaultdict(dict)
    leaves: dict[str, np.ndarray] = {}
    of_experts: dict[str, dict[str, np.ndarray]] = collections.defaultdict(dict)
    heads = {p: leaf.shape for p, leaf in flatten(model.abstract_params()).items() if is_head(p)}
    for tensor in read_header(file):
        head, _ = path_of(tensor.name.removeprefix(PREFIX), model)
        if head in heads:
            leaf = read_tensor(tensor).astype(np.float32)
            leaves[head] = leaf.T if head.endswith("/kernel") else leaf
            if leaves[head].shape != heads[head]:
                raise ModelError(
                    f"{file}: {tensor.name} has shape {tensor.shape}, the model gives "
                    f"{heads[head][::-1]}"
                )
            continue
        match = TENSOR.fullmatch(tensor.name)
        if match is None or (match["leaf"] == MAGNITUDES and not config["use_dora"]):
            also = f", {MAGNITUDES}" if config["use_dora"] else ""
            raise ModelError(
                f"{file}: unexpected tensor {tensor.name}; only lora_A, lora_B{also} and the head "
                "of a reward model are read"
            )
        module, part = match["module"], match["leaf"].removesuffix(".weight")
        if is_of_experts(module):
            of_experts[module][part[-1]] = read_tensor(tensor).astype(np.float32)
            continue
        path, layer = path_of(f"{module}.weight", model)
        path = (path or "").removesuffix("/kernel")
        if path not in shapes:
            raise ModelError(
                f"{file}: {module} is no layer of this {model.config.family} that can be adapted"
            )
        factors[module][part] = read_tensor(tensor).astype(np.float32)
        modules[path][layer or 0] = module
    if not modules and not of_experts:
        raise ModelError(f"{file}: there is no adapter in it")
    for path, named in modules.items():
        is_stack = len(shapes[path]) == 3
        depth = shapes[path][0] if is_stack else 1
        numbers = layer_numbers(path, depth, model) if is_stack else None
        _check_layers(file, named, numbers, config)
        parts = {
            layer: _read_parts(file, module, factors[module], shapes[path], config)
            for layer, module in named.items()
        }
        stacked = _stack(parts, depth, {i: scale_of(config, named[i]) for i in named})
        for name, leaf in stacked.items():
            leaves[f"{path}/{name}"] = leaf if is_stack else leaf[0]
    return leaves | read_experts(file, of_experts, config, model, shapes)


def with_adapter(params: Params, folder: str | os.PathLike[str], model: Model) -> Params:
    """A model's parameters with the adapter of a folder beside them; see `load_adapter`."""
    return unflatten({**flatten(params), **load_adapter(folder, model)})


def save_adapter(
    folder: str | os.PathLike[str], model: Model, params: Params, *, base: str, dropout: float
) -> None:
    """Writes the adapters among the parameters in PEFT's format, and the reward head if there is
    one, which PEFT has among `modules_to_save`.

    Args:
      folder: written whole, by rename.
      model: the architecture.
      params: the parameters, on any device; only the adapters are written.
      base: the checkpoint that they belong to, an absolute path or a hub id.
      dropout: what they were trained with, for whom it interests.

    Raises:
      ModelError: the weights cannot be written, the disk being full for instance.
    """
    tensors, ranks, alphas = _tensors(model, params)
    modules = sorted(ranks)
    experts = expert_adapters(model, params)
    for name, adapter in experts.items():
        tensors += adapter.tensors
        ranks[name], alphas[name] = adapter.rank, adapter.alpha
    heads = {path: leaf for path, leaf in flatten(params).items() if is_head(path)}
    tensors += [
        dataclasses.replace(tensor, name=PREFIX + tensor.name)
        for tensor in new_tensors(unflatten(heads), model)
    ]
    rank, alpha = (
        collections.Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas)
    )
    name, revision = split_hub_id(base) if is_on_hub(base) else (base, None)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": name,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0 if experts else dropout,  # of which experts' have none
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": modules or None,
        **({"target_parameters": sorted(experts)} if experts else {}),
        "use_rslora": False,
        "use_dora": any(tensor.name.endswith(MAGNITUDES) for tensor in tensors),
        "bias": "none",
        "inference_mode": True,
        **_head_entries(model),
    }

    def write_config(staging: str) -> None:
        with open(os.path.join(staging, CONFIG_FILE), "w", encoding="utf-8") as file:
            json.dump(config, file, indent=2, sort_keys=True)

    write_folder(folder, {WEIGHTS_FILE: tensors}, write_config)


def _head_entries(model: Model) -> dict[str, Any]:
    """What an adapter's config says of the model's reward head."""
    head = model.config.reward_head
    if head is None:
        return {}
    reward_class = model.family.reward_classes.get(model.config.family)
    task = {"task_type": "SEQ_CLS"} if head.kind == "linear" and reward_class else {}
    said = reward_head_entries(head, None)
    return {**said, **task, "modules_to_save": [MODULES[head.kind]]}


def _tensors(
    model: Model, params: Params
) -> tuple[list[NewTensor], dict[str, int], dict[str, float]]:
    """(tensors with PEFT's names, rank of every module, alpha of every module)."""
    flat = flatten(params)
    tensors: list[NewTensor] = []
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path in adapted_layers(params):
        if EXPERTS in path:
            continue
        leaves = (f"{path}/{name}" for name in (A, B, SCALE, MAGNITUDE))
        parts = [to_host(flat[leaf]) for leaf in leaves if leaf in flat]
        is_stack = parts[0].ndim == 3
        layers = zip(*parts, strict=True) if is_stack else [tuple(parts)]
        for layer, (a, b, scale, *magnitude) in enumerate(layers):
            if not scale:  # a layer without an adapter
                continue
            name = module_name(path, layer if is_stack else None, model)
            theirs = ("lora_A.weight", "lora_B.weight", MAGNITUDES)
            for leaf, array in zip(theirs, (a.T, b.T, *magnitude), strict=False):
                key = f"{PREFIX}{name}.{leaf}"
                fetch = functools.partial(np.asarray, array)
                tensors.append(NewTensor(key, array.dtype, array.shape, fetch))
            ranks[name] = a.shape[1]
            alphas[name] = alpha_of(scale, a.shape[1])
    return tensors, ranks, alphas


def _check_layers(
    file: str, named: dict[int, str], numbers: tuple[int, ...] | None, config: dict[str, Any]
) -> None:
    """
    Args:
      file: for errors.
      named: module by place in the stack.
      numbers: which layers of the model the stack's are; None for what is not stacked.
      config: PEFT's.

    Raises:
      ModelError: a layer of a stack is beyond it, lacks its adapter, or has one that the config
        does not name.
    """
    example, depth = next(iter(named.values())), len(numbers or [0])
    for place in sorted({*range(depth), *named}):
        if place >= depth:
            raise ModelError(f"{file}: {named[place]}: the model has {depth} layers")
        layer = None if numbers is None else numbers[place]
        module = named.get(place, re.sub(r"\.\d+\.", f".{layer}.", example, count=1))
        if (place in named) != is_target(config, module, layer):
            has = "has an adapter" if place in named else "has none"
            raise ModelError(f"{file}: {module} {has}, against target_modules in {CONFIG_FILE}")


def _read_parts(
    file: str,
    module: str,
    found: dict[str, np.ndarray],
    kernel: tuple[int, ...],
    config: dict[str, Any],
) -> dict[str, np.ndarray]:
    """A [inputs, r], B [r, outputs] and with DoRA the magnitudes [outputs] of one module.

    Raises:
      ModelError: one of them is missing or does not fit.
    """
    inputs, outputs = kernel[-2:]
    rank = rank_of(config, module)
    wanted: dict[str, tuple[str, tuple[int, ...]]] = {
        A: ("lora_A", (rank, inputs)),
        B: ("lora_B", (outputs, rank)),
    }
    if config["use_dora"]:
        wanted[MAGNITUDE] = MAGNITUDES, (outputs,)
    for name, shape in wanted.values():
        if name not in found:
            raise ModelError(f"{file}: {module} has no {name}")
        if found[name].shape != shape:
            raise ModelError(
                f"{file}: {module}: {name} has shape {found[name].shape}, the model and "
                f"{CONFIG_FILE} give {shape}"
            )
    return {leaf: found[name].T for leaf, (name, _) in wanted.items()}


def _stack(
    layers: dict[int, dict[str, np.ndarray]], depth: int, scales: dict[int, float]
) -> dict[str, np.ndarray]:
    """Leaf -> [L, ...]: A, B and the scale, zero where nothing is, and magnitudes if there are
    any, 1 where nothing is."""
    first = next(iter(layers.values()))
    rank = max(parts[B].shape[0] for parts in layers.values())
    (inputs, _), (_, outputs) = first[A].shape, first[B].shape
    stacked = {
        A: np.zeros((depth, inputs, rank), np.float32),
        B: np.zeros((depth, rank, outputs), np.float32),
        SCALE: np.zeros(depth, np.float32),
    }
    if MAGNITUDE in first:
        stacked[MAGNITUDE] = np.ones((depth, outputs), np.float32)
    for layer, parts in layers.items():
        stacked[SCALE][layer] = scales[layer]
        for name, part in parts.items():
            stacked[name][layer][tuple(map(slice, part.shape))] = part
    return stacked
