"""Layouts of any media in any prompt, against a reader that goes token by token."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.models.layout import Layout, media_in, pad_size, place

PLACEHOLDERS = (90, 91)
WIDTH = 3
EXTRAS = 2


@st.composite
def media(draw, grids=False):
    """A layout and its tokens: features that are put in any order, mixed, framed and repeated.

    Args:
      grids: whether every feature has a time, row and column, in one run of tokens.
    """
    features = draw(st.integers(1, 5))
    count = draw(st.integers(1, 6))
    columns = draw(st.integers(1, WIDTH))
    vector = st.integers(-EXTRAS, features - 1)
    index = draw(st.lists(vector, min_size=count * columns, max_size=count * columns))
    index = np.array(index, np.int32).reshape(count, columns)
    weight = 1 + np.arange(index.size, dtype=np.float32).reshape(index.shape)
    placeholder = draw(st.sampled_from(PLACEHOLDERS))
    tokens = [placeholder] * count
    frame = st.lists(st.integers(1, 80), max_size=2)
    if grids:
        steps = draw(st.lists(st.integers(0, 4), min_size=3 * count, max_size=3 * count))
        steps = np.array(steps, np.int32).reshape(3, count)
        layout = Layout(
            np.array(tokens), index, weight, 1, features, steps, span=int(steps.max()) + 1
        )
        return layout, [*draw(frame), *tokens, *draw(frame)]
    framed = [one for token in tokens for one in (*draw(frame), token)] + draw(frame)
    return Layout(np.array(framed), index, weight, 1, features), framed


def prompts(grids=False):
    """Text and media by turns, text at the end."""
    text, rest = (st.lists(st.integers(1, 80), min_size=least, max_size=3) for least in (0, 1))
    return st.tuples(st.lists(st.tuples(text, media(grids)), max_size=4), rest)


def written(prompt):
    """(ids, layouts) of a drawn prompt."""
    parts, rest = prompt
    ids = [token for text, (_, tokens) in parts for token in (*text, *tokens)]
    return np.array(ids + rest, np.int32), [layout for _, (layout, _) in parts]


def pool(layouts):
    """What the device gathers from, by name: the learned vectors, then the features in order."""
    names = [f"learned {number}" for number in range(EXTRAS)]
    for number, layout in enumerate(layouts):
        names += [f"{number}.{feature}" for feature in range(layout.features)]
    return names


def read_by_token(ids, layouts):
    """The (vector, weight) pairs of every token by name, and its position on three axes."""
    queue = [
        (number, place, len(layout.index))
        for number, layout in enumerate(layouts)
        for place in range(len(layout.index))
    ]
    mixes, positions, now = [], [], 0
    for token in ids:
        if token not in PLACEHOLDERS:
            mixes.append([])
            positions.append([now] * 3)
            now += 1
            continue
        number, place, count = queue.pop(0)
        layout = layouts[number]
        pairs = zip(layout.index[place], layout.weight[place], strict=True)
        mixes.append([(f"{number}.{i}" if i >= 0 else f"learned {-1 - i}", w) for i, w in pairs])
        if layout.steps is not None:
            positions.append([now + step for step in layout.steps[:, place]])
            now += layout.span if place == count - 1 else 0
    return mixes, positions, now


def mixes_of(placement, names):
    """What the device gathers for every token, by the names of the pool."""
    return [
        [(names[i], w) for i, w in zip(index, weight, strict=True) if w]
        for index, weight in zip(placement.index, placement.weight, strict=True)
    ]


@given(prompts())
def test_every_placeholder_takes_its_own_features(prompt):
    ids, layouts = written(prompt)
    placement = place(ids, layouts, PLACEHOLDERS, extras=EXTRAS, width=WIDTH)
    mixes, *_ = read_by_token(ids, layouts)
    assert mixes_of(placement, pool(layouts)) == mixes
    assert (placement.index[~np.isin(ids, PLACEHOLDERS)] == -1).all()
    assert placement.positions.tolist() == [list(range(len(ids)))]
    assert placement.next_position == len(ids)


@given(prompts(grids=True))
def test_grids_stand_at_time_row_and_column_behind_the_text(prompt):
    ids, layouts = written(prompt)
    placement = place(ids, layouts, PLACEHOLDERS, extras=EXTRAS, width=WIDTH, axes=3)
    mixes, positions, following = read_by_token(ids, layouts)
    assert mixes_of(placement, pool(layouts)) == mixes
    assert placement.positions.T.tolist() == positions
    assert placement.next_position == following


@given(prompts(grids=True), st.integers(0, 4), st.sampled_from([1, 3]))
def test_media_behind_the_end_change_nothing_before_it(prompt, number, axes):
    parts, rest = prompt
    begun, layouts = written((parts[:number], rest))
    behind, others = written((parts[number:], rest))
    whole, all_layouts = np.concatenate([begun, behind]), [*layouts, *others]
    options = {"extras": EXTRAS, "width": WIDTH, "axes": axes}
    first = place(begun, all_layouts, PLACEHOLDERS, **options)
    both = place(whole, all_layouts, PLACEHOLDERS, **options)
    for name in ("index", "weight"):
        np.testing.assert_array_equal(
            getattr(first, name), getattr(both, name)[: len(begun)], err_msg=name
        )
    np.testing.assert_array_equal(first.positions, both.positions[:, : len(begun)])
    alone = place(begun, layouts, PLACEHOLDERS, **options)
    for field in dataclasses.fields(alone):
        np.testing.assert_array_equal(getattr(alone, field.name), getattr(first, field.name))


@given(st.lists(media(), max_size=4), st.integers(0, 30))
def test_media_come_whole_or_not_at_all(drawn, places):
    layouts = [layout for layout, _ in drawn]
    ends = [sum(len(layout.index) for layout in layouts[:n]) for n in range(len(layouts) + 1)]
    wanted = [count for count, end in enumerate(ends) if end == places]
    if wanted:
        assert media_in(places, layouts) == wanted[0]
    else:
        with pytest.raises(ValueError, match=f"{places} places"):
            media_in(places, layouts)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_sizes_of_pixels_are_few_and_waste_a_quarter_at_most(first, second):
    size, other = pad_size(first), pad_size(second)
    assert first <= size <= 1.25 * first
    assert pad_size(size) == size
    assert size <= other if first <= second else other <= size
    assert "1" not in f"{size:b}"[3:]
