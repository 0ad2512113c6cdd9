"""Hugging Face checkpoint folders in and out: safetensors to and from the parameter tree.

Reads every layout that transformers has written for a family; writes the oldest one
(transformers 4.x), which all of them read. The names are in the files under `families/`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from mmpo_jax.files import replace_folder
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.family import Renaming
from mmpo_jax.models.model import Model, Params, load_config

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""What is copied beside the weights, so that the folder is a whole checkpoint."""


def load_model(folder: str | os.PathLike[str]) -> tuple[Model, Params]:
    """The model of a checkpoint folder and its parameters as NumPy arrays.

    Raises:
      ModelError: no config, an unknown architecture, or weights that do not fit the config.
    """
    model = Model.create(load_config(folder))
    return model, load_params(folder, model)


def load_params(folder: str | os.PathLike[str], model: Model) -> Params:
    """Reads the weights of a checkpoint folder into the model's parameter tree.

    Returns:
      A nested dict of NumPy arrays in the files' dtype.

    Raises:
      ModelError: naming the file and the tensor that is missing, unexpected or of another shape.
    """
    expected = flatten(model.abstract_params())
    found: dict[str, np.ndarray] = {}
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for file in weight_files(folder):
        for key, tensor in _read_tensors(file):
            path, layer = path_of(key, model)
            if path is None:
                continue
            if path not in expected:
                raise ModelError(f"{file}: unexpected tensor {key}")
            shape = expected[path].shape if layer is None else expected[path].shape[1:]
            array = _to_ours(path, tensor, len(shape))
            if array.shape != shape:
                raise ModelError(
                    f"{file}: {key} has shape {tensor.shape}, the config gives "
                    f"{_to_theirs(path, np.empty(shape, np.int8)).shape}"
                )
            if layer is None:
                found[path] = array
            else:
                stacks.setdefault(path, {})[layer] = array
    for path, layers in stacks.items():
        depth = expected[path].shape[0]
        missing = sorted(set(range(depth)) - set(layers))
        extra = sorted(set(layers) - set(range(depth)))
        if missing or extra:
            what = f"no layer {missing[0]}" if missing else f"a layer {extra[0]}"
            raise ModelError(f"{folder}: {path} has {what}; the config has {depth} layers")
        found[path] = np.stack([layers[i] for i in range(depth)])
    missing_paths = sorted(set(expected) - set(found))
    if missing_paths:
        raise ModelError(f"{folder}: no weights for {', '.join(missing_paths[:5])}")
    return unflatten(found)


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
) -> None:
    """Writes a checkpoint folder that transformers loads.

    Args:
      folder: written whole, by rename: it is complete whenever it exists.
      model: the architecture.
      params: its parameters, on any device.
      source: the folder the config, tokenizer and processor files are copied from.

    Raises:
      ModelError: the weights cannot be written, the disk being full for instance.
    """

    def write(staging: str) -> None:
        os.makedirs(staging)
        tensors = dict(to_huggingface(params, model))
        weights = os.path.join(staging, SINGLE_FILE)
        try:
            safetensors.numpy.save_file(tensors, weights, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # a full disk too
            raise ModelError(f"{weights}: cannot be written: {error}") from error
        os.chmod(weights, 0o644)  # safetensors makes it unreadable for others
        copy_base(source, staging)

    replace_folder(os.fspath(folder), write)


def copy_base(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Copies what lies beside the weights: config, tokenizer, processor, templates."""
    os.makedirs(target, exist_ok=True)
    for name in ("config.json", *PROCESSOR_FILES):
        origin = os.path.join(source, name)
        if os.path.isfile(origin):
            shutil.copyfile(origin, os.path.join(target, name))


def to_huggingface(params: Params, model: Model) -> Iterator[tuple[str, np.ndarray]]:
    """(key, tensor) of the layout that the model's family writes, sorted by key."""
    shapes = model.family.tensor_shapes(model.config)
    names = model.family.write_keys
    tensors = {}
    for path, leaf in flatten(params).items():
        array = np.asarray(jax.device_get(leaf))
        layers = enumerate(array) if "/layers/" in path else [(None, array)]
        for layer, part in layers:
            key = key_of(path, layer, names)
            tensor = _to_theirs(path, part)
            tensors[key] = np.ascontiguousarray(tensor.reshape(shapes.get(key, tensor.shape)))
    yield from sorted(tensors.items())


def weight_files(folder: str | os.PathLike[str]) -> list[str]:
    """The safetensors files of a checkpoint folder, checked against its index if it has one.

    Raises:
      ModelError: there are none, or the index names one that is not there.
    """
    folder = os.fspath(folder)
    index = os.path.join(folder, INDEX_FILE)
    if os.path.isfile(index):
        try:
            with open(index) as handle:
                names = sorted(set(json.load(handle)["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: not an index of safetensors files: {error}") from error
    else:
        names = [SINGLE_FILE]
    files = [os.path.join(folder, name) for name in names]
    for file in files:
        if not os.path.isfile(file):
            raise ModelError(f"{file}: not found; weights are read from safetensors files only")
    return files


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, the spelling that sharding and freezing rules match."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        flat.update(flatten(value, path) if isinstance(value, Mapping) else {path: value})
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(function: Callable[[str, Any], Any], tree: Params) -> Params:
    """Applies `function(path, leaf)` to every leaf of a nested dict."""
    return unflatten({path: function(path, leaf) for path, leaf in flatten(tree).items()})


def _read_tensors(file: str) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with safetensors.safe_open(file, framework="numpy") as handle:
            for key in handle.keys():  # noqa: SIM118 (a handle is no mapping)
                yield key, handle.get_tensor(key)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{file}: not a readable safetensors file: {error}") from error


def path_of(key: str, model: Model) -> tuple[str | None, int | None]:
    """The parameter path and layer index of a Hugging Face key; None for what is not stored."""
    for pattern, replacement in model.family.read_keys:
        key = re.sub(pattern, replacement, key)
    if key == "language_model.lm_head.weight" and model.config.decoder.tie_word_embeddings:
        return None, None  # the same tensor as the embedding, written by some versions
    if key.endswith(("position_ids", "rotary_emb.inv_freq")):
        return None, None  # buffers that old versions stored
    layer = re.search(r"\.layers\.(\d+)\.", key)
    path = re.sub(r"\.layers\.\d+\.", ".layers.", key).replace(".", "/")
    stem, _, name = path.rpartition("/")
    if name == "weight":
        if re.search(r"norm\d?$", stem):
            name = "scale"
        elif stem.endswith(("embed_tokens", "position_embedding")):
            name = "embedding"
        else:
            name = "kernel"
    return f"{stem}/{name}" if stem else name, int(layer.group(1)) if layer else None


def key_of(path: str, layer: int | None, names: Renaming) -> str:
    """The Hugging Face key of a parameter path."""
    key = re.sub(r"/(kernel|scale|embedding)$", "/weight", path).replace("/", ".")
    if layer is not None:
        key = key.replace(".layers.", f".layers.{layer}.")
    for pattern, replacement in names:
        key = re.sub(pattern, replacement, key)
    return key


def _to_ours(path: str, tensor: np.ndarray, ndim: int) -> np.ndarray:
    """torch stores a dense layer as [out, in] and a patch embedding as a convolution, which is a
    dense layer over flat patches; single vectors may have axes of one in front."""
    if path.endswith("/kernel"):
        return tensor.reshape(tensor.shape[0], -1).T
    while tensor.ndim > ndim and tensor.shape[0] == 1:
        tensor = tensor[0]
    return tensor


def _to_theirs(path: str, array: np.ndarray) -> np.ndarray:
    return array.T if path.endswith("/kernel") else array
