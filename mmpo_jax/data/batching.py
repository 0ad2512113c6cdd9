"""Tokenized records to padded batches of a few static shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.models.batch import Batch


def bucket(length: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `length`.

    Raises:
      ValueError: none does.
    """
    for size in sizes:
        if length <= size:
            return size
    raise ValueError(f"length {length} is over the largest bucket {sizes[-1]}")


def pad_batch(
    records: Sequence[TokenizedRecord],
    processor: Processor,
    *,
    rows: int,
    prompt_sizes: Sequence[int],
    response_sizes: Sequence[int],
    num_responses: int | None = None,
    num_images: int | None = None,
) -> Batch:
    """A batch of NumPy arrays; rows that only fill it have weight 0 and a one-token prompt.

    Args:
      records: at most `rows` of them.
      processor: makes the pixels.
      rows: B.
      prompt_sizes: ascending bucket sizes of P.
      response_sizes: ascending bucket sizes of T.
      num_responses: R; None takes the most that a record has.
      num_images: I; None takes the most that a record has.

    Returns:
      A `Batch` whose P and T are the smallest buckets that hold every record.

    Raises:
      DataError: an image cannot be read.
    """
    responses = [response for record in records for response in record.responses]
    p = bucket(max((len(r.prompt_ids) for r in records), default=1), prompt_sizes)
    r = (
        max((len(x.responses) for x in records), default=0)
        if num_responses is None
        else num_responses
    )
    # Rows that only fill a batch have the shape of its others, T included.
    t = bucket(max((len(x.ids) for x in responses), default=0), response_sizes) if r else 0
    images = (
        max((len(record.images) for record in records), default=0)
        if num_images is None
        else num_images
    )

    prompt_ids = np.full((rows, p), processor.pad_id, np.int32)
    prompt_mask = np.zeros((rows, p), bool)
    prompt_mask[len(records) :, 0] = True
    pixels = np.zeros((rows, images, *processor.pixel_shape), np.float32)
    response_ids = np.full((rows, r, t), processor.pad_id, np.int32)
    response_mask = np.zeros((rows, r, t), bool)
    loss_mask = np.zeros((rows, r, t), bool)
    for row, record in enumerate(records):
        prompt_ids[row, : len(record.prompt_ids)] = record.prompt_ids
        prompt_mask[row, : len(record.prompt_ids)] = True
        for index, image in enumerate(record.images):
            pixels[row, index] = processor.pixels(image)
        for index, response in enumerate(record.responses):
            size = len(response.ids)
            response_ids[row, index, :size] = response.ids
            response_mask[row, index, :size] = True
            loss_mask[row, index, :size] = response.loss_mask
    weights = (np.arange(rows) < len(records)).astype(np.float32)
    # NumPy here, jax.Array on the mesh: `put_batch` turns the one into the other.
    arrays: tuple[Any, ...] = (
        prompt_ids,
        prompt_mask,
        pixels,
        response_ids,
        response_mask,
        loss_mask,
        weights,
    )
    return Batch(*arrays)
