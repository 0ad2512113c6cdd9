"""The train step: exact accumulation, clipping, frozen parameters, refusing what is not finite."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tiny
from jax.sharding import PartitionSpec

from mmpo_jax.core.trees import flatten
from mmpo_jax.objectives.sums import Sums
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.recipes.optimizers import AdamW, Cosine
from mmpo_jax.recipes.training import MovingReference
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.metrics import means
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import create_state, make_step, trainable_paths, whole_params

LINE = types.SimpleNamespace(rules=((r".*", PartitionSpec()),))  # all of a model a state needs
CONSTANT = optax.constant_schedule(0.5)


def line_params():
    return {
        "dense": {"kernel": np.float32([[1.0], [-2.0]]), "bias": np.float32([0.5])},
        "norm": {"scale": np.float32([1.5])},
    }


def line(params, batch):
    x = batch[0]
    heights = x @ params["dense"]["kernel"] * params["norm"]["scale"] + params["dense"]["bias"]
    return heights[:, 0]


def squared_error(heights, batch):
    _, y, weight = batch
    return Sums(jnp.sum(weight * (heights - y) ** 2), weight.sum(), {})


LINE_LOSS = tiny.row_loss(line, squared_error)


def line_batch(micro_batches=1, rows=4):
    rng = np.random.default_rng(0)
    shape = (micro_batches, rows)
    x, y = rng.standard_normal((*shape, 2)), rng.standard_normal(shape)
    return tuple(np.float32(part) for part in (x, y, np.ones(shape)))


def line_gradient(params, batch):
    def mean_loss(params):
        whole = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), batch)
        sums = squared_error(line(params, whole), whole)
        return sums.loss / sums.weight

    return jax.value_and_grad(mean_loss)(params)


def host(tree):
    """A copy that outlives the donation of the state."""
    return jax.tree.map(np.array, tree)


class TestAccumulation:
    """A supervised batch of eight rows with very different token counts, cut in different ways."""

    RESPONSES = ((1, 9), (2, 1), (9, 9), (1, 1), (8, 7), (5, 5), (6, 2), (3, 3))
    WEIGHTS = (1, 1, 1, 1, 1, 0, 0, 0)  # the last rows only fill the batch

    def run(self, mesh, tiny_model, micro_batches, filler_seed=0, freeze=(r"vision_tower/.*",)):
        model, params = tiny_model
        batch = tiny.random_batch(model.config, [7, 9, 6, 8, 9, 6, 7, 8], self.RESPONSES)
        filler = tiny.random_batch(
            model.config, [7, 9, 6, 8, 9, 6, 7, 8], self.RESPONSES, seed=filler_seed
        )
        kept = np.array(self.WEIGHTS, bool)
        batch = jax.tree.map(
            lambda a, b: np.where(kept.reshape(-1, *[1] * (a.ndim - 1)), a, b), batch, filler
        )
        batch = dataclasses.replace(
            batch,
            weights=np.float32(self.WEIGHTS),
            loss_mask=batch.response_mask & (np.arange(9) > 0),
        )
        optimizer = optax.sgd(CONSTANT)
        state = create_state(params, model, optimizer, freeze, mesh)
        step = make_step(make_loss(model, [make_term("sft")]), optimizer, CONSTANT, state)
        stacked = jax.tree.map(
            lambda leaf: leaf.reshape(micro_batches, -1, *leaf.shape[1:]), tiny.train_batch(batch)
        )
        with jax.set_mesh(mesh):
            state, metrics = step(state, stacked)
        return host(state), means([metrics])

    @pytest.fixture(scope="class")
    @classmethod
    def whole(cls, mesh, tiny_model):
        return cls().run(mesh, tiny_model, 1)

    @pytest.mark.slow
    def test_uneven_micro_batches_add_up_to_the_whole(self, mesh, tiny_model, whole):
        state, metrics = self.run(mesh, tiny_model, 4)
        expected_state, expected = whole
        for name in expected:
            assert metrics[name] == pytest.approx(expected[name], rel=2e-6), name
        for path, leaf in expected_state.params.items():
            np.testing.assert_allclose(state.params[path], leaf, rtol=1e-5, atol=1e-5, err_msg=path)
        before = flatten(tiny_model[1])
        assert all(
            np.abs(state.params[p] - before[p]).max() > 1e-3
            for p in state.params
            if not p.endswith("k_proj/bias")
        )

    def test_rows_that_fill_the_batch_do_not_count(self, mesh, tiny_model, whole):
        state, metrics = self.run(mesh, tiny_model, 1, filler_seed=5)
        assert metrics == pytest.approx(whole[1], rel=1e-6)
        for path, leaf in whole[0].params.items():
            np.testing.assert_allclose(state.params[path], leaf, rtol=0, atol=1e-6, err_msg=path)

    def test_frozen_parameters_stay(self, tiny_model, whole):
        state, before = whole[0], flatten(tiny_model[1])
        assert {path.split("/")[0] for path in state.frozen} == {"vision_tower"}
        assert {path.split("/")[0] for path in state.params} == {
            "multi_modal_projector",
            "language_model",
        }
        merged = flatten(whole_params(state))
        assert merged.keys() == before.keys()
        for path in state.frozen:
            np.testing.assert_array_equal(merged[path], before[path])


@pytest.mark.slow
def test_micro_batches_of_a_line(mesh):
    batch = line_batch(3, 4)
    batch[2][1, 1:] = 0
    batch[2][2] = 0
    optimizer = optax.sgd(CONSTANT)
    state = create_state(line_params(), LINE, optimizer, (), mesh)
    state, metrics = make_step(LINE_LOSS, optimizer, CONSTANT, state)(state, batch)
    loss, gradient = line_gradient(line_params(), batch)
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-6)
    assert metrics["grad_norm"] == pytest.approx(float(optax.global_norm(gradient)), rel=1e-6)
    assert metrics["learning_rate"] == 0.5
    assert int(state.step) == 1
    expected = jax.tree.map(lambda p, g: p - 0.5 * g, line_params(), gradient)
    for path, leaf in flatten(expected).items():
        np.testing.assert_allclose(state.params[path], leaf, rtol=1e-6)


def halves(heights, batch):
    """Another mean, over other weights."""
    x, _, weight = batch
    counted = weight * (x[:, 0] > 0)
    return Sums(jnp.sum(counted * jnp.cos(heights)), counted.sum(), {})


def order_statistics(heights, batch):
    """The k-th largest height counts k times: rows depend on each other."""
    weight = batch[2]
    ordered = jnp.sort(jnp.where(weight > 0, heights, -jnp.inf))[::-1]
    ordered = jnp.where(jnp.arange(len(ordered)) < weight.sum(), ordered, 0)
    return Sums(jnp.sum(ordered**2 * jnp.arange(len(ordered))), weight.sum(), {})


@pytest.mark.parametrize(
    ("terms", "coupled"),
    [
        ((squared_error, halves), False),
        ((order_statistics,), True),
        ((halves, order_statistics), True),
    ],
)
def test_several_terms_and_coupled_rows_do_not_depend_on_the_cut(mesh, terms, coupled):
    """Every term is divided by its own weight in the whole batch."""
    batch = line_batch(1, 12)
    batch[2][0, 3:5] = 0
    optimizer = optax.sgd(CONSTANT)
    loss = tiny.row_loss(line, *terms, coupled=coupled)
    results = []
    for micro_batches in (1, 2, 6):
        state = create_state(line_params(), LINE, optimizer, (), mesh)
        cut = jax.tree.map(lambda x, n=micro_batches: x.reshape(n, 12 // n, *x.shape[2:]), batch)
        state, metrics = make_step(loss, optimizer, CONSTANT, state)(state, cut)
        results.append((host(state.params), float(metrics["loss"])))
    whole = jax.tree.map(lambda x: x[0], batch)
    expected = jax.grad(
        lambda params: sum(
            part.loss / part.weight for part in (term(line(params, whole), whole) for term in terms)
        )
    )(line_params())
    for params, value in results:
        assert value == pytest.approx(results[0][1], rel=1e-6)
        for path, slope in flatten(expected).items():
            start = flatten(line_params())[path]
            np.testing.assert_allclose(params[path], start - 0.5 * slope, rtol=2e-5, atol=1e-6)


def test_a_reference_in_the_step(mesh):
    """It stays, or follows every second step; the policy is compared with what it is then."""

    def evaluate(gap, batch, state):
        return [Sums(jnp.sum(gap + gap**2), jnp.float32(len(gap)), {})], state

    loss = dataclasses.replace(
        LINE_LOSS,
        forward=lambda params, reference, batch: line(params, batch) - line(reference, batch),
        sums=evaluate,
        metrics=lambda sums: {"gap": sums[0].loss},
    )
    optimizer = optax.sgd(optax.constant_schedule(0.1))
    seen = []
    for moving in (None, MovingReference(every=2, mixup=0.25)):
        state = create_state(line_params(), LINE, optimizer, (), mesh, reference_dtype=jnp.float32)
        step = make_step(loss, optimizer, CONSTANT, state, reference=moving)
        expected = host(state.reference)
        gaps = []
        for number in range(1, 5):
            state, metrics = step(state, line_batch())
            gaps.append(float(metrics["gap"]))
            if moving and number % 2 == 0:
                for path, leaf in expected.items():
                    expected[path] = leaf + 0.25 * (np.asarray(state.params[path]) - leaf)
            for path, leaf in expected.items():
                np.testing.assert_allclose(state.reference[path], leaf, rtol=1e-6)
        assert gaps[0] == 0
        assert gaps[1] != 0
        seen.append(gaps)
    assert seen[0][:2] == seen[1][:2]
    assert seen[0][2] != seen[1][2]


def test_gradients_are_clipped_and_reported_as_they_were(mesh):
    config = AdamW(max_grad_norm=0.1, beta1=0.9)
    optimizer = make_optimizer(config, CONSTANT)
    state = create_state(line_params(), LINE, optimizer, (), mesh)
    state, metrics = make_step(LINE_LOSS, optimizer, CONSTANT, state)(state, line_batch())
    _, gradient = line_gradient(line_params(), line_batch())
    norm = float(optax.global_norm(gradient))
    assert norm > 1
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-6)
    first_moment = optax.tree_utils.tree_get(state.optimizer, "mu")
    for path, leaf in flatten(gradient).items():
        expected = (1 - config.beta1) * leaf * 0.1 / norm
        np.testing.assert_allclose(first_moment[path], expected, rtol=1e-5)


def test_freezing_by_regular_expression():
    paths = ["a/kernel", "a/bias", "b/kernel"]
    assert trainable_paths(paths, ()) == paths
    assert trainable_paths(paths, (r"a/.*",)) == ["b/kernel"]
    assert trainable_paths(paths, (r".*/bias", r"b/.*")) == ["a/kernel"]
    with pytest.raises(ValueError, match=r"'c/\.\*' matches no parameter, such as 'a/kernel'"):
        trainable_paths(paths, (r"a/.*", r"c/.*"))
    with pytest.raises(ValueError, match="matches no parameter"):
        trainable_paths(paths, ("kernel",))  # a part of a path is not a path
    with pytest.raises(ValueError, match="leaves nothing to train"):
        trainable_paths(paths, (r".*",))


@pytest.mark.parametrize("fault", ["nan", "inf", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(mesh, fault):
    def forward(params, batch):
        # sqrt has a value at 0 and no gradient there.
        root = jnp.sqrt(jnp.abs(params["dense"]["bias"] - 0.5)).sum()
        return line(params, batch) + (root if fault == "gradient" else 0)

    loss = tiny.row_loss(forward, squared_error)

    optimizer = make_optimizer(AdamW(learning_rate=0.1), CONSTANT)
    state = create_state(line_params(), LINE, optimizer, (), mesh)
    before = host(state)
    step = make_step(loss, optimizer, CONSTANT, state)
    batch = line_batch()
    if fault != "gradient":
        batch[1][0, 2] = float(fault)
    state, metrics = step(state, batch)
    assert metrics["finite"] == 0
    assert np.isfinite(metrics["loss"]) == (fault == "gradient")
    assert not np.isfinite(metrics["grad_norm"])
    jax.tree.map(
        np.testing.assert_array_equal,
        host((state.params, state.optimizer)),
        (before.params, before.optimizer),
    )
    assert int(state.step) == 0 and state.is_halted


def test_no_step_behind_one_that_is_not_finite_changes_anything(mesh):
    """Whoever looks later finds the state of the last good step, which goes on where it is not
    halted."""
    loss, optimizer = tiny.row_loss(line, squared_error), make_optimizer(AdamW(), CONSTANT)
    state = create_state(line_params(), LINE, optimizer, (), mesh)
    step = make_step(loss, optimizer, CONSTANT, state)
    broken = line_batch()
    broken[1][0, 2] = np.nan
    state, metrics = step(state, line_batch())
    assert metrics["finite"] == 1
    good = host(state)
    for batch in (broken, line_batch(), line_batch()):
        state, metrics = step(state, batch)
        assert metrics["finite"] == 0
    assert int(state.step) == 1
    jax.tree.map(
        np.testing.assert_array_equal,
        host((state.params, state.optimizer)),
        (good.params, good.optimizer),
    )
    state, metrics = step(dataclasses.replace(state, is_halted=good.is_halted), line_batch())
    assert metrics["finite"] == 1 and int(state.step) == 2
    assert np.any(np.asarray(state.params["dense/kernel"]) != good.params["dense/kernel"])


def test_parameters_are_kept_in_float32_and_computed_in_bfloat16(mesh):
    seen = []

    def forward(params, batch):
        seen.extend(leaf.dtype for leaf in jax.tree.leaves(params))
        return line(params, batch)

    loss = tiny.row_loss(forward, squared_error)

    optimizer = optax.sgd(1e-4)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), line_params())
    state = create_state(params, LINE, optimizer, (), mesh)
    state, _ = make_step(loss, optimizer, CONSTANT, state, jnp.bfloat16)(state, line_batch())
    assert set(seen) == {jnp.dtype(jnp.bfloat16)}
    kernel = state.params["dense/kernel"]
    assert kernel.dtype == jnp.float32
    # A change this small is lost in bfloat16.
    assert 0 < np.abs(kernel - line_params()["dense"]["kernel"]).max() < 1e-3


def test_only_kernels_and_embeddings_decay(mesh):
    config = AdamW(learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config, optax.constant_schedule(0.1))
    state = create_state(line_params(), LINE, optimizer, (), mesh)
    batch = line_batch()
    batch[2][:] = 0  # no gradient: what moves, decays
    before = host(state.params)
    state, _ = make_step(LINE_LOSS, optimizer, CONSTANT, state)(state, batch)
    after = host(state.params)
    np.testing.assert_allclose(after["dense/kernel"], before["dense/kernel"] * 0.95, rtol=1e-6)
    for path in ("dense/bias", "norm/scale"):
        np.testing.assert_array_equal(after[path], before[path])


def test_schedule():
    schedule = make_schedule(Cosine(warmup_ratio=0.1), 2.0, 40)
    rates = [float(schedule(step)) for step in range(41)]
    np.testing.assert_allclose(rates[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)  # 4 steps up
    assert max(rates) == rates[4]
    assert rates[22] == pytest.approx(1.0)  # half way down
    assert np.all(np.diff(rates[4:]) < 0)
    assert rates[39] > 0
    assert rates[40] == pytest.approx(0, abs=1e-6)
    assert float(schedule(1000)) == pytest.approx(0, abs=1e-6)
    assert float(make_schedule(Cosine(warmup_ratio=0), 2.0, 40)(0)) == 2.0
    assert 0 < float(make_schedule(Cosine(warmup_ratio=1.0), 2.0, 1)(0)) <= 2.0
