"""Rewards of responses under a reward model, computed once and stored under a key."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.inference.loop import TokenCount, run_batches
from mmpo_jax.inference.plan import PlannedBatch, plan_responses
from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.models.log_probs import response_rewards
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import check_finite
from mmpo_jax.scoring.stage import responses_stage

REWARD_RULES = 1
"""Part of the key of rewards: changes with how they are computed of the same rows."""


@functools.partial(jax.jit, static_argnames=("model", "compute_dtype"))
def reward_batch(
    model: Model, params: Params, batch: Batch | PackedBatch, compute_dtype: str = "float32"
) -> Float[Array, "B R"]:
    """float32[B, R]: `response_rewards` in a dtype, as training computes them."""
    return response_rewards(model, cast_params(params, compute_dtype), batch)


def reward_stage(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths,
    mesh: Mesh,
    *,
    folder: str,
    batch_size: int,
    compute_dtype: str,
    name: str = "rewards",
) -> pa.Table:
    """The reward of every response, from the stage if it is valid, part by part.

    Args:
      checkpoint: with a reward head, its parameters on the mesh.
      records: as `data.critiques.tokenize_scored` makes them.
      lengths: bucket sizes.
      mesh: the devices.
      folder: of the stage's files.
      batch_size: rows at a time, over all devices.
      compute_dtype: the parameters are cast to it.
      name: of the stage.

    Returns:
      A row per record, in order: id, rewards, one for each response.

    Raises:
      DataError: naming rows whose rewards are not finite; parts finished before are kept.
    """

    def compute(rows: range, batches: Sequence[PlannedBatch], count: TokenCount) -> pa.Table:
        found = _compute(checkpoint, records, batches, mesh, compute_dtype, count)
        rewards = [found[row] for row in rows]
        ids = [records[row].id for row in rows]
        finite = (bool(np.isfinite(row).all()) for row in rewards)
        check_finite("rewards", zip(ids, finite, strict=True), compute_dtype)
        columns = pa.array(ids, pa.string()), pa.array(rewards, pa.list_(pa.float32()))
        return pa.table(columns, ["id", "rewards"])

    return responses_stage(
        checkpoint,
        records,
        lengths,
        mesh,
        compute,
        name=name,
        folder=folder,
        batch_size=batch_size,
        settings={"rules": REWARD_RULES, "compute_dtype": compute_dtype},
    )


def reward_records(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths,
    mesh: Mesh,
    batch_size: int,
    compute_dtype: str = "float32",
) -> list[list[float]]:
    """The reward of every response of every record, in their order; see `reward_stage`."""
    parts = plan_responses(checkpoint, records, lengths, mesh, batch_size)
    batches = [batch for part in parts for batch in part]
    found = _compute(checkpoint, records, batches, mesh, compute_dtype, None)
    rewards = [found[number] for number in range(len(records))]
    finite = ((r.id, bool(np.isfinite(row).all())) for r, row in zip(records, rewards, strict=True))
    check_finite("rewards", finite, compute_dtype)
    return rewards


def _compute(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    batches: Sequence[PlannedBatch],
    mesh: Mesh,
    compute_dtype: str,
    count: TokenCount | None,
) -> dict[int, list[float]]:
    """Number of a record -> the rewards of its responses."""

    def compute(batch: Any) -> jax.Array:
        return reward_batch(checkpoint.model, checkpoint.params, batch, compute_dtype)

    return {
        number: row[: len(records[number].responses)].tolist()
        for of_batch in run_batches(batches, compute, mesh, count)
        for number, row in of_batch
    }
