"""Shared-prompt log-probs against plain rows of text, and how much memory they take."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.models import head
from mmpo_jax.models.batch import Batch, Shown
from mmpo_jax.models.head import head_chunk, token_statistics
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.models.model import Model, read_config
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.optimizers import AdamW, Cosine
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import make_step

PROMPTS = (6, 9, 14)
RESPONSES = ((5, 2, 7, 1, 4), (1, 7, 3, 6, 2), (4, 4, 1, 7, 5))
LOG_PROB_TOLERANCE, GRADIENT_TOLERANCE = 1e-9, 1e-7


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def params(tiny_model):
    with jax.enable_x64(True):
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), tiny_model[1])


@pytest.fixture(scope="module")
def batch(tiny_model):
    return tiny.random_batch(tiny_model[0].config, PROMPTS, RESPONSES)


def first_responses(batch: Batch, count: int) -> Batch:
    return dataclasses.replace(
        batch,
        response_ids=batch.response_ids[:, :count],
        response_mask=batch.response_mask[:, :count],
        loss_mask=batch.loss_mask[:, :count],
        shown=batch.shown
        and Shown(
            positions=batch.shown.positions[:, :, :count],
            feature_index=batch.shown.feature_index[:, :count],
            feature_weight=batch.shown.feature_weight[:, :count],
        ),
    )


def separate_rows(batch: Batch) -> Batch:
    """B*R rows of plain text: each response written after its own copy of the prompt."""
    b, r, t = batch.response_ids.shape
    p = batch.prompt_ids.shape[1]
    ids = np.full((b * r, p + t), tiny.PAD_ID, np.int32)
    mask = np.zeros((b * r, p + t), bool)
    for row in range(b * r):
        i, j = divmod(row, r)
        prompt = batch.prompt_ids[i][batch.prompt_mask[i]]
        text = np.concatenate([prompt, batch.response_ids[i, j][batch.response_mask[i, j]]])
        ids[row, : len(text)], mask[row, : len(text)] = text, True
    return Batch(
        prompt_ids=ids,
        prompt_mask=mask,
        pixel_values=np.repeat(batch.pixel_values, r, axis=0),
        **tiny.reading_order(ids, mask.sum(axis=1)),
        response_ids=np.zeros((b * r, 0, 0), np.int32),
        response_mask=np.zeros((b * r, 0, 0), bool),
        loss_mask=np.zeros((b * r, 0, 0), bool),
        weights=np.ones(b * r, np.float32),
    )


def plain_log_probs(model, params, rows: Batch) -> jax.Array:
    """Log-prob of every token of every row given those before it, by causal attention alone."""
    module = model.bind(params)
    s = rows.prompt_ids.shape[1]

    def attend(made, stack, carry, inputs):
        query, key, value = made
        groups = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(query.shape[-1])
        scores = jnp.where(jnp.tril(jnp.ones((s, s), bool)), scores, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value), carry, None

    embedded = module.embed_batch(rows, responses=False)
    x, _, _ = module.language_model(embedded.x, embedded.positions, attend)
    scores = jax.nn.log_softmax(x @ module.language_model.head_kernel())
    return jnp.take_along_axis(scores[:, :-1], jnp.array(rows.prompt_ids)[:, 1:, None], 2)[..., 0]


@functools.partial(jax.jit, static_argnames=("model", "chunk", "remat"))
def shared(model, params, batch, cotangent, chunk=None, remat="none"):
    def loss(params):
        log_probs = response_log_probs(model, params, batch, chunk=chunk, remat=remat)
        return (log_probs * cotangent).sum(), log_probs

    return jax.grad(loss, has_aux=True)(params)


@functools.partial(jax.jit, static_argnames="model")
def plain(model, params, rows, cotangent):
    def loss(params):
        log_probs = plain_log_probs(model, params, rows)
        return (log_probs * cotangent).sum(), log_probs

    return jax.grad(loss, has_aux=True)(params)


def assert_trees_close(actual, expected, tolerance):
    for path, leaf in flatten(expected).items():
        np.testing.assert_allclose(
            flatten(actual)[path], leaf, rtol=0, atol=tolerance, err_msg=path
        )


def assert_equal_to_separate_rows(model, params, whole, count):
    """Log-probs and gradients of the first `count` responses against plain rows of text."""
    part = first_responses(whole, count)
    b, r, t = part.response_ids.shape
    cotangent = np.random.default_rng(1).standard_normal((b, r, t)) * part.response_mask
    gradient, log_probs = shared(model, params, part, cotangent)
    assert log_probs.dtype == jnp.float64

    # Rows of all responses, so that one program serves every count; those not asked for weigh 0.
    rows = separate_rows(whole)
    row_cotangent = np.zeros((rows.prompt_ids.shape[0], rows.prompt_ids.shape[1] - 1))
    places = {}
    for i, j in np.ndindex(b, r):
        first, size = whole.prompt_mask[i].sum(), whole.response_mask[i, j].sum()
        places[i, j] = (i * whole.response_ids.shape[1] + j, slice(first - 1, first - 1 + size))
        row_cotangent[places[i, j]] = cotangent[i, j, :size]
    expected_gradient, expected = plain(model, params, rows, row_cotangent)
    for (i, j), place in places.items():
        size = whole.response_mask[i, j].sum()
        np.testing.assert_allclose(
            log_probs[i, j, :size], expected[place], rtol=0, atol=LOG_PROB_TOLERANCE
        )
        assert not np.any(log_probs[i, j, size:])
    assert np.std(expected) > 0.5  # not a model that says the same everywhere
    assert_trees_close(gradient, expected_gradient, GRADIENT_TOLERANCE)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in gradient_of_what_matters(gradient))


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.slow
def test_shared_prompt_equals_separate_rows(tiny_model, params, batch, count):
    assert_equal_to_separate_rows(tiny_model[0], params, batch, count)


@pytest.mark.slow
def test_long_prompts_equal_separate_rows(tiny_model, params):
    # Long enough that attention is taken in several blocks of queries, the last one cut short.
    long = tiny.random_batch(tiny_model[0].config, (40, 333, 130), ((3, 2), (1, 3), (2, 2)))
    assert_equal_to_separate_rows(tiny_model[0], params, long, 2)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.slow
def test_images_in_responses_equal_separate_rows(tiny_model, tiny_processor, params, count):
    """In all responses at different places, in two of three beside one in the prompt, in none."""
    batch = tiny.batch_with_later_images(tiny_processor, 3)
    images = (batch.response_ids == tiny.IMAGE_ID).sum(axis=2)
    assert images.tolist() == [[4, 4, 4], [4, 0, 4], [0, 0, 0]]
    assert (batch.prompt_ids == tiny.IMAGE_ID).sum(axis=1).tolist() == [0, 4, 4]
    starts = (batch.response_ids == tiny.IMAGE_ID).argmax(axis=2)
    assert len(set(starts[0])) > 1
    assert_equal_to_separate_rows(tiny_model[0], params, batch, count)


def gradient_of_what_matters(gradient):
    # A key bias shifts all scores of a query alike; the last vision layers are not read.
    return [
        leaf
        for path, leaf in flatten(gradient).items()
        if not path.endswith("k_proj/bias") and "post_layernorm" not in path
    ]


def test_siblings_and_padding_do_not_matter(tiny_model, params, batch):
    model = tiny_model[0]
    forward = jax.jit(functools.partial(response_log_probs, model))
    expected = forward(params, batch)
    rng = np.random.default_rng(2)

    def words(shape):
        return rng.integers(tiny.FIRST_WORD, tiny.VOCAB_SIZE, shape).astype(np.int32)

    siblings = batch.response_ids.copy()
    siblings[:, 1:] = words(siblings[:, 1:].shape)
    changed = forward(params, dataclasses.replace(batch, response_ids=siblings))
    np.testing.assert_allclose(changed[:, 0], expected[:, 0], rtol=0, atol=1e-12)
    assert not np.allclose(changed[:, 1:], expected[:, 1:])

    garbage = dataclasses.replace(
        batch,
        prompt_ids=np.where(batch.prompt_mask, batch.prompt_ids, words(batch.prompt_ids.shape)),
        response_ids=np.where(
            batch.response_mask, batch.response_ids, words(batch.response_ids.shape)
        ),
    )
    np.testing.assert_allclose(forward(params, garbage), expected, rtol=0, atol=1e-12)

    longer = tiny.random_batch(model.config, PROMPTS, RESPONSES, prompt_size=19, response_size=11)
    longer = dataclasses.replace(longer, pixel_values=batch.pixel_values)
    np.testing.assert_allclose(forward(params, longer)[:, :, :7], expected, rtol=0, atol=1e-12)

    order = np.array([3, 0, 4, 1, 2])
    shuffled = dataclasses.replace(
        batch,
        response_ids=batch.response_ids[:, order],
        response_mask=batch.response_mask[:, order],
    )
    np.testing.assert_allclose(forward(params, shuffled), expected[:, order], rtol=0, atol=1e-12)


def test_images_matter_and_stay_with_their_prompt(tiny_model, params, batch):
    forward = jax.jit(functools.partial(response_log_probs, tiny_model[0]))
    pixels = batch.pixel_values.copy()
    pixels[1] = -pixels[1]
    changed = forward(params, dataclasses.replace(batch, pixel_values=pixels))
    expected = forward(params, batch)
    np.testing.assert_allclose(changed[::2], expected[::2], rtol=0, atol=1e-12)
    assert np.abs(changed[1] - expected[1]).max() > 1e-2


@pytest.mark.parametrize("remat", ["dots", "full"])
@pytest.mark.slow
def test_rematerialisation_changes_nothing(tiny_model, params, batch, remat):
    part = first_responses(batch, 2)
    cotangent = np.random.default_rng(1).standard_normal(part.response_ids.shape)
    gradient, log_probs = shared(tiny_model[0], params, part, cotangent, remat=remat)
    expected_gradient, expected = shared(tiny_model[0], params, part, cotangent)
    np.testing.assert_allclose(log_probs, expected, rtol=0, atol=1e-12)
    assert_trees_close(gradient, expected_gradient, 1e-10)


def unchunked(hidden, kernel, labels):
    scores = jax.nn.log_softmax(hidden @ kernel)
    return jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]


@pytest.mark.parametrize("chunk", [1, 3, 4, 10, 64])
def test_chunked_head_equals_the_whole(chunk):
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((2, 3, 10, 6))
    kernel, labels = rng.standard_normal((6, 23)), rng.integers(0, 23, (2, 3, 10))
    cotangent = rng.standard_normal(labels.shape)

    def gradients(function):
        def loss(hidden, kernel):
            values = function(hidden, kernel, labels)
            return (values * cotangent).sum(), values

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, kernel)

    def chunked(hidden, kernel, labels):
        return token_statistics(hidden, kernel, labels, chunk=chunk)["log_probs"]

    actual, log_probs = gradients(chunked)
    expected, expected_log_probs = gradients(unchunked)
    np.testing.assert_allclose(log_probs, expected_log_probs, rtol=0, atol=1e-12)
    for a, b in zip(actual, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12)


def test_head_chunks_are_equal_and_within_the_budget():
    for rows, length, vocab in [(4, 512, 152_000), (1, 7, 32_000), (64, 1024, 32_000), (8, 0, 9)]:
        chunk = head_chunk(rows, length, 64, vocab)
        assert 1 <= chunk <= max(1, length)
        assert chunk == 1 or rows * chunk * vocab * 4 <= 64 * 2**20 + rows * vocab * 4
        with jax.set_mesh(make_mesh(2, 2, 2)):
            on_a_mesh = head_chunk(rows, length, 64, vocab)
        assert chunk <= on_a_mesh <= max(1, length)
        held = -(-rows // 2) * (-(-vocab // 4) + 64) * 4
        assert on_a_mesh == 1 or on_a_mesh * held <= 64 * 2**20 + held


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_compute_dtype_is_that_of_the_parameters(tiny_model, batch, dtype):
    def hidden(params, batch):
        return model.bind(params).hidden_states(batch)

    model = tiny_model[0]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), tiny_model[1])
    states = jax.eval_shape(hidden, params, batch)
    assert {leaf.dtype for leaf in states} == {jnp.dtype(dtype)}
    log_probs = jax.eval_shape(functools.partial(response_log_probs, model), params, batch)
    assert log_probs.dtype == jnp.float32


LARGE = (2, 2, 512, 152_000)  # B, R, T, V
LOGITS = math.prod(LARGE)


def compile_large_step():
    """A DPO training step at a vocabulary of 152,000, compiled and not run."""
    b, r, t, v = LARGE
    text = {"vocab_size": v, "hidden_size": 8, "num_hidden_layers": 1}
    config = tiny.make_config({"num_hidden_layers": 1}, text, vision_feature_layer=-1)
    model = Model.create(read_config(config))
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def spec(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    batch = Batch(  # a micro-batch in front
        prompt_ids=spec((1, b, 16), jnp.int32),
        prompt_mask=spec((1, b, 16), bool),
        positions=spec((1, b, 1, 16), jnp.int32),
        next_position=spec((1, b), jnp.int32),
        pixel_values=spec((1, b, 1, 3, 16, 16), jnp.float32),
        patches={},
        feature_index=spec((1, b, 16, 1), jnp.int32),
        feature_weight=spec((1, b, 16, 1), jnp.float32),
        response_ids=spec((1, b, r, t), jnp.int32),
        response_mask=spec((1, b, r, t), bool),
        loss_mask=spec((1, b, r, t), bool),
        weights=spec((1, b), jnp.float32),
    )
    with jax.enable_x64(False):
        schedule = make_schedule(Cosine(), 1e-3, 10)
        optimizer = make_optimizer(AdamW(), schedule)
        params = flatten(model.abstract_params())
        state = TrainState(
            jax.eval_shape(lambda: jnp.int32(0)), params, {}, jax.eval_shape(optimizer.init, params)
        )
        state = jax.tree.map(lambda leaf: spec(leaf.shape, leaf.dtype), state)
        step = make_step(
            make_loss(model, [make_term("dpo")], remat="full"), optimizer, schedule, state
        )
        numbers = spec((1, b, r), jnp.float32)
        inputs = TrainBatch(batch, {"sums": numbers}, {"rank": numbers})
        return jax.jit(step, donate_argnums=0).lower(state, inputs).compile()


def largest_array(program):
    shapes = re.findall(r"\b[a-z]+[0-9]*\[([0-9,]+)\]", program.as_text())
    return max(math.prod(int(n) for n in shape.split(",")) for shape in shapes)


@pytest.mark.slow
def test_logits_are_never_stored():
    program = compile_large_step()
    assert largest_array(program) < LOGITS / 2
    assert program.memory_analysis().temp_size_in_bytes < LOGITS * 4 / 2


@pytest.mark.slow
def test_the_check_above_finds_stored_logits(monkeypatch):
    monkeypatch.setattr(head, "HEAD_BYTES", LOGITS * 4)
    program = compile_large_step()
    assert largest_array(program) >= LOGITS
    assert program.memory_analysis().temp_size_in_bytes >= LOGITS * 4
