"""Experts of a layer in one tensor, as some layouts have them, seen as a tensor for each.

The oldest layout of most mixtures has `experts.7.gate_proj.weight` [F, D] of every expert. In
memory transformers 5 has them in `experts.gate_up_proj` [E, 2 F, D], gates in front, and
`experts.down_proj` [E, D, F], and so have Gemma 4's files; Qwen3-VL's have these with the last two
axes the other way.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

from mmpo_jax.checkpoints.safetensors_files import DTYPES, StoredTensor
from mmpo_jax.checkpoints.safetensors_writing import NewTensor

EXPERT = re.compile(r"(?P<stem>.*)\.experts\.\d+\.(?P<layer>\w+)_proj\.weight")
JOINED = re.compile(r"(?P<stem>.*\.experts)\.(?P<kind>gate_up|down)_proj")


def parts_of(tensor: StoredTensor, hidden_size: int) -> Iterator[StoredTensor]:
    """The tensor of every expert's layers, where a tensor holds all of them; any other one itself.

    Args:
      tensor: of a file.
      hidden_size: of the decoder, D. Where F or 2 F is D too, axes are taken to be as they are in
        transformers' memory.
    """
    match = JOINED.fullmatch(tensor.name)
    if match is None or len(tensor.shape) != 3 or tensor.dtype not in DTYPES:
        yield tensor
        return
    stem, is_down = match["stem"], match["kind"] == "down"
    count, rows, columns = tensor.shape
    as_in_memory = (rows if is_down else columns) == hidden_size
    names = ("down",) if is_down else ("gate", "up")
    itemsize = DTYPES[tensor.dtype].itemsize
    own = (rows // len(names), columns) if as_in_memory else (rows, columns // len(names))
    for expert in range(count):
        for number, name in enumerate(names):
            before = number * own[0] * own[1] if as_in_memory else number * own[1]
            yield dataclasses.replace(
                tensor,
                name=f"{stem}.{expert}.{name}_proj.weight",
                shape=own,
                offset=tensor.offset + (expert * rows * columns + before) * itemsize,
                num_bytes=own[0] * own[1] * itemsize,
                pitch=None if as_in_memory else columns,
                inputs_first=not as_in_memory,
            )


def join_experts(
    tensors: Sequence[NewTensor], layout: Literal["inputs_first", "outputs_first"]
) -> list[NewTensor]:
    """The same weights with those of all experts of a layer in two tensors.

    Args:
      tensors: of all layers and their experts.
      layout: "outputs_first" as in memory, [E, 2 F, D] with gates in front and [E, D, F];
        "inputs_first" with the last two axes the other way. Square ones are as in memory, for
        `parts_of` and transformers take them for that.
    """
    layers: dict[str, dict[str, list[NewTensor]]] = {}
    made = []
    for tensor in tensors:
        match = EXPERT.fullmatch(tensor.name)
        if match is None:
            made.append(tensor)
            continue
        layers.setdefault(match["stem"], {}).setdefault(match["layer"], []).append(tensor)
    for stem, named in layers.items():
        for name, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
            experts = list(zip(*(named[part] for part in parts), strict=True))
            outputs, inputs = experts[0][0].shape
            shape = len(experts), len(parts) * outputs, inputs
            as_in_memory = layout == "outputs_first" or shape[1] == shape[2]
            if not as_in_memory:
                shape = shape[0], inputs, len(parts) * outputs
            fetch = functools.partial(_joined, experts, shape, as_in_memory)
            dtype = experts[0][0].dtype
            made.append(NewTensor(f"{stem}.experts.{name}_proj", dtype, shape, fetch))
    return made


def _joined(
    experts: Sequence[Sequence[NewTensor]], shape: tuple[int, int, int], as_in_memory: bool
) -> np.ndarray:
    """The tensor, filled expert by expert, so that no more than it is in memory."""
    made = np.empty(shape, experts[0][0].dtype)
    in_memory = made if as_in_memory else made.swapaxes(1, 2)
    for own, parts in zip(in_memory, experts, strict=True):
        first = 0
        for part in parts:
            outputs = part.shape[0]
            own[first : first + outputs] = part.fetch()
            first += outputs
    return made
