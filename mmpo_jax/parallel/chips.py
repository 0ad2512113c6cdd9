"""What chips can do: peaks of their makers, and the memory that TPUs' compiler gives away."""

from __future__ import annotations

import dataclasses
import re
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

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}
"""What JAX calls a device (`device_kind`) -> which chip it is."""

GPUS = (
    ("A100", 312),
    ("A10", 125),
    ("A40", 149.7),
    ("B200", 2250),
    ("H100 PCIe", 756),
    ("H100 NVL", 835),
    ("H100", 989),
    ("H200 NVL", 835),
    ("H200", 989),
    ("L40S", 362),
    ("L4", 121),
)
"""What a GPU's `device_kind` has behind "NVIDIA " -> TFLOP/s in bfloat16 with dense factors, by
NVIDIA's data sheets, which print twice that for sparse ones. The first that fits counts."""


def peak_flops(kind: str) -> float | None:
    """Products and sums a second that a device does at most in bfloat16, with dense factors.

    Args:
      kind: what JAX calls it, `device_kind`.

    Returns:
      None where no maker says so, as for CPUs, or where the kind is not in the tables here.
    """
    if kind in KINDS:
        return CHIPS[KINDS[kind]].flops
    for name, tera in GPUS:
        if re.match(rf"NVIDIA {name}(?![0-9A-Za-z])", kind):
            return tera * 1e12
    return None
