"""The inference loop: the caller's records, the next batch made while one is computed, errors."""

import threading

import jax
import numpy as np
import pytest

from mmpo_jax.core.errors import DataError
from mmpo_jax.inference.loop import TokenCount, run_batches
from mmpo_jax.inference.plan import PlannedBatch
from mmpo_jax.parallel.mesh import make_mesh


@pytest.fixture
def mesh():
    return make_mesh()


def planned(numbers, make=None, rows=8):
    arrays = np.zeros((rows, 1), np.float32)
    arrays[: len(numbers), 0] = numbers
    places = tuple((number, place) for place, number in enumerate(numbers))
    return PlannedBatch(make or (lambda share: arrays), places, len(numbers), rows)


def test_results_go_with_their_records(mesh):
    batches = [planned([4, 0]), planned([3]), planned([2, 1])]
    count = TokenCount()
    found = [
        (number, float(value[0]))
        for rows in run_batches(batches, jax.jit(lambda x: x * 10), mesh, count)
        for number, value in rows
    ]
    assert found == [(4, 40), (0, 0), (3, 30), (2, 20), (1, 10)]
    assert (count.tokens, count.computed, count.useful_share) == (5, 24, 5 / 24)


def test_trees_of_results(mesh):
    rows = next(run_batches([planned([7])], lambda x: {"twice": 2 * x, "same": x}, mesh))
    assert rows[0][1]["twice"] == 14 and rows[0][1]["same"] == 7


def test_the_next_batch_is_made_while_one_is_computed(mesh):
    """Computing the first waits until the second is made: one after the other would never end."""
    made = threading.Event()
    second = planned([1])

    def make(share):
        made.set()
        return second.make(share)

    def compute(batch):
        assert made.wait(60)
        return batch

    assert len(list(run_batches([planned([0]), planned([1], make)], compute, mesh))) == 2


def test_an_image_that_cannot_be_read(mesh):
    """What was computed before it is given first."""

    def broken(share):
        raise DataError("image lost.png cannot be read")

    batches = [planned([0]), planned([1]), planned([2], broken)]
    seen = []
    with pytest.raises(DataError, match=r"lost\.png"):
        for rows in run_batches(batches, lambda batch: batch, mesh):
            seen += rows
    assert [number for number, _ in seen] == [0]


def test_nothing_to_run(mesh):
    assert list(run_batches([], lambda batch: batch, mesh)) == []
    assert TokenCount().useful_share == 1


def test_the_share_is_logged(caplog):
    count = TokenCount()
    count.log_summary("score")
    assert not caplog.records
    count.add(planned([1, 2, 3]))
    with caplog.at_level("INFO"):
        count.log_summary("score")
    assert "score: 3 tokens, 38 % of those computed" in caplog.text
