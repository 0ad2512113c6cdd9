"""Plans: every record in one batch, few shapes, little padding."""

import collections
import dataclasses

import jax
import numpy as np
import pytest
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import Response
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse
from mmpo_jax.inference.plan import (
    FEWEST,
    in_classes,
    plan_many_responses,
    plan_packed,
    plan_padded,
)
from mmpo_jax.models.packed_attention import packed_attention, packed_blocks


def text(number, prompt, *responses):
    made = tuple(
        TokenizedResponse(
            np.full(n, tiny.FIRST_WORD, np.int32), np.ones(n, bool), 0, Response.of("")
        )
        for n in responses
    )
    return TokenizedRecord(str(number), np.full(prompt, tiny.FIRST_WORD, np.int32), made, (), ())


def texts(count, seed=0):
    rng = np.random.default_rng(seed)
    lengths = np.clip(rng.lognormal(4, 0.8, (count, 3)).astype(int), 2, 300)
    return [text(number, *row) for number, row in enumerate(lengths)]


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 20)), min_size=1, max_size=60),
    st.integers(10, 60),
    st.integers(1, 3),
)
def test_classes(items, capacity, fewest):
    """Whole batches, but for the last class; nothing goes down, nothing is lost."""
    classes, sizes = zip(*items, strict=True)
    filled = in_classes(classes, sizes, capacity, fewest)
    assert sorted(n for numbers in filled.values() for n in numbers) == list(range(len(items)))
    for name, numbers in filled.items():
        assert all(classes[n] <= name for n in numbers)
        load = sum(sizes[n] for n in numbers)
        if name != max(classes):
            # Full to what one item takes.
            assert load + max(sizes) >= fewest * capacity


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("part_size", [7, 40, 500])
def test_packed(tiny_processor, shards, part_size):
    records = texts(120)
    parts = plan_packed(records, tiny_processor, shards, 16, part_size)
    assert len(parts) == -(-120 // part_size)
    shapes = collections.Counter()
    for number, part in enumerate(parts):
        first = number * part_size
        seen = [n for batch in part for n, _ in batch.places]
        assert sorted(seen) == list(range(first, min(first + part_size, 120)))
        for planned in part:
            batch = planned.make()
            assert planned.computed == batch.token_ids.size
            assert planned.tokens == (batch.record >= 0).sum()
            for n, place in planned.places:
                assert batch.loss_mask[place].sum() == sum(len(r.ids) for r in records[n].responses)
                assert batch.weights[place] == 1
            assert batch.weights.sum() == len(planned.places)
            shapes[batch.token_ids.shape, batch.predictor.shape] += 1
    assert len(shapes) <= 3


def test_little_is_padding(tiny_processor):
    (part,) = plan_packed(texts(400), tiny_processor, 1, 16, 400)
    assert sum(batch.tokens for batch in part) / sum(batch.computed for batch in part) > 0.8


def test_a_few_long_ones_do_not_lengthen_the_others(tiny_processor):
    records = [*(text(n, 20, 10, 10) for n in range(400)), text(400, 2000, 10)]
    (part,) = plan_packed(records, tiny_processor, 1, 16, 401)
    reaches = {batch.make().reach for batch in part}
    assert min(reaches) == 64 and max(reaches) > 2000
    assert len([batch for batch in part if batch.make().reach > 64]) <= FEWEST


def test_nothing_to_plan(tiny_processor):
    assert plan_packed([], tiny_processor, 1, 4, 10) == []
    assert plan_padded([], tiny_processor, Lengths(), rows=4) == []


@pytest.mark.parametrize("with_responses", [False, True])
def test_padded(tiny_processor, with_responses):
    """By buckets, what is left over going along with the next longer prompts."""
    lengths = Lengths(prompt=(8, 16, 32), response=(8,))
    prompts = [6] * 5 + [12] * 2 + [30] * 6
    records = [text(n, prompt, 4, 7) for n, prompt in enumerate(prompts)]
    plan = plan_padded(records, tiny_processor, lengths, rows=4, with_responses=with_responses)
    assert sorted(n for batch in plan for n, _ in batch.places) == list(range(13))
    made = [batch.make() for batch in plan]
    # Four of 8; the fifth and both of 16 go along with 32.
    assert [batch.prompt_ids.shape for batch in made] == [(4, 8), (4, 32), (4, 32), (4, 32)]
    assert {batch.response_ids.shape[1:] for batch in made} == {
        (2, 8) if with_responses else (0, 0)
    }
    for planned, batch in zip(plan, made, strict=True):
        for n, place in planned.places:
            assert batch.prompt_mask[place].sum() == prompts[n]
        assert planned.computed == batch.prompt_ids.size + batch.response_ids.size


def differing(seed=0):
    """Records with 1 to 128 responses of 2 to 8 tokens behind 30 of a prompt."""
    rng = np.random.default_rng(seed)
    counts = np.clip(rng.lognormal(2.5, 1.2, 300).astype(int), 1, 128)
    return [text(n, 30, *rng.integers(2, 9, count)) for n, count in enumerate(counts)]


@pytest.mark.parametrize("shards", [1, 4])
def test_padded_to_few_numbers_of_responses(tiny_processor, shards):
    """Batches of those with more responses than usual have fewer records, and no more tokens."""
    records, rows, usual = differing(), 16, 16
    lengths = Lengths(prompt=(32,), response=(8,))
    plan = plan_many_responses(
        records, tiny_processor, lengths, shards=shards, rows=rows, usual=usual
    )
    assert sorted(n for batch in plan for n, _ in batch.places) == list(range(len(records)))
    shapes = set()
    for planned in plan:
        batch = planned.make()
        shapes.add(batch.response_ids.shape)
        assert planned.computed == batch.prompt_ids.size + batch.response_ids.size
        assert len(batch.prompt_ids) % shards == 0
        for n, place in planned.places:
            lengths_there = batch.response_mask[place].sum(axis=1)
            own = [len(response.ids) for response in records[n].responses]
            assert lengths_there.tolist() == own + [0] * (len(lengths_there) - len(own))
    assert 2 <= len(shapes) <= 6
    most = rows * (32 + usual * 8)
    assert all(b * (32 + r * t) <= max(most, shards * (32 + r * t)) for b, r, t in shapes)
    assert min(b for b, _, _ in shapes) < rows


@pytest.mark.parametrize("shards", [1, 4])
def test_packed_batches_of_many_responses_have_no_more_tokens(tiny_processor, shards):
    records = [text(n, 30, *[5] * 100) for n in range(40)]
    (usual,) = plan_packed(
        [text(n, 30, *[5] * 16) for n in range(40)], tiny_processor, shards, 8, 40, 16
    )
    (many,) = plan_packed(records, tiny_processor, shards, 8, 40, 16)
    (whole,) = plan_packed(records, tiny_processor, shards, 8, 40)
    longest = 30 + 100 * 5
    assert max(b.tokens for b in many) <= max(b.tokens for b in usual) + shards * longest
    assert max(b.tokens for b in whole) >= 2 * max(b.tokens for b in many)


@pytest.mark.parametrize("window", [None, 7])
def test_rows_of_one_record_with_many_responses(tiny_processor, window):
    """Responses are held against the prompt and what is near; nothing else is seen anyway."""
    rng = np.random.default_rng(0)
    records = [text(n, rng.integers(20, 40), *rng.integers(1, 9, 150)) for n in range(4)]
    ((planned, *_),) = plan_packed(records, tiny_processor, 1, 4, 4, 16)
    batch = planned.make()
    assert batch.prompt == 64
    whole = dataclasses.replace(batch, prompt=0)
    query, key, value = rng.standard_normal((3, *batch.token_ids.shape, 2, 8), np.float32)
    split, plain = (
        jax.jit(packed_attention, static_argnums=4)(query, key, value, one, window)
        for one in (batch, whole)
    )
    real = batch.record >= 0
    np.testing.assert_allclose(split[real], plain[real], rtol=1e-5, atol=1e-6)
    lengths = batch.token_ids.shape[1], batch.reach

    def keys_held(prompt):
        blocks = packed_blocks(*lengths, prompt, batch.loss_mask.shape[-1])
        return sum(
            (queries.stop - queries.start) * sum(keys.stop - keys.start for keys in seen)
            for queries, seen in blocks
        )

    assert keys_held(batch.prompt) < keys_held(0) / 2


def test_rows_of_few_responses_are_as_they_were(tiny_processor):
    (part,) = plan_packed([text(n, 500, 60, 60) for n in range(4)], tiny_processor, 1, 1, 4)
    assert {batch.make().prompt for batch in part} == {0}
