"""Log-probs of responses, computed once and stored under a key that says of what."""

from __future__ import annotations

import functools
import itertools
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
from mmpo_jax.models.log_probs import response_log_probs, sum_log_probs
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import check_finite, inference_dtype
from mmpo_jax.recipes.scoring import ScoringDtype
from mmpo_jax.scoring.stage import ROWS_PER_PART, responses_stage

SCORE_RULES = 2
"""Part of the key of log-probs: changes with how they are computed of the same rows."""
STATIC = ("model", "compute_dtype", "per_token", "temperature")


@functools.partial(jax.jit, static_argnames=STATIC)
def score_batch(
    model: Model,
    params: Params,
    batch: Batch | PackedBatch,
    compute_dtype: str = "float32",
    per_token: bool = False,
    temperature: float = 1.0,
) -> Float[Array, "B R *T"]:
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
    placed = functools.cache(lambda: checkpoint.placed(mesh))

    def compute(rows: range, batches: Sequence[PlannedBatch], count: TokenCount) -> pa.Table:
        of_part = records[rows.start : rows.stop]
        scores = compute_scores(placed(), records, batches, mesh, compute_dtype, per_token, count)
        sums = [scores[row] for row in rows]
        finite = (all(np.isfinite(response).all() for response in row) for row in sums)
        ids = [record.id for record in of_part]
        check_finite("log-probs", zip(ids, finite, strict=True), compute_dtype)
        number = pa.list_(pa.float32()) if per_token else pa.float32()
        tokens = [[int(r.loss_mask.sum()) for r in record.responses] for record in of_part]
        return pa.table(
            {
                "id": pa.array(ids, pa.string()),
                "log_probs": pa.array(sums, pa.list_(number)),
                "num_tokens": pa.array(tokens, pa.list_(pa.int32())),
            }
        )

    settings = {"rules": SCORE_RULES, "compute_dtype": compute_dtype, "per_token": per_token}
    return responses_stage(
        checkpoint,
        records,
        lengths,
        mesh,
        compute,
        name=name,
        folder=folder,
        batch_size=batch_size,
        settings=settings,
    )


def score_records(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths,
    mesh: Mesh,
    batch_size: int,
    compute_dtype: str = "float32",
    per_token: bool = False,
    *,
    count: TokenCount | None = None,
) -> list[list[Any]]:
    """Summed log-prob of every response of every record, or of its tokens, in the records' order.

    See `plan.plan_responses` for how records are batched.
    """
    parts = plan_responses(checkpoint, records, lengths, mesh, batch_size, ROWS_PER_PART)
    batches = [batch for part in parts for batch in part]
    scores = compute_scores(checkpoint, records, batches, mesh, compute_dtype, per_token, count)
    return [scores[number] for number in range(len(records))]


def compute_scores(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    batches: Sequence[PlannedBatch],
    mesh: Mesh,
    compute_dtype: str,
    per_token: bool,
    count: TokenCount | None,
) -> dict[int, list[Any]]:
    """Number of a record -> the sums of its responses, or their tokens'."""

    def compute(batch: Any) -> jax.Array:
        return score_batch(checkpoint.model, checkpoint.params, batch, compute_dtype, per_token)

    scores: dict[int, list[Any]] = {}
    for number, row in itertools.chain.from_iterable(run_batches(batches, compute, mesh, count)):
        responses = records[number].responses
        scores[number] = row[: len(responses)].tolist()
        if per_token:
            scores[number] = [
                row[place, : len(response.ids)].tolist() for place, response in enumerate(responses)
            ]
    return scores


def chosen_dtype(dtype: ScoringDtype, checkpoint: Checkpoint) -> str:
    """The dtype to compute in: `auto` is that of the weights, see `inference_dtype`."""
    return inference_dtype(checkpoint.params).name if dtype == "auto" else dtype
