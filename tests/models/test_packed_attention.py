"""Attention taken in many blocks, with windows and images, against softmax written out in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmpo_jax.models import attention, packed_attention
from mmpo_jax.models.batch import PackedBatch
from mmpo_jax.models.sight import Images, image_numbers

BLOCK = 4
RECORDS = ((11, (6, 3, 9)), (5, (2,)), (8, (7, 7)))
"""Tokens of a prompt and of the responses to it, of all in a row."""
IMAGE = 5
"""Tokens of an image; one begins at the second token of every prompt that has room for it."""
NOTHING = np.zeros((1, 1), np.int32)
WINDOWS = [None, 3, 7, 16]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for module in (attention, packed_attention):
        monkeypatch.setattr(module, "MIN_QUERY_BLOCK", BLOCK)
        monkeypatch.setattr(module, "MAX_QUERY_BLOCKS", 1000)


def describe(records):
    """(record, response, place, is_image) of every token of a row."""
    columns = []
    for number, (prompt, responses) in enumerate(records):
        of = [(number, 0, place, 1 <= place <= IMAGE < prompt) for place in range(prompt)]
        for response, length in enumerate(responses):
            of += [(number, 1 + response, prompt + step, False) for step in range(length)]
        columns += of
    return np.array(columns).T


def expected(arrays, record, response, place, is_image, window):
    """One query after the other: its own record's tokens, as the definition has it."""
    query, key, value = (np.asarray(array, np.float64)[0] for array in arrays)
    out = np.zeros_like(query)
    for at in range(len(query)):
        same = (record == record[at]) & ((response == 0) | (response == response[at]))
        seen = place <= place[at]
        if is_image[at]:
            seen = seen | (is_image == 1)
        if window is not None:
            seen = seen & (place > place[at] - window)
        chosen = same & seen
        for head in range(query.shape[1]):
            scores = key[chosen, head] @ query[at, head] / np.sqrt(query.shape[-1])
            weights = np.exp(scores - scores.max())
            out[at, head] = weights / weights.sum() @ value[chosen, head]
    return out


def draw(length):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal((1, length, 2, 8)), jnp.float32) for _ in range(3)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sees", [False, True])
@pytest.mark.parametrize("records", [RECORDS, RECORDS[:1]])
def test_packed_rows(records, sees, window):
    """A window reaches from a response to its prompt over all siblings that stand in between."""
    record, response, place, is_image = describe(records)
    arrays = draw(len(record))
    responses = [length for _, lengths in records for length in lengths]
    batch = PackedBatch(
        token_ids=record[None],
        record=jnp.asarray(record[None]),
        response=jnp.asarray(response[None]),
        place=jnp.asarray(place[None]),
        positions=place[None, None],
        pixel_values=NOTHING,
        patches={},
        feature_row=NOTHING,
        feature_index=NOTHING,
        feature_weight=NOTHING,
        predictor=NOTHING,
        target=NOTHING,
        target_place=NOTHING,
        last=NOTHING,
        loss_mask=np.zeros((len(records), 1, max(responses)), bool),
        weights=NOTHING,
        reach=max(prompt + sum(lengths) for prompt, lengths in records),
        prompt=records[0][0] if len(records) == 1 else 0,
    )
    begins = np.diff(record, prepend=-1) != 0
    images = Images(image_numbers(jnp.asarray(is_image[None] == 1), begins[None]), IMAGE)
    out = packed_attention.packed_attention(*arrays, batch, window, sees_images=sees, images=images)
    shown = is_image if sees else np.zeros_like(is_image)
    wanted = expected(arrays, record, response, place, shown, window)
    np.testing.assert_allclose(out[0], wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sees", [False, True])
def test_shared_prompts(sees, window):
    (prompt, lengths), t = RECORDS[0], max(RECORDS[0][1])
    record, response, place, is_image = describe(((prompt, (t,) * len(lengths)),))
    arrays = draw(len(record))
    real = np.arange(t) < np.array(lengths)[:, None]
    images = Images(image_numbers(jnp.asarray(is_image[None, :prompt] == 1)), IMAGE)
    out = jax.jit(
        lambda *arrays: attention.shared_prompt_attention(
            *arrays,
            jnp.ones((1, prompt), bool),
            jnp.asarray(real[None]),
            window,
            backend="xla",
            sees_images=sees,
            images=images,
        )
    )(*arrays)
    shown = is_image if sees else np.zeros_like(is_image)
    wanted = expected(arrays, record, response, place, shown, window)
    counted = np.concatenate([np.ones(prompt, bool), real.ravel()])
    np.testing.assert_allclose(out[0][counted], wanted[counted], rtol=0, atol=1e-5)
