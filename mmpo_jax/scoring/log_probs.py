"""Log-probs of responses, computed once and stored under a key that says of what."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.stages import Stage, run_stage
from mmpo_jax.data.batching import bucket, pad_batch
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.tokenization import TokenizedRecord, fingerprint_records
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.log_probs import response_log_probs, sum_log_probs
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import check_finite
from mmpo_jax.parallel.mesh import batch_shards, put_batch

ROWS_PER_PART = 256
SCORE_RULES = 2
"""Part of the key of log-probs: changes with how they are computed of the same rows."""
STATIC = ("model", "compute_dtype", "per_token", "temperature")


@functools.partial(jax.jit, static_argnames=STATIC)
def score_batch(
    model: Model,
    params: Params,
    batch: Batch,
    compute_dtype: str = "float32",
    per_token: bool = False,
    temperature: float = 1.0,
) -> jax.Array:
    """float32[B, R]: summed log-prob of every response; [B, R, T] that of its tokens.

    In the dtype that training computes in, so that policy and reference agree at step 0; and with
    its temperature.
    """
    params = cast_params(params, compute_dtype)
    log_probs = response_log_probs(model, params, batch, temperature=temperature)
    return log_probs * batch.loss_mask if per_token else sum_log_probs(log_probs, batch)


def score_stage(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths,
    mesh: Mesh,
    *,
    name: str,
    folder: str,
    batch_size: int,
    compute_dtype: str,
    per_token: bool = False,
) -> pa.Table:
    """Log-probs of every response, from the cache if it is valid, part by part.

    The cache is a stage file: its manifest holds the fingerprints of the model, tokenizer, chat
    template, image preprocessing and of the tokenized rows, and another model's is not used.

    Args:
      checkpoint: its parameters on the host or the mesh.
      records: tokenized, with responses.
      lengths: bucket sizes.
      mesh: the devices.
      name: of the stage.
      folder: of its files.
      batch_size: rows at a time, over all devices.
      compute_dtype: the parameters are cast to it; sums are float32.
      per_token: keeps the log-probs of the tokens and not their sums.

    Returns:
      A row per record, in order: id, log_probs, num_tokens, one of each for every response.

    Raises:
      DataError: naming rows whose log-probs are not finite; parts finished before are kept.
    """
    stage = Stage(
        folder=folder,
        name=name,
        inputs={
            "model": checkpoint.fingerprint,
            "rows": fingerprint_records(records),
            **checkpoint.processor.fingerprints(),
        },
        settings={
            "rules": SCORE_RULES,
            "compute_dtype": compute_dtype,
            "per_token": per_token,
        },
        num_parts=max(1, -(-len(records) // ROWS_PER_PART)),
    )
    placed = functools.cache(lambda: checkpoint.placed(mesh))

    def make_part(part: int) -> pa.Table:
        activity.start_at(part * ROWS_PER_PART)
        progress.tell()
        rows = records[part * ROWS_PER_PART : (part + 1) * ROWS_PER_PART]
        sums = score_records(placed(), rows, lengths, mesh, batch_size, compute_dtype, per_token)
        finite = (all(np.isfinite(response).all() for response in row) for row in sums)
        ids = (record.id for record in rows)
        check_finite("log-probs", zip(ids, finite, strict=True), compute_dtype)
        number = pa.list_(pa.float32()) if per_token else pa.float32()
        return pa.table(
            {
                "id": pa.array([record.id for record in rows], pa.string()),
                "log_probs": pa.array(sums, pa.list_(number)),
                "num_tokens": pa.array(
                    [[int(r.loss_mask.sum()) for r in record.responses] for record in rows],
                    pa.list_(pa.int32()),
                ),
            }
        )

    with progress.doing(name, len(records), first="compiling") as activity:
        return run_stage(stage, make_part).table


def score_records(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths,
    mesh: Mesh,
    batch_size: int,
    compute_dtype: str = "float32",
    per_token: bool = False,
) -> list[list[Any]]:
    """Summed log-prob of every response of every record, or of its tokens, in the records' order.

    Records are batched by the buckets they fall in, so that short ones are not padded to long.
    """
    shards = batch_shards(mesh)
    rows = -(-batch_size // shards) * shards
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for index, record in enumerate(records):
        groups.setdefault(_shape(record, lengths), []).append(index)
    scores: dict[int, list[Any]] = {}
    running: tuple[list[int], jax.Array] | None = None  # the next batch is made meanwhile
    for (prompt, response, responses, _), indices in groups.items():
        for start in range(0, len(indices), rows):
            chosen = indices[start : start + rows]
            batch = pad_batch(
                [records[i] for i in chosen],
                checkpoint.processor,
                rows=rows,
                prompt_sizes=(prompt,),
                response_sizes=(response,),
                num_responses=responses,
            )
            scores |= _fetch(running, records)
            with jax.set_mesh(mesh):
                sums = score_batch(
                    checkpoint.model,
                    checkpoint.params,
                    put_batch(batch, mesh),
                    compute_dtype,
                    per_token,
                )
            running = chosen, sums
    scores |= _fetch(running, records)
    return [scores[index] for index in range(len(records))]


def _fetch(
    running: tuple[list[int], jax.Array] | None, records: Sequence[TokenizedRecord]
) -> dict[int, list[Any]]:
    """Record index -> the sums of its responses, or their tokens', of a batch that was started."""
    if running is None:
        return {}
    indices, sums = running
    found = {}
    values = np.asarray(sums)  # which waits for the device
    progress.advance(len(indices))
    for index, row in zip(indices, values, strict=False):
        responses = records[index].responses
        found[index] = row[: len(responses)].tolist()
        if row.ndim == 2:
            found[index] = [
                row[place, : len(response.ids)].tolist() for place, response in enumerate(responses)
            ]
    return found


def _shape(record: TokenizedRecord, lengths: Lengths) -> tuple[int, int, int, int]:
    return (
        bucket(len(record.prompt_ids), lengths.prompt),
        bucket(max(len(r.ids) for r in record.responses), lengths.response),
        len(record.responses),
        len(record.images),
    )
