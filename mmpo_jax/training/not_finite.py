"""What is kept of a step that was not finite: the state before it, and the batch it was given."""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.files import null_if_not_finite, write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.data.train_batch import HostBatch
from mmpo_jax.parallel.mesh import gathered, put_batch

FOLDER = "not_finite"
"""Folder of a run's for such batches."""


@dataclasses.dataclass(frozen=True)
class Recorder:
    """Writes the batch of a step, for a closer look at it."""

    folder: str
    """Folder of the run."""
    mesh: Mesh
    """The devices, by which several processes put their rows together."""
    draw_again: Callable[[dict[str, Any], TrainState], HostBatch | None]
    """(position, state) -> the batch that was drawn there; None where it cannot be drawn again."""

    def record(
        self,
        step: int,
        metrics: Mapping[str, float],
        position: dict[str, Any],
        state: TrainState,
    ) -> str | None:
        """Writes `step-N.npz` with all arrays of a batch, `[micro-batch, row, ...]`, and
        `step-N.json` with the ids of its rows, the metrics, and which arrays have numbers that are
        not finite.

        Args:
          step: number of the step.
          metrics: of it.
          position: of the data before it.
          state: before it.

        Returns:
          The file of the arrays; None where the batch cannot be drawn again.
        """
        host = self.draw_again(position, state)
        if host is None:
            return None
        placed = gathered(put_batch(host.arrays, self.mesh, leading=1), self.mesh)
        leaves, _ = jax.tree_util.tree_flatten_with_path(jax.device_get(placed))
        arrays = {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
            for path, leaf in leaves
        }
        path = os.path.join(self.folder, FOLDER, f"step-{step}")
        about = {
            "step": step,
            "rows": list(host.ids),
            "not_finite": [name for name, leaf in arrays.items() if not np.isfinite(leaf).all()],
            "metrics": null_if_not_finite(metrics),
        }
        on_one(lambda: _write(path, arrays, about))
        return f"{path}.npz"


def first_not_finite(params: Mapping[str, jax.Array]) -> str | None:
    """The path of a parameter with an infinity or NaN; None where all are finite."""
    return next((path for path, leaf in params.items() if not jax.numpy.isfinite(leaf).all()), None)


def _write(path: str, arrays: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)
    write_atomic(f"{path}.npz", buffer.getvalue())
    text = json.dumps(about, indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(f"{path}.json", text.encode())
