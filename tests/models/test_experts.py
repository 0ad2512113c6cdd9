"""Experts against transformers' own block, and sharded against one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models import grouped
from mmpo_jax.models.experts import SHARDING_RULES, SparseMlp
from mmpo_jax.models.grouped import grouped_matmul
from mmpo_jax.models.layer_kinds import ExpertsConfig
from mmpo_jax.parallel.mesh import make_mesh, put_params

SIZE, ACT = 16, "silu"
CONFIG = ExpertsConfig(8, 3, 12, ACT, normalised=True)
SWITCHES = {
    "normalised": CONFIG,
    "as-they-are": ExpertsConfig(6, 2, 8, ACT, normalised=False),
    "one-expert-a-token": ExpertsConfig(5, 1, 8, ACT, normalised=False),
    "all-experts": ExpertsConfig(4, 4, 8, ACT, normalised=True),
    "shared": ExpertsConfig(8, 2, 12, ACT, normalised=False, shared_size=10),
}


def make(config):
    """(graph, path -> large random float64 array)"""
    graph, state = nnx.split(SparseMlp(SIZE, config, 1, nnx.Rngs(0)))
    rng = np.random.default_rng(0)
    flat = flatten(nnx.to_pure_dict(state))
    return graph, {
        path: 1.2 * rng.standard_normal(leaf.shape) / leaf.shape[-2] ** 0.5
        for path, leaf in flat.items()
    }


def run(graph, flat, x):
    return nnx.merge(graph, unflatten(flat))(x)


def in_numpy(config, flat, x):
    """The block's definition, token by token."""

    def mlp(x, gate, up, down):
        gate = x @ gate
        return (gate / (1 + np.exp(-gate)) * (x @ up)) @ down

    out = np.zeros_like(x)
    for place in np.ndindex(x.shape[:2]):
        token = x[place]
        logits = token @ flat["gate/kernel"]
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        chosen = np.argsort(-probs)[: config.top_k]
        weights = probs[chosen] / (probs[chosen].sum() if config.normalised else 1)
        for expert, weight in zip(chosen, weights, strict=True):
            kernels = (flat[f"experts/{n}_proj/kernel"][expert] for n in ("gate", "up", "down"))
            out[place] += weight * mlp(token, *kernels)
        if config.shared_size:
            kernels = (flat[f"shared_expert/{n}_proj/kernel"] for n in ("gate", "up", "down"))
            share = 1 / (1 + np.exp(-(token @ flat["shared_expert_gate/kernel"])))
            out[place] += share * mlp(token, *kernels)
    return out


@pytest.fixture
def tokens():
    return np.random.default_rng(1).standard_normal((8, 5, SIZE))


@pytest.mark.parametrize("name", SWITCHES)
def test_the_definition(name, tokens):
    graph, flat = make(SWITCHES[name])
    with jax.enable_x64(True):
        found = jax.jit(functools.partial(run, graph))(flat, tokens)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, in_numpy(SWITCHES[name], flat, tokens), rtol=0, atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("name", [name for name in SWITCHES if name != "shared"])
def test_outputs_and_gradients_are_those_of_transformers(name, tokens):
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_moe import modeling_qwen3_moe

    config = SWITCHES[name]
    theirs = modeling_qwen3_moe.Qwen3MoeSparseMoeBlock(
        modeling_qwen3_moe.Qwen3MoeConfig(
            hidden_size=SIZE,
            hidden_act=ACT,
            num_experts=config.num_experts,
            num_experts_per_tok=config.top_k,
            moe_intermediate_size=config.intermediate_size,
            norm_topk_prob=config.normalised,
            experts_implementation="eager",
        )
    ).double()
    graph, flat = make(config)
    fused = np.concatenate([flat[f"experts/{n}_proj/kernel"] for n in ("gate", "up")], axis=-1)
    own = {
        "gate.weight": flat["gate/kernel"].T,
        "experts.gate_up_proj": fused.swapaxes(1, 2),
        "experts.down_proj": flat["experts/down_proj/kernel"].swapaxes(1, 2),
    }
    theirs.load_state_dict({key: torch.tensor(value.copy()) for key, value in own.items()})
    x = torch.tensor(tokens, requires_grad=True)
    expected = theirs(x)
    expected.square().sum().backward()

    def value(flat, x):
        found = run(graph, flat, x)
        return (found**2).sum(), found

    with jax.enable_x64(True):
        gradient = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))
        (grads, by_x), found = gradient(flat, jnp.asarray(tokens))
    # transformers takes the softmax in float32.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    close(found, expected.detach().numpy())
    close(by_x, x.grad.numpy())
    close(grads["gate/kernel"], theirs.gate.weight.grad.numpy().T)
    up = theirs.experts.gate_up_proj.grad.numpy().swapaxes(1, 2)
    split = np.split(up, 2, axis=-1)
    close(grads["experts/gate_proj/kernel"], split[0])
    close(grads["experts/up_proj/kernel"], split[1])
    down = theirs.experts.down_proj.grad.numpy().swapaxes(1, 2)
    close(grads["experts/down_proj/kernel"], down)


MESHES = [
    *({"expert": 8}, {"expert": 4, "tensor": 2}, {"fsdp": 4, "expert": 2}, {"fsdp": 8}),
    *({"data": 2, "fsdp": 2, "expert": 2}, {"fsdp": 2, "expert": 2, "tensor": 2}, {"tensor": 8}),
    {"data": 2, "expert": 2, "tensor": 2},
]


def with_adapters(flat):
    rng = np.random.default_rng(2)
    adapted = dict(flat)
    for name in ("gate", "up", "down"):
        layer = f"experts/{name}_proj"
        experts, inputs, outputs = flat[f"{layer}/kernel"].shape
        adapted[f"{layer}/lora_a"] = rng.standard_normal((experts, inputs, 3))
        adapted[f"{layer}/lora_b"] = 0.2 * rng.standard_normal((experts, 3, outputs))
        adapted[f"{layer}/lora_scale"] = np.full(experts, 0.5)
    return adapted


def run_adapted(graph, flat, x):
    """The block with the leaves of adapters, as `Model.bind` puts them in."""
    plain = {path: leaf for path, leaf in flat.items() if "lora_" not in path}
    module = nnx.merge(graph, unflatten(plain))
    for path in flat.keys() - plain.keys():
        _, layer, name = path.split("/")
        setattr(getattr(module.experts, layer), name, nnx.Param(flat[path]))
    return module(x)


def derivatives(graph, flat, x, sizes):
    """(outputs, gradients by parameters and tokens) on a mesh; None for one device."""

    def value(flat, x):
        found = run_adapted(graph, flat, x)
        return (found**2).sum(), found

    gradient = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True))
    if sizes is None:
        return gradient(flat, x)
    mesh = make_mesh(**sizes)
    rules = tuple((f"({rule})|(.*)", spec) for rule, spec in SHARDING_RULES)
    with jax.set_mesh(mesh):
        # Without the axis of layers, of which the rules are.
        stacked = {f"l/mlp/{path}": leaf[None] for path, leaf in flat.items()}
        placed = flatten(put_params(unflatten(stacked), rules, mesh))
        return gradient({path.removeprefix("l/mlp/"): v[0] for path, v in placed.items()}, x)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_sharded_equals_one_device(sizes, tokens):
    graph, flat = make(CONFIG)
    flat = with_adapters(flat)
    with jax.enable_x64(True):
        expected = derivatives(graph, flat, jnp.asarray(tokens), None)
        found = derivatives(graph, flat, jnp.asarray(tokens), sizes)
    for actual, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        assert np.abs(wanted).max() > 1e-3
        np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-9)


def test_experts_that_the_axis_does_not_divide(tokens):
    """Six experts over four devices are whole on each, and so are rows that no axis divides."""
    graph, flat = make(SWITCHES["as-they-are"])
    with jax.enable_x64(True):
        for x in (jnp.asarray(tokens), jnp.asarray(tokens[:3])):
            for sizes in ({"expert": 4, "tensor": 2}, {"expert": 2, "fsdp": 4}):
                expected, found = (derivatives(graph, flat, x, way) for way in (None, sizes))
                for actual, wanted in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
                    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-9)


SIZES = [[7, 0, 30, 3, 0], [0, 0, 0, 0, 40], [40, 0, 0, 0, 0], [8, 8, 8, 8, 8], [1, 2, 3, 4, 5]]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "tpu"])
def test_products_of_groups(sizes, backend, monkeypatch):
    """Both ways; the kernel of TPUs is plain JAX here. What is behind the groups is 0."""
    monkeypatch.setattr(grouped, "platform", lambda: backend)
    rng = np.random.default_rng(0)
    x, kernels = rng.standard_normal((40, 6)), rng.standard_normal((5, 6, 4))
    outside, total = rng.standard_normal((40, 4)), sum(sizes)
    group = np.repeat(np.arange(5), sizes)
    expected = np.zeros((40, 4))
    expected[:total] = np.einsum("nd,ndf->nf", x[:total], kernels[group])
    by_x, by_kernels = np.zeros_like(x), np.zeros_like(kernels)
    by_x[:total] = np.einsum("nf,ndf->nd", outside[:total], kernels[group])
    for row in range(total):
        by_kernels[group[row]] += np.outer(x[row], outside[row])

    def product(x, kernels):
        return grouped_matmul(x, kernels, jnp.array(sizes, jnp.int32), total == 40)

    with jax.enable_x64(True):
        found, back = jax.vjp(product, jnp.asarray(x), jnp.asarray(kernels))
        grads = back(jnp.asarray(outside))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grads[0], by_x, rtol=0, atol=1e-12)
    np.testing.assert_allclose(grads[1], by_kernels, rtol=0, atol=1e-12)
