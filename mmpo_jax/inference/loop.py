"""Batches through a compiled function, the next one made ready while the devices work."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.core import progress
from mmpo_jax.inference.plan import PlannedBatch
from mmpo_jax.parallel.mesh import batch_share, gathered, put_batch

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

    Sampling, log-probs and the labeler are such functions.

    Args:
      batches: see `plan`.
      compute: a compiled function of a batch on the mesh; gives arrays with one leading axis.
      mesh: the devices.
      count: adds the batches up.

    Yields:
      Of every batch, (number of a record, its slice of the results in NumPy).
    """
    share = batch_share(mesh)
    made = (batch.make(share) for batch in batches)
    for batch, (_, results) in zip(batches, overlapped(made, compute, mesh), strict=True):
        if count is not None:
            count.add(batch)
        progress.advance(len(batch.places))
        yield [
            (number, jax.tree.map(lambda leaf, place=place: leaf[place], results))
            for number, place in batch.places
        ]


def overlapped(
    batches: Iterable[Any], compute: Callable[[Any], Any], mesh: Mesh
) -> Iterator[tuple[Any, Any]]:
    """Batches with what a function gives for them, the next one made while one is computed.

    Runs a model over records, for all but sampling, whose places are refilled. A thread decodes
    images and fills arrays for the next batch, and results are fetched only when the batch behind
    has been started.

    Args:
      batches: in NumPy, made when they are asked for.
      compute: a compiled function of a batch on the mesh.
      mesh: the devices.

    Yields:
      (batch, results), both in NumPy. Of several processes each gives its own rows and gets the
      results of all.
    """
    running: tuple[Any, Any] | None = None
    for batch in made_ahead(batches):
        with jax.set_mesh(mesh):
            started = gathered(compute(put_batch(batch, mesh)), mesh)
        if running is not None:
            yield running[0], jax.tree.map(np.asarray, running[1])  # which waits
        running = batch, started
    if running is not None:
        yield running[0], jax.tree.map(np.asarray, running[1])


def made_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """Items as they come; a thread makes the next one while the caller has one."""
    source, end = iter(items), object()
    with concurrent.futures.ThreadPoolExecutor(1) as maker:
        made = maker.submit(next, source, end)
        while (item := made.result()) is not end:
            made = maker.submit(next, source, end)
            yield item
