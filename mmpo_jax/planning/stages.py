"""The stages of a recipe: which programs each runs, and how often."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.data.batching import bucket, fitting_sizes
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.models.family import Size
from mmpo_jax.objectives.terms import needs, rows_read
from mmpo_jax.parallel.mesh import batch_shards, make_mesh
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.planning.abstract import Sizes
from mmpo_jax.planning.opened import Opened, open_config
from mmpo_jax.planning.programs import BESIDE, Program, scoring, training
from mmpo_jax.planning.sampling import Sampled, generating
from mmpo_jax.planning.teaching import Teaching
from mmpo_jax.recipes.base import Base, Devices
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.losses import needs_reference, recipe_terms
from mmpo_jax.training.plan import check_training, micro_batch_size

TEXT_TOKENS = 64
"""Of a prompt's text, where no recipe gives bucket sizes."""


SPEED = {"micro_batch_size": None, "remat": "none"}
"""Options of a training that its parameters have nothing to do with."""


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What no recipe and no config says."""

    rows: int | None = None
    """Rows of the data; None for those that are found."""
    claims: float = 8.0
    """Claims of a response."""
    question_tokens: int = 32
    """Of a question about a claim, or of a claim with its question in a splitter's reply."""
    responses: int = 2
    """Responses of a record that training or scoring reads."""
    image: Size | None = None
    """Height and width of a prompt's picture; None for `opened.USUAL_IMAGE`."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A program and how often the whole recipe runs it."""

    stage: str
    program: Program
    runs: float | None
    """None where the number of rows is not known. Of a decoding one, in whole loops."""

    def beside(self, size: float) -> Run:
        """The run on devices that hold so many bytes for something else."""
        held = {**self.program.held, BESIDE: size}
        return dataclasses.replace(self, program=dataclasses.replace(self.program, held=held))


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that a recipe runs on a mesh."""

    runs: tuple[Run, ...]
    notes: tuple[str, ...]
    """What was assumed or left out, for people."""


class Stages:
    """Makes the stages of a recipe on one mesh."""

    def __init__(self, recipe: Base, mesh: Mesh, assumed: Assumed):
        """
        Args:
          recipe: of any command that runs one.
          mesh: the devices.
          assumed: what it does not say.
        """
        self.recipe, self.mesh, self.assumed = recipe, mesh, assumed
        self.notes: list[str] = []
        self.runs: list[Run] = []

    @property
    def shards(self) -> int:
        """Devices, or groups of them, that rows are split over."""
        return batch_shards(self.mesh)

    @contextlib.contextmanager
    def on(self, devices: Devices | None) -> Iterator[None]:
        """What is added within runs on a mesh of the same devices with these sizes.

        Args:
          devices: its sizes; None for the stages' own mesh.
        """
        own = self.mesh
        if devices is not None:
            self.mesh = make_mesh(**devices.model_dump(), devices=own.devices.flatten().tolist())
        yield
        self.mesh = own

    def plan(self) -> Plan:
        """What was added so far."""
        return Plan(tuple(self.runs), tuple(dict.fromkeys(self.notes)))

    def add(self, stage: str, programs: Sequence[Program], runs: Sequence[float | None]) -> None:
        """Adds the programs of a stage, with how often each is run."""
        self.runs += [
            Run(stage, program, count) for program, count in zip(programs, runs, strict=True)
        ]

    def training(
        self,
        opened: Opened,
        config: Training,
        sizes: Sizes,
        steps: float | None,
        records: float | None,
        rollout: Rollout | None = None,
        teaching: Teaching | None = None,
    ) -> None:
        """Adds so many steps on batches of these sizes, and the reference pass that they need."""
        micro_batch_size(config, self.mesh)
        _check_once(
            config.model_copy(update=SPEED | {"batch_size": self.shards}), opened, self.mesh
        )
        terms = recipe_terms(config)
        if rows_read(terms).mismatched:
            sizes = dataclasses.replace(sizes, responses=2 * sizes.responses)
        if needs_reference(terms) and config.reference.type == "cached" and rollout is None:
            rows = self.rounded(config.batch_size)
            per_token = "reference_tokens" in needs(terms)
            of_reference = dataclasses.replace(sizes, rows=rows)
            program = scoring(
                "reference",
                opened.quantized(config.quantization),
                self.mesh,
                of_reference,
                config.compute_dtype,
                per_token,
            )
            self.add("reference", [program], [_batches(records, rows)])
        step = training(opened, self.mesh, config, sizes, rollout, teaching)
        if rollout is not None:  # all that was added so far runs between its steps
            self.runs = [run.beside(step.stays) for run in self.runs]
        self.add("training", [step], [steps])

    def scored(
        self,
        stage: str,
        opened: Opened,
        sizes: Sizes,
        batch_size: int,
        dtype: str,
        records: float | None,
    ) -> None:
        """Adds log-probs of so many records, or of an unknown number."""
        rows = self.rounded(batch_size)
        chosen = opened.inference_dtype.name if dtype == "auto" else dtype
        sizes = dataclasses.replace(sizes, rows=rows)
        program = scoring("log-probs", opened, self.mesh, sizes, chosen)
        self.add(stage, [program], [_batches(records, rows)])

    def sample(
        self,
        stage: str,
        opened: Opened,
        sizes: Sizes,
        sampled: Sampled,
        prompts: float | None,
        times: float | None,
    ) -> None:
        """Samples after so many prompts, so many times."""
        given = sampled.prompts if prompts is None else min(sampled.prompts, int(prompts))
        sampled = dataclasses.replace(sampled, prompts=max(1, given))
        name = "" if stage == "generation" else f"{stage}: "
        first, loop = generating(opened, self.mesh, sizes, sampled, name)
        total = None if prompts is None or times is None else prompts * times
        prefills = _batches(total, first.gives["prompts"])
        loops = None
        if total is not None:
            samples = total * sampled.decoding.num_samples
            loops = samples / (loop.gives["responses"] * loop.loops)
            self.notes.append("samples are planned as long as their limit")
        self.add(stage, [first, loop], [prefills, loops])

    def open(self, name: str, template: str) -> Opened:
        """The checkpoint of this name, without weights."""
        return open_config(name, self.recipe.attention, template, self.assumed.image)

    def sizes(
        self,
        opened: Opened,
        lengths: Lengths | None,
        responses: int,
        limit: int = 512,
        key: str = "lengths.prompt",
    ) -> Sizes:
        """The largest bucket sizes of a recipe, whose prompts are of `key`.

        Raises:
          MmpoError: the largest does not hold the picture.
        """
        if lengths is None:
            (prompt,) = fitting_sizes([opened.picture_tokens + TEXT_TOKENS], 4)
            self.notes.append(
                f"no `lengths` are given: prompts have {prompt} tokens, responses {limit}"
            )
            return Sizes(
                1, prompt, responses, bucket(limit, fitting_sizes([limit], 2)), opened.slots
            )
        prompt, response = lengths.prompt[-1], lengths.response[-1]
        if prompt <= opened.picture_tokens:
            raise MmpoError(
                f"{key}: the largest size is {prompt}, and the picture of a prompt alone "
                f"takes {opened.picture_tokens} tokens of {opened.name}; give a larger one, or "
                "a smaller picture by --image"
            )
        return Sizes(1, prompt, responses, response, opened.slots)

    def rows(self, data: Any) -> int | None:
        """Rows of the data: said, of the picture world, or those of the file where it is here."""
        if self.assumed.rows is not None:
            return self.assumed.rows
        if isinstance(data, PictureWorldData):
            return data.size
        found = _count_rows(data, isinstance(self.recipe, TrainRecipe))
        if found is None:
            self.notes.append(
                f"{data.path} cannot be read here: --rows says how many rows there are, without "
                "which there are no hours"
            )
        return found

    def rounded(self, batch_size: int) -> int:
        """Rows of a batch, which all devices share."""
        return -(-batch_size // self.shards) * self.shards


def _batches(rows: float | None, of: float) -> float | None:
    return None if rows is None else math.ceil(rows / of)


@functools.cache
def _check_once(config: Training, opened: Opened, mesh: Mesh) -> None:
    """`check_training`, which takes a while, once for all that a search varies.

    Raises:
      TrainingError: see there.
    """
    check_training(config, opened.model, mesh)


@functools.cache
def _count_rows(data: Any, supervised: bool) -> int | None:
    try:
        return len(data.load(supervised=supervised).records)
    except (DataError, OSError):
        return None
