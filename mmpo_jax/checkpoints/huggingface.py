"""Hugging Face checkpoint folders in and out: safetensors to and from the parameter tree.

Reads every layout that transformers has written for a family; writes the oldest one
(transformers 4.x), which all of them read. The names are in the files under `families/`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mmpo_jax.checkpoints.cards import ModelCard, write_card
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.checkpoints.expert_tensors import join_experts, parts_of
from mmpo_jax.checkpoints.fetching import at_place, in_strips, is_large, on_host
from mmpo_jax.checkpoints.folders import (
    copy_base,
    write_dtype,
    write_left_out,
    write_quantized_base,
    write_reward_head,
    write_untied,
)
from mmpo_jax.checkpoints.foreign_tensors import explain
from mmpo_jax.checkpoints.loading import Change, StoredParameter, load_arrays
from mmpo_jax.checkpoints.rounding import Survival, rounded, stored_dtype
from mmpo_jax.checkpoints.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    StoredTensor,
    check_dtype,
    read_header,
    weight_files,
)
from mmpo_jax.checkpoints.safetensors_writing import (
    MAX_SHARD_BYTES,
    NewTensor,
    split_into_files,
    write_files,
)
from mmpo_jax.checkpoints.tensor_names import (
    Place,
    first_key,
    is_transposed,
    key_at,
    layer_numbers,
    our_shape,
    place_of,
    stack_axes,
    their_shape,
)
from mmpo_jax.core.buckets import replace_folder
from mmpo_jax.core.processes import alone
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.merging import MAGNITUDE, SCALE, A, B, kernel_and_adapter, merge, wide
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import weights_dtype
from mmpo_jax.models.quantized import SCALES, Quantization, QuantizedKernel, dequantize
from mmpo_jax.models.reward_head import is_reward_head
from mmpo_jax.models.vocabulary import TABLES, without_added

log = logging.getLogger(__name__)


EMBEDDING = "language_model/embed_tokens/embedding"


def load_model(folder: str | os.PathLike[str]) -> tuple[Model, Params]:
    """The model of a checkpoint folder and its parameters as NumPy arrays.

    Raises:
      ModelError: no config, an unknown architecture, or weights that do not fit the config.
    """
    model = Model.create(load_config(folder))
    return model, load_params(folder, model)


def load_params(
    folder: str | os.PathLike[str],
    model: Model,
    places: Params | None = None,
    dtype: Any = None,
    change: Change | None = None,
) -> Params:
    """Reads the weights of a checkpoint folder into the model's parameter tree.

    Args:
      folder: on this machine or in a bucket.
      model: the architecture.
      places: `ShapeDtypeStruct`s with shardings, as `placed_shapes` has them; every process reads
        what its devices hold. What a shape has beyond the file's is 0.
      dtype: to cast to; None for that of the files.
      change: see `load_arrays`.

    Returns:
      A nested dict of arrays: on devices where places are given, else NumPy's.

    Raises:
      ModelError: naming the file and the tensor that is missing, unexpected or of another shape.
        That is known before any weight is read.
    """
    sources = match_tensors(folder, model)
    places = None if places is None else flatten(places)
    return unflatten(load_arrays(sources, places, dtype, change))


def match_tensors(folder: str | os.PathLike[str], model: Model) -> dict[str, StoredParameter]:
    """Which tensors of a folder's files make up which parameter.

    Raises:
      ModelError: naming the file and the tensor that is missing, unexpected or of another shape
        or dtype.
    """
    expected = flatten(model.abstract_params())
    found: dict[str, dict[Place, StoredTensor]] = {path: {} for path in expected}
    size = model.config.decoder.hidden_size
    files = weight_files(folder)
    if os.path.join(folder, SINGLE_FILE) in files and (epath.Path(folder) / INDEX_FILE).exists():
        log.warning("%s is read and not what %s names, as in transformers", files[0], INDEX_FILE)
    tied_head = None
    stored = (whole for file in files for whole in read_header(file))
    for tensor in (part for whole in stored for part in parts_of(whole, size)):
        path, place = place_of(tensor.name, model)
        if path is None:
            if tensor.name.endswith("lm_head.weight"):
                tied_head = tensor
            continue
        if path not in expected:
            raise ModelError(
                f"{tensor.file}: unexpected tensor {tensor.name}{explain(tensor.name)}"
            )
        _check_tensor(tensor, path, place, expected[path].shape, model)
        twin = found[path].setdefault(place, tensor)
        if twin is not tensor:
            raise ModelError(
                f"{tensor.file}: {tensor.name} is there again; {twin.file} has {twin.name}"
            )
    if tied_head is not None and not found[EMBEDDING]:  # the one of the two that some tools keep
        _check_tensor(tied_head, EMBEDDING, (), expected[EMBEDDING].shape, model)
        found[EMBEDDING][()] = tied_head
    where = files[0] if len(files) == 1 else os.path.join(folder, INDEX_FILE)
    missing = [path for path, tensors in found.items() if not tensors]
    if missing:
        names = ", ".join(first_key(path, model) for path in missing[:5])
        raise ModelError(f"{where}: no weights for {', '.join(missing[:5])} ({names})")
    return {
        path: _stored(_in_order(found[path], path, leaf.shape, where, model), path, leaf.shape)
        for path, leaf in expected.items()
    }


def _stored(
    tensors: tuple[StoredTensor, ...], path: str, shape: tuple[int, ...]
) -> StoredParameter:
    """
    Raises:
      ModelError: some experts are stored one way and some another.
    """
    other = next((t for t in tensors if t.inputs_first != tensors[0].inputs_first), None)
    if other is not None:
        raise ModelError(f"{other.file}: {other.name} is stored otherwise than {tensors[0].name}")
    transposed = is_transposed(path) and not tensors[0].inputs_first
    return StoredParameter(tensors, shape, stack_axes(path), transposed)


def _check_tensor(
    tensor: StoredTensor, path: str, place: Place, shape: tuple[int, ...], model: Model
) -> None:
    """
    Raises:
      ModelError: the tensor is not of the parameter's shape, or of no dtype for weights.
    """
    check_dtype(tensor)
    shape = shape[len(place) :]
    found = tensor.shape if tensor.inputs_first else our_shape(path, tensor.shape, len(shape))
    if found != shape:
        theirs = shape if tensor.inputs_first else their_shape(path, place, shape, model)
        hint = (
            "; a head is of the model that it was trained on: take that one's folder, or one "
            "without a head, of which `reward_head` in a recipe makes a new one"
        )
        raise ModelError(
            f"{tensor.file}: {tensor.name} has shape {tensor.shape}, the config gives {theirs}"
            f"{hint if is_reward_head(path) else ''}"
        )


def _in_order(
    tensors: Mapping[Place, StoredTensor],
    path: str,
    shape: tuple[int, ...],
    where: str,
    model: Model,
) -> tuple[StoredTensor, ...]:
    """
    Raises:
      ModelError: a layer or an expert is missing, or there is one too many.
    """
    axes = stack_axes(path)
    wanted = list(itertools.product(*map(range, shape[:axes])))
    missing, extra = sorted(set(wanted) - set(tensors)), sorted(set(tensors) - set(wanted))
    if missing or extra:
        numbers = layer_numbers(path, shape[0], model)
        article = "a" if axes == 1 else "an"
        what = f"no {_told(missing[0], numbers)}" if missing else f"{article} {_told(extra[0])}"
        raise ModelError(f"{where}: {path} has {what}; the config has {shape[0]} layers")
    return tuple(tensors[place] for place in wanted)


def _told(place: Place, numbers: Sequence[int] = ()) -> str:
    """A place for people; `numbers` are those of the layers that the stack has."""
    layer, *expert = place
    named = f"layer {numbers[layer] if layer < len(numbers) else layer}"
    return f"expert {expert[0]} in {named}" if expert else named


def check_params(folder: str, params: Params, model: Model) -> Params:
    """Parameters read from elsewhere than safetensors, if they fit the model.

    Raises:
      ModelError: naming the folder and the first parameter that is missing or of another shape.
    """
    expected, found = flatten(model.abstract_params()), flatten(params)
    for path in sorted(set(expected) | set(found)):
        shapes = [tree[path].shape if path in tree else None for tree in (found, expected)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                f"{folder}: {path} has shape {shapes[0]}, the config gives {shapes[1]}"
            )
    return params


def save_model(
    folder: str | os.PathLike[str],
    model: Model,
    params: Params,
    source: str | os.PathLike[str],
    *,
    dtype: Any = None,
    before: Params | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: ModelCard | None = None,
    chat_template: str | None = None,
    quantized_base: Quantization | None = None,
) -> float | None:
    """Writes a checkpoint folder that transformers loads.

    Weights go to the disk tensor by tensor. Of several processes all have to call this, since
    they gather every tensor together; the first one writes.

    Args:
      folder: written whole, by rename: it is complete whenever it exists.
      model: the architecture.
      params: its parameters, on any device; adapters among them are merged, in float32.
      source: the folder the config, tokenizer and processor files are copied from.
      dtype: a `SaveDtype`, or a dtype; None keeps the parameters'.
      before: what training began with, to compare with where weights are rounded.
      max_shard_bytes: larger weights are split over several files.
      card: written to README.md.
      chat_template: written in place of the source's.
      quantized_base: written to `config.json`, see `weights.quantized_base`.

    Returns:
      The share of the update since `before` that is in the folder, see `rounding.Survival`; None
      where that is not given, or nothing differs from it.

    Raises:
      ModelError: the weights cannot be written, the disk being full for instance, or do not fit
        the dtype.
    """
    survival = Survival()
    tensors = new_tensors(params, model)
    if dtype is not None:
        others = {} if before is None else {t.name: t for t in new_tensors(before, model)}
        tensors = [rounded(tensor, dtype, others, survival) for tensor in tensors]

    def write_others(staging: str) -> None:
        copy_base(source, staging, chat_template)
        stored = weights_dtype(params) if dtype is None else stored_dtype(dtype)
        write_dtype(staging, stored.name)
        if not model.config.decoder.tie_word_embeddings:
            write_untied(staging)
        write_reward_head(staging, model)
        write_left_out(staging, model)
        write_quantized_base(staging, quantized_base)
        if card is not None:
            write_card(staging, card)

    write_folder(folder, split_into_files(tensors, max_shard_bytes), write_others)
    return survival.share


def write_folder(
    folder: str | os.PathLike[str],
    files: Mapping[str, Sequence[NewTensor]],
    write_others: Callable[[str], None],
) -> None:
    """Writes safetensors files, and what lies beside them, as a folder that appears whole.

    Args:
      folder: written by the first process; all gather every tensor together.
      files: name -> tensors.
      write_others: is given the folder as it is being made.

    Raises:
      ModelError: the weights cannot be written, the disk being full for instance.
    """

    def write(staging: str) -> None:
        os.makedirs(staging)
        write_files(staging, files)
        write_others(staging)

    if jax.process_index() == 0:
        with alone():
            replace_folder(os.fspath(folder), write)
    else:
        for tensor in (tensor for tensors in files.values() for tensor in tensors):
            tensor.fetch()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {folder}")


def to_huggingface(params: Params, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """(key, tensor) of the layout that the model's family writes, sorted by key."""
    for tensor in sorted(new_tensors(params, model), key=lambda tensor: tensor.name):
        yield tensor.name, tensor.fetch()


def new_tensors(params: Params, model: Model) -> list[NewTensor]:
    """What is written of parameters, in the layout of the model's family.

    Args:
      params: arrays; only their shapes are looked at until a tensor is fetched. Adapters among them
        are merged then, and quantised kernels made, one layer at a time, in float32.
      model: the architecture.
    """
    flat, tokens = flatten(params), model.config.decoder.vocab_size
    tensors = []
    for path, leaf in flat.items():
        if path.endswith((f"/{A}", f"/{B}", f"/{SCALE}", f"/{MAGNITUDE}", f"/{SCALES}")):
            continue
        parts = kernel_and_adapter(flat, path)
        stored = np.float32 if isinstance(parts[0], QuantizedKernel) else leaf.dtype
        dtype = np.dtype(stored if len(parts) == 1 else wide(stored))
        axes = stack_axes(path)
        shape = tuple(leaf.shape[axes:])
        if path in TABLES:
            shape = tuple(
                tokens if axis == TABLES[path] else size for axis, size in enumerate(shape)
            )
        for place in itertools.product(*map(range, leaf.shape[:axes])):
            key = key_at(path, place, model)
            theirs = their_shape(path, place, shape, model)
            fetch = functools.partial(_fetch, path, parts, place, tokens, theirs)
            strips = None
            transposed = is_transposed(path)
            is_plain = len(parts) == 1 and theirs == (shape[::-1] if transposed else shape)
            if not place and is_plain and is_large(parts[0]):
                strips = functools.partial(in_strips, leaf, transposed, theirs[0])
            tensors.append(NewTensor(key, dtype, theirs, fetch, strips))
    layout = model.family.joined_experts
    return tensors if layout is None else join_experts(tensors, layout)


def _fetch(
    path: str, parts: Sequence[Any], place: Place, tokens: int, shape: tuple[int, ...]
) -> np.ndarray:
    """What a parameter has at a place of its stack, or all of one that is not stacked, as it is
    written."""
    leaf, *adapter = jax.tree.map(lambda part: at_place(part, place), parts)
    if adapter:
        leaf = merge(leaf, *adapter)
    elif isinstance(leaf, QuantizedKernel):
        leaf = dequantize(leaf)
    transposed = is_transposed(path)
    array = without_added(path, on_host(leaf, transposed), tokens)
    return (array.T if transposed else array).reshape(shape)
