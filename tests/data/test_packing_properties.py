"""Packed batches of any records, against a reader that knows only what attention sees."""

import numpy as np
from helpers import tiny
from helpers.any_records import N, tokenized_records
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.data.packing import PackedSizes, Size, pack_batch


@st.composite
def packed(draw):
    """Records, and their numbers in groups of rows: each once, in any order."""
    records = draw(st.lists(tokenized_records(12, 5), min_size=1, max_size=5))
    order = draw(st.permutations(range(len(records))))
    rows = draw(st.integers(1, 2))
    groups = [[[] for _ in range(rows)] for _ in range(draw(st.integers(1, 2)))]
    for number in order:
        draw(st.sampled_from([row for group in groups for row in group])).append(number)
    return records, groups


def read(batch, row):
    """{(record of the row, response or 0): [(column, token id, place)]}, in order of columns."""
    found = {}
    for column in np.flatnonzero(batch.record[row] >= 0):
        key = int(batch.record[row, column]), int(batch.response[row, column])
        token = int(column), int(batch.token_ids[row, column]), int(batch.place[row, column])
        found.setdefault(key, []).append(token)
    return found


@given(drawn=packed())
def test_every_token_once_where_attention_finds_it(tiny_processor, drawn):
    records, groups = drawn
    shape = PackedSizes.holding([groups], [Size.of(record) for record in records])
    batch = pack_batch(records, groups, tiny_processor, shape)
    targets = shape.responses * shape.response
    for group, rows in enumerate(groups):
        number, images = 0, 0
        left = {  # place in [C, R, T] -> (predictor, target)
            int(place): (int(at), int(token))
            for place, at, token in zip(
                batch.target_place[group], batch.predictor[group], batch.target[group], strict=True
            )
            if place < shape.records * targets
        }
        for row, numbers in enumerate(rows):
            of_row = group * shape.rows + row
            tokens = read(batch, of_row)
            for column, record in enumerate(records[i] for i in numbers):
                prompt = tokens.pop((column, 0))
                assert [token for _, token, _ in prompt] == record.prompt_ids.tolist()
                assert [place for *_, place in prompt] == list(range(len(prompt)))
                shown = [c for c, token, _ in prompt if token == tiny.IMAGE_ID]
                index = batch.feature_index[of_row, shown, 0]
                assert index.tolist() == list(range(N * len(record.images)))
                if record.images:
                    assert set(batch.feature_row[of_row, shown].tolist()) == {images}
                    images += 1
                for place, response in enumerate(record.responses):
                    own = tokens.pop((column, place + 1), [])
                    assert [token for _, token, _ in own] == response.ids.tolist()
                    for step, (_, token, seen) in enumerate(own):
                        assert seen == len(prompt) + step
                        at = number * targets + place * shape.response + step
                        assert (
                            batch.loss_mask[group * shape.records + number, place, step]
                            == (response.loss_mask[step])
                        )
                        if response.loss_mask[step]:
                            before = (own[step - 1] if step else prompt[-1])[0]
                            assert left.pop(at) == (row * shape.tokens + before, token)
                    end = row * shape.tokens + (own or prompt)[-1][0]
                    assert batch.last[group * shape.records + number, place] == end
                number += 1
            assert not tokens
        assert not left
        of_group = slice(group * shape.records, (group + 1) * shape.records)
        assert batch.weights[of_group].tolist() == [1] * number + [0] * (shape.records - number)
    counted = sum(int(r.loss_mask.sum()) for record in records for r in record.responses)
    assert batch.loss_mask.sum() == counted
