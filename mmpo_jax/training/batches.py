"""What a stage of training learns from, and the batches that are made of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import grain
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.data.examples import Example, rows_of
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry, training_batches
from mmpo_jax.data.train_batch import HostBatch
from mmpo_jax.inference.plan import packed_over
from mmpo_jax.parallel.mesh import batch_share
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.on_policy import Prompts, Rollouts
from mmpo_jax.training.plan import micro_batch_size
from mmpo_jax.training.teacher import LoadedTeacher
from mmpo_jax.training.validation import Held, Measurements


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """What a stage of training learns from, and what is measured as it goes on."""

    examples: Sequence[Example]
    """Tokenized, with the fields the objective needs."""
    entries: Sequence[MixtureEntry] = ()
    """The data sets that stand one after another in `examples`, if there are several."""
    held: Held | None = None
    """Rows that are measured, if any are held out."""
    rollout: Rollout | None = None
    """How responses are sampled and rewarded, where the examples have none."""
    measurements: Measurements | None = None
    """What else is measured."""

    @property
    def mixture(self) -> Sequence[MixtureEntry]:
        return self.entries or [MixtureEntry(len(self.examples))]


class Batches(Protocol):
    """What the batches are made of."""

    seconds: float
    """Time that went into sampling them."""

    def draw(self, state: TrainState) -> HostBatch:
        """The batch of the next step."""

    def get_state(self) -> dict[str, Any]:
        """The position after it."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from a position."""

    def can_resume(self) -> bool:
        """Whether what goes on from the position of now draws what this one does."""

    def draw_again(self, position: dict[str, Any], state: TrainState) -> HostBatch | None:
        """The batch that was drawn at a position; None where it cannot be drawn again."""


class FromData:
    """Batches of data, whatever the state."""

    def __init__(self, batches: grain.DatasetIterator):
        self.batches, self.seconds = batches, 0.0
        self.get_state, self.set_state = batches.get_state, batches.set_state

    def draw(self, state: TrainState) -> HostBatch:
        return next(self.batches)

    def can_resume(self) -> bool:
        return True

    def draw_again(self, position: dict[str, Any], state: TrainState) -> HostBatch:
        self.set_state(position)
        return self.draw(state)


def make_batches(
    start: Checkpoint,
    data: TrainingData,
    config: Training,
    lengths: Lengths,
    mesh: Mesh,
    seed: int,
    teacher: LoadedTeacher | None = None,
) -> Batches:
    """Batches of the examples, or of what is sampled after their prompts; see `train`."""
    micro = micro_batch_size(config, mesh)
    if data.rollout is not None:
        prompts = Prompts(rows_of(data.examples), data.mixture, seed)
        return Rollouts(start, prompts, config, data.rollout, lengths, mesh, micro, teacher)
    batches = training_batches(
        data.examples,
        start.processor,
        lengths,
        seed=seed,
        epochs=config.epochs,
        batch_size=config.batch_size,
        micro_batch_size=micro,
        parts=data.mixture,
        workers=config.workers,
        packed_over=None if _drops(config) else packed_over(start.model, mesh),
        share=batch_share(mesh),
    )
    return FromData(batches)


def _drops(config: Training) -> bool:
    """Whether adapters drop inputs: the masks follow the places of tokens in a batch, which in
    packed rows depend on the devices, so such rows are padded."""
    return config.lora is not None and config.lora.dropout > 0
