"""How long programs take at the least, and what keeps them from being faster."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from mmpo_jax.planning.collectives import Collective
from mmpo_jax.planning.compiling import Compiled
from mmpo_jax.planning.programs import Program
from mmpo_jax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that a device computes, moves bytes and exchanges them, each at its peak."""

    compute: float
    memory: float
    exchange: float
    exchange_estimated: bool = False
    """Whether what is exchanged is counted, for want of the compiler's own program."""

    @property
    def seconds(self) -> float:
        """The longest of the three: the others hide behind it, if all goes well."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def bound(self) -> str:
        """Which it is: "compute", "memory" or "exchange"."""
        parts = {"compute": self.compute, "memory": self.memory, "exchange": self.exchange}
        return max(parts, key=lambda name: parts[name])


def roofline(program: Program, topology: Topology, compiled: Compiled | None) -> Roofline | None:
    """The roofline of one run of a program; of a decoding one, of one token of every place.

    Args:
      program: of a recipe.
      topology: the devices.
      compiled: the compiler's, whose exchanges count; None where only counts are known.

    Returns:
      None where nobody has measured the peaks of such a device.
    """
    chip, work = topology.chip, program.work
    if chip.flops is None or chip.bandwidth is None or chip.link is None:
        return None
    known = None if compiled is None else compiled.collectives
    if known is None:
        exchange = work.exchanged / (2 * chip.link)
    else:
        places = [getattr(device, "coords", ()) for device in program.mesh.devices.flat]
        exchange = sum(exchange_seconds(one, places, chip.link) for one in known)
    return Roofline(
        work.flops / program.mesh.size / chip.flops,
        work.bytes / chip.bandwidth,
        exchange,
        known is None,
    )


def exchange_seconds(collective: Collective, places: Sequence[Any], link: float) -> float:
    """Seconds of an exchange over the links of a torus.

    A group that lies along k axes of it has k rings, each with links in both directions; permutes,
    which the compiler makes of gathers beside a product, come in pairs, one for each direction. A
    ring that does not close, as on slices of less than 16 chips along an axis of v5e and v6e, is
    slower than that.

    Args:
      collective: between which places of the mesh.
      places: coordinates of the mesh's devices, in their order.
      link: bytes a second over one link, in one direction.
    """
    if collective.kind == "collective-permute":
        return collective.sent / (2 * link)
    columns = zip(*(places[number] for number in collective.group), strict=True)
    axes = sum(len(set(column)) > 1 for column in columns)
    return collective.sent / (2 * link * max(1, axes))
