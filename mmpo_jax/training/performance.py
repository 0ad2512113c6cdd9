"""What operators look at while a model trains: where time goes, rates, utilisation, memory."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core import progress
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.amounts import Amounts
from mmpo_jax.models.flops import ModelFlops, model_flops, tower_of
from mmpo_jax.models.lora import is_adapter
from mmpo_jax.models.model import Model
from mmpo_jax.objectives.terms import Term, reads_log_probs
from mmpo_jax.parallel.chips import GIB, peak_flops
from mmpo_jax.training.goodput import Goodput
from mmpo_jax.training.losses import needs_reference
from mmpo_jax.training.metrics import MEASURED
from mmpo_jax.training.teacher import LoadedTeacher
from mmpo_jax.training.times import Times

log = logging.getLogger(__name__)


NOTHING = Amounts()


@dataclasses.dataclass(frozen=True)
class StepFlops:
    """What a training step takes for each of what its batch has."""

    policy: ModelFlops
    """With a reference that runs over the same tokens."""
    teacher: ModelFlops | None = None
    """Of what a teacher is shown; None without one."""

    def of(self, amounts: Amounts, taught: Amounts = NOTHING) -> float:
        """FLOPs of a batch of which a teacher is shown so much."""
        parts = [(self.policy, amounts), (self.teacher, taught)]
        return sum(
            flops.of(part.tokens, part.targets, part.seen, part.slots)
            for flops, part in parts
            if flops is not None
        )


class Performance:
    """Measures the steps from one report to the next."""

    def __init__(
        self,
        times: Times,
        goodput: Goodput,
        flops: StepFlops | None,
        peak: float | None,
        devices: Sequence[Any],
    ):
        """
        Args:
          times: of the training.
          goodput: of the run.
          flops: what a batch takes; None where that is not known.
          peak: FLOPs a second of all devices in bfloat16; None where that is not known.
          devices: of this process, whose memory is looked at.
        """
        self.times, self.goodput = times, goodput
        self.flops, self.peak, self.devices = flops, peak, devices
        self.amounts, self.taught, self.steps = Amounts(), Amounts(), 0

    def add(self, amounts: Amounts, taught: Amounts = NOTHING) -> None:
        """A step was started on so much data, of which a teacher was shown so much."""
        self.amounts += amounts
        self.taught += taught
        self.steps += 1

    def close(self) -> dict[str, float]:
        """What is measured of the steps since the last call, by its name in `metrics.jsonl`.

        Seconds are those of a step in the mean. Rates are over the time in which steps ran or
        waited for their batches, and so is utilisation, but for rollouts, of which no FLOPs count.
        """
        split, steps = self.times.close(), self.steps
        amounts, taught = self.amounts, self.taught
        self.amounts, self.taught, self.steps = Amounts(), Amounts(), 0
        self.goodput.add(split)
        measured = {part: seconds / steps for part, seconds in split.items()}
        measured["step_time"] = sum(measured.values())
        updating = split["compute"] + split["data_wait"]
        seconds = updating + split["rollout"]
        if seconds > 0:
            for name in ("tokens", "rows", "responses", "pairs"):
                if amount := getattr(amounts, name):  # no pairs where none are compared
                    measured[f"{name}_per_second"] = amount / seconds
            measured["computed_tokens_per_second"] = amounts.computed / seconds
        if self.flops is not None and self.peak is not None and updating > 0:
            measured["mfu"] = self.flops.of(amounts, taught) / updating / self.peak
        measured |= device_memory(self.devices)
        measured["goodput"] = self.goodput.share()
        return {f"{MEASURED}{name}": value for name, value in measured.items()}

    def log_summary(self) -> None:
        """Says in the log what the run's time came to, where a step was done."""
        if self.times.first is None:
            return
        self.times.log_summary()
        passed = progress.duration(self.goodput.passed())
        log.info("goodput %.1f %% of %s since the first start", 100 * self.goodput.share(), passed)


def measure(
    model: Model,
    state: TrainState,
    terms: Sequence[Term],
    mesh: Mesh,
    goodput: Goodput,
    teacher: LoadedTeacher | None = None,
) -> Performance:
    """Measures a training from now on.

    Args:
      model: the architecture.
      state: of the training.
      terms: its objectives.
      mesh: the devices.
      goodput: of the run.
      teacher: of the training, if it has one.
    """
    peak = peak_flops(mesh.devices.flat[0].device_kind)
    return Performance(
        Times(),
        goodput,
        training_flops(model, state, terms, teacher),
        None if peak is None else peak * mesh.size,
        mesh.local_devices,
    )


def training_flops(
    model: Model, state: TrainState, terms: Sequence[Term], teacher: LoadedTeacher | None = None
) -> StepFlops | None:
    """What a training step takes for a batch, with a reference or a teacher that runs in it.

    Args:
      model: the architecture.
      state: says what is trained, by which of its products a gradient is taken.
      terms: the objectives; where they read rewards alone, no token is predicted.
      teacher: another model, or the reference over what this is shown.

    Returns:
      None for a model, or a teacher, whose vision half nobody counts.
    """
    taught = model if teacher is None or teacher.model is None else teacher.model
    if any(one.family.images and tower_of(one.config) is None for one in (model, taught)):
        return None
    params = {**state.params, **state.frozen}
    base = {path: leaf for path, leaf in params.items() if not is_adapter(path)}
    flops = model_flops(model, params, state.params.keys())
    if state.reference and needs_reference(terms):
        flops += model_flops(model, base)
    if not reads_log_probs(terms):
        return StepFlops(dataclasses.replace(flops, target=0.0))
    if teacher is None:
        return StepFlops(flops)
    theirs = base if teacher.params is None else flatten(teacher.params)
    return StepFlops(flops, model_flops(taught, theirs))


def device_memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """GiB in use, and at most so far, on the fullest of some devices; nothing where a backend does
    not say, as on CPU."""
    stats = [device.memory_stats() or {} for device in devices]
    names = {"memory_gib": "bytes_in_use", "peak_memory_gib": "peak_bytes_in_use"}
    return {
        name: max(each[key] for each in stats) / GIB
        for name, key in names.items()
        if all(key in each for each in stats)
    }
