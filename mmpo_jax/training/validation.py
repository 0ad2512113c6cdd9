"""Held-out rows: metrics as training goes on, the best step, and when to stop."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core import progress
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import unflatten
from mmpo_jax.data.examples import Example
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.tokenized_rows import KnownRows, known
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.inference.loop import overlapped
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.lora import cast_params
from mmpo_jax.recipes.train_recipe import Validation
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.losses import Loss
from mmpo_jax.training.metrics import HELD_OUT, means

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Held:
    """What is held out and what is made of it."""

    examples: Sequence[Example]
    config: Validation


@dataclasses.dataclass(frozen=True)
class Measurements:
    """What else is measured as training goes on, and shown beside its metrics."""

    measure: Callable[[int, TrainState], Mapping[str, float]]
    """Values by name, of a step and the state after it."""
    every: int | None
    """Steps between them; None for one before the first step and one at the end."""

    def is_due(self, step: int, is_last: bool) -> bool:
        """Whether there is something to measure after this step."""
        return is_last or (self.every is not None and step % self.every == 0)


class Validator:
    """Measures held-out rows as training goes on, and knows which step was best.

    What it knows is what `metrics.jsonl` says, so a run that was stopped goes on the same way.
    """

    def __init__(
        self,
        config: Validation,
        batches: Callable[[], Iterable[TrainBatch]],
        loss: Loss,
        training: Training,
        mesh: Mesh,
        rows: Sequence[Mapping[str, float]],
        count: int | None = None,
    ):
        """
        Args:
          config: of the recipe.
          batches: makes what is held out, on the host, all with one T.
          loss: as training has it.
          training: the recipe's section.
          mesh: the devices.
          rows: of `metrics.jsonl` so far.
          count: how many batches are held out, to say how far a measurement is.
        """
        self.config, self.batches, self.loss, self.mesh = config, batches, loss, mesh
        self.count, self.keep_best = count, training.keep_best
        self.forward = make_forward(loss, jnp.dtype(training.compute_dtype))
        self.evaluate = jax.jit(loss.sums)
        self.history = [row for row in rows if config.metric in row]
        self.lost: set[int] = set()
        """Steps whose parameters are not there or damaged, so that others are the best."""

    def measure(self, step: int, state: TrainState) -> dict[str, float]:
        """Metrics of all held-out rows, named as those of training with `eval_` in front.

        Raises:
          MmpoError: the metric that the recipe names is none of them.
        """
        with progress.doing("validation", self.count, "batches", "compiling") as activity:
            batches = activity.each(self.batches())
            values = measure_batches(
                self.forward, self.evaluate, self.loss, batches, state, self.mesh
            )
        named = {HELD_OUT + name: value for name, value in values.items()}
        if self.config.metric not in named:
            raise MmpoError(
                f"validation.metric: {self.config.metric!r} is none of {', '.join(named)}"
            )
        self.history.append({"step": step, **named})
        log.info("step %d  %s %.4g", step, self.config.metric, named[self.config.metric])
        return named

    def is_due(self, step: int, steps: int) -> bool:
        """Whether there is something to measure after this step."""
        return step % self.config.every == 0 or step == steps

    def best_steps(self, until: float = math.inf) -> list[int]:
        """The `keep_best` best steps measured until one, the best of them first; the start where
        nothing finite was measured."""
        return self.ranked_steps(until)[: self.keep_best] or [0]

    def ranked_steps(self, until: float = math.inf) -> list[int]:
        """The steps measured until one with finite values that are not lost, the best first."""
        rows = best_rows([row for row in self.history if row["step"] <= until], self.config)
        return [int(row["step"]) for row in rows if row["step"] not in self.lost]

    def score(self, step: int) -> float:
        """What was measured at a step, greater where it is better."""
        sign = 1 if self.config.greater_is_better else -1
        return sign * next(row[self.config.metric] for row in self.history if row["step"] == step)

    def is_over(self) -> bool:
        """Whether the last `patience` measurements brought nothing better."""
        if self.config.patience is None or not self.history:
            return False
        best = best_row(self.history, self.config).get("step", 0)
        return sum(row["step"] > best for row in self.history) >= self.config.patience

    def log_summary(self, step: int, steps: int, result: int) -> None:
        """Says in the log which step is the result, and why training ended before the last one."""
        best = best_row([row for row in self.history if row["step"] == result], self.config)
        if step < steps:
            measured = f"{self.config.patience} measurements without a better one"
            log.info("stopped after step %d of %d: %s", step, steps, measured)
        if best:
            metric = self.config.metric
            log.info(
                "the result is the model of step %d: %s %.4g", best["step"], metric, best[metric]
            )


def best_row(rows: Sequence[Mapping[str, float]], config: Validation) -> Mapping[str, float]:
    """The first of the rows of `metrics.jsonl` with the best value; empty where there is none."""
    return next(iter(best_rows(rows, config)), {})


def best_rows(rows: Sequence[Mapping[str, float]], config: Validation) -> list[Mapping[str, float]]:
    """The rows of `metrics.jsonl` with finite values, the best first, of equal ones the first."""
    sign = -1 if config.greater_is_better else 1
    measured = [row for row in rows if np.isfinite(row.get(config.metric, np.nan))]
    return sorted(measured, key=lambda row: sign * row[config.metric])


def measure_batches(
    forward: Callable[[TrainState, TrainBatch], Any],
    evaluate: Callable[..., Any],
    loss: Loss,
    batches: Iterable[TrainBatch],
    state: TrainState,
    mesh: Mesh,
) -> dict[str, float]:
    """The metrics of all rows of some batches, named as those of training.

    Args:
      forward: see `make_forward`.
      evaluate: that of the loss, compiled.
      loss: of the recipe's objectives.
      batches: on the host, all with one T.
      state: the parameters, and the reference where one runs.
      mesh: the devices.
    """

    def compute(batch: TrainBatch) -> tuple[Any, TrainBatch]:
        return forward(state, batch), _without_prompts(batch)  # with it, as it is of all processes

    found = [results for _, results in overlapped(batches, compute, mesh)]
    outputs, batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
    # Of all rows at once: some losses compare rows with each other.
    total, _ = evaluate(outputs, batch, state.objective_state)
    values = jax.device_get({**loss.metrics(total), "loss": loss.value(total)})
    return means([values])


def make_forward(loss: Loss, compute_dtype: Any) -> Callable[[TrainState, TrainBatch], Any]:
    """The compiled outputs of a batch, as a train step has them, without dropout."""

    @jax.jit
    def forward(state: TrainState, batch: TrainBatch) -> Any:
        params = cast_params(unflatten({**state.params, **state.frozen}), compute_dtype)
        reference = None
        if state.reference:
            reference = cast_params(unflatten({**state.reference, **state.frozen}), compute_dtype)
        return loss.forward(params, reference, batch)

    return forward


def _without_prompts(batch: TrainBatch) -> TrainBatch:
    """What a loss reads beside the outputs."""
    rest: dict[str, Any] = {field.name: None for field in dataclasses.fields(Batch)}
    rest |= {"loss_mask": batch.prompts.loss_mask, "weights": batch.prompts.weights}
    return dataclasses.replace(batch, prompts=Batch(**rest))


def hold_out(
    sets: Sequence[Sequence[TokenizedRecord]], share: float
) -> list[tuple[KnownRows, KnownRows]]:
    """(rows to train on, rows held out) of every data set, whatever the order of rows and sets.

    Rows with one prompt about the same images fall on the same side, in whichever sets they are, so
    that nothing is validated on what was trained. Prompts are gone through in the order of their
    digests, and one is held out where that brings the number of held-out rows closer to the share
    of all rows; at least one is held out, and at least one left. Of a small set all rows may be on
    one side.

    Raises:
      MmpoError: all rows have the same prompt.
    """
    rows = [known(records) for records in sets]
    digests = [records.prompts for records in rows]
    sizes = collections.Counter(itertools.chain.from_iterable(digests))
    total = sizes.total()
    if len(sizes) < 2:
        raise MmpoError(
            f"validation.share: all {total} rows have one prompt, which stays on one side; "
            "give `validation.data` instead"
        )
    wanted, count, chosen = share * total, 0, set()
    for digest in sorted(sizes):
        more = count + sizes[digest]
        if abs(more - wanted) < abs(count - wanted):
            chosen.add(digest)
            count = more
    smallest = min(sizes, key=lambda digest: (sizes[digest], digest))
    if not chosen:
        chosen.add(smallest)
    elif len(chosen) == len(sizes):
        chosen.remove(smallest)
    held = sum(sizes[digest] for digest in chosen)
    log.info(
        "held out: %d of %d rows, which is %d of %d prompts", held, total, len(chosen), len(sizes)
    )
    held_out = [np.array([digest in chosen for digest in of_set], bool) for of_set in digests]
    return [
        (records.take(np.flatnonzero(~apart)), records.take(np.flatnonzero(apart)))
        for records, apart in zip(rows, held_out, strict=True)
    ]
