"""What eight devices compute is what one computes, however they are laid out."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import meshes, tiny
from helpers.sampling import sample
from jax.sharding import NamedSharding, PartitionSpec

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten
from mmpo_jax.generation.sampler import sample_keys
from mmpo_jax.models import layers
from mmpo_jax.models.head import token_statistics
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import (
    batch_spec,
    make_mesh,
    param_shardings,
    put_batch,
    put_params,
)
from mmpo_jax.recipes.optimizers import AdamW, Constant
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.scoring.log_probs import score_batch
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.metrics import means
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import create_state, make_step, whole_params

MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1), "all-axes": (2, 2, 2)}
TOLERANCE = 1e-5
# Adam divides by the gradient's size: a small epsilon would blow up the rounding of zeros.
OPTIMIZER = AdamW(learning_rate=3e-3, epsilon=1e-3)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a mesh computes."""

    start: dict
    """Shapes and shardings of the state's parameters and of its optimizer's moments."""
    log_probs: np.ndarray
    metrics: list[dict[str, float]]
    params: dict[str, np.ndarray]
    tokens: np.ndarray


def run(mesh, model, params) -> Outcome:
    """The reference's log-probs, two DPO steps from it, then samples of the trained model."""
    batch = tiny.random_batch(
        model.config, [6, 9, 8, 7, 9, 6, 7, 9], [(3, 5), (5, 1), (2, 4), (5, 5)] * 2
    )
    batch = dataclasses.replace(batch, weights=np.float32([1, 1, 1, 1, 1, 1, 1, 0]))
    schedule = make_schedule(Constant(warmup_ratio=0), OPTIMIZER.learning_rate, 10)
    optimizer = make_optimizer(OPTIMIZER, schedule)
    decoding = Decoding(num_samples=2, max_new_tokens=5)
    with jax.set_mesh(mesh):
        reference = score_batch(
            model, put_params(params, model.rules, mesh), put_batch(batch, mesh)
        )
        state = create_state(params, model, optimizer, (), mesh)
        start = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.optimizer))
        step = make_step(make_loss(model, [make_term("dpo", beta=0.1)]), optimizer, schedule, state)
        inputs = tiny.train_batch(batch, np.asarray(reference))
        inputs = put_batch(jax.tree.map(lambda leaf: leaf[None], inputs), mesh, leading=1)
        metrics = []
        for _ in range(2):
            state, values = step(state, inputs)
            metrics.append(means([values]))
        after = jax.tree.map(lambda leaf: leaf.sharding, (state.params, state.optimizer))
        assert jax.tree.all(jax.tree.map(lambda a, b: a == b, start, after))
        keys = sample_keys(0, 0, np.arange(8), 2)
        tokens = sample(
            model,
            whole_params(state),
            batch,
            keys,
            decoding=decoding,
            eos_ids=(tiny.EOS_ID,),
            pad_id=tiny.PAD_ID,
            mesh=mesh,
        )
    trained = {path: np.asarray(leaf) for path, leaf in state.params.items()}
    return Outcome(start, np.asarray(reference), metrics, trained, np.asarray(tokens))


@pytest.fixture(scope="module")
def one_device():
    return meshes.one_device()


@pytest.fixture(scope="module")
def unsharded(tiny_model, one_device):
    return run(one_device, *tiny_model)


@pytest.fixture(scope="module", params=[*MESHES, "two-goes"])
def outcome(request, tiny_model):
    """Also with gradients that are spread in two goes, as on 64 devices and more."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "two-goes":
            patch.setattr(layers, "SEVERAL_SIDES", 4)
        return run(make_mesh(*MESHES.get(request.param, (1, 8, 1))), *tiny_model)


def test_same_log_probs_and_losses(unsharded, outcome):
    np.testing.assert_allclose(outcome.log_probs, unsharded.log_probs, rtol=1e-6, atol=TOLERANCE)
    for step, (actual, expected) in enumerate(zip(outcome.metrics, unsharded.metrics, strict=True)):
        assert actual.keys() == expected.keys()
        for name in expected:
            if step == 0 and name == "rewards/accuracies":
                continue  # margins are 0 up to rounding, whose sign means nothing
            assert actual[name] == pytest.approx(expected[name], rel=1e-5, abs=TOLERANCE), name


def test_same_parameters_after_two_steps(tiny_model, unsharded, outcome):
    before = flatten(tiny_model[1])
    for path, expected in unsharded.params.items():
        np.testing.assert_allclose(
            outcome.params[path], expected, rtol=0, atol=TOLERANCE, err_msg=path
        )
    moved = [path for path in before if np.abs(outcome.params[path] - before[path]).max() > 1e-3]
    assert len(moved) > 20


def test_same_samples(unsharded, outcome):
    np.testing.assert_array_equal(outcome.tokens, unsharded.tokens)
    assert np.all(outcome.tokens[-1] == tiny.PAD_ID)  # a row that only fills the batch


def test_step_0_is_exact(unsharded, outcome):
    for metrics in (unsharded.metrics, outcome.metrics):
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert metrics[0]["rewards/chosen"] == pytest.approx(0, abs=1e-6)
        assert metrics[0]["rewards/rejected"] == pytest.approx(0, abs=1e-6)
        assert metrics[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
        assert metrics[0]["finite"] == 1
        assert metrics[1]["loss"] < math.log(2) - 1e-3


@pytest.fixture(scope="module")
def with_later_images(tiny_model, tiny_processor):
    """(mesh) -> log-probs of a batch with images in responses, and the gradient of all of them."""
    model, params = tiny_model
    batch = tiny.batch_with_later_images(tiny_processor, 8)
    weights = np.random.default_rng(0).standard_normal(batch.response_ids.shape)

    def compute(mesh):
        @jax.jit
        @functools.partial(jax.grad, has_aux=True)
        def gradient(params, batch, weights):
            found = response_log_probs(model, params, batch)
            return (found * weights).sum(), found

        with jax.set_mesh(mesh):
            placed = put_batch((batch, np.float32(weights)), mesh)
            found, log_probs = gradient(put_params(params, model.rules, mesh), *placed)
        return np.asarray(log_probs), flatten(jax.tree.map(np.asarray, found))

    return compute


@pytest.fixture(scope="module")
def expected_with_later_images(with_later_images, one_device):
    return with_later_images(one_device)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
@pytest.mark.slow
def test_images_in_responses(with_later_images, expected_with_later_images, sizes):
    log_probs, gradient = with_later_images(make_mesh(*sizes))
    expected, expected_gradient = expected_with_later_images
    assert expected.std() > 0.5
    np.testing.assert_allclose(log_probs, expected, rtol=1e-6, atol=TOLERANCE)
    for path, leaf in expected_gradient.items():
        np.testing.assert_allclose(gradient[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_parameters_and_moments_are_sharded(tiny_model, sizes):
    model, params = tiny_model
    mesh = make_mesh(*sizes)
    optimizer = make_optimizer(OPTIMIZER, lambda step: 0.0)
    state = create_state(params, model, optimizer, (r"vision_tower/.*",), mesh)
    split = sizes[1] * sizes[2]
    for path in (
        "language_model/embed_tokens/embedding",
        "language_model/lm_head/kernel",
        "language_model/layers/self_attn/q_proj/kernel",
        "language_model/layers/mlp/down_proj/kernel",
        "multi_modal_projector/linear_1/kernel",
    ):
        leaf = state.params[path]
        shapes = {shard.data.shape for shard in leaf.addressable_shards}
        assert {math.prod(shape) for shape in shapes} == {leaf.size // split}, path
    frozen = state.frozen["vision_tower/layers/mlp/fc1/kernel"]
    assert math.prod(frozen.addressable_shards[0].data.shape) == frozen.size // split

    moments = [
        tree
        for tree in jax.tree.leaves(state.optimizer, is_leaf=lambda x: isinstance(x, dict))
        if isinstance(tree, dict)
    ]
    assert len(moments) == 2  # Adam's first and second
    for tree in moments:
        assert tree.keys() == state.params.keys()
        for path, leaf in tree.items():
            assert leaf.sharding == state.params[path].sharding
            assert leaf.addressable_shards[0].data.shape == (
                state.params[path].addressable_shards[0].data.shape
            )
    on_device = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    assert on_device < whole / split * 1.6  # biases and norms are on every device


@pytest.mark.parametrize("vocab", [240, 251])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_no_device_holds_the_head_or_its_gradient(sizes, vocab):
    """251 is a number of tokens that eight devices do not share evenly."""
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((8, 3, 10, 16)).astype(np.float32)
    kernel = rng.standard_normal((16, vocab)).astype(np.float32)
    labels = rng.integers(0, vocab, (8, 3, 10))

    def loss(hidden, kernel, labels):
        log_probs = token_statistics(hidden, kernel, labels, chunk=4)["log_probs"]
        return (log_probs * np.linspace(-1, 1, 10)).sum(), log_probs

    gradient = jax.grad(loss, argnums=(0, 1), has_aux=True)
    expected = jax.jit(gradient)(hidden, kernel, labels)
    mesh = make_mesh(*sizes)
    rules = (("lm_head", PartitionSpec("fsdp", "tensor")),)
    split = param_shardings({"lm_head": kernel}, rules, mesh)["lm_head"]
    rows = put_batch((hidden, labels), mesh)
    placed = rows[0], jax.device_put(kernel, split), rows[1]
    with jax.set_mesh(mesh):
        program = jax.jit(gradient, out_shardings=((None, split), None)).lower(*placed).compile()
    for a, b in zip(jax.tree.leaves(program(*placed)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    if vocab % mesh.shape["tensor"] == 0:  # else XLA makes it whole on the way to another split
        assert f"[16,{vocab}]" not in program.as_text()


def test_a_parameter_without_a_rule_is_refused(tiny_model):
    model, params = tiny_model
    mesh = make_mesh(1, 8, 1)
    extra = params | {"adapter": {"kernel": np.zeros((8, 8), np.float32)}}
    with pytest.raises(ValueError, match="no sharding rule matches the parameter adapter/kernel"):
        param_shardings(extra, model.rules, mesh)
    with pytest.raises(ValueError, match="no sharding rule"):
        # A rule has to match the whole path.
        param_shardings({"kernels": jnp.zeros(8)}, ((r"kernel", PartitionSpec()),), mesh)


def test_a_dimension_that_does_not_divide_stays_whole():
    rules = ((r".*", PartitionSpec("tensor", "fsdp")),)
    mesh = make_mesh(2, 2, 2)
    shardings = param_shardings({"a": jnp.zeros((33, 6)), "b": jnp.zeros((4, 3))}, rules, mesh)
    assert shardings["a"].shard_shape((33, 6)) == (33, 3)
    assert shardings["b"].shard_shape((4, 3)) == (2, 3)


def test_mesh_sizes():
    assert make_mesh().shape == {"data": 1, "fsdp": 8, "tensor": 1}
    assert make_mesh(data=-1, fsdp=2, tensor=2).shape == {"data": 2, "fsdp": 2, "tensor": 2}
    for sizes in [(3, -1, 1), (1, 4, 1), (-1, -1, 1), (2, 8, 1)]:
        with pytest.raises(MmpoError, match="8 devices"):
            make_mesh(*sizes)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 4, 1), (1, 4, 2)])
def test_gradients_that_are_spread_in_two_goes(shape, monkeypatch):
    """As on 64 devices and more; they are those of one device."""
    monkeypatch.setattr(layers, "SEVERAL_SIDES", 4)
    rng = np.random.default_rng(0)
    kernel, x = rng.standard_normal((16, 24)), rng.standard_normal((32, 16))
    mesh, spec = make_mesh(*shape), PartitionSpec("fsdp", "tensor")

    def loss(kernel, x):
        return jnp.square(x @ layers.spread_gradient(kernel, spec)).sum()

    expected = jax.grad(loss)(kernel, x)
    placed = jax.device_put(kernel, NamedSharding(mesh, spec))
    rows = jax.device_put(x, NamedSharding(mesh, batch_spec(mesh)))
    with jax.set_mesh(mesh):
        step = jax.jit(jax.grad(loss), out_shardings=placed.sharding)
        found = step(placed, rows)
        assert "fsdp_outer" in step.lower(placed, rows).as_text()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(1, 2, 2), (1, 2, 4), (2, 1, 2)])
def test_gradients_of_one_row_a_device(tiny_model, sizes):
    """The compiler once summed the gradients of what `tensor` gathers wrongly there."""
    model, params = tiny_model
    batch = tiny.random_batch(model.config, [24, 20], [(8, 5, 8), (6, 8, 7)])
    cotangent = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)

    def gradient(mesh):
        def loss(params, batch):
            return (response_log_probs(model, params, batch) * cotangent).sum()

        with jax.set_mesh(mesh):
            placed = put_params(params, model.rules, mesh)
            return flatten(jax.jit(jax.grad(loss))(placed, put_batch(batch, mesh)))

    expected, found = gradient(meshes.one_device()), gradient(meshes.mesh_of(*sizes))
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, atol=1e-4, err_msg=path)
