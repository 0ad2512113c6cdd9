"""Tokenized records to padded batches of a few static shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.models.batch import Batch, Shown
from mmpo_jax.models.layout import Placement, pad_size, place

SMALLEST = 16
"""Smallest of the bucket sizes that are chosen from the data."""


def bucket(length: int, sizes: Sequence[int]) -> int:
    """The smallest of the ascending `sizes` that holds `length`.

    Raises:
      ValueError: none does.
    """
    for size in sizes:
        if length <= size:
            return size
    raise ValueError(f"length {length} is over the largest bucket {sizes[-1]}")


def fitting_lengths(records: Sequence[TokenizedRecord]) -> Lengths:
    """Bucket sizes for these records, the same for any data of these lengths.

    Prompts, the long ones with their images, are padded by a fifth at most; responses by a third,
    which keeps the number of shapes, each of which is compiled, small.
    """
    responses = [len(response.ids) for record in records for response in record.responses]
    return Lengths(
        prompt=fitting_sizes([len(record.prompt_ids) for record in records], 4),
        response=fitting_sizes(responses or [1], 2),
    )


def fitting_sizes(lengths: Sequence[int], per_octave: int) -> tuple[int, ...]:
    """The sizes, so many from one power of two to the next, that hold all lengths."""
    sizes = set()
    for length in lengths:
        length = max(length, SMALLEST)
        octave = 1 << ((length - 1).bit_length() - 1)
        step = octave // per_octave
        sizes.add(-(-length // step) * step)
    return tuple(sorted(sizes))


def pad_batch(
    records: Sequence[TokenizedRecord | None],
    processor: Processor,
    *,
    rows: int,
    prompt_sizes: Sequence[int],
    response_sizes: Sequence[int],
    num_responses: int | None = None,
    num_slots: int | None = None,
    shown: bool | None = None,
) -> Batch:
    """A batch of NumPy arrays; rows that only fill it have weight 0 and a one-token prompt.

    Args:
      records: at most `rows` of them; None for a row that only fills the batch.
      processor: makes the pixels.
      rows: B.
      prompt_sizes: ascending bucket sizes of P.
      response_sizes: ascending bucket sizes of T.
      num_responses: R; None takes the most that a record has.
      num_slots: at least so many rows of pixels, I; None takes the most that a record has.
      shown: whether responses may show images; None for whether those of the records do.

    Returns:
      A `Batch` whose P and T are the smallest buckets that hold every record.

    Raises:
      DataError: an image cannot be read.
    """
    records = [*records, *[None] * (rows - len(records))]
    real = [record for record in records if record is not None]
    responses = [response for record in real for response in record.responses]
    p = bucket(max((len(r.prompt_ids) for r in real), default=1), prompt_sizes)
    r = max((len(x.responses) for x in real), default=0) if num_responses is None else num_responses
    # Rows that only fill a batch have the shape of its others, T included.
    t = bucket(max((len(x.ids) for x in responses), default=0), response_sizes) if r else 0
    slots = max((x.num_slots for x in real), default=0) if num_slots is None else num_slots
    vision = _pad_images(records, processor, p, pad_size(slots))

    prompt_ids = np.full((rows, p), processor.pad_id, np.int32)
    prompt_mask = np.zeros((rows, p), bool)
    response_ids = np.full((rows, r, t), processor.pad_id, np.int32)
    response_mask = np.zeros((rows, r, t), bool)
    loss_mask = np.zeros((rows, r, t), bool)
    for row, record in enumerate(records):
        if record is None:
            prompt_mask[row, 0] = True
            continue
        prompt_ids[row, : len(record.prompt_ids)] = record.prompt_ids
        prompt_mask[row, : len(record.prompt_ids)] = True
        for index, response in enumerate(record.responses):
            size = len(response.ids)
            response_ids[row, index, :size] = response.ids
            response_mask[row, index, :size] = True
            loss_mask[row, index, :size] = response.loss_mask
    weights = np.array([record is not None for record in records], np.float32)
    # NumPy here, jax.Array on the mesh: `put_batch` turns the one into the other.
    arrays: dict[str, Any] = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "response_ids": response_ids,
        "response_mask": response_mask,
        "loss_mask": loss_mask,
        "weights": weights,
    }
    if any(record.shows_later for record in real) if shown is None else shown:
        arrays["shown"] = _pad_shown(records, processor, r, t)
    return Batch(**arrays, **vision)


def _pad_shown(
    records: Sequence[TokenizedRecord | None], processor: Processor, responses: int, length: int
) -> Shown:
    """What the tokens of responses read and where they stand; at padding, anything.

    Args:
      records: B of them; None for a row that only fills the batch.
      processor: of the checkpoint.
      responses, length: R and T.
    """
    images, axes = processor.images, processor.config.decoder.position_axes
    width = images.vectors if images else 1
    shape = len(records), responses, length
    positions: Any = np.zeros((shape[0], axes, *shape[1:]), np.int32)
    index = np.full((*shape, width), -1, np.int32)
    weight = np.zeros((*shape, width), np.float32)
    for row, record in enumerate(records):
        for column, response in enumerate(record.responses if record else ()):
            assert record is not None
            start, size = len(record.prompt_ids), len(response.ids)
            whole = np.concatenate([record.prompt_ids, response.ids])
            placed = place_media(whole, record, processor)
            index[row, column, :size] = placed.index[start:]
            weight[row, column, :size] = placed.weight[start:]
            positions[row, :, column, :size] = placed.positions[:, start:]
    arrays: dict[str, Any] = {"feature_index": index, "feature_weight": weight}
    return Shown(positions=positions, **arrays)


def place_media(ids: np.ndarray, record: TokenizedRecord, processor: Processor) -> Placement:
    """What the first n tokens of a record read of its images, and where they stand; n is no less
    than the prompt's."""
    images, seen = processor.images, record.seen
    whole = np.concatenate([record.whole_prompt, ids[len(record.prompt_ids) :]])
    placed = place(
        whole,
        record.layouts,
        processor.placeholders,
        extras=images.extras if images else 0,
        width=images.vectors if images else 1,
        axes=processor.config.decoder.position_axes,
    )
    if seen is None:
        return placed
    kept = np.concatenate([seen.kept, np.arange(len(seen.whole), len(whole))])
    return dataclasses.replace(
        placed,
        index=placed.index[kept],
        weight=placed.weight[kept],
        positions=placed.positions[:, kept],
    )


def _pad_images(
    records: Sequence[TokenizedRecord | None], processor: Processor, length: int, slots: int
) -> dict[str, Any]:
    """The fields of `Batch` that say what images a prompt has and where its tokens stand.

    Args:
      records: B of them; None for a row that only fills the batch.
      processor: makes the pixels.
      length: P.
      slots: I.
    """
    images, axes = processor.images, processor.config.decoder.position_axes
    rows, width = len(records), images.vectors if images else 1
    index = np.full((rows, length, width), -1, np.int32)
    weight = np.zeros((rows, length, width), np.float32)
    positions = np.zeros((rows, axes, length), np.int32)
    following = np.ones(rows, np.int32)
    for row, record in enumerate(records):
        if record is None:
            continue
        size = len(record.prompt_ids)
        placed = place_media(record.prompt_ids, record, processor)
        index[row, :size], weight[row, :size] = placed.index, placed.weight
        positions[row, :, :size], following[row] = placed.positions, placed.next_position
    return {
        "positions": positions,
        "next_position": following,
        **image_arrays(records, processor, slots),
        "feature_index": index,
        "feature_weight": weight,
    }


def image_arrays(
    records: Sequence[TokenizedRecord | None], processor: Processor, slots: int
) -> dict[str, Any]:
    """`pixel_values` and `patches` of a batch.

    Args:
      records: one for every row; None for a row without images.
      processor: makes the pixels.
      slots: I.

    Raises:
      DataError: an image cannot be read.
    """
    images = processor.images
    pixels = np.zeros((len(records), slots, *processor.slot_shape), np.float32)
    for row, record in enumerate(records):
        made = processor.pixels(record.images, record.videos) if record else []
        if record and made:
            own = np.concatenate([made[place] for place in record.order or range(len(made))])
            pixels[row, : len(own)] = own
    described = [
        images.describe(processor.config, record.layouts if record else (), slots) if images else {}
        for record in records
    ]
    patches = jax.tree.map(lambda *leaves: np.stack(leaves), *described) if described else {}
    return {"pixel_values": pixels, "patches": patches}
