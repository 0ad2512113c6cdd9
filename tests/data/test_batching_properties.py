"""Batches of any records: every token stands in one place, and padding counts nowhere."""

import math

import numpy as np
import pytest
from helpers import tiny
from helpers.any_records import N, tokenized_records
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.data.batching import SMALLEST, bucket, fitting_sizes, pad_batch

PROMPT_SIZES, RESPONSE_SIZES = (4, 8, 32), (2, 6, 8)

LENGTHS = st.lists(st.integers(1, 20_000), min_size=1, max_size=20)
SIZES = st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True).map(sorted)


@given(SIZES, st.integers(0, 60))
def test_a_bucket_is_the_smallest_that_holds(sizes, length):
    holding = [size for size in sizes if size >= length]
    if holding:
        assert bucket(length, sizes) == min(holding)
    else:
        with pytest.raises(ValueError, match=f"length {length} is over"):
            bucket(length, sizes)


@given(LENGTHS, LENGTHS, st.sampled_from([1, 2, 4]))
def test_fitting_sizes(lengths, others, per_octave):
    sizes = fitting_sizes(lengths, per_octave)
    assert list(sizes) == sorted({bucket(length, sizes) for length in lengths})  # all of use
    for length in lengths:
        size = bucket(length, sizes)
        assert size == SMALLEST if length <= SMALLEST else size < length * (1 + 1 / per_octave) + 1
    # They are on a grid that does not depend on the data: programs are found again.
    assert fitting_sizes([*lengths, *others], per_octave) == tuple(
        sorted({*sizes, *fitting_sizes(others, per_octave)})
    )
    octaves = {math.ceil(math.log2(max(length, SMALLEST))) for length in lengths}
    assert len(sizes) <= per_octave * len(octaves)


@given(
    rows=st.lists(st.none() | tokenized_records(PROMPT_SIZES[-1], RESPONSE_SIZES[-1]), max_size=4),
    more=st.integers(0, 2),
)
def test_every_token_once_and_padding_nowhere(tiny_processor, rows, more):
    batch = pad_batch(
        rows,
        tiny_processor,
        rows=len(rows) + more,
        prompt_sizes=PROMPT_SIZES,
        response_sizes=RESPONSE_SIZES,
    )
    rows = [*rows, *[None] * more]
    real = [row for row in rows if row is not None]
    every = [response for row in real for response in row.responses]

    assert batch.weights.tolist() == [float(row is not None) for row in rows]
    assert batch.prompt_ids.shape[1] == bucket(
        max((len(row.prompt_ids) for row in real), default=1), PROMPT_SIZES
    )
    if every:
        longest = max(len(response.ids) for response in every)
        assert batch.response_ids.shape[2] == bucket(longest, RESPONSE_SIZES)
    assert batch.response_mask.sum() == sum(len(response.ids) for response in every)
    assert batch.loss_mask.sum() == sum(response.loss_mask.sum() for response in every)
    assert (batch.prompt_ids[~batch.prompt_mask] == tiny.PAD_ID).all()
    assert (batch.response_ids[~batch.response_mask] == tiny.PAD_ID).all()
    assert (batch.feature_weight[~batch.prompt_mask] == 0).all()

    for place, row in enumerate(rows):
        mask = batch.prompt_mask[place]
        assert not np.diff(mask.astype(int)).max(initial=0) > 0  # all of it on the left
        if row is None:
            assert mask.sum() == 1
            assert not batch.loss_mask[place].any()
            continue
        np.testing.assert_array_equal(batch.prompt_ids[place][mask], row.prompt_ids)
        np.testing.assert_array_equal(batch.positions[place][0, mask], np.arange(mask.sum()))
        assert batch.next_position[place] == mask.sum()
        shown = batch.feature_index[place, :, 0]
        assert shown[shown >= 0].tolist() == list(range(N * len(row.images)))
        np.testing.assert_array_equal(shown >= 0, batch.prompt_ids[place] == tiny.IMAGE_ID)
        for slot, image in enumerate(row.images):
            (pixels,) = tiny_processor.pixels([image])
            np.testing.assert_array_equal(batch.pixel_values[place, slot], pixels[0])
        for column, response in enumerate(row.responses):
            mask = batch.response_mask[place, column]
            assert mask.tolist() == sorted(mask.tolist(), reverse=True)
            np.testing.assert_array_equal(batch.response_ids[place, column][mask], response.ids)
            np.testing.assert_array_equal(batch.loss_mask[place, column][mask], response.loss_mask)
        assert not batch.response_mask[place, len(row.responses) :].any()
