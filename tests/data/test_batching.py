"""Padded batches: bucket sizes, masks, and rows that only fill."""

import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.batching import bucket, pad_batch
from mmpo_jax.data.records import ImageRef, Response
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse
from mmpo_jax.models.layout import Layout
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene

IMAGES = tuple(ImageRef(str(i), png_bytes(sample_scene("train", 0, i))) for i in range(3))


def row(prompt, *responses, images=()):
    """A record of the given lengths; ids count up, the first token of a response has no loss.

    Images take four tokens each, after the first token.
    """
    features = 4 * len(images)
    ids = np.arange(10, 10 + prompt, dtype=np.int32)
    ids[1 : 1 + features] = tiny.IMAGE_ID
    return TokenizedRecord(
        id=f"{prompt}-{responses}",
        prompt_ids=ids,
        responses=tuple(
            TokenizedResponse(
                np.arange(30, 30 + n, dtype=np.int32), np.arange(n) > 0, 0, Response.of("")
            )
            for n in responses
        ),
        images=images,
        layouts=tuple(Layout.plain(tiny.IMAGE_ID, 4) for _ in images),
    )


def pad(records, processor, rows=3, **options):
    sizes = {"prompt_sizes": (4, 8, 16), "response_sizes": (2, 6)} | options
    return pad_batch(records, processor, rows=rows, **sizes)


def test_bucket():
    assert [bucket(n, (4, 8, 16)) for n in (0, 1, 4, 5, 8, 16)] == [4, 4, 4, 8, 8, 16]
    with pytest.raises(ValueError, match="length 17 is over the largest bucket 16"):
        bucket(17, (4, 8, 16))


def test_a_batch(tiny_processor):
    records = [row(6, 2, 5, images=IMAGES[:1]), row(11, 1, images=IMAGES[1:])]
    batch = pad(records, tiny_processor)
    assert batch.prompt_ids.shape == (3, 16)
    assert batch.response_ids.shape == (3, 2, 6)
    assert batch.pixel_values.shape == (3, 2, 3, 16, 16)

    assert batch.prompt_ids[0].tolist() == [10, *[tiny.IMAGE_ID] * 4, 15, *[0] * 10]
    assert batch.prompt_mask.sum(axis=1).tolist() == [6, 11, 1]
    assert batch.feature_index[0, :, 0].tolist() == [-1, 0, 1, 2, 3, *[-1] * 11]
    assert batch.feature_index[1, :, 0].tolist() == [-1, *range(8), *[-1] * 7]
    assert batch.feature_weight[..., 0].tolist() == (batch.feature_index[..., 0] >= 0).tolist()
    assert batch.positions[1, 0].tolist() == [*range(11), *[0] * 5]
    assert batch.next_position[:2].tolist() == [6, 11]
    assert batch.response_ids[0].tolist() == [[30, 31, 0, 0, 0, 0], [30, 31, 32, 33, 34, 0]]
    assert batch.response_mask.sum(axis=2).tolist() == [[2, 5], [1, 0], [0, 0]]
    assert batch.loss_mask.sum(axis=2).tolist() == [[1, 4], [0, 0], [0, 0]]
    assert batch.weights.tolist() == [1, 1, 0]

    for place, image in [((0, 0), 0), ((1, 0), 1), ((1, 1), 2)]:
        ((expected,),) = tiny_processor.pixels([IMAGES[image]])
        np.testing.assert_array_equal(batch.pixel_values[place], expected)
    assert not batch.pixel_values[0, 1].any()
    assert not batch.pixel_values[2].any()
    fields = dict(vars(batch))
    assert fields.pop("patches") == {}
    assert fields.pop("shown") is None
    dtypes = {name: leaf.dtype.name for name, leaf in fields.items()}
    assert dtypes == {
        "prompt_ids": "int32",
        "prompt_mask": "bool",
        "positions": "int32",
        "next_position": "int32",
        "pixel_values": "float32",
        "feature_index": "int32",
        "feature_weight": "float32",
        "response_ids": "int32",
        "response_mask": "bool",
        "loss_mask": "bool",
        "weights": "float32",
    }


def test_what_is_padding_is_masked(tiny_processor):
    """Real tokens are exactly where the masks say, and masks are runs from the left."""
    batch = pad([row(5, 1, 2), row(2, 6), row(8, 3, 4)], tiny_processor)
    for ids, mask in [
        (batch.prompt_ids, batch.prompt_mask),
        (batch.response_ids, batch.response_mask),
    ]:
        np.testing.assert_array_equal(mask, ids != tiny.PAD_ID)
        assert np.all(np.diff(mask.astype(int), axis=-1) <= 0)
    assert not np.any(batch.loss_mask & ~batch.response_mask)


def test_filling_rows_have_a_prompt_to_attend_and_nothing_to_learn(tiny_processor):
    batch = pad([], tiny_processor, rows=2, num_responses=2, num_slots=1)
    assert batch.prompt_mask.sum(axis=1).tolist() == [1, 1]
    # The shape of the other micro-batches of a step, not an empty one.
    assert batch.response_ids.shape == (2, 2, 2)
    assert batch.pixel_values.shape == (2, 1, 3, 16, 16)
    assert not batch.response_mask.any()
    assert not batch.loss_mask.any()
    assert not batch.weights.any()


def test_prompts_without_responses(tiny_processor):
    batch = pad([row(3), row(4)], tiny_processor, rows=2)
    assert batch.response_ids.shape == (2, 0, 0)
    assert batch.prompt_ids.shape == (2, 4)


def test_number_of_responses_can_be_given(tiny_processor):
    batch = pad([row(3, 2)], tiny_processor, num_responses=4)
    assert batch.response_mask.sum(axis=2).tolist() == [[2, 0, 0, 0], [0] * 4, [0] * 4]


def test_what_does_not_fit_is_refused(tiny_processor):
    with pytest.raises(ValueError, match="length 17"):
        pad([row(17, 2)], tiny_processor)
    with pytest.raises(ValueError, match="length 7"):
        pad([row(3, 7)], tiny_processor)
    with pytest.raises(DataError, match="lost"):
        pad([row(6, 2, images=(ImageRef("lost", b"no image"),))], tiny_processor)
