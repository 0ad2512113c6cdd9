"""A recipe planned on a slice: every program compiled, with its roofline; the whole in hours."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.core import progress
from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.planning.collectives import summed
from mmpo_jax.planning.commands import plan_stages
from mmpo_jax.planning.compiling import Compiled, compile_program
from mmpo_jax.planning.opened import open_config
from mmpo_jax.planning.programs import BESIDE
from mmpo_jax.planning.roofline import Roofline, roofline
from mmpo_jax.planning.stages import Assumed, Run
from mmpo_jax.planning.topology import Topology
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.base import Base
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.training.plan import mesh_sizes

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PlannedRun:
    """A program of a recipe with all that is known of it."""

    run: Run
    compiled: Compiled | None
    """None where it was only counted."""
    roofline: Roofline | None
    """None where a device's peaks are not known."""
    fits: bool

    @property
    def peak(self) -> float | None:
        """Bytes of a device at most, with what no compiler knows of; None where it was only
        counted."""
        return None if self.compiled is None else _peak(self.run, self.compiled)

    @property
    def seconds(self) -> float | None:
        """Of one run, whole loops of a decoding one."""
        if self.roofline is None:
            return None
        return self.roofline.seconds * self.run.program.loops

    @property
    def total(self) -> float | None:
        """Seconds of all runs of the recipe."""
        if self.seconds is None or self.run.runs is None:
            return None
        return self.seconds * self.run.runs

    @property
    def rates(self) -> dict[str, float]:
        """What it brings in a second: "pairs", "prompts", "tokens", ..."""
        if self.roofline is None:
            return {}
        seconds = self.roofline.seconds
        return {name: count / seconds for name, count in self.run.program.gives.items()}

    def to_json(self) -> dict[str, Any]:
        program, compiled, line = self.run.program, self.compiled, self.roofline
        known = compiled is not None and compiled.collectives is not None
        exchanged = summed(compiled.collectives or ()) if compiled is not None and known else None
        return {
            "stage": self.run.stage,
            "program": program.name,
            "model": program.checkpoint,
            "dtype": program.dtype,
            "shape": program.shape,
            "mesh": dict(program.mesh.shape),
            "fits": self.fits,
            "bytes": {
                **program.held,
                "arguments": compiled and compiled.arguments,
                "temporaries": compiled and compiled.temporaries,
                "peak": compiled and compiled.peak,
            },
            "collectives": exchanged,
            "collectives_counted": program.work.exchanged,
            "flops": program.work.flops,
            "model_flops": program.work.model_flops,
            "hbm_bytes": program.work.bytes,
            "loops": program.loops,
            "roofline": line and {**dataclasses.asdict(line), "bound": line.bound},
            "seconds": self.seconds,
            "per_second": self.rates,
            "runs": self.run.runs,
            "total_seconds": self.total,
            "compile_seconds": compiled and compiled.seconds,
        }


@dataclasses.dataclass(frozen=True)
class Planned:
    """A recipe on a mesh of a slice."""

    topology: Topology
    mesh: Mesh
    runs: tuple[PlannedRun, ...]
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return all(run.fits for run in self.runs)

    @property
    def seconds(self) -> float | None:
        """Of the whole recipe; None where something is not known."""
        totals = [run.total for run in self.runs]
        known = [total for total in totals if total is not None]
        return sum(known) if len(known) == len(totals) else None

    def stage_seconds(self) -> dict[str, float]:
        """Stage -> seconds of all rounds, where they are known."""
        found: dict[str, float] = {}
        for run in self.runs:
            if run.total is not None:
                found[run.run.stage] = found.get(run.run.stage, 0.0) + run.total
        return found

    def to_json(self) -> dict[str, Any]:
        chip = self.topology.chip
        hours = None if self.seconds is None else self.seconds / 3600
        return {
            "topology": self.topology.name,
            "chips": self.topology.chips,
            "hosts": self.topology.hosts,
            "devices": len(self.topology.devices),
            "memory": chip.memory,
            "mesh": dict(self.mesh.shape),
            "fits": self.fits,
            "programs": [run.to_json() for run in self.runs],
            "stage_hours": {k: v / 3600 for k, v in self.stage_seconds().items()},
            "hours": hours,
            "chip_hours": None if hours is None else hours * self.topology.chips,
            "notes": list(self.notes),
        }


def plan_recipe(
    recipe: Base,
    topology: Topology,
    assumed: Assumed,
    *,
    optimised: bool = True,
    only: Sequence[str] = (),
    dump: str | None = None,
) -> Planned:
    """Compiles all programs of a recipe for a slice.

    Args:
      recipe: whose `devices` say the mesh.
      topology: the slice.
      assumed: what recipe and configs do not say.
      optimised: see `compile_program`.
      only: names of the programs that are compiled; all if none is named.
      dump: file for the optimised HLO of the last one.

    Raises:
      MmpoError: the recipe cannot be run on the slice.
    """
    mesh = mesh_of(recipe, topology)
    with progress.doing("counting"):
        plan = plan_stages(recipe, mesh, assumed)
    runs = [run for run in plan.runs if not only or run.program.name in only]
    planned = []
    for run in runs:
        with progress.doing(f"compiling {run.program.name} of {run.program.checkpoint}"):
            compiled = compile_program(run.program, optimised, dump)
        planned.append(judged(run, topology, compiled))
    return Planned(topology, mesh, tuple(planned), plan.notes)


def mesh_of(recipe: Base, topology: Topology, **sizes: int) -> Mesh:
    """The recipe's mesh on a slice, or one of other sizes."""
    chosen: Mapping[str, Any] = sizes or recipe.devices.model_dump()
    if isinstance(recipe, AlignRecipe | TrainRecipe) and not sizes:
        decoder = decoder_of(recipe)
        chosen = mesh_sizes(recipe.devices, recipe.training, decoder, topology.devices)
    return make_mesh(**chosen, devices=topology.devices)


def decoder_of(recipe: Base) -> DecoderConfig:
    """The decoder of the recipe's model."""
    opened = open_config(recipe.model, recipe.attention, recipe.template)
    return opened.model.config.decoder


def _peak(run: Run, compiled: Compiled) -> float:
    return compiled.peak + run.program.held.get(BESIDE, 0.0)


def judged(run: Run, topology: Topology, compiled: Compiled | None) -> PlannedRun:
    """A run with its roofline, and whether it fits: of one that was only counted, whether what it
    is given does."""
    memory = topology.chip.memory
    if compiled is not None:
        fits = not compiled.refused and (memory is None or _peak(run, compiled) <= memory)
    else:
        fits = memory is None or sum(run.program.held.values()) <= memory
    return PlannedRun(run, compiled, roofline(run.program, topology, compiled), fits)
