"""Places that are refilled: the same samples as where every sample has a place of its own."""

import copy
import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.loop_runs import make_start
from helpers.meshes import one_device
from helpers.sampling import sample
from hypothesis import given, settings
from hypothesis import strategies as st

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.trees import map_with_path
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.generation import refill
from mmpo_jax.generation.caches import DeltaStates, KeyValues, state_tokens
from mmpo_jax.generation.decoding import compact
from mmpo_jax.generation.places import Pool, prefill
from mmpo_jax.generation.refill import Layout, Work, choose_layout, pool_sizes
from mmpo_jax.generation.responses import SampleCount, read_length, sample_tokens
from mmpo_jax.generation.sampler import NOT_FINITE, sample_keys
from mmpo_jax.models.model import Model
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
    return sample(*tiny_model, batch, keys, mesh=mesh, layout=layout, work=work, **options)


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
    sizes = set()

    def compact_too(pool, size):
        sizes.add(size)
        return compact(pool, size=size)

    monkeypatch.setattr(refill, "compact", compact_too)
    layout = Layout(rows=3, width=2, groups=2, members=2, batch=3)
    np.testing.assert_array_equal(draw(tiny_model, batch, layout=layout), at_once)
    assert len(sizes) > 1  # grown


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), ends=st.sampled_from([5, 40]), greedy=st.booleans())
def test_random_lengths(tiny_model, batch, seed, ends, greedy):
    options = {
        "seed": seed,
        "eos_ids": tuple(range(tiny.FIRST_WORD, tiny.VOCAB_SIZE, ends)),
        "temperature": 0.0 if greedy else 1.0,
    }
    layout = Layout(rows=3, width=2, groups=1, members=3, batch=3)
    expected = draw(tiny_model, batch, **options)
    np.testing.assert_array_equal(draw(tiny_model, batch, layout=layout, **options), expected)


def unlike_layers(model):
    """A model of 2 x (2 layers with a window, 1 without) and one with a window."""
    full = model.config.decoder.layers[0]
    mixer = dataclasses.replace(full.mixer, window=4)
    local = dataclasses.replace(full, name="sliding_attention", mixer=mixer)
    layers = (local, local, full) * 2 + (local,)
    decoder = dataclasses.replace(model.config.decoder, layers=layers)
    model = Model.create(dataclasses.replace(model.config, decoder=decoder))
    return model, model.init(0)


@pytest.mark.parametrize("kind", ["bfloat16", "unlike-layers"])
def test_other_models(tiny_model, batch, kind):
    model, params = tiny_model
    if kind == "bfloat16":
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    else:
        model, params = unlike_layers(model)
    layout = Layout(rows=3, width=2, groups=2, members=2, batch=3)
    expected = draw((model, params), batch)
    np.testing.assert_array_equal(draw((model, params), batch, layout=layout), expected)


def without_word(tiny_model, word):
    """The model with NaN for the embedding of a word."""
    model, params = tiny_model

    def change(path, leaf):
        if not path.endswith("embed_tokens/embedding"):
            return leaf
        return np.where(np.arange(len(leaf))[:, None] == word, np.float32(np.nan), leaf)

    return model, map_with_path(change, params)


def test_a_sample_that_is_not_finite_spoils_no_other(tiny_model, batch, at_once):
    """Beside it in its pool and in its row are others."""
    said = np.bincount(at_once[:, :, 3].ravel(), minlength=tiny.VOCAB_SIZE)
    said[[tiny.PAD_ID, *EOS_IDS]] = 0
    word = said.argmax()
    layout = Layout(rows=3, width=2, groups=1, members=4, batch=3)
    tokens = draw(without_word(tiny_model, word), batch, layout=layout)
    asked = (np.asarray(batch.prompt_ids) == word).any(axis=1)
    assert not asked.all()
    assert np.all(tokens[asked, :, 0] == NOT_FINITE)
    ended = 0
    for row, expected in zip(
        tokens[~asked].reshape(-1, LENGTH), at_once[~asked].reshape(-1, LENGTH), strict=True
    ):
        places = np.flatnonzero(expected[:-1] == word)
        length = places[0] + 1 if len(places) else LENGTH
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert np.all(row[length : length + 1] == NOT_FINITE)
        ended += length < LENGTH
    assert 0 < ended < tokens.size // LENGTH


@pytest.fixture(scope="module")
def records(tiny_processor):
    lengths = Lengths(prompt=(24,), response=(8,))
    kept, skipped = tokenize_records(prompt_records("align", 0, 13, 24), tiny_processor, lengths)
    assert not skipped
    return kept


def take_samples(model, processor, records, batch_size, count=None):
    return sample_tokens(
        make_start(model, processor),
        records,
        Decoding(num_samples=4, max_new_tokens=24),
        fitting_lengths(records),
        one_device(),
        batch_size=batch_size,
        seed=3,
        count=count,
    )


def test_samples_of_records(tiny_model, tiny_processor, records):
    """In their order, whatever the batch size; the share that is useful is counted."""
    processor = copy.copy(tiny_processor)
    processor.eos_ids = EOS_IDS
    counts = SampleCount(), SampleCount()
    expected = take_samples(tiny_model, processor, records, 16, counts[0])
    found = take_samples(tiny_model, processor, records, 2, counts[1])
    np.testing.assert_array_equal(found, expected)
    lengths = [read_length(processor, row)[0] for rows in expected for row in rows]
    for count in counts:
        assert count.samples.tokens == sum(lengths)
        assert count.prompts.tokens == sum(len(record.prompt_ids) for record in records)
    # Sixteen rows of four places, until the longest sample ends.
    assert counts[0].samples.computed == 16 * 4 * max(lengths)
    assert sum(lengths) <= counts[1].samples.computed < counts[0].samples.computed


@pytest.mark.parametrize("batch_size", [2, 16])
def test_a_prompt_whose_logits_are_not_finite_is_named(
    tiny_model, tiny_processor, records, batch_size
):
    said = {record.id: set(record.prompt_ids.tolist()) for record in records}
    word = max(set.union(*said.values()) - set.intersection(*said.values()))
    asked = [name for name, words in said.items() if word in words]
    processor = copy.copy(tiny_processor)
    processor.eos_ids = (tiny.EOS_ID, word)  # so that no other prompt's sample goes on after it
    with pytest.raises(DataError, match=r"the logits of rows .* are not finite") as error:
        take_samples(without_word(tiny_model, word), processor, records, batch_size)
    assert any(f"rows {name} are" in str(error.value) for name in asked)
    assert jax.sharding.get_abstract_mesh().empty  # whoever catches it goes on without


def test_layouts():
    decoding = Decoding(num_samples=10, max_new_tokens=512)
    # As many prompts as are sampled at once: a place for every sample, in groups that fit.
    assert choose_layout(16, 600, decoding, 16, 1) == Layout(16, 1, 2, 5, 16)
    assert choose_layout(3, 600, Decoding(num_samples=7), 5, 4) == Layout(8, 1, 7, 1, 8)
    # One sample of each: the next prompt takes the row.
    assert choose_layout(99, 600, Decoding(), 16, 1) == Layout(16, 1, 1, 1, 2)
    # Short samples of long prompts: no second prompt in a row.
    short = Decoding(num_samples=4, max_new_tokens=32)
    assert choose_layout(99, 600, short, 16, 1) == Layout(16, 1, 1, 4, 4)
    for prompts, length, n, limit, shards, state in itertools.product(
        (40, 1000), (30, 600, 7000), (2, 3, 10, 64), (32, 512), (1, 8), (0, 2304)
    ):
        decoding = Decoding(num_samples=n, max_new_tokens=limit)
        layout = choose_layout(prompts, length, decoding, 16, shards, state)
        assert layout.rows % shards == layout.batch % shards == 0
        assert shards <= layout.batch <= layout.rows
        of_row = layout.width * (length + state) + layout.places * (limit + state)
        assert layout.rows * of_row <= 16 * (length + state + n * (limit + state)) or (
            layout.rows == shards
        )
        assert layout.places <= n


def test_states_count_as_tokens(family_case, tiny_model):
    """As many as have their memory, by the arrays that prompts leave."""
    case = family_case("qwen3_5_text")
    from helpers import checks, families

    _, batch = checks.batch_of(case, families.records("qwen3_5_text"))
    keys = sample_keys(0, 0, np.arange(2), 1)
    made = jax.eval_shape(functools.partial(prefill, case.model), case.params, batch, keys)
    state, token = 0, 0
    for kept in made.cache.values():
        if isinstance(kept, DeltaStates):
            state += math.prod(kept.memory.shape) * kept.memory.dtype.itemsize
        else:
            parts = (kept.key, kept.value)
            token += sum(math.prod(part.shape) * part.dtype.itemsize for part in parts)
    expected = math.ceil(state / (token / made.width))
    assert state_tokens(case.model.config.decoder, np.dtype(np.float32)) == expected > 1
    assert state_tokens(tiny_model[0].config.decoder, np.dtype(np.float32)) == 0


def test_pools_grow_in_few_steps():
    assert pool_sizes(40) == [40]
    assert pool_sizes(512) == [128, 192, 256, 384, 512]


def test_compaction_keeps_what_places_read():
    rng = np.random.default_rng(0)
    owner = rng.integers(-1, 3, (2, 2, 30)).astype(np.int32)
    owner[:, :, 25:] = -1
    key = rng.standard_normal((1, 2, 2, 2, 4, 30)).astype(np.float32)
    position = rng.integers(0, 50, owner.shape).astype(np.int32)
    kept = {"layers": KeyValues(key, key.swapaxes(4, 5))}
    pool = Pool(kept, owner, position, np.int32(25))
    for size in (25, 48):
        made = jax.tree.map(np.asarray, compact(pool, size=size))
        assert made.owner.shape[2] == size
        assert made.used == (owner >= 0).sum(axis=2).max()
        for at in np.ndindex(2, 2):
            kept, there = owner[at] >= 0, made.owner[at] >= 0
            np.testing.assert_array_equal(made.owner[at][there], owner[at][kept])
            np.testing.assert_array_equal(made.position[at][there], position[at][kept])
            cache = made.cache["layers"]
            np.testing.assert_array_equal(cache.key[0][at][..., there], key[0][at][..., kept])
            values = cache.value[0][at].swapaxes(1, 2)
            np.testing.assert_array_equal(values[..., there], key[0][at][..., kept])
            assert not there[made.used :].any()
