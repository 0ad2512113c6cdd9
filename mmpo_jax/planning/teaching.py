"""A teacher of distillation in a plan: what of it lies on the devices, and what its passes take."""

from __future__ import annotations

import dataclasses
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.models.batch import Batch
from mmpo_jax.models.model import Model
from mmpo_jax.planning import abstract
from mmpo_jax.planning.abstract import Sizes
from mmpo_jax.planning.counts import Computation, forward_work
from mmpo_jax.planning.opened import Opened
from mmpo_jax.planning.work import Work


@dataclasses.dataclass(frozen=True)
class Teaching:
    """Who teaches, and what it is shown."""

    opened: Opened
    """Of the dtype that its parameters have on the devices."""
    sizes: Sizes
    """Of its prompt with the policy's responses; rows are not read."""
    is_reference: bool
    """Whether it is the policy's reference, whose parameters the state has."""

    @property
    def model(self) -> Model | None:
        """Its architecture, where it is another model."""
        return None if self.is_reference else self.opened.model

    def params(self, mesh: Mesh) -> Any:
        """Its own parameters, which a step is given beside the state; None where it has none."""
        if self.is_reference:
            return None
        return abstract.params(self.opened.model, mesh, self.opened.dtype)

    def batch(self, mesh: Mesh, rows: int, micro_batches: int) -> Batch:
        """What it is shown of a batch: so many micro-batches of so many rows."""
        sizes = dataclasses.replace(self.sizes, rows=rows)
        return abstract.batch(self.opened.model, sizes, mesh, micro_batches)

    def work(self, computation: Computation, rows: int) -> Work:
        """Its pass over a micro-batch. What its head says of a chunk is made again for the
        gradients of the policy's."""
        sizes = dataclasses.replace(self.sizes, rows=rows)
        return forward_work(computation, sizes, head_passes=2)
