"""What a model computes of the responses of many rows, as a stage that is made in parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.stages import Stage, run_stage
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.tokenized_rows import fingerprint_records
from mmpo_jax.inference.loop import TokenCount
from mmpo_jax.inference.plan import PlannedBatch, plan_responses

ROWS_PER_PART = 512

Compute = Callable[[range, Sequence[PlannedBatch], TokenCount], pa.Table]
"""(numbers of the rows of a part, their batches, where computed tokens are counted) -> a row for
each of them."""


def responses_stage(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths,
    mesh: Mesh,
    compute: Compute,
    *,
    name: str,
    folder: str,
    batch_size: int,
    settings: Mapping[str, Any],
) -> pa.Table:
    """A row for every record, from the stage if it is valid, computed part by part.

    Args:
      checkpoint: the model, a part of the stage's key with its processor and the rows.
      records: the rows with their responses.
      lengths: bucket sizes.
      mesh: the devices.
      compute: makes the rows of a part.
      name: of the stage.
      folder: of its files.
      batch_size: rows at a time, over all devices.
      settings: what else the rows depend on.

    Raises:
      DataError: what `compute` raises; parts finished before are kept.
    """
    stage = Stage(
        folder=folder,
        name=name,
        inputs={
            "model": checkpoint.fingerprint,
            **({"quantization": checkpoint.quantization} if checkpoint.quantization else {}),
            "rows": fingerprint_records(records),
            **checkpoint.processor.fingerprints(),
        },
        settings=settings,
        num_parts=max(1, -(-len(records) // ROWS_PER_PART)),
    )
    plan = functools.cache(
        lambda: plan_responses(checkpoint, records, lengths, mesh, batch_size, ROWS_PER_PART)
    )
    count = TokenCount()

    def make_part(part: int) -> pa.Table:
        first = part * ROWS_PER_PART
        activity.start_at(first)
        progress.tell()
        rows = range(first, min(first + ROWS_PER_PART, len(records)))
        return compute(rows, plan()[part] if rows else [], count)

    with progress.doing(name, len(records), first="compiling") as activity:
        table = run_stage(stage, make_part).table
    count.log_summary(name)
    return table
