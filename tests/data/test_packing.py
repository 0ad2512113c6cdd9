"""Packing: every token once, rows nearly equally full, sizes that hold what is in them."""

import itertools

import numpy as np
import pytest
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.data.packed_batches import ENOUGH, MOST_SHAPES, plan_packing
from mmpo_jax.data.packing import PackedSizes, Size, best_rows, in_rows, pack_batch, rounded, spread
from mmpo_jax.data.records import ImageRef, Response
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse
from mmpo_jax.models.layout import Layout
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene

IMAGE = ImageRef("0", png_bytes(sample_scene("train", 0, 0)))
COUNTS = st.lists(st.integers(1, 900), min_size=1, max_size=40)


def size(tokens, targets=1, slots=0):
    return Size(tokens, targets, 2, targets, slots)


def record(name, prompt, *responses, image=False):
    """Of words that no other record has, with an image of four tokens in front or none."""
    rng = np.random.default_rng(int(name))
    words = rng.integers(tiny.FIRST_WORD, tiny.VOCAB_SIZE, prompt)
    layouts = (Layout.plain(tiny.IMAGE_ID, 4),) if image else ()
    made = tuple(
        TokenizedResponse(
            rng.integers(tiny.FIRST_WORD, tiny.VOCAB_SIZE, length).astype(np.int32),
            np.arange(length) % 3 > 0,
            0,
            Response.of(""),
        )
        for length in responses
    )
    ids = np.array([*([tiny.IMAGE_ID] * 4 if image else ()), *words], np.int32)
    return TokenizedRecord(name, ids, made, (IMAGE,) if image else (), layouts)


@given(COUNTS, st.integers(1, 6))
def test_spread_is_nearly_even(counts, bins):
    filled = spread(counts, bins)
    assert sorted(itertools.chain.from_iterable(filled)) == list(range(len(counts)))
    loads = [sum(counts[place] for place in places) for places in filled]
    assert max(loads) - min(loads) <= max(counts)


@given(st.integers(1, 6), st.data())
def test_spread_holds_no_more_than_it_may(bins, data):
    most = data.draw(st.integers(1, 5))
    counts = data.draw(st.lists(st.integers(1, 50), max_size=most * bins))
    assert max(map(len, spread(counts, bins, most))) <= most


@given(st.integers(1, 100_000))
def test_rounded(length):
    assert length <= rounded(length) <= max(32, length + max(31, length // 16))
    assert rounded(rounded(length)) == rounded(length)


def test_few_long_rows_where_attention_is_cheap():
    """The wider the model, the less it matters how many keys a query is held against."""
    sizes = [size(n) for n in (300, 300, 300, 200, 200, 200, 100, 100, 100)]
    group = list(range(len(sizes)))
    assert best_rows([group], sizes, 8192) <= best_rows([group], sizes, 32)
    filled = in_rows(group, sizes, best_rows([group], sizes, 8192))
    shape = PackedSizes.holding([[filled]], sizes)
    assert sum(s.tokens for s in sizes) / shape.computed > 0.9


def test_every_token_has_its_place(tiny_processor):
    records = [
        record("0", 5, 3, 2, image=True),
        record("1", 4, 6),
        record("2", 9, 1, 0, 4),
        record("3", 2, 5, image=True),
    ]
    sizes = [Size.of(row) for row in records]
    groups = [[[2, 0], [3]], [[1], []]]
    shape = PackedSizes.holding([groups], sizes)
    batch = pack_batch(records, groups, tiny_processor, shape)
    assert batch.token_ids.shape == (4, shape.tokens)
    assert batch.weights.tolist() == [1, 1, 1, 1, 0, 0]
    assert batch.pixel_values.shape[0] == 2 * shape.shown == 4
    flat = batch.token_ids.reshape(2, -1)
    place = 0
    for group, rows in enumerate(groups):
        for row, numbers in enumerate(rows):
            cursor = 0
            for number in numbers:
                source = records[number]
                first = cursor
                whole = [source.prompt_ids, *(response.ids for response in source.responses)]
                for part, ids in enumerate(whole):
                    at = (group * 2 + row, slice(cursor, cursor + len(ids)))
                    assert batch.token_ids[at].tolist() == ids.tolist()
                    assert set(batch.response[at]) <= {part}
                    start = 0 if part == 0 else len(source.prompt_ids)
                    assert batch.place[at].tolist() == list(range(start, start + len(ids)))
                    assert batch.positions[at[0], 0, at[1]].tolist() == batch.place[at].tolist()
                    cursor += len(ids)
                assert len(set(batch.record[group * 2 + row, first:cursor])) == 1
                for index, response in enumerate(source.responses):
                    mask = response.loss_mask
                    assert batch.loss_mask[place, index, : len(mask)].tolist() == mask.tolist()
                    assert not batch.loss_mask[place, index, len(mask) :].any()
                    end = (response.ids if len(mask) else source.prompt_ids)[-1]
                    assert flat[group, batch.last[place, index]] == end
                place += 1
            assert (batch.record[group * 2 + row, cursor:] == -1).all()
        place = shape.records
    for group in range(2):
        real = batch.target_place[group] < batch.loss_mask[:3].size
        marked = np.flatnonzero(batch.loss_mask.reshape(2, -1)[group])
        assert batch.target_place[group][real].tolist() == marked.tolist()
    first = batch.target_place[0] // (shape.responses * shape.response) == 0
    assert first.sum() == sum(r.loss_mask.sum() for r in records[2].responses)


def test_what_predicts_a_token_stands_before_it(tiny_processor):
    rows = [record("0", 5, 3, 2)]
    sizes = [Size.of(row) for row in rows]
    batch = pack_batch(rows, [[[0]]], tiny_processor, PackedSizes.holding([[[[0]]]], sizes))
    # Responses stand at 5..7 and 8..9; their first tokens count for no loss here.
    assert batch.predictor[0, :3].tolist() == [5, 6, 8]
    assert batch.target[0, :3].tolist() == batch.token_ids[0, [6, 7, 9]].tolist()
    everything = np.ones(3, bool)
    counted = tuple(
        TokenizedResponse(r.ids, everything[: len(r.ids)], 0, r.source) for r in rows[0].responses
    )
    (row,) = [TokenizedRecord("0", rows[0].prompt_ids, counted, (), ())]
    whole = PackedSizes.holding([[[[0]]]], [Size.of(row)])
    batch = pack_batch([row], [[[0]]], tiny_processor, whole)
    assert batch.predictor[0, :5].tolist() == [4, 5, 6, 4, 8]


@given(
    st.lists(st.tuples(st.integers(2, 400), st.integers(0, 2)), min_size=8, max_size=60),
    st.sampled_from([(8, 8, 1), (8, 4, 2), (8, 2, 1), (4, 4, 4)]),
)
def test_batches_of_a_run(lengths, cut):
    """Every example once in its batch, never too many in a group, in a few shapes."""
    batch_size, micro, shards = cut
    sizes = [size(tokens, tokens // 2, slots) for tokens, slots in lengths]
    batches = [
        list(range(start, min(start + batch_size, len(sizes))))
        for start in range(0, len(sizes), batch_size)
    ]
    packing = plan_packing(
        batches, sizes, batch_size=batch_size, micro_batch_size=micro, shards=shards, width=64
    )
    assert 1 <= len(packing.shapes) <= MOST_SHAPES
    for batch in batches:
        filled = packing.fill(batch, sizes)
        assert len(filled) == batch_size // micro
        assert all(len(groups) == shards for groups in filled)
        shape = packing.shape(filled, sizes)
        assert any(shape.tokens == known.tokens for known in packing.shapes)
        seen = []
        for group in itertools.chain.from_iterable(filled):
            numbers = list(itertools.chain.from_iterable(group))
            assert len(numbers) <= shape.records == micro // shards
            assert len(group) == shape.rows
            assert sum(sizes[n].targets for n in numbers) <= shape.targets
            assert all(sum(sizes[n].tokens for n in row) <= shape.tokens for row in group)
            assert max((sizes[n].slots for n in numbers), default=0) <= shape.slots
            seen += numbers
        assert sorted(seen) == batch


def test_a_batch_that_was_not_looked_at_gets_a_shape_of_its_own():
    sizes = [size(40, 20)] * 8 + [size(900, 500)] * 4
    packing = plan_packing(
        [[0, 1, 2, 3], [4, 5, 6, 7]], sizes, batch_size=4, micro_batch_size=4, shards=1, width=64
    )
    large = packing.fill([8, 9, 10, 11], sizes)
    shape = packing.shape(large, sizes)
    assert shape.rows * shape.tokens >= 3600
    assert shape.targets >= 2000


def test_shapes_are_few_and_full():
    """Real texts vary by a factor of ten; their batches do not."""
    rng = np.random.default_rng(0)
    tokens = np.clip(rng.lognormal(5, 0.6, 800).astype(int), 20, 900)
    sizes = [size(int(n), int(n) // 2) for n in tokens]
    batches = [list(range(start, start + 8)) for start in range(0, 800, 8)]
    packing = plan_packing(batches, sizes, batch_size=8, micro_batch_size=8, shards=1, width=576)
    computed = sum(packing.shape(packing.fill(batch, sizes), sizes).computed for batch in batches)
    assert tokens.sum() / computed > ENOUGH - 0.1


@pytest.mark.parametrize("shards", [1, 2])
def test_images_are_no_more_than_records(shards):
    sizes = [size(100, 10, slots=1)] * 16
    packing = plan_packing(
        [list(range(16))], sizes, batch_size=16, micro_batch_size=8, shards=shards, width=64
    )
    assert all(shape.shown == 8 // shards for shape in packing.shapes)
