"""Weights and configuration of a checkpoint, by where its files lie: with adapters merged, cast, or
quantised."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.configs import load_config, without_language_head
from mmpo_jax.checkpoints.folders import QUANTIZED_BASE
from mmpo_jax.checkpoints.huggingface import check_params, load_params
from mmpo_jax.checkpoints.locations import Location, fingerprint_location
from mmpo_jax.checkpoints.orbax import load_checkpoint_params
from mmpo_jax.checkpoints.peft import adapter_head, with_adapter
from mmpo_jax.checkpoints.safetensors_files import all_finite
from mmpo_jax.checkpoints.steps import checkpoint_shapes
from mmpo_jax.core.files import read_json
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelConfig, ModelError
from mmpo_jax.models.lora import adapted_layers, cast_params, merge_adapters, without_adapters
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.quantized import Quantization
from mmpo_jax.models.quantized_base import as_quantized, quantize_base
from mmpo_jax.models.reward_head import without_reward_head
from mmpo_jax.models.vocabulary import TABLES
from mmpo_jax.parallel.mesh import placed_shapes, put_params

log = logging.getLogger(__name__)

HEAD = "language_model/lm_head/kernel"
"""What the parameters have where the head is not the token embedding."""


def load_weights(
    location: Location,
    model: Model,
    mesh: Mesh | None = None,
    dtype: Any = None,
    quantization: Quantization | None = None,
) -> Params:
    """The parameters of a checkpoint, straight onto the mesh or as NumPy arrays on the host.

    Adapters are merged into them: those of the location, and those that a run trained. All is
    float32 then, as what an adapter adds is mostly below the steps of a narrower kernel. A reward
    head that the files lack is not among them, unless an adapter brings it.

    Of a run above a quantised base, quantised to the same, the adapters stay beside that base: what
    the run trained, of which nothing is rounded.

    Args:
      location: of the files.
      model: the architecture.
      mesh: its devices get the parameters, sharded by the model's rules; None for the host.
      dtype: to cast to; None for that of the files, or float32 where adapters are merged.
      quantization: what the decoder's kernels are quantised to, each as soon as it is read where
        nothing is merged.

    Raises:
      ModelError, CheckpointError: naming the file that is missing or wrong, or what is not to be
        quantised again.
    """
    check_quantization(location, quantization)
    if mesh is not None and "expert" in mesh.shape and not any(model.config.decoder.experts):
        told = f"the mesh's expert {mesh.shape['expert']} is a part of fsdp"
        log.info("%s: no mixture of experts, so %s", location.weights, told)
    whole = model
    if model.config.reward_head is not None and _config_of_files(location).reward_head is None:
        model = Model.create(without_reward_head(model.config), model.attention)
    shapes = model.abstract_params()
    if location.is_orbax:
        shapes = _without_added(checkpoint_shapes(location.weights), model)
        if location.below is None:
            check_params(location.weights, without_adapters(shapes), model)
    if quantization is not None and location.below is not None:
        return check_finite(location.weights, _read_weights(location, model, shapes, mesh, None))
    if not location.adapters and not adapted_layers(shapes):
        params = _read_weights(location, model, shapes, mesh, dtype, quantization)
        # Of safetensors files that is known since they were read.
        if not location.is_orbax:
            return params
        check_finite(location.weights, params, dtype)
        return params if quantization is None else quantize_base(params, model, quantization)
    # The sum is rounded once: it is cast, and not what is summed.
    params = _read_weights(location, model, shapes, mesh, np.float32)
    params = merge_adapters(params, in_place=True)
    for folder in location.adapters:
        params = merge_adapters(with_adapter(params, folder, whole), in_place=True)
    check_finite(location.weights, params)
    if mesh is not None:  # where an adapter's reward head is not yet
        params = put_params(params, whole.rules, mesh)
    if dtype is not None:
        flat = flatten(params)
        del params  # so that every parameter goes when it is cast
        for path in flat:
            flat[path] = flat[path].astype(dtype)
        params = check_finite(location.weights, unflatten(flat), dtype)
    return params if quantization is None else quantize_base(params, whole, quantization)


def quantized_base(location: Location) -> Quantization | None:
    """The integers above which a checkpoint's adapters were trained, if they were: as its run or
    its `config.json` says. Merged, its kernels lie near to the steps of these."""
    if location.below is not None:
        return location.below[0].quantization
    return read_json(os.path.join(location.base, "config.json")).get(QUANTIZED_BASE)


def check_quantization(
    location: Location, quantization: Quantization | None, *, merged: bool = False
) -> None:
    """Checks that nothing that was trained above a quantised base is quantised again.

    Args:
      location: of a checkpoint.
      quantization: what its kernels are to be quantised to, if they are.
      merged: whether adapters of a run are merged before, also where the base is the same.

    Raises:
      ModelError: its kernels would be rounded back to the steps that they lie near to.
    """
    known = None if quantization is None else quantized_base(location)
    goes_on = location.below is not None and not location.adapters and not merged
    if known is None or (goes_on and known == quantization):
        return
    told = "leave training.lora.quantize_base out"
    if goes_on:
        told += f", or make it {known}, to go on with its adapters"
    raise ModelError(
        f"{location.weights}: was trained above a base of {known}; to quantise it again would "
        f"round away most of that: {told}"
    )


def _without_added(saved: Mapping[str, jax.ShapeDtypeStruct], model: Model) -> Params:
    """Shapes of a run's parameters, whose vocabulary its mesh may have filled up."""
    expected = flatten(model.abstract_params())

    def own(path: str, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        larger = path in TABLES and path in expected
        larger = larger and all(
            a >= b for a, b in zip(leaf.shape, expected[path].shape, strict=True)
        )
        return jax.ShapeDtypeStruct(expected[path].shape if larger else leaf.shape, leaf.dtype)

    return unflatten({path: own(path, leaf) for path, leaf in saved.items()})


def check_finite(folder: str, params: Params, dtype: Any = None) -> Params:
    """Parameters, if all of their numbers are finite.

    Args:
      folder: where they are from, for the message.
      params: arrays.
      dtype: that they were cast to, if they were.

    Raises:
      ModelError: naming the folder and the first parameter with another number.
    """
    for path, leaf in flatten(params).items():
        finite = all_finite(leaf) if isinstance(leaf, np.ndarray) else jnp.isfinite(leaf).all()
        if not finite:
            told = "" if dtype is None else f" as {np.dtype(dtype).name}"
            raise ModelError(
                f"{folder}: {path} has numbers that are not finite (NaN or infinity){told}"
            )
    return params


def _read_weights(
    location: Location,
    model: Model,
    shapes: Params,
    mesh: Mesh | None,
    dtype: Any,
    quantization: Quantization | None = None,
) -> Params:
    """What the files at `location.weights` hold, which is of these shapes."""
    places = None if mesh is None else placed_shapes(shapes, model.rules, mesh)
    if not location.is_orbax:
        change = None if quantization is None else as_quantized(model, quantization)
        return load_params(location.weights, model, places, dtype, change)
    wanted = {
        path: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=leaf.sharding)
        for path, leaf in flatten(shapes if places is None else places).items()
    }
    own = load_checkpoint_params(location.weights, wanted)
    if location.below is None:
        return own
    base = _load_below(location, model, mesh)
    if dtype is not None:
        base = cast_params(base, dtype)
    return unflatten({**flatten(base), **flatten(own)})


def _load_below(location: Location, model: Model, mesh: Mesh | None) -> Params:
    """The quantised base of a step that has adapters alone, as it was trained on.

    Raises:
      ModelError: it is no more what the run started from, or cannot be read.
    """
    assert location.below is not None
    known, base = location.below
    if fingerprint_location(base) != known.fingerprint:
        raise ModelError(
            f"{location.weights}: has adapters alone, and {known.model}, which they were trained "
            "on, is no more what it was"
        )
    return load_weights(base, model, mesh, quantization=known.quantization)


def load_model_config(location: Location) -> ModelConfig:
    """The configuration of a checkpoint: its `config.json`, whether its weights tie the head, and
    the reward head that an adapter brings.

    Raises:
      ModelError, CheckpointError: naming the file that is missing or wrong.
    """
    config = _config_of_files(location)
    heads = (adapter_head(folder) for folder in location.adapters)
    for head in filter(None, heads):
        config = dataclasses.replace(config, reward_head=head)
    return config


def _config_of_files(location: Location) -> ModelConfig:
    """`load_model_config` without adapters."""
    if not location.is_orbax:
        return load_config(location.base, location.weights)
    config = load_config(location.base)
    if location.below is not None:
        return _config_of_files(location.below[1])
    tied = HEAD not in checkpoint_shapes(location.weights)
    if tied and config.reward_head is not None and not config.decoder.tie_word_embeddings:
        return without_language_head(config)
    decoder = dataclasses.replace(config.decoder, tie_word_embeddings=tied)
    return dataclasses.replace(config, decoder=decoder)
