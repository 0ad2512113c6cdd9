"""The devices of a slice that is not there, as far as the compiler is concerned."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.libtpu import NOWHERE
from mmpo_jax.parallel.chips import CHIPS, Chip

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice: its chips and how they are arranged."""

    name: str
    """As libtpu names it, "v5e:8x8"."""
    chip: Chip
    sides: tuple[int, ...]
    """Chips along every axis of the torus."""
    devices: tuple[Any, ...]

    @property
    def chips(self) -> int:
        return len(self.devices) // self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        return len({device.process_index for device in self.devices})


def find_topology(name: str) -> Topology:
    """A slice by its name.

    Args:
      name: kind of chip and sides, "v5e:8x8", "v5p:4x4x8"; or "cpu:8" for so many devices of this
        machine's, on which programs are compiled by XLA for CPUs and nothing limits them.

    Raises:
      MmpoError: there is no such chip or slice, or the compiler for TPUs is not installed.
    """
    read = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", name)
    if read is None or read[1] not in CHIPS:
        raise MmpoError(
            f"--topology {name}: write a kind of chip ({', '.join(CHIPS)}) and the sides of the "
            "slice, as v5e:8x8, v5p:4x4x8 or cpu:8"
        )
    chip, sides = CHIPS[read[1]], tuple(map(int, read[2].split("x")))
    jax.config.update("jax_platforms", "cpu")  # no TPU is used or locked
    devices = _simulated(math.prod(sides)) if chip.name == "cpu" else _described(name, chip)
    return Topology(name, chip, sides, tuple(devices))


def _simulated(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # the devices are there already
        jax.config.update("jax_num_cpu_devices", count)
    if len(jax.devices()) < count:
        raise MmpoError(f"--topology cpu:{count}: JAX has {len(jax.devices())} devices here")
    return jax.devices()[:count]


def _described(name: str, chip: Chip) -> list[Any]:
    if importlib.util.find_spec("libtpu") is None:
        raise MmpoError(
            "planning for TPUs takes their compiler, which runs on any machine with Linux: "
            "pip install libtpu"
        )
    for key, value in NOWHERE.items():
        os.environ.setdefault(key, value)
    # libtpu ends the process over a flag that it does not have, as those for CPUs.
    flags = os.environ.pop("XLA_FLAGS", "")
    if flags:
        log.warning("XLA_FLAGS are left out (%s); those for TPUs are LIBTPU_INIT_ARGS", flags)
    try:
        options = dict(chip.options)
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError) as error:  # JaxRuntimeError among them
        raise MmpoError(f"--topology {name}: libtpu knows no such slice: {error}") from error
    return list(found.devices)
