"""The optimizer's state on eight devices: split as the parameters are, and the same steps."""

import itertools
import math

import jax
import numpy as np
import optax
import pytest
from helpers import meshes

from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.decoder import SHARDING_RULES
from mmpo_jax.parallel.mesh import make_mesh, param_shardings
from mmpo_jax.recipes.optimizers import Adafactor, AdamW, Lion, Muon
from mmpo_jax.training.moments import Blocks, restored
from mmpo_jax.training.optimizer import make_optimizer
from mmpo_jax.training.sharding import optimizer_shardings

MESHES = {"fsdp": (1, 8, 1), "all-axes": (2, 2, 2)}
OPTIONS = {"learning_rate": 1e-2, "weight_decay": 0.1}
OPTIMIZERS = {
    # Adam divides by the gradient's size: a small epsilon would blow up the rounding of zeros.
    "adamw": AdamW(**OPTIONS, epsilon=1e-3),
    "adamw-bfloat16": AdamW(**OPTIONS, epsilon=1e-3, moments="bfloat16"),
    "adamw-int8": AdamW(**OPTIONS, epsilon=1e-3, moments="int8"),
    "adafactor": Adafactor(**OPTIONS, min_dim_size_to_factor=8),
    "adafactor-whole": Adafactor(**OPTIONS, scale_parameter=True, min_dim_size_to_factor=1024),
    "lion-int8": Lion(**OPTIONS, moments="int8"),
    "muon": Muon(**OPTIONS, epsilon=1e-3),
    "muon-int8": Muon(**OPTIONS, epsilon=1e-3, moments="int8"),
}
COMBINED = ("adafactor-whole", "lion-int8", "muon-int8")
"""Of parts that are in the others."""
SHAPES = {
    "language_model/embed_tokens/embedding": (64, 128),
    "language_model/lm_head/kernel": (128, 64),
    "language_model/layers/self_attn/q_proj/kernel": (2, 128, 128),  # rows and columns look alike
    "language_model/layers/mlp/up_proj/kernel": (2, 128, 344),  # 43 numbers on each of eight
    "language_model/layers/mlp/down_proj/kernel": (2, 344, 128),
    "language_model/layers/input_layernorm/scale": (2, 128),
    "language_model/layers/self_attn/q_proj/bias": (2, 128),
}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {path: np.float32(rng.standard_normal(shape)) for path, shape in SHAPES.items()}


def steps_on(mesh, config):
    """(parameters after three steps, the state after them, the placed parameters)."""
    optimizer = make_optimizer(config, lambda step: config.learning_rate)
    places = _places(mesh)
    params = {path: jax.device_put(leaf, places[path]) for path, leaf in drawn(0).items()}
    shardings = optimizer_shardings(optimizer, params, mesh)
    state = jax.jit(optimizer.init, out_shardings=shardings)(params)

    def update(params, state, grads):
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    compiled = jax.jit(update, out_shardings=(places, shardings), donate_argnums=(0, 1))
    with jax.set_mesh(mesh):
        for seed in (1, 2, 3):
            grads = {path: jax.device_put(leaf, places[path]) for path, leaf in drawn(seed).items()}
            params, state = compiled(params, state, grads)
    return params, state, places


def _places(mesh):
    shapes = {path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in SHAPES.items()}
    return flatten(param_shardings(unflatten(shapes), SHARDING_RULES, mesh))


@pytest.fixture(scope="module")
def on_one():
    mesh = meshes.one_device()
    found = {}

    def of(name):
        if name not in found:
            found[name] = jax.tree.map(np.asarray, steps_on(mesh, OPTIMIZERS[name])[:2])
        return found[name]

    return of


def close_but_for_codes(ours, theirs, name):
    """A few codes may be their neighbours: sums in another order, then rounded the other way."""
    assert np.mean(ours.codes != theirs.codes) < 0.01, name
    np.testing.assert_allclose(ours.scales, theirs.scales, rtol=1e-3, err_msg=name)
    difference = np.abs(np.asarray(restored(ours)) - np.asarray(restored(theirs)))
    assert difference.max() < 0.02 * theirs.scales.max(), name


CASES = [
    pytest.param((name, mesh), marks=[pytest.mark.slow] if name in COMBINED else [])
    for name, mesh in itertools.product(OPTIMIZERS, MESHES)
]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def outcome(request):
    """(the optimizer's name, sizes of the mesh, what comes of it there)."""
    name, mesh = request.param
    return name, MESHES[mesh], steps_on(make_mesh(*MESHES[mesh]), OPTIMIZERS[name])


def test_sharded_equals_unsharded(on_one, outcome):
    name, _, (params, state, _) = outcome
    expected, expected_state = on_one(name)
    for path, leaf in params.items():
        difference = np.abs(np.asarray(leaf) - expected[path])
        narrow = name.endswith(("int8", "bfloat16"))
        # Where one number is rounded the other way, a weight moves by a step's share.
        assert np.quantile(difference, 0.99 if narrow else 1.0) < 2e-5, path
        assert difference.max() < (1e-3 if narrow else 2e-5), path
    ours = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, Blocks))
    theirs = jax.tree.leaves(expected_state, is_leaf=lambda leaf: isinstance(leaf, Blocks))
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, Blocks):
            close_but_for_codes(jax.tree.map(np.asarray, one), other, name)


def test_no_device_holds_much_of_the_state(outcome):
    """What has a matrix's size is split as it is; of the rest only what is small is everywhere."""
    name, sizes, (_, state, places) = outcome
    split = sizes[1] * sizes[2]
    matrices = {path: math.prod(shape) for path, shape in SHAPES.items() if len(shape) > 1}
    biggest = max(matrices.values())
    flat = jax.tree_util.tree_leaves_with_path(state)
    total = sum(leaf.nbytes for _, leaf in flat)
    held = sum(leaf.addressable_shards[0].data.nbytes for _, leaf in flat)
    for keys, leaf in flat:
        path = next((k.key for k in keys if getattr(k, "key", None) in SHAPES), None)
        if path is not None and leaf.shape == SHAPES[path]:
            assert leaf.sharding.is_equivalent_to(places[path], leaf.ndim), keys
    if name == "adafactor":
        assert total < biggest  # in bytes, of four for each number
        factors = [leaf for keys, leaf in flat if leaf.size >= 128 and "v_" in str(keys)]
        assert len(factors) == 8  # of the embedding and the head one, the other has 64
        if sizes[1] > 1 and sizes[2] > 1:
            assert all(not leaf.sharding.is_fully_replicated for leaf in factors)
    else:
        assert held < total / split * 1.6
