"""Samples of a batch of prompts, by places of any number."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from helpers import meshes
from jax.sharding import Mesh

from mmpo_jax.generation.refill import Layout, Work, sample_batches
from mmpo_jax.inference.plan import PlannedBatch
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.model import Model, Params
from mmpo_jax.recipes.sampling import Decoding


def sample(
    model: Model,
    params: Params,
    batch: Batch,
    keys: jax.Array,
    *,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
    mesh: Mesh | None = None,
    layout: Layout | None = None,
    work: Work | None = None,
) -> np.ndarray:
    """int32[B, n, T]: samples of every prompt.

    Args:
      model, params, batch, keys, decoding, eos_ids, pad_id: see `sample_batches`.
      mesh: one device by default.
      layout: by default all samples are decoded at once, and nothing is refilled.
      work: is told what was computed.
    """
    count, n = keys.shape
    layout = layout or Layout(rows=count, width=1, groups=1, members=n, batch=count)
    batches = []
    for start in range(0, count, layout.batch):
        numbers = np.arange(start, start + layout.batch)
        real, at = numbers[numbers < count], np.minimum(numbers, count - 1)
        chosen = jax.tree.map(lambda leaf, at=at: leaf[at], batch)
        made: Any = chosen, keys[at]
        places = tuple((int(number), place) for place, number in enumerate(real))
        places = tuple(at for at in places if chosen.weights[at[1]])
        batches.append(PlannedBatch(lambda share, made=made: made, places, 0, 0))
    tokens = np.full((count, n, decoding.max_new_tokens), pad_id, np.int32)
    found = sample_batches(
        model,
        params,
        batches,
        layout,
        mesh or meshes.one_device(),
        decoding=decoding,
        eos_ids=eos_ids,
        pad_id=pad_id,
        work=work,
    )
    for number, rows in found:
        tokens[number] = rows
    return tokens
