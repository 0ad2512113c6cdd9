"""Batches through a compiled function, the next one made ready while the devices work."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.core import progress
from mmpo_jax.inference.plan import PlannedBatch
from mmpo_jax.parallel.mesh import put_batch

log = logging.getLogger(__name__)


@dataclasses.dataclass
class TokenCount:
    """How many of the tokens that were computed are no padding."""

    tokens: int = 0
    computed: int = 0

    def add(self, batch: PlannedBatch) -> None:
        self.tokens += batch.tokens
        self.computed += batch.computed

    @property
    def useful_share(self) -> float:
        """1 where nothing was computed."""
        return self.tokens / self.computed if self.computed else 1.0

    def log_summary(self, name: str) -> None:
        """Says it in the log, where anything was computed."""
        if self.computed:
            share = 100 * self.useful_share
            log.info("%s: %d tokens, %.0f %% of those computed", name, self.tokens, share)


def run_batches(
    batches: Sequence[PlannedBatch],
    compute: Callable[[Any], Any],
    mesh: Mesh,
    count: TokenCount | None = None,
) -> Iterator[list[tuple[int, Any]]]:
    """What a function gives for every record of some batches.

    The one place that runs a model over records: sampling, log-probs and the labeler are
    functions. One thread decodes images and fills arrays for the next batch, and a result is
    fetched only when the batch behind it has been started.

    Args:
      batches: see `plan`.
      compute: a compiled function of a batch on the mesh; gives arrays with one leading axis.
      mesh: the devices.
      count: adds the batches up.

    Yields:
      Of every batch, (number of a record, its slice of the results in NumPy).
    """
    running: tuple[PlannedBatch, Any] | None = None
    with concurrent.futures.ThreadPoolExecutor(1) as maker:
        made = maker.submit(batches[0].make) if batches else None
        for number, batch in enumerate(batches):
            assert made is not None
            arrays = made.result()
            if number + 1 < len(batches):
                made = maker.submit(batches[number + 1].make)
            with jax.set_mesh(mesh):
                started = compute(put_batch(arrays, mesh))
            if running is not None:
                yield _results(*running)
            running = batch, started
            if count is not None:
                count.add(batch)
    if running is not None:
        yield _results(*running)


def _results(batch: PlannedBatch, results: Any) -> list[tuple[int, Any]]:
    """The records of a batch that was started, when it is done."""
    values = jax.tree.map(np.asarray, results)  # which waits for the device
    progress.advance(len(batch.places))
    return [
        (number, jax.tree.map(lambda leaf, place=place: leaf[place], values))
        for number, place in batch.places
    ]
