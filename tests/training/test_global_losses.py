"""Losses are those of the global batch: any cut into micro-batches and any mesh gives them."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from helpers import meshes, tiny

from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import put_batch
from mmpo_jax.recipes.training import MovingReference
from mmpo_jax.scoring.log_probs import score_batch
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.metrics import means
from mmpo_jax.training.step import create_state, make_step

OBJECTIVES = {
    "aot": [make_term("aot", beta=0.5)],
    "aot_unpaired": [make_term("aot_unpaired", beta=0.5)],
    "beta_dpo": [make_term("beta_dpo", beta=0.5, drop=0.4)],
    "mm_dpo_batch": [make_term("mm_dpo_batch", beta=0.5, w=2.0, drop=0.4)],
    "ema": [make_term("dpo", beta=0.5)],
    "dpo and sft": [make_term("dpo", beta=0.5), make_term("sft")],
}
MOVING = {"ema": MovingReference(every=1, mixup=0.5)}
"""Where the reference runs in the step; the second step compares with what the first made of it."""
RANKS = [[1, 2, 3], [2, 1, 3], [1, 1, 2], [3, 1, 2], [1, 2, 2], [2, 3, 1], [1, 1, 1], [1, 2, 3]]
WEIGHTS = [1, 1, 1, 1, 1, 1, 1, 0]
RATE = optax.constant_schedule(0.1)


@pytest.fixture(scope="module")
def batch(tiny_model):
    """Eight rankings of three with responses of very different lengths, one a filler."""
    model, params = tiny_model
    lengths = [
        (1, 6, 3),
        (2, 1, 5),
        (6, 6, 1),
        (1, 1, 4),
        (5, 2, 2),
        (3, 4, 6),
        (2, 2, 2),
        (6, 1, 1),
    ]
    prompts = tiny.random_batch(model.config, [7, 9, 6, 8, 9, 6, 7, 8], lengths)
    prompts = dataclasses.replace(prompts, weights=np.float32(WEIGHTS))
    other = tiny.random_params(model, seed=7)
    near = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, params, other)
    sums = np.asarray(score_batch(model, near, prompts))
    return TrainBatch(prompts, {"sums": sums}, {"rank": np.float32(RANKS)})


def two_steps(model, params, name, batch, micro_batches, shape=(1, 1, 1)):
    """(metrics of two steps, the weights after them and the reference's, what objectives keep)."""
    mesh = meshes.mesh_of(*shape)
    optimizer, loss = optax.sgd(RATE), make_loss(model, OBJECTIVES[name])
    moving = MOVING.get(name)
    freeze = (r"vision_tower/.*",)
    state = create_state(
        params,
        model,
        optimizer,
        freeze,
        mesh,
        reference_dtype=np.float32 if moving else None,
        keeps=loss.state,
    )
    # Not the policy itself: whether rewards of 0 are accurate is up to rounding.
    other = {path: 0.95 * leaf for path, leaf in state.reference.items()}
    state = dataclasses.replace(state, reference=other)
    step = make_step(loss, optimizer, RATE, state, reference=moving)
    cut = jax.tree.map(lambda x: x.reshape(micro_batches, -1, *x.shape[1:]), batch)
    metrics = []
    with jax.set_mesh(mesh):
        cut = put_batch(cut, mesh, leading=1)
        for _ in range(2):
            state, values = step(state, cut)
            metrics.append(means([values]))
    kept = {name: float(value) for name, value in state.objective_state.items()}
    weights = {path: np.asarray(x) for path, x in state.params.items()}
    weights |= {f"reference/{path}": np.asarray(x) for path, x in state.reference.items()}
    return metrics, weights, kept


@pytest.fixture(scope="module")
def whole(tiny_model, batch):
    """By name, of one micro-batch on one device."""
    return {name: two_steps(*tiny_model, name, batch, 1) for name in OBJECTIVES}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize(
    ("micro_batches", "shape"),
    [(8, (1, 1, 1)), (4, (1, 1, 1)), (1, (4, 2, 1))],
    ids=["rows alone", "rows in twos", "8 devices"],
)
@pytest.mark.slow
def test_the_cut_does_not_matter(tiny_model, batch, whole, name, micro_batches, shape):
    metrics, params, kept = two_steps(*tiny_model, name, batch, micro_batches, shape)
    expected, trained, state = whole[name]
    for found, values in zip(metrics, expected, strict=True):
        assert found.keys() == values.keys()
        for key, value in values.items():
            assert found[key] == pytest.approx(value, rel=2e-4, abs=2e-5), key
    assert kept == pytest.approx(state, rel=1e-4)
    assert bool(kept) == (name == "beta_dpo")
    for path, leaf in trained.items():
        np.testing.assert_allclose(params[path], leaf, rtol=1e-3, atol=1e-5, err_msg=path)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_steps_learn(tiny_model, whole, name):
    metrics, _, kept = whole[name]
    assert metrics[0]["finite"] == metrics[1]["finite"] == 1
    assert metrics[1]["loss"] != metrics[0]["loss"]
    assert metrics[0]["grad_norm"] > 1e-2
    assert all(abs(value) > 1e-4 for value in kept.values())


def test_the_reference_moves(whole):
    _, weights, _ = whole["ema"]
    moved = [path for path in weights if path.startswith("reference/")]
    assert moved
    for path in moved:
        assert not np.array_equal(weights[path], weights[path.removeprefix("reference/")])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "mm_dpo_batch", "dpo and sft"])
def test_halves_have_another_mean(tiny_model, batch, whole, name):
    """So that the tests above can fail."""
    model, params = tiny_model
    loss = make_loss(model, OBJECTIVES[name])

    @jax.jit
    def value(part):
        return loss.value(loss.sums(loss.forward(params, None, part), part, loss.state)[0])

    halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
    first, second = (float(value(jax.tree.map(lambda x, i=i: x[i], halves))) for i in range(2))
    assert abs((first + second) / 2 - whole[name][0][0]["loss"]) > 1e-3
