"""The frozen reference: log-probs of the model that training starts from, computed or given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.recipes.training import Training
from mmpo_jax.scoring.log_probs import score_records, score_stage

NATS, NATS_PER_TOKEN = 0.5, 0.1
"""How far a given log-prob may be from the model's."""


def reference_stage(
    start: Checkpoint,
    records: Sequence[TokenizedRecord],
    lengths: Lengths,
    mesh: Mesh,
    per_token: bool = False,
    **options: Any,
) -> StoredScores:
    """Log-probs of every response under the model training starts from, see `score_stage`."""
    table = score_stage(
        start,
        records,
        lengths,
        mesh,
        name="reference",
        per_token=per_token,
        **options,
    )
    return StoredScores(table, per_token)


class StoredScores(Mapping[str, np.ndarray]):
    """Record id -> float32[R], or [R, t] per token, of the table of `score_stage`."""

    def __init__(self, table: pa.Table, per_token: bool):
        self.table, self.per_token = table.combine_chunks(), per_token
        self.places = {id_: place for place, id_ in enumerate(table["id"].to_pylist())}

    def __getitem__(self, id_: str) -> np.ndarray:
        values = self.table["log_probs"][self.places[id_]].as_py()
        if self.per_token:
            longest = max(map(len, values))
            values = [np.pad(tokens, (0, longest - len(tokens))) for tokens in values]
        return np.array(values, np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def check_given(
    start: Checkpoint,
    records: Sequence[TokenizedRecord],
    given: Mapping[str, np.ndarray],
    config: Training,
    lengths: Lengths,
    mesh: Mesh,
) -> None:
    """Compares log-probs that the data give with those of the model that training starts from.

    Half of the responses have to agree within `NATS` and `NATS_PER_TOKEN`: what bfloat16 and
    other kernels change is a tenth of that, means in place of sums or another model's are far more.

    Args:
      start: of the training.
      records: the first ones, with responses.
      given: id -> float32[R] summed log-probs.
      config, lengths, mesh: of the training.

    Raises:
      DataError: they cannot be this model's; with the first rows and both numbers.
    """
    with progress.doing("comparing the data's reference with the model", len(records)):
        computed = score_records(
            start.placed(mesh), records, lengths, mesh, config.batch_size, config.compute_dtype
        )
    apart, told = [], []
    for record, sums in zip(records, computed, strict=True):
        for response, ours, theirs in zip(record.responses, sums, given[record.id], strict=True):
            count = int(response.loss_mask.sum())
            if count:
                apart.append(abs(ours - theirs) / (NATS + NATS_PER_TOKEN * count))
        texts = [", ".join(f"{value:.2f}" for value in row) for row in (given[record.id], sums)]
        told.append(f"row {record.id!r}: {texts[0]} in the data, {texts[1]} of the model")
    if np.median(apart) <= 1:
        return
    raise DataError(
        f"the data's reference log-probs cannot be those of {start.folder}: "
        f"{'; '.join(told[:3])}. They are sums over a response's tokens, EOS included; take "
        "`reference: {type: cached}`, or `check: false` where another model is meant"
    )
