"""Requests that come one by one: the same samples as where all prompts are known before."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.meshes import one_device

from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_checkpoint
from mmpo_jax.core.trees import map_with_path
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.records import Record, Turn
from mmpo_jax.data.tokenization import tokenize, tokenize_records
from mmpo_jax.generation import engine as engines
from mmpo_jax.generation.engine import ROW, Asked, Engine
from mmpo_jax.generation.responses import generate_responses
from mmpo_jax.generation.sampler import truncate, truncate_each
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.recipes.sampling import Decoding

LENGTH = 24


@pytest.fixture(scope="module")
def checkpoint():
    return load_checkpoint("builtin:picture_world", one_device())


@pytest.fixture(scope="module")
def records(checkpoint):
    records = prompt_records("test", 5, 11, 48)
    return tokenize_records(records, checkpoint.processor, None)[0]


@pytest.fixture(scope="module")
def greedy(checkpoint, records):
    decoding = Decoding(temperature=0, max_new_tokens=LENGTH)
    lengths = fitting_lengths(records)
    made = generate_responses(
        checkpoint, records, decoding, lengths, one_device(), batch_size=16, seed=0
    )
    return [response.token_ids.tolist() for response in made]


def serve(engine, asked, at_once=3, dropped=()):
    """Asked -> number -> ids of its samples, where a few come between any two steps."""
    left, found, steps = list(asked), {}, 0
    while left or engine.works:
        for one in left[:at_once]:
            engine.add(one)
        del left[:at_once]
        for part in engine.advance():
            own = found.setdefault(part.asked, {}).setdefault(part.number, [])
            own += part.ids.tolist()
            assert part.error is None
        steps += 1
        for when, one, number in dropped:
            if when == steps:
                engine.drop(one, number)
    assert not any(holder for row in engine.holders for holder in row)
    return found


@pytest.mark.parametrize(("places", "pool"), [(1, engines.POOL), (8, 4)])
def test_greedy_responses_are_those_of_generate(
    checkpoint, records, greedy, places, pool, monkeypatch
):
    """Also where pools begin so small that they are full again and again, and grow."""
    monkeypatch.setattr(engines, "POOL", pool)
    monkeypatch.setattr(engines, "POOL_GROWS", 2)
    engine = Engine(checkpoint, one_device(), places=places, max_prompt=64)
    asked = [Asked(record, LENGTH, num_samples=1 + 2 * (n % 3)) for n, record in enumerate(records)]
    found = serve(engine, asked)
    for one, ids in zip(asked, greedy, strict=True):
        assert found[one] == dict.fromkeys(range(one.num_samples), ids)


@pytest.mark.parametrize("name", ["qwen3_5_text", "gemma4_e2b"])
def test_places_go_on_from_their_prompts(family_case, name):
    """From states of delta nets, and keys that later layers read too, also where a place served
    another prompt before."""
    pytest.importorskip("torch")
    from helpers import checks

    case = family_case(name)
    start = Checkpoint(case.model, case.processor, case.params)
    words = np.random.default_rng(0).choice(checks.WORDS, (5, 8))
    texts = [" ".join(row[: 4 + n]) for n, row in enumerate(words)]
    rows = [tokenize(checks.record(str(n), t), case.processor, 99, 99) for n, t in enumerate(texts)]
    decoding = Decoding(temperature=0, max_new_tokens=LENGTH)
    lengths = fitting_lengths(rows)
    made = generate_responses(start, rows, decoding, lengths, one_device(), batch_size=5, seed=0)
    engine = Engine(start, one_device(), places=ROW, max_prompt=64)
    asked = [Asked(row, LENGTH, num_samples=3) for row in rows]
    found = serve(engine, asked, at_once=1)
    for one, response in zip(asked, made, strict=True):
        ids = response.token_ids.tolist()
        assert found[one] == dict.fromkeys(range(one.num_samples), ids)
    assert len({response.token_ids.tobytes() for response in made}) == len(rows)


def test_every_request_has_its_own_sampling(checkpoint, records, greedy):
    """Whatever is decoded beside it, and however many places there are."""
    options = [
        {"temperature": 0.9, "seed": 7, "num_samples": 5},
        {"temperature": 0.9, "seed": 7},
        {"temperature": 0.9, "seed": 7 + 2**40},
        {"temperature": 1.2, "seed": 8, "top_p": 0.5, "num_samples": 2},
        {"temperature": 2.0, "seed": 9, "top_k": 1},
        {"max_new_tokens": 3},
    ]
    asked = [Asked(records[0], **({"max_new_tokens": LENGTH} | more)) for more in options]
    alone = [serve(Engine(checkpoint, one_device(), places=1, max_prompt=64), [a]) for a in asked]
    engine = Engine(checkpoint, one_device(), places=12, max_prompt=64)
    found = serve(engine, [*asked, *[Asked(record, LENGTH) for record in records]], at_once=5)
    for one, own in zip(asked, alone, strict=True):
        assert found[one] == own[one]
    several, single, other, _, first, short = (found[one] for one in asked)
    assert len(set(map(tuple, several.values()))) > 1
    assert several[0] == single[0] != other[0]
    assert first[0] == greedy[0]  # one token is kept
    assert short[0] == greedy[0][:3]


def test_places_of_who_hangs_up_go_to_others(checkpoint, records, greedy):
    engine = Engine(checkpoint, one_device(), places=ROW, max_prompt=64)
    gone = Asked(records[0], LENGTH, num_samples=7)
    waits = Asked(records[1], LENGTH, num_samples=3)
    one_less = Asked(records[2], LENGTH, num_samples=6)
    asked = [gone, one_less, waits, *[Asked(record, LENGTH) for record in records[3:]]]
    dropped = [(1, gone, None), (2, waits, None), (3, one_less, 5)]
    found = serve(engine, asked, at_once=len(asked), dropped=dropped)
    assert all(len(ids) <= 8 for ids in found[gone].values())
    assert waits not in found or len(found[waits]) <= 3
    assert found[one_less].items() >= dict.fromkeys(range(5), greedy[2]).items()
    for one, ids in zip(asked[3:], greedy[3:], strict=True):
        assert found[one] == {0: ids}


def test_a_long_prompt_leaves_no_room_behind(checkpoint, records, greedy):
    """Short ones are as wide as before once it has gone, and say the same."""
    words = Record("long", (), (Turn("user", "star " * 90),), ())
    long = tokenize_records([words], checkpoint.processor, None)[0][0]
    engine = Engine(checkpoint, one_device(), places=ROW, max_prompt=128)
    widths = []
    for record in (records[0], long, records[0]):
        said = serve(engine, [asked := Asked(record, LENGTH)])[asked][0]
        widths.append(engine.prompts[0].width)
    assert said == greedy[0]
    assert widths[0] == widths[2] < widths[1]


def test_what_is_told_beside_tokens(checkpoint, records):
    """Log-probs are the model's own, whatever the temperature, and the first of the most likely
    tokens is what greedy decoding takes."""
    engine = Engine(checkpoint, one_device(), places=ROW, max_prompt=64)
    hot = Asked(records[0], LENGTH, temperature=3.0, seed=1, tells_top=True)
    cold = Asked(records[1], LENGTH, tells_top=True)
    for one in (hot, cold):
        engine.add(one)
    parts = []
    while engine.works:
        parts += engine.advance()
    for part in parts:
        assert (np.diff(part.top_log_probs, axis=1) <= 0).all()
        assert np.exp(part.top_log_probs).sum(axis=1).max() <= 1 + 1e-5
        for token, log_prob, ids, values in zip(
            part.ids, part.log_probs, part.top_ids, part.top_log_probs, strict=True
        ):
            if token in ids:
                np.testing.assert_allclose(log_prob, values[ids == token][0], rtol=1e-6)
        if part.asked is cold:
            assert (part.ids == part.top_ids[:, 0]).all()


def test_logits_that_are_not_finite_end_a_sample(checkpoint, records):
    def spoilt(path, leaf):
        return leaf * np.nan if path == "language_model/norm/scale" else leaf

    broken = dataclasses.replace(checkpoint, params=map_with_path(spoilt, checkpoint.params))
    engine = Engine(broken, one_device(), places=ROW, max_prompt=64)
    engine.add(asked := Asked(records[0], LENGTH, num_samples=2))
    parts = engine.advance()
    assert [(part.asked, part.number, len(part.ids)) for part in parts] == [
        (asked, 0, 0),
        (asked, 1, 0),
    ]
    assert all(isinstance(part.error, FloatingPointError) for part in parts)
    assert not engine.works


@pytest.mark.slow
def test_a_mesh_serves_the_same(checkpoint, records, greedy):
    mesh = make_mesh(2, 2, 2)
    engine = Engine(load_checkpoint("builtin:picture_world", mesh), mesh, places=8, max_prompt=64)
    asked = [Asked(record, LENGTH, num_samples=1 + n % 2) for n, record in enumerate(records)]
    found = serve(engine, asked, at_once=8)
    for one, ids in zip(asked, greedy, strict=True):
        assert found[one] == dict.fromkeys(range(one.num_samples), ids)


def test_truncation_of_every_row_is_that_of_all():
    logits = jax.random.normal(jax.random.key(0), (3, 40))
    logits = logits.at[:, 5].set(logits[:, 9])  # a tie
    cases = [(0, 1.0), (1, 1.0), (7, 1.0), (0, 0.3), (5, 0.7), (60, 0.01)]
    for top_k, top_p in cases:
        each = truncate_each(logits, np.full(3, top_k, np.int32), np.full(3, top_p, np.float32))
        np.testing.assert_array_equal(each, truncate(logits, top_k, top_p))
