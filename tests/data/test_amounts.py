"""How much a batch holds, counted in batches that are made."""

import pytest

from mmpo_jax.data.amounts import Amounts, preference_pairs, seen_pairs


def test_pairs_that_are_seen_by_a_mask():
    """Prompt and responses behind one another, a query a row."""
    prompt, responses = 3, (2, 1)
    owner = [-1] * prompt + [0] * responses[0] + [1] * responses[1]
    seen = sum(
        owner[key] in (-1, owner[query]) for query in range(len(owner)) for key in range(query + 1)
    )
    assert seen_pairs(prompt, responses) == seen
    assert seen_pairs(4, ()) == 10


@pytest.mark.parametrize(
    ("ranks", "pairs"), [((), 0), ((1.0,), 0), ((1.0, 2.0), 1), ((1.0, 2.0, 2.0, 3.0), 5)]
)
def test_preference_pairs(ranks, pairs):
    assert preference_pairs(ranks) == pairs


def test_batches_add_up():
    one = Amounts(1, 2, 1, 10, 16, 4, 30, (1,))
    assert one + one == Amounts(2, 4, 2, 20, 32, 8, 60, (1, 1))
    assert one + Amounts() == one
