"""Names and shapes of tensors in Hugging Face files, of parameter paths and back.

A parameter of the tree has all layers of a stack in one array, a file has a tensor for each; what
families call them otherwise is in the files under `families/`.
"""

from __future__ import annotations

import functools
import math
import re

from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.models.family import Renaming
from mmpo_jax.models.layer_kinds import LAYERS, AttentionConfig, Stack
from mmpo_jax.models.model import Model

Place = tuple[int, ...]
"""Of a tensor in a stacked parameter: its layer in the stack, of experts also its expert."""

EXPERT = re.compile(r"\.experts\.(\d+)\.")
OF_KEYS = re.compile(r"\.self_attn\.(k_proj|v_proj|k_norm)\.")
DECODER = "language_model"


def place_of(key: str, model: Model) -> tuple[str | None, Place]:
    """The parameter path of a Hugging Face key and the place in its stack; None for what is not
    stored."""
    expert = EXPERT.search(key)
    path, layer = path_of(EXPERT.sub(".experts.", key), model)
    place = () if layer is None else (layer,)
    return path, place if expert is None else (*place, int(expert.group(1)))


def key_at(path: str, place: Place, model: Model) -> str:
    """The Hugging Face key of what a parameter has at a place of its stack."""
    key = key_of(path, place[0] if place else None, model)
    return key.replace(".experts.", f".experts.{place[1]}.") if len(place) > 1 else key


def path_of(key: str, model: Model) -> tuple[str | None, int | None]:
    """The parameter path of a Hugging Face key, and the layer's place in its stack; None for what
    is not stored, or not read."""
    if any(re.search(pattern, key) for pattern in model.family.unread):
        return None, None
    for pattern, replacement in model.family.read_keys:
        key = re.sub(pattern, replacement, key)
    if key == "language_model.lm_head.weight" and model.config.decoder.tie_word_embeddings:
        return None, None  # the same tensor as the embedding, written by some versions
    if key.endswith(("position_ids", "rotary_emb.inv_freq")):
        return None, None  # buffers that old versions stored
    layer = re.search(r"\.layers\.(\d+)\.", key)
    place = int(layer.group(1)) if layer else None
    stack = LAYERS
    if place is not None and key.startswith(f"{DECODER}."):
        if OF_KEYS.search(key) and place in _kv_shared(model.config.decoder):
            return None, None  # what the layer would read if it had keys of its own
        stack, place = _places(model.config.decoder).get(place, (LAYERS, place))
    path = re.sub(r"\.layers\.\d+\.", f".{stack}.", key).replace(".", "/")
    stem, _, name = path.rpartition("/")
    if name == "weight":
        if re.search(r"norm(_?\d)?$", stem):
            name = "scale"
        elif stem.endswith(("embed_tokens", "embed_tokens_per_layer", "position_embedding")):
            name = "embedding"
        else:
            name = "kernel"
    return f"{stem}/{name}" if stem else name, place


def key_of(path: str, place: int | None, model: Model, others: Renaming = ()) -> str:
    """The Hugging Face key of a parameter path.

    Args:
      path: of the parameter.
      place: of the layer in its stack; None where it is not stacked.
      model: the architecture.
      others: names that are changed behind those that files have.
    """
    key = re.sub(r"/(kernel|scale|embedding)$", "/weight", path)
    if place is not None:
        stack = stack_of(path, model)
        layer = place if stack is None else stack.numbers[place]
        inner = LAYERS if stack is None else stack.path
        key = key.replace(f"/{inner}/", f"/{LAYERS}/{layer}/", 1)
    key = key.replace("/", ".")
    for pattern, replacement in (*model.family.write_keys, *others):
        key = re.sub(pattern, replacement, key)
    return key


def stack_of(path: str, model: Model) -> Stack | None:
    """The decoder's stack that a parameter belongs to; None for all others."""
    stacks = model.config.decoder.stacks
    return next((s for s in stacks if path.startswith(f"{DECODER}/{s.path}/")), None)


def layer_numbers(path: str, depth: int, model: Model) -> tuple[int, ...]:
    """Which layers of the model the `depth` ones of a stacked parameter are."""
    stack = stack_of(path, model)
    return tuple(range(depth)) if stack is None else stack.numbers


@functools.lru_cache(maxsize=8)
def _places(decoder: DecoderConfig) -> dict[int, tuple[str, int]]:
    """(path of its stack, place in it) of every layer."""
    return {
        number: (stack.path.replace("/", "."), place)
        for stack in decoder.stacks
        for place, number in enumerate(stack.numbers)
    }


@functools.lru_cache(maxsize=8)
def _kv_shared(decoder: DecoderConfig) -> frozenset[int]:
    """Layers that read keys and values of others."""
    return frozenset(
        number
        for number, layer in enumerate(decoder.layers)
        if isinstance(layer.mixer, AttentionConfig) and layer.mixer.kv_source is not None
    )


def first_key(path: str, model: Model) -> str:
    return key_at(path, (0,) * stack_axes(path), model)


def stack_axes(path: str) -> int:
    """How many axes of a parameter files have a tensor for each place of: layers, and of each the
    experts."""
    return int("/layers/" in path) + int("/experts/" in path)


def is_transposed(path: str) -> bool:
    """torch stores a dense layer as [out, in]."""
    return path.endswith("/kernel")


def our_shape(path: str, shape: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """A patch embedding is a convolution in files, which is a dense layer over flat patches;
    single vectors may have axes of one in front, and single numbers have no axis at all."""
    if is_transposed(path):
        return (math.prod(shape[1:]), *shape[:1])
    if not shape:
        return (1,) * ndim
    while len(shape) > ndim and shape[0] == 1:
        shape = shape[1:]
    return shape


def their_shape(path: str, place: Place, shape: tuple[int, ...], model: Model) -> tuple[int, ...]:
    key = key_at(path, place, model)
    others = model.family.tensor_shapes(model.config)
    return others.get(key, shape[::-1] if is_transposed(path) else shape)
