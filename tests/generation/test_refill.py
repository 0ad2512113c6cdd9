"""Places that are refilled: the samples that come when all are decoded at once, whatever the places."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.sampling import one_device, sample
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.generation import refill
from mmpo_jax.generation.places import compact, empty_pool
from mmpo_jax.generation.refill import Layout, Work, choose_layout, pool_sizes
from mmpo_jax.generation.responses import SampleCount, read_length, sample_tokens
from mmpo_jax.generation.sampler import NOT_FINITE, sample_keys
from mmpo_jax.parallel.mesh import make_mesh, put_params
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.recipes.sampling import Decoding

LENGTH = 40
PROMPTS = (7, 10, 6, 9, 14, 8, 11, 7, 6, 12, 9)
EOS_IDS = (tiny.EOS_ID, *range(tiny.FIRST_WORD, tiny.VOCAB_SIZE, 12))
"""Every twelfth word ends a sample, so that lengths are as different as real ones."""
SAMPLES = 5


@pytest.fixture(scope="module")
def batch(tiny_model):
    return tiny.random_batch(tiny_model[0].config, PROMPTS, [(1,)] * len(PROMPTS))


def draw(tiny_model, batch, *, seed=0, eos_ids=EOS_IDS, mesh=None, layout=None, work=None, **more):
    decoding = Decoding(**({"num_samples": SAMPLES, "max_new_tokens": LENGTH} | more))
    keys = sample_keys(seed, 0, np.arange(len(PROMPTS)), decoding.num_samples)
    options = {"decoding": decoding, "eos_ids": eos_ids, "pad_id": tiny.PAD_ID}
    return sample(
        *tiny_model, batch, keys, mesh=mesh, layout=layout, work=work, **options
    )


@pytest.fixture(scope="module")
def at_once(tiny_model, batch):
    """All samples in a place of their own."""
    tokens = draw(tiny_model, batch)
    lengths = (tokens != tiny.PAD_ID).sum(axis=2)
    assert lengths.min() < 4 and lengths.max() == LENGTH
    return tokens


@pytest.mark.parametrize(
    "layout",
    [
        Layout(rows=3, width=1, groups=1, members=1, batch=1),
        Layout(rows=3, width=1, groups=1, members=3, batch=2),
        Layout(rows=2, width=2, groups=2, members=2, batch=2),
        Layout(rows=2, width=2, groups=1, members=7, batch=1),
        Layout(rows=4, width=3, groups=5, members=1, batch=4),
        Layout(rows=11, width=1, groups=2, members=3, batch=11),
    ],
    ids=str,
)
def test_samples_do_not_depend_on_places(tiny_model, batch, at_once, layout):
    work = Work()
    np.testing.assert_array_equal(draw(tiny_model, batch, layout=layout, work=work), at_once)
    assert work.computed % (layout.rows * layout.places) == 0
    assert work.computed >= (at_once != tiny.PAD_ID).sum()


@pytest.mark.parametrize("sizes", [(8, 1, 1), (1, 4, 2), (2, 2, 2)])
@pytest.mark.parametrize("width", [1, 2])
def test_eight_devices(tiny_model, batch, at_once, sizes, width):
    model, params = tiny_model
    mesh = make_mesh(*sizes)
    shards = sizes[0] * sizes[1]
    layout = Layout(rows=shards, width=width, groups=1, members=2, batch=shards)
    placed = model, put_params(params, model.rules, mesh)
    tokens = draw(placed, batch, mesh=mesh, layout=layout)
    np.testing.assert_array_equal(tokens, at_once)


@pytest.mark.parametrize("first", [4, 16])
def test_samples_do_not_depend_on_the_pool(tiny_model, batch, at_once, monkeypatch, first):
    monkeypatch.setattr(refill, "FIRST_POOL", first)
    sizes = []
    monkeypatch.setattr(refill, "compact", lambda pool, size: sizes.append(size) or compact(pool, size=size))
    layout = Layout(rows=3, width=2, groups=2, members=2, batch=3)
    np.testing.assert_array_equal(draw(tiny_model, batch, layout=layout), at_once)
    assert len(set(sizes)) > 1  # grown


@settings(max_examples=12)
@given(seed=st.integers(0, 1000), share=st.integers(2, 30), greedy=st.booleans())
def test_random_lengths(tiny_model, batch, seed, share, greedy):
    eos_ids = tuple(range(tiny.FIRST_WORD, tiny.VOCAB_SIZE, share))
    # One program for all, as ends are compiled in: what is cut there is cut here.
    options = {"seed": seed, "eos_ids": eos_ids[:1], "temperature": 0.0 if greedy else 1.0}
    layout = Layout(rows=3, width=2, groups=1, members=3, batch=3)
    expected = draw(tiny_model, batch, **options)
    np.testing.assert_array_equal(draw(tiny_model, batch, layout=layout, **options), expected)
