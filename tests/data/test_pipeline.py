"""The order of training batches: every row once an epoch, the same again, from where it stopped."""

import jax
import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.data.examples import Example
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry, mixed_order, num_batches, training_batches
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.data.train_batch import USEFUL_SHARE
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene

LENGTHS = Lengths(prompt=(16, 24), response=(4, 8))
ROWS, EPOCHS, BATCH, MICRO = 7, 2, 4, 2


def make_record(number: int) -> Record:
    """Row 2 has two images, row 3 a long prompt, row 5 a long response and one more of them."""
    prompt = "is there a red star in the picture and a ring ?" if number == 3 else "a ring ?"
    answers = ["a red star and a ring", "no", "yes"] if number == 5 else ["yes", "no"]
    return Record(
        id=f"row-{number}",
        images=tuple(
            ImageRef(f"{number}-{i}", png_bytes(sample_scene("train", i, number)))
            for i in range(2 if number == 2 else 1)
        ),
        prompt=(Turn("user", prompt),),
        responses=tuple(Response.of(answer) for answer in answers),
    )


@pytest.fixture(scope="module")
def examples(tiny_processor):
    records, skipped = tokenize_records(
        [make_record(number) for number in range(ROWS)], tiny_processor, LENGTHS
    )
    assert not skipped
    return [
        Example(
            (record,),
            {"score": np.arange(len(record.responses), dtype=np.float32) - number},
            {"sums": np.arange(len(record.responses), dtype=np.float32)[None] + number},
        )
        for number, record in enumerate(records)
    ]


@pytest.fixture
def make_batches(examples, tiny_processor):
    def make(**changes):
        options = {
            "seed": 0,
            "epochs": EPOCHS,
            "batch_size": BATCH,
            "micro_batch_size": MICRO,
        } | changes
        return training_batches(examples, tiny_processor, LENGTHS, **options)

    return make


def test_every_row_once_an_epoch_in_another_order(make_batches):
    ids = [name for batch in make_batches() for name in batch.ids]
    first, second = ids[:ROWS], ids[ROWS:]
    assert sorted(first) == sorted(second) == [f"row-{number}" for number in range(ROWS)]
    assert first != second
    assert first != sorted(first)


def test_the_order_depends_on_the_seed_alone(make_batches):
    def order(**changes):
        return [batch.ids for batch in make_batches(**changes)]

    assert order() == order()
    assert order(seed=1) != order()
    flat = [name for ids in order() for name in ids]
    assert [name for ids in order(batch_size=2) for name in ids] == flat
    assert [name for ids in order(micro_batch_size=1) for name in ids] == flat


def test_batches_hold_their_rows(make_batches, examples, tiny_processor):
    by_id = {example.id: example for example in examples}
    for host in make_batches():
        batch = host.arrays.prompts
        assert batch.prompt_ids.shape[:2] == (BATCH // MICRO, MICRO)
        assert batch.response_ids.shape[:3] == (BATCH // MICRO, MICRO, 3)  # the most of any row
        rows = jax.tree.map(lambda leaf: leaf.reshape(BATCH, *leaf.shape[2:]), batch)
        prompt_ids, prompt_mask, pixels = rows.prompt_ids, rows.prompt_mask, rows.pixel_values
        response_ids, response_mask = rows.response_ids, rows.response_mask
        loss_mask, weights = rows.loss_mask, rows.weights
        scores = host.arrays.fields["score"].reshape(BATCH, 3)
        reference = host.arrays.reference["sums"].reshape(BATCH, 3)
        for number, name in enumerate(host.ids):
            example = by_id[name]
            (record,) = example.contexts
            np.testing.assert_array_equal(
                prompt_ids[number][prompt_mask[number]], record.prompt_ids
            )
            for column, response in enumerate(record.responses):
                np.testing.assert_array_equal(
                    response_ids[number, column][response_mask[number, column]], response.ids
                )
            count = len(record.responses)
            assert not response_mask[number, count:].any()
            assert not loss_mask[number, count:].any()
            np.testing.assert_array_equal(scores[number, :count], example.fields["score"])
            np.testing.assert_array_equal(reference[number, :count], example.reference["sums"][0])
            assert not scores[number, count:].any() and not reference[number, count:].any()
            for place, image in enumerate(record.images):
                ((expected,),) = tiny_processor.pixels([image])
                np.testing.assert_array_equal(pixels[number, place], expected)
            assert not pixels[number, len(record.images) :].any()
        assert weights.tolist() == [1] * len(host.ids) + [0] * (BATCH - len(host.ids))


def test_buckets_are_the_smallest_that_hold_the_whole_batch(make_batches):
    seen = set()
    for host in make_batches():
        shape = host.arrays.prompts.prompt_ids.shape[-1], host.arrays.prompts.response_ids.shape[-1]
        assert shape == (24 if "row-3" in host.ids else 16, 8 if "row-5" in host.ids else 4)
        seen.add(shape)
    assert len(seen) > 1


def test_only_the_very_last_batch_is_filled_up(make_batches):
    batches = list(make_batches())
    assert len(batches) == num_batches(ROWS, EPOCHS, BATCH) == 4
    assert [len(batch.ids) for batch in batches] == [4, 4, 4, 2]
    last = batches[-1].arrays.prompts
    assert last.weights.tolist() == [[1, 1], [0, 0]]
    assert not last.loss_mask[1].any()
    assert not batches[-1].arrays.reference["sums"][1].any()
    assert num_batches(8, 3, 4) == 6


@pytest.mark.parametrize("done", [0, 1, 3, 4])
def test_resumes_where_it_stopped(make_batches, done):
    batches = make_batches()
    for _ in range(done):
        next(batches)
    state = batches.get_state()
    rest = [batch.ids for batch in batches]
    assert len(rest) == 4 - done
    again = make_batches()
    again.set_state(state)
    resumed = list(again)
    assert [batch.ids for batch in resumed] == rest
    whole = list(make_batches())
    for batch, expected in zip(resumed, whole[done:], strict=True):
        np.testing.assert_array_equal(
            batch.arrays.prompts.prompt_ids, expected.arrays.prompts.prompt_ids
        )


@pytest.mark.parametrize("packed_over", [None, 1])
def test_amounts_are_those_of_the_arrays(make_batches, packed_over):
    """Padding, and rows that only fill a batch, count as computed and nothing else."""
    slots = []
    for host in make_batches(packed_over=packed_over):
        prompts, amounts = host.arrays.prompts, host.amounts
        if packed_over:
            tokens, computed = (prompts.record >= 0).sum(), prompts.token_ids.size
        else:
            in_rows = prompts.prompt_mask * prompts.weights[..., None]
            tokens = in_rows.sum() + prompts.response_mask.sum()
            computed = prompts.prompt_ids.size + prompts.response_ids.size
        assert (amounts.tokens, amounts.computed) == (tokens, computed)
        assert amounts.targets == prompts.loss_mask.sum()
        assert amounts.rows == prompts.weights.sum() == len(host.ids)
        assert amounts.responses == prompts.loss_mask.any(-1).sum()
        assert host.metrics[USEFUL_SHARE] == tokens / computed
        slots += amounts.slots
    assert sorted(slots) == [1] * (ROWS - 1) * EPOCHS + [2] * EPOCHS


def test_rows_that_do_not_fit_are_counted_with_a_reason(tiny_processor):
    short = Lengths(prompt=(12,), response=(8,))
    kept, skipped = tokenize_records([make_record(n) for n in range(5)], tiny_processor, short)
    assert [record.id for record in kept] == ["row-0", "row-1", "row-4"]
    assert [(row.id, row.reason) for row in skipped] == [
        ("row-2", "prompt_too_long"),
        ("row-3", "prompt_too_long"),
    ]
    assert all(tiny.IMAGE_ID in record.prompt_ids for record in kept)


def test_a_mixture_is_even_and_every_row_gets_its_turn():
    parts = [MixtureEntry(20), MixtureEntry(8, 0.5), MixtureEntry(3, 2.0)]
    assert [part.per_epoch for part in parts] == [20, 4, 6]
    order = list(mixed_order(parts, seed=0, epochs=2))
    assert len(order) == 60
    epochs = order[:30], order[30:]
    for epoch in epochs:
        assert sorted(i for i in epoch if i < 20) == list(range(20))
        assert sum(20 <= i < 28 for i in epoch) == 4
        assert sorted(i for i in epoch if i >= 28) == [28, 28, 29, 29, 30, 30]
        for start in range(0, 30, 10):  # no stretch is of one part
            assert sum(i < 20 for i in epoch[start : start + 10]) in (6, 7)
    halves = [{i for i in epoch if 20 <= i < 28} for epoch in epochs]
    assert halves[0] | halves[1] == set(range(20, 28))
    assert order == list(mixed_order(parts, seed=0, epochs=2))
    assert order != list(mixed_order(parts, seed=1, epochs=2))
