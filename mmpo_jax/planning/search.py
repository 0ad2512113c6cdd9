"""Which meshes, micro-batches and rematerialisation make a recipe fastest, of those that fit.

There are hundreds of choices, and compiling one takes minutes: all are counted, those that cannot
fit by the count are left out, and the fastest of the rest are compiled until a few of them fit.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

from mmpo_jax.core import progress
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.parallel.choice import expert_sizes
from mmpo_jax.parallel.mesh import batch_shards
from mmpo_jax.planning.commands import plan_stages
from mmpo_jax.planning.compiling import Compiled, compile_program
from mmpo_jax.planning.planned import Planned, PlannedRun, decoder_of, judged, mesh_of
from mmpo_jax.planning.programs import Program
from mmpo_jax.planning.stages import Assumed, Plan
from mmpo_jax.planning.topology import Topology
from mmpo_jax.recipes.base import Base

log = logging.getLogger(__name__)

MOST_TENSOR = 16
"""Chips over which heads are split, at most: with more, sums of activations take all the time."""
MESHES = 4
"""Meshes, the fastest, for which micro-batches and rematerialisation are varied."""
REMAT = ("none", "dots", "full")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A recipe with another mesh, micro-batch or rematerialisation."""

    changes: tuple[tuple[str, Any], ...]
    """Keys of the recipe with their values."""
    recipe: Base
    planned: Planned
    """Counted, or compiled."""

    @property
    def seconds(self) -> float:
        """Of all runs; where their number is not known, of one run of each program."""
        if self.planned.seconds is not None:
            return self.planned.seconds
        return sum(run.seconds or 0.0 for run in self.planned.runs)

    @property
    def overrides(self) -> str:
        """The changes as they stand on a command line."""
        return " ".join(f"{key}={value}" for key, value in self.changes)

    @property
    def compiled(self) -> bool:
        return all(run.compiled is not None for run in self.planned.runs)


def search(
    recipe: Base,
    topology: Topology,
    assumed: Assumed,
    *,
    compilations: int,
    wanted: int = 3,
    optimised: bool = True,
) -> list[Choice]:
    """The fastest choices that were compiled, those that fit in front.

    Args:
      recipe: to vary.
      topology: the slice; its peaks have to be known.
      assumed: what recipe and configs do not say.
      compilations: programs that are compiled at most.
      wanted: how many choices that fit are looked for.
      optimised: see `compile_program`.

    Raises:
      MmpoError: the recipe can be run on no mesh of the slice, or nothing may fit by the count.
    """
    if topology.chip.flops is None:
        raise MmpoError(f"--search ranks by rooflines, and {topology.name} has none")
    counted = counted_choices(recipe, topology, assumed)
    possible = [choice for choice in counted if _may_fit(choice)]
    log.info("%d choices, %d of them may fit", len(counted), len(possible))
    if not possible:
        raise MmpoError(
            f"no mesh, micro-batch or rematerialisation of this recipe can fit {topology.name}"
        )
    known: dict[Any, Compiled] = {}
    found: list[Choice] = []
    for choice in sorted(possible, key=lambda choice: choice.seconds):
        tried = _compiled(choice, topology, known, compilations, optimised)
        if tried is None:
            break
        found.append(tried)
        if sum(each.planned.fits for each in found) >= wanted:
            break
    return sorted(found, key=lambda choice: (not choice.planned.fits, choice.seconds))


def counted_choices(recipe: Base, topology: Topology, assumed: Assumed) -> list[Choice]:
    """All choices that the recipe can be run with, counted.

    Raises:
      MmpoError: there is none; why the last one is none.
    """
    found: list[Choice] = []
    refusal: MmpoError | None = None
    with progress.doing("counting meshes"):
        for sizes in meshes(len(topology.devices), decoder_of(recipe)):
            try:
                found.append(_counted(recipe, topology, assumed, tuple(sizes.items())))
            except MmpoError as error:
                refusal = error
    if not found:
        raise refusal or MmpoError(f"{topology.name} has no mesh")
    training = getattr(recipe, "training", None)
    if training is None:
        return found
    found.sort(key=lambda choice: (not _may_fit(choice), choice.seconds))
    varied = list(found)
    with progress.doing("counting micro-batches and rematerialisation"):
        for choice in found[:MESHES]:
            for changes in _variations(training, choice.planned):
                try:
                    varied.append(_counted(recipe, topology, assumed, choice.changes + changes))
                except MmpoError:
                    continue
    return varied


def meshes(count: int, decoder: DecoderConfig) -> Iterator[dict[str, int]]:
    """Sizes of the axes that multiply to a number of devices; of a dense decoder without the axis
    `expert`."""
    for tensor in _divisors(count):
        if tensor > MOST_TENSOR:
            break
        for data in _divisors(count // tensor):
            both = count // tensor // data
            for expert in expert_sizes(both, decoder):
                sizes = {"data": data, "fsdp": both // expert, "tensor": tensor}
                sizes |= {"expert": expert} if decoder.experts else {}
                yield {f"devices.{axis}": size for axis, size in sizes.items()}


def _divisors(count: int) -> list[int]:
    return [size for size in range(1, count + 1) if count % size == 0]


def _variations(training: Any, planned: Planned) -> Iterator[tuple[tuple[str, Any], ...]]:
    """Changes of micro-batches and rematerialisation but the recipe's own."""
    shards = batch_shards(planned.mesh)
    batch = training.batch_size
    micro = [size for size in _divisors(batch) if size % shards == 0]
    own = training.micro_batch_size or batch, training.remat
    for size, remat in itertools.product(micro, REMAT):
        if (size, remat) != own:
            yield ("training.micro_batch_size", size), ("training.remat", remat)


def _counted(
    recipe: Base, topology: Topology, assumed: Assumed, changes: Sequence[tuple[str, Any]]
) -> Choice:
    changed = changed_recipe(recipe, changes)
    plan = plan_stages(changed, mesh_of(changed, topology), assumed)
    return Choice(tuple(changes), changed, _planned(topology, plan, changed, {}))


def changed_recipe(recipe: Base, changes: Sequence[tuple[str, Any]]) -> Base:
    """The recipe with other values under some keys, `section.option`."""
    sections: dict[str, dict[str, Any]] = {}
    for key, value in changes:
        section, option = key.split(".")
        sections.setdefault(section, {})[option] = value
    updated = {
        name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()
    }
    return recipe.model_copy(update=updated)


def _planned(topology: Topology, plan: Plan, recipe: Base, known: dict[Any, Compiled]) -> Planned:
    runs = [judged(run, topology, known.get(_key(run.program, recipe))) for run in plan.runs]
    return Planned(topology, mesh_of(recipe, topology), tuple(runs), plan.notes)


def _may_fit(choice: Choice) -> bool:
    """Whether every program fits by the count, what is kept for the backward pass included."""
    memory = choice.planned.topology.chip.memory
    if memory is None:
        return True
    return all(
        sum(run.run.program.held.values()) + run.run.program.kept <= memory
        for run in choice.planned.runs
    )


def _compiled(
    choice: Choice,
    topology: Topology,
    known: dict[Any, Compiled],
    compilations: int,
    optimised: bool,
) -> Choice | None:
    """The choice with its programs compiled, those that take most first; what follows one that does
    not fit is not compiled. None where no more may be compiled."""
    order = sorted(choice.planned.runs, key=_size, reverse=True)
    for run in order:
        key = _key(run.run.program, choice.recipe)
        if key not in known:
            if len(known) >= compilations:
                return None
            with progress.doing(f"compiling {run.run.program.name} with {choice.overrides}"):
                known[key] = compile_program(run.run.program, optimised)
        if not judged(run.run, topology, known[key]).fits:
            break
    plan = Plan(tuple(run.run for run in choice.planned.runs), choice.planned.notes)
    planned = _planned(topology, plan, choice.recipe, known)
    return dataclasses.replace(choice, planned=planned)


def _size(run: PlannedRun) -> float:
    return sum(run.run.program.held.values()) + run.run.program.kept


def _key(program: Program, recipe: Base) -> Any:
    """What a compiled program depends on, of those of one recipe."""
    training = getattr(recipe, "training", None)
    remat = training.remat if training and program.name == "train step" else None
    return (
        program.name,
        program.checkpoint,
        tuple(program.mesh.shape.values()),
        program.shape,
        remat,
    )
