"""Sampling: reproducible whatever the batch, equal to the model's own distribution."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.sampling import sample

from mmpo_jax.core.trees import map_with_path
from mmpo_jax.generation.places import prefill
from mmpo_jax.generation.sampler import (
    NOT_FINITE,
    choose_token,
    most_likely,
    sample_keys,
    truncate,
)
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.head import next_token_logits
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.recipes.sampling import Decoding

LENGTH = 8
PROMPTS = (7, 10, 6, 9)
NUMBERS = np.uint32([5, 1_000_003, 17, 4_000_000_000])  # of the prompts' ids


@pytest.fixture(scope="module")
def batch(tiny_model):
    return tiny.random_batch(tiny_model[0].config, PROMPTS, [(1,)] * 4)


def take(batch: Batch, rows) -> Batch:
    return jax.tree.map(lambda leaf: leaf[np.array(rows)], batch)


def draw(tiny_model, batch, numbers, *, num_samples=1, eos_ids=(tiny.EOS_ID,), seed=0, **options):
    decoding = Decoding(**({"num_samples": num_samples, "max_new_tokens": LENGTH} | options))
    keys = sample_keys(seed, 0, numbers, num_samples)
    return sample(*tiny_model, batch, keys, decoding=decoding, eos_ids=eos_ids, pad_id=tiny.PAD_ID)


@pytest.fixture(scope="module")
def whole(tiny_model, batch):
    """Three samples of each of the four prompts."""
    return draw(tiny_model, batch, NUMBERS, num_samples=3)


def test_samples_do_not_depend_on_the_batch(tiny_model, batch, whole):
    assert len(np.unique(whole.reshape(12, -1), axis=0)) == 12
    order = [2, 0, 3, 1]
    shuffled = draw(tiny_model, take(batch, order), NUMBERS[order], num_samples=3)
    np.testing.assert_array_equal(shuffled, whole[order])
    alone = draw(tiny_model, take(batch, [1]), NUMBERS[[1]], num_samples=3)
    np.testing.assert_array_equal(alone, whole[[1]])
    fewer = draw(tiny_model, batch, NUMBERS, num_samples=2)
    np.testing.assert_array_equal(fewer, whole[:, :2])


def test_samples_do_not_depend_on_padding(tiny_model, batch, whole):
    pad = ((0, 0), (0, 5))
    padded = dataclasses.replace(
        batch,
        prompt_ids=np.pad(batch.prompt_ids, pad, constant_values=tiny.FIRST_WORD),
        prompt_mask=np.pad(batch.prompt_mask, pad),
        positions=np.pad(batch.positions, ((0, 0), *pad)),
        feature_index=np.pad(batch.feature_index, (*pad, (0, 0)), constant_values=-1),
        feature_weight=np.pad(batch.feature_weight, (*pad, (0, 0))),
    )
    np.testing.assert_array_equal(draw(tiny_model, padded, NUMBERS, num_samples=3), whole)


def test_keys_differ_by_seed_round_prompt_and_sample():
    data = [
        jax.random.key_data(sample_keys(seed, round_index, NUMBERS, 3)).reshape(-1, 2)
        for seed in (0, 1)
        for round_index in (0, 1)
    ]
    assert len(np.unique(np.concatenate(data), axis=0)) == 2 * 2 * 4 * 3
    np.testing.assert_array_equal(
        jax.random.key_data(sample_keys(0, 1, NUMBERS[2:], 2)),
        jax.random.key_data(sample_keys(0, 1, NUMBERS, 3))[2:, :2],
    )


def test_the_samples_of_a_prompt_that_comes_again_are_numbered_on():
    once = jax.random.key_data(sample_keys(0, 1, NUMBERS[:1], 9))
    again = jax.random.key_data(sample_keys(0, 1, np.repeat(NUMBERS[:1], 3), 3, np.arange(3)))
    np.testing.assert_array_equal(again.reshape(1, 9, -1), once)


@pytest.mark.slow
def test_greedy_is_the_argmax_of_teacher_forced_log_probs(tiny_model, batch):
    tokens = draw(tiny_model, batch, NUMBERS, temperature=0, eos_ids=())
    # Every continuation of the greedy prefix by one other token, as responses to the same prompt.
    model, params = tiny_model
    score = jax.jit(functools.partial(response_log_probs, model))
    for position in (0, 1, LENGTH - 1):
        responses = np.repeat(tokens, tiny.VOCAB_SIZE, axis=1)[:, :, : position + 1]
        responses[:, :, position] = np.arange(tiny.VOCAB_SIZE)
        mask = np.ones(responses.shape, bool)
        scored = dataclasses.replace(
            batch, response_ids=responses, response_mask=mask, loss_mask=mask
        )
        log_probs = np.asarray(score(params, scored))[:, :, position]
        np.testing.assert_allclose(np.exp(log_probs).sum(axis=1), 1, rtol=1e-5)
        np.testing.assert_array_equal(log_probs.argmax(axis=1), tokens[:, 0, position])


def test_eos_ends_a_sample_and_padding_follows(tiny_model, batch, whole):
    free = draw(tiny_model, batch, NUMBERS, num_samples=3, eos_ids=())
    assert np.all(free >= 0)
    assert free.shape == (4, 3, LENGTH)
    # Half of all words end a response from now on; samples are the same up to there.
    eos_ids = (tiny.EOS_ID, *range(tiny.FIRST_WORD, tiny.VOCAB_SIZE, 4))
    tokens = draw(tiny_model, batch, NUMBERS, num_samples=3, eos_ids=eos_ids)
    lengths = set()
    for row, expected in zip(tokens.reshape(-1, LENGTH), free.reshape(-1, LENGTH), strict=True):
        ends = np.flatnonzero(np.isin(expected, eos_ids))
        length = ends[0] + 1 if len(ends) else LENGTH
        np.testing.assert_array_equal(row[:length], expected[:length])
        assert np.all(row[length:] == tiny.PAD_ID)
        lengths.add(length)
    assert len(lengths) > 2


@pytest.mark.parametrize(
    ("few", "cast"),
    [
        (r".*/scale", jnp.bfloat16),  # norms are kept in float32 beside bfloat16
        (r".*/scale|multi_modal_projector/.*", jnp.float32),  # a run that froze the others
    ],
)
def test_parameters_of_mixed_dtype_are_cast_to_that_of_matrices(tiny_model, batch, few, cast):
    model, params = tiny_model
    mixed = map_with_path(
        lambda path, leaf: leaf if re.fullmatch(few, path) else leaf.astype(jnp.bfloat16), params
    )
    uniform = jax.tree.map(lambda leaf: leaf.astype(cast), mixed)
    ours, expected = (
        draw((model, tree), batch, NUMBERS, temperature=0.0) for tree in (mixed, uniform)
    )
    np.testing.assert_array_equal(ours, expected)


def test_rows_that_fill_the_batch_are_not_sampled(tiny_model, batch, whole):
    filled = dataclasses.replace(batch, weights=np.float32([1, 0, 1, 0]))
    tokens = draw(tiny_model, filled, NUMBERS, num_samples=3)
    np.testing.assert_array_equal(tokens[::2], whole[::2])
    assert np.all(tokens[1::2] == tiny.PAD_ID)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_samples_end_where_logits_are_not_finite(tiny_model, batch, whole, temperature):
    """From the token on that has no embedding; other samples go on as without it."""
    model, params = tiny_model
    plain = draw(tiny_model, batch, NUMBERS, num_samples=3, temperature=temperature, eos_ids=())
    word = plain[1, 0, 3]
    broken = map_with_path(
        lambda path, leaf: (
            np.where(np.arange(len(leaf))[:, None] == word, np.float32(np.nan), leaf)
            if path.endswith("embed_tokens/embedding")
            else leaf
        ),
        params,
    )
    clear = dataclasses.replace(
        batch,
        prompt_ids=np.where(batch.prompt_ids == word, tiny.FIRST_WORD, batch.prompt_ids),
    )
    options = {"num_samples": 3, "temperature": temperature, "eos_ids": ()}
    expected = draw(tiny_model, clear, NUMBERS, **options)
    found = draw((model, broken), clear, NUMBERS, **options)
    ended = 0
    for row, plain in zip(found.reshape(-1, LENGTH), expected.reshape(-1, LENGTH), strict=True):
        said = np.flatnonzero(plain[:-1] == word)
        length = said[0] + 1 if len(said) else LENGTH
        np.testing.assert_array_equal(row[:length], plain[:length])
        assert np.all(row[length : length + 1] == NOT_FINITE)
        assert np.all(row[length + 1 :] == tiny.PAD_ID)
        ended += length < LENGTH
    assert 0 < ended < found.size // LENGTH


def test_a_shorter_limit_only_cuts(tiny_model, batch, whole):
    short = draw(tiny_model, batch, NUMBERS, num_samples=3, max_new_tokens=3)
    np.testing.assert_array_equal(short, whole[:, :, :3])


def test_samples_follow_the_distribution(tiny_model, batch):
    model, params = tiny_model

    @jax.jit
    def logits(params, batch):
        module = model.bind(params)
        keys = sample_keys(0, 0, NUMBERS[:1], 1)
        return next_token_logits(module, prefill(model, params, batch, keys).hidden[:, 0])

    count, temperature = 4000, 0.6
    one = take(batch, [0])
    tokens = draw(
        tiny_model, one, NUMBERS[:1], num_samples=count, temperature=temperature, max_new_tokens=1
    )
    assert_follows(tokens, np.asarray(jax.nn.softmax(logits(params, one)[0] / temperature)))


def assert_follows(tokens, probabilities):
    """A chi-square test of drawn tokens; those seldom seen are counted together."""
    expected = tokens.size * probabilities
    observed = np.bincount(tokens.reshape(-1), minlength=len(probabilities))
    assert not observed[probabilities == 0].any()
    rare = expected < 5
    assert 5 < (~rare).sum() < len(rare)
    expected = np.append(expected[~rare], expected[rare].sum())
    observed = np.append(observed[~rare], observed[rare].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected) ** 2 / expected).sum()
    # Mean `degrees`, variance twice that: four deviations.
    degrees = len(expected) - 1
    assert statistic < degrees + 4 * np.sqrt(2 * degrees)


@pytest.mark.parametrize("top_k", [0, 40])
def test_draws_of_a_large_vocabulary_follow_the_distribution(top_k):
    """Larger than what is drawn from at a time, and no multiple of it."""
    logits = jnp.float32(2 * np.random.default_rng(0).standard_normal(700))
    keys = jax.random.split(jax.random.key(0), (1, 8000))
    draw = jax.jit(choose_token, static_argnames="decoding")
    decoding = Decoding(num_samples=8000, temperature=0.8, top_k=top_k)
    third = jnp.full((1, 8000), 3)
    tokens = draw(jnp.broadcast_to(logits, (1, 8000, 700)), keys, third, decoding=decoding)
    probabilities = jax.nn.softmax(truncate(logits / 0.8, top_k, 1.0))
    assert_follows(np.asarray(tokens), np.asarray(probabilities))


def numpy_truncate(logits, top_k, top_p):
    """One row at a time, token by token."""
    result = np.full_like(logits, -np.inf)
    for row, out in zip(logits, result, strict=True):
        kept = np.argsort(-row, kind="stable")
        if top_k:
            kept = kept[:top_k]
        if top_p < 1:
            weights = np.exp(row[kept] - row[kept].max())
            weights /= weights.sum()
            total, number = 0.0, 0
            while total < top_p and number < len(kept):
                total += weights[number]
                number += 1
            kept = kept[:number]
        out[kept] = row[kept]
    return result


@pytest.mark.parametrize("top_k", [0, 1, 5, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5, 1e-6])
def test_truncation(top_k, top_p):
    logits = np.float32(2 * np.random.default_rng(0).standard_normal((6, 40)))
    actual = np.asarray(truncate(jnp.asarray(logits), top_k, top_p))
    np.testing.assert_array_equal(actual, numpy_truncate(logits, top_k, top_p))
    assert np.all(np.isfinite(actual).sum(axis=-1) >= 1)


def test_ties_with_the_last_kept_token_stay():
    logits = jnp.float32([[1, 3, 2, 2, 0]])
    kept = np.isfinite(truncate(logits, 2, 1.0))
    np.testing.assert_array_equal(kept, [[False, True, True, True, False]])


def test_temperature_sharpens_before_truncation():
    logits = jnp.log(jnp.float32([[[0.5, 0.3, 0.2]]]))
    keys = jax.vmap(lambda k: jax.random.split(k, 300))(jax.random.split(jax.random.key(0), 1))
    logits = jnp.broadcast_to(logits, (1, 300, 3))
    first = jnp.zeros((1, 300), jnp.int32)
    # At 0.5 the first token has 0.25 / 0.38 = 0.66 and is alone within 0.6; at 1 it is not.
    cold = choose_token(logits, keys, first, Decoding(num_samples=300, temperature=0.5, top_p=0.6))
    warm = choose_token(logits, keys, first, Decoding(num_samples=300, temperature=1.0, top_p=0.6))
    assert set(np.unique(cold)) == {0}
    assert set(np.unique(warm)) == {0, 1}
    greedy = choose_token(logits, keys, first, Decoding(num_samples=300, temperature=0))
    assert set(np.unique(greedy)) == {0}


def test_the_most_likely_token_is_the_first_of_the_largest():
    logits = np.random.default_rng(0).integers(0, 5, (3, 4, 33)).astype(np.float32)  # many ties
    np.testing.assert_array_equal(most_likely(jnp.asarray(logits)), logits.argmax(axis=-1))
    assert most_likely(jnp.full(7, -jnp.inf)) == 0
    assert most_likely(jnp.array([1.0, jnp.nan, 2.0])) == 2  # a token of the vocabulary
