"""Every way to lay out eight devices, for every family: the same as one device computes.

Log-probs, loss and gradients are compared in float64, so that a tolerance of 1e-9 leaves room for
the order of sums and for nothing else; training and sampling in float32, which they are made for.
"""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest
from helpers import tiny

pytest.importorskip("torch")
from helpers import checks, families
from helpers.meshes import one_device
from helpers.sampling import sample

from mmpo_jax.core.trees import flatten
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.generation.sampler import sample_keys
from mmpo_jax.models.families import FAMILIES
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.models.vocabulary import without_added
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import make_mesh, put_batch, put_params
from mmpo_jax.recipes.optimizers import AdamW, Constant
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import create_state, make_step, whole_params

SHAPES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(shape) == 8]
"""Sizes of `data`, `fsdp` and `tensor`."""
WITH_EXPERT = [
    shape
    for shape in itertools.product((1, 2, 4, 8), repeat=4)
    if np.prod(shape) == 8 and shape[-1] > 1
]
"""Sizes of these and of `expert`, which splits something."""
MIXTURES = ("qwen3_moe", "qwen3_vl_moe", "qwen3_5_moe", "qwen3_5_moe_text", "gemma4_26b")


def shapes_of(family):
    """Of a dense model one with `expert` will do: there it is a part of `fsdp`."""
    return SHAPES + (WITH_EXPERT if family in MIXTURES else [(1, 2, 2, 2)])


def mesh_of(shape):
    data, fsdp, tensor, *expert = shape
    return make_mesh(data, fsdp, tensor, expert=expert[0] if expert else None)


CASES = [
    pytest.param(family, shape, id=f"{family}-{'x'.join(map(str, shape))}")
    for family in families.FAMILIES
    for shape in shapes_of(family)
]
ROWS, STEPS = 8, 3
UNEVEN = "internvl"
"""A family whose rows have a number of tokens that no `tensor` divides; of the others all do."""

EXACT = 1e-9
"""Of numbers around 10, in float64."""
CLOSE = 1e-5
"""In float32."""
CLOSE_BEHIND_DELTA_NETS = 5e-5
"""Of gradients in float32 that went through decays; their float64 is as exact as others'."""
# Adam divides by the gradient's size: a small epsilon would blow up the rounding of zeros. With
# three times the rate Qwen3.5's third step makes of a rounding of 2e-5 one of 8e-4.
OPTIMIZER = AdamW(learning_rate=1e-3, epsilon=1e-3)


def test_there_are_ten_shapes():
    assert len(SHAPES) == len(set(SHAPES)) == 10
    assert len(WITH_EXPERT) == len(set(WITH_EXPERT)) == 10


def test_there_are_all_families():
    assert FAMILIES.keys() <= families.FAMILIES.keys()


@pytest.fixture(scope="module")
def batch_of(family_case):
    """family -> (its case, a batch of eight rows of two responses, numbers of a reference)."""

    @functools.cache
    def batch_of(family):
        case = family_case(family)
        first, second = families.records(family)
        third = families.filmed(family) or [first]
        records = [
            dataclasses.replace(record, id=str(number))
            for number, record in enumerate([first, second, *third, second] * (ROWS // 4))
        ]
        tokenized, batch = checks.batch_of(case, records)
        if family != UNEVEN:
            prompt, length = batch.prompt_ids.shape[1], batch.response_ids.shape[2]
            prompt += -(prompt + 2 * length) % 8
            sizes = {"prompt_sizes": (prompt,), "response_sizes": (length,)}
            batch = pad_batch(tokenized, case.processor, rows=ROWS, **sizes)
        # Of every row its own, or sums over rows could be of the wrong ones.
        words = np.random.default_rng(0).integers(
            checks.token_ids("USER:")["USER:"], case.model.config.decoder.vocab_size, (ROWS, 2, 99)
        )
        said = np.where(
            batch.response_mask, words[..., : batch.response_ids.shape[2]], batch.response_ids
        )
        batch = dataclasses.replace(batch, response_ids=said.astype(np.int32))
        reference = -3.0 * batch.loss_mask.sum(axis=-1)
        return case, tiny.train_batch(batch, reference.astype(np.float32))

    return batch_of


@pytest.mark.parametrize("family", families.FAMILIES)
def test_log_probs_with_all_three_axes(batch_of, family):
    """The quick one, in float32."""
    case, batch = batch_of(family)

    def on(mesh):
        with jax.set_mesh(mesh):
            params = put_params(case.params, case.model.rules, mesh)
            placed = put_batch(batch.prompts, mesh)
            return jax.jit(functools.partial(response_log_probs, case.model))(params, placed)

    expected = np.asarray(on(one_device()))
    assert expected.std() > 0.5
    np.testing.assert_allclose(on(make_mesh(2, 2, 2)), expected, rtol=CLOSE, atol=CLOSE)
    if family in MIXTURES:
        np.testing.assert_allclose(on(mesh_of((1, 2, 2, 2))), expected, rtol=CLOSE, atol=CLOSE)


def derivatives(case, batch, mesh):
    """(log-probs, loss, path -> gradient) in float64."""
    loss = make_loss(case.model, [make_term("dpo", beta=0.1)])

    def value(params, batch):
        outputs = loss.forward(params, None, batch)
        sums, _ = loss.sums(outputs, batch, {})
        return loss.value(sums), outputs["log_probs"]

    with jax.enable_x64(True), jax.set_mesh(mesh):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), case.params)
        placed = put_params(params, case.model.rules, mesh)
        gradient = jax.jit(jax.value_and_grad(value, has_aux=True))
        (found, log_probs), grads = gradient(placed, put_batch(batch, mesh))
        return np.asarray(log_probs), float(found), as_stored(grads, case)


def as_stored(tree, case):
    """path -> array as files have it: without what fills a vocabulary up."""
    size = case.model.config.decoder.vocab_size
    return {p: without_added(p, np.asarray(leaf), size) for p, leaf in flatten(tree).items()}


@pytest.fixture(scope="module")
def expected_derivatives(batch_of):
    return functools.cache(lambda family: derivatives(*batch_of(family), one_device()))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_log_probs_loss_and_gradients(batch_of, expected_derivatives, family, shape):
    log_probs, loss, grads = derivatives(*batch_of(family), mesh_of(shape))
    expected, expected_loss, expected_grads = expected_derivatives(family)
    assert log_probs.dtype == np.float64
    assert expected.std() > 0.5
    np.testing.assert_allclose(log_probs, expected, rtol=0, atol=EXACT)
    assert loss == pytest.approx(expected_loss, abs=EXACT)
    assert grads.keys() == expected_grads.keys()
    for path, leaf in expected_grads.items():
        np.testing.assert_allclose(grads[path], leaf, rtol=0, atol=EXACT, err_msg=path)
    learned = [path for path, leaf in expected_grads.items() if np.abs(leaf).max() > 1e-4]
    assert len(learned) > 0.8 * len(expected_grads)


def steps_and_samples(case, batch, mesh):
    """(metrics of every step, path -> parameter, int32[B, n, T] samples of the trained model)."""
    schedule = make_schedule(Constant(warmup_ratio=0), OPTIMIZER.learning_rate, 10)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    loss = make_loss(case.model, [make_term("dpo", beta=0.1)])
    with jax.set_mesh(mesh):
        state = create_state(case.params, case.model, optimizer, (), mesh)
        step = make_step(loss, optimizer, schedule, state)
        inputs = put_batch(jax.tree.map(lambda leaf: leaf[None], batch), mesh, leading=1)
        metrics = []
        for _ in range(STEPS):
            state, values = step(state, inputs)
            metrics.append({name: float(values[name]) for name in ("loss", "grad_norm", "finite")})
        tokens = sample(
            case.model,
            whole_params(state),
            batch.prompts,
            sample_keys(0, 0, np.arange(ROWS), 2),
            decoding=Decoding(num_samples=2, max_new_tokens=6),
            eos_ids=(checks.EOS_ID,),
            pad_id=checks.PAD_ID,
            mesh=mesh,
        )
    return metrics, as_stored(state.params, case), tokens


@pytest.fixture(scope="module")
def expected_steps(batch_of):
    return functools.cache(lambda family: steps_and_samples(*batch_of(family), one_device()))


@pytest.mark.slow
@pytest.mark.parametrize(("family", "shape"), CASES)
def test_steps_and_samples(batch_of, expected_steps, family, shape):
    close = CLOSE_BEHIND_DELTA_NETS if family.startswith("qwen3_5") else CLOSE
    metrics, params, tokens = steps_and_samples(*batch_of(family), mesh_of(shape))
    expected_metrics, expected_params, expected_tokens = expected_steps(family)
    for actual, expected in zip(metrics, expected_metrics, strict=True):
        assert actual["finite"] == 1
        assert actual == pytest.approx(expected, rel=close)
    assert expected_metrics[-1]["loss"] < expected_metrics[0]["loss"]
    start = flatten(batch_of(family)[0].params)
    for path, expected in expected_params.items():
        np.testing.assert_allclose(params[path], expected, rtol=0, atol=close, err_msg=path)
    # What nothing trains is no part of the state.
    moved = [
        path for path, leaf in expected_params.items() if np.abs(leaf - start[path]).max() > 1e-3
    ]
    assert len(moved) > 0.5 * len(expected_params)
    np.testing.assert_array_equal(tokens, expected_tokens)
    assert len(np.unique(tokens)) > 5
