"""Lion, Muon and Adafactor against float64 recomputations; layers in a stack as if each were alone;
schedules."""

import math

import jax
import numpy as np
import optax
import pytest

from mmpo_jax.core.trees import flatten
from mmpo_jax.recipes.optimizers import (
    Adafactor,
    AdamW,
    Constant,
    Cosine,
    Linear,
    Lion,
    Muon,
    WarmupStableDecay,
)
from mmpo_jax.training.optimizer import make_optimizer, make_schedule

RATE, STEPS = 0.02, 6
STACK = "language_model/layers/self_attn/q_proj/kernel"
SHAPES = {
    STACK: (3, 6, 9),
    "language_model/layers/self_attn/q_proj/bias": (3, 9),
    "multi_modal_projector/linear_1/kernel": (8, 5),
    "language_model/embed_tokens/embedding": (12, 6),
    "language_model/lm_head/kernel": (6, 12),
    "language_model/norm/scale": (6,),
}
OPTIONS = {"learning_rate": RATE, "weight_decay": 0.3, "max_grad_norm": 1e9}


def drawn(seed):
    rng = np.random.default_rng(seed)
    return {path: np.float32(rng.standard_normal(shape)) for path, shape in SHAPES.items()}


def trained(config, params, gradients):
    """The parameters after a step with each of the gradients."""
    optimizer = make_optimizer(config, lambda step: config.learning_rate)
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    for grads in gradients:
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


@pytest.fixture(scope="module")
def start():
    return drawn(0)


@pytest.fixture(scope="module")
def gradients():
    return [drawn(seed) for seed in range(1, STEPS + 1)]


def decay(path):
    return 0.0 if path.endswith(("/bias", "/scale")) else OPTIONS["weight_decay"]


def lion(path, p, grads, config):
    m = np.zeros_like(p)
    for g in grads:
        p = p - RATE * (np.sign(config.beta1 * m + (1 - config.beta1) * g) + decay(path) * p)
        m = config.beta2 * m + (1 - config.beta2) * g
    return p


def adam(path, p, grads, config):
    m, v = np.zeros_like(p), np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = config.beta1 * m + (1 - config.beta1) * g
        v = config.beta2 * v + (1 - config.beta2) * g * g
        m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
        p = p - RATE * (m_hat / (np.sqrt(v_hat) + config.epsilon) + decay(path) * p)
    return p


def orthogonal(x, steps):
    """Newton-Schulz iterations with Jordan's coefficients."""
    if x.shape[0] > x.shape[1]:
        return orthogonal(x.T, steps).T
    x = x / np.linalg.norm(x)
    for _ in range(steps):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def muon(path, p, grads, config):
    """A matrix, or each of a stack; moments are corrected for their start at zero."""
    if p.ndim == 3:
        each = [muon(path, p[i], [g[i] for g in grads], config) for i in range(len(p))]
        return np.stack(each)
    beta, m = config.momentum, np.zeros_like(p)
    for t, g in enumerate(grads, 1):
        m = beta * m + (1 - beta) * g
        mean = m / (1 - beta**t)
        if config.nesterov:
            mean = beta * m / (1 - beta ** (t + 1)) + (1 - beta) * g / (1 - beta**t)
        step = 0.2 * math.sqrt(max(p.shape)) * orthogonal(mean, config.steps)
        p = p - RATE * (step + decay(path) * p)
    return p


def muon_or_adam(path, p, grads, config):
    hidden = path in (STACK, "multi_modal_projector/linear_1/kernel")
    return (muon if hidden else adam)(path, p, grads, config)


@pytest.mark.parametrize(
    ("config", "recomputed"),
    [
        (Lion(**OPTIONS), lion),
        (AdamW(**OPTIONS), adam),
        (Muon(**OPTIONS), muon_or_adam),
        (Muon(**OPTIONS, momentum=0.8, nesterov=False, steps=3), muon_or_adam),
    ],
    ids=["lion", "adamw", "muon", "muon-plain"],
)
def test_recomputed_in_float64(start, gradients, config, recomputed):
    found = trained(config, start, gradients)
    for path, before in start.items():
        grads = [np.float64(step[path]) for step in gradients]
        expected = recomputed(path, np.float64(before), grads, config)
        np.testing.assert_allclose(found[path], expected, rtol=0, atol=2e-5, err_msg=path)


def test_steps_of_muon_are_as_large_as_those_of_adamw(start, gradients):
    config = Muon(**OPTIONS | {"weight_decay": 0})
    moved = trained(config, start, gradients[:1])[STACK] - start[STACK]
    assert np.sqrt(np.mean(moved**2)) == pytest.approx(0.2 * RATE, rel=0.4)


@pytest.mark.parametrize("scale_parameter", [False, True])
@pytest.mark.parametrize("least", [1, 128])
def test_adafactor_sees_layers_one_by_one(start, gradients, scale_parameter, least):
    config = Adafactor(**OPTIONS, scale_parameter=scale_parameter, min_dim_size_to_factor=least)
    found = trained(config, start, gradients)
    stacks = {path for path in SHAPES if "/layers/" in path}
    apart = {
        f"{layer} {path}" if path in stacks else path
        for path in SHAPES
        for layer in (range(3) if path in stacks else [0])
    }

    def split(tree):
        return {
            name: tree[name] if name in tree else tree[name[2:]][int(name[0])] for name in apart
        }

    # Names without "/layers/", but with the same ends.
    alone = {name: name.replace("/layers/", "/layer/") for name in apart}
    expected = trained(
        config,
        {alone[name]: leaf for name, leaf in split(start).items()},
        [{alone[name]: leaf for name, leaf in split(step).items()} for step in gradients],
    )
    for name, leaf in split(found).items():
        np.testing.assert_allclose(leaf, expected[alone[name]], rtol=0, atol=1e-6, err_msg=name)


def test_muon_takes_the_matrices_of_layers_and_projectors(tiny_model):
    params = flatten(tiny_model[1])
    state = make_optimizer(Muon(), lambda step: 0.0).init(params)
    trees = optax.tree_utils.tree_get_all_with_path(state, "nu")
    by_adam = {
        path
        for _, tree in trees
        for path, leaf in tree.items()
        if not isinstance(leaf, optax.MaskedNode)
    }
    by_muon = params.keys() - by_adam
    assert {p for p in by_muon if "layers" not in p} == {
        "multi_modal_projector/linear_1/kernel",
        "multi_modal_projector/linear_2/kernel",
    }
    assert {p for p in by_adam if "/layers/" in p} == {
        p for p in params if "/layers/" in p and not p.endswith("/kernel")
    }
    assert "language_model/lm_head/kernel" in by_adam
    assert "vision_tower/embeddings/patch_embedding/kernel" in by_adam


def rates(config, steps=40):
    schedule = make_schedule(config, 2.0, steps)
    return np.array([float(schedule(step)) for step in range(steps + 1)])


def test_linear_and_constant():
    line = rates(Linear(warmup_ratio=0.1, min_ratio=0.25))
    np.testing.assert_allclose(line[:5], [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)
    np.testing.assert_allclose(line[4:], np.linspace(2.0, 0.5, 37), rtol=1e-6)
    np.testing.assert_allclose(rates(Constant(warmup_ratio=0.1))[4:], 2.0)
    np.testing.assert_allclose(rates(Constant(warmup_ratio=0)), 2.0)


def test_warmup_stable_decay():
    found = rates(WarmupStableDecay(warmup_ratio=0.1, decay_ratio=0.25))
    np.testing.assert_allclose(found[4:31], 2.0)
    np.testing.assert_allclose(found[30:], np.linspace(2.0, 0.0, 11), atol=1e-6)
    root = rates(WarmupStableDecay(warmup_ratio=0, decay_ratio=0.25, decay="1-sqrt"))
    np.testing.assert_allclose(root[30:], 2 * (1 - np.sqrt(np.linspace(0, 1, 11))), atol=1e-6)
    whole = rates(WarmupStableDecay(warmup_ratio=0.6, decay_ratio=1.0, min_ratio=0.5))
    assert whole[24] == 2.0
    assert whole[40] == 1.0


def test_what_is_left_of_a_cosine():
    assert rates(Cosine(warmup_ratio=0, min_ratio=0.1))[-1] == pytest.approx(0.2)


def test_rates_of_few_steps():
    """As docs/training.md tells them."""
    assert rates(Cosine(), 1)[0] == 1.0
    assert rates(Cosine(warmup_ratio=0), 1)[0] == 2.0
    np.testing.assert_allclose(rates(Cosine(), 4), [1.0, 2.0, 1.5, 0.5, 0.0], atol=1e-6)
    np.testing.assert_allclose(rates(Linear(), 4)[3], 2 / 3, rtol=1e-6)
