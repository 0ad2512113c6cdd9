"""The mesh of a training whose recipe leaves it open: by its devices, its rows and its model."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.parallel.mesh import by_slice


@dataclasses.dataclass(frozen=True)
class Choice:
    """Sizes of the axes of a mesh, and why it has them."""

    data: int
    fsdp: int
    tensor: int
    why: str
    expert: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """`expert` only where it splits something."""
        sizes = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        return sizes if self.expert == 1 else sizes | {"expert": self.expert}


def choose_sizes(devices: Sequence[Any], rows: int, decoder: DecoderConfig) -> Choice:
    """The sizes for so many rows at a time.

    Of a mixture, a part of what weights and rows are split over is `expert`: the largest there can
    be, see `expert_sizes`.

    Args:
      devices: of the mesh.
      rows: at a time.
      decoder: of the model.

    Returns:
      The sizes; with a `tensor` of 1, which so few rows are refused with, where the heads are too
      few for the other factor.
    """
    choice = _of_rows(devices, rows, decoder)
    expert = max(expert_sizes(choice.fsdp, decoder))
    return dataclasses.replace(choice, fsdp=choice.fsdp // expert, expert=expert)


def expert_sizes(fsdp: int, decoder: DecoderConfig) -> list[int]:
    """How large the part of `fsdp` can be that is `expert`: it divides the experts, and is not more
    than a token's experts, up to which devices that gather each other's tokens send no more than
    tokens that go to their experts' devices would."""
    counts = [experts.num_experts for experts in decoder.experts]
    most = min((experts.top_k for experts in decoder.experts), default=1)
    common = math.gcd(fsdp, *counts)
    return [size for size in range(1, most + 1) if common % size == 0]


def _of_rows(devices: Sequence[Any], rows: int, decoder: DecoderConfig) -> Choice:
    """`choose_sizes` without `expert`.

    Rows are split over `data` and `fsdp`, weights over `fsdp` and `tensor`. Where every device can
    have a row of its own, `fsdp` takes all of a slice. Where there are fewer rows, as many devices
    as can share them do, and `tensor` takes the other factor: rows over few, weights over all. It
    divides the heads where it can, since heads that it does not divide are computed by all of its
    devices.
    """
    count, slices = len(devices), len(by_slice(devices))
    if rows % count == 0:
        own = rows // count
        return Choice(slices, count // slices, 1, f"{rows} rows at a time are {own} a device")
    heads = [attention.num_heads for attention in decoder.attentions]
    fewest = min(heads)
    possible = [
        shards
        for shards in range(slices, count + 1, slices)
        if count % shards == 0 and count // shards <= fewest
    ]
    fitting = [shards for shards in possible if rows % shards == 0]
    if not fitting:
        why = f"{rows} rows at a time are too few for {count} devices"
        return Choice(slices, count // slices, 1, why)
    common = math.gcd(*heads, *(attention.num_kv_heads for attention in decoder.attentions))
    evenly = [shards for shards in fitting if common % (count // shards) == 0]
    chosen = max(evenly or fitting)
    tensor = count // chosen
    why = f"{rows} rows at a time are split over {chosen} of {count} devices, weights over all"
    if not evenly:
        why += (
            f"; {tensor} does not divide the {fewest} heads, so attention is computed "
            f"{tensor} times: a larger batch_size is faster"
        )
    return Choice(slices, chosen // slices, tensor, why)
