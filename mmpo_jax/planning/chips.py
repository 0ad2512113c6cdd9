"""What chips can do: peaks of their makers, and the memory that the compiler gives away."""

from __future__ import annotations

import dataclasses
from typing import Any

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip, as JAX counts devices: a TPU7x has two, and the figures are of one."""

    name: str
    memory: float | None
    """Bytes that a program may have; None where nothing limits it."""
    flops: float | None = None
    """Products and sums a second in bfloat16, and in float32 too: JAX rounds the factors of a
    product to bfloat16 on TPUs unless `jax_default_matmul_precision` says otherwise."""
    bandwidth: float | None = None
    """Bytes a second from and to high-bandwidth memory."""
    link: float | None = None
    """Bytes a second over one link to a neighbour, in one direction."""
    devices_per_chip: int = 1
    options: tuple[tuple[str, str], ...] = ()
    """What libtpu has to be told beside the topology's name."""


def _tpu(
    name: str, gib: float, tera: float, gigabytes: float, exchange: float, links: int, **more: Any
) -> Chip:
    """A TPU by its maker's table, where `exchange` is GB/s over all links in both directions."""
    link = exchange / links / 2 * 1e9
    return Chip(name, gib * GIB, tera * 1e12, gigabytes * 1e9, link, **more)


CHIPS = {
    chip.name: chip
    for chip in (
        _tpu("v4", 30.75, 275, 1228, 600, 6, options=(("chip_config_name", "megacore"),)),
        _tpu("v5e", 15.75, 197, 819, 400, 4),
        _tpu("v5p", 95.73, 459, 2765, 1200, 6),
        _tpu("v6e", 31.24, 918, 1638, 800, 4),
        # Two devices a chip, with half of its memory, products and links each.
        _tpu("tpu7x", 94.74, 2307 / 2, 7380 / 2, 1200 / 2, 6, devices_per_chip=2),
        Chip("cpu", None),
    )
}
"""Peaks: docs.cloud.google.com/tpu/docs, pages v4, v5e, v5p, v6e and tpu7x (read in November 2026).
Memory: what libtpu 0.0.52 says is available when a program takes more; the rest of a chip's 16, 32,
95, 96 or 192 GiB it keeps for itself."""
