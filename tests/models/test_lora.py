"""Adapters as leaves of the parameter tree: which layers, what they compute, merging, dropout."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from jax.sharding import PartitionSpec

from mmpo_jax.checkpoints import huggingface
from mmpo_jax.checkpoints.huggingface import new_tensors, to_huggingface
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.models.lora import (
    MAGNITUDE,
    NORM,
    SCALE,
    A,
    B,
    Lora,
    adapted_layers,
    add_adapters,
    cast_params,
    check_experts,
    dense_layers,
    merge_adapters,
    targeted_layers,
    with_dropout,
    without_adapters,
)
from mmpo_jax.models.merging import merge
from mmpo_jax.parallel.mesh import make_mesh, put_params

EVERYWHERE = Lora(target=".*", rank=3, alpha=5)
Q = "language_model/layers/self_attn/q_proj"


@pytest.fixture(scope="module")
def batch(tiny_model):
    return tiny.random_batch(tiny_model[0].config, [6, 9], [(3, 5), (5, 1)])


@pytest.fixture(scope="module")
def adapted(tiny_model):
    """The tiny model with random adapters everywhere."""
    model, params = tiny_model
    return with_noise(add_adapters(params, model, EVERYWHERE, (), 0))


@pytest.fixture(scope="module")
def decomposed(tiny_model):
    """The same with DoRA's magnitudes."""
    model, params = tiny_model
    lora = EVERYWHERE.model_copy(update={"dora": True})
    return with_noise(add_adapters(params, model, lora, (), 0))


def with_noise(params):
    """Adapters whose B is not zero, and whose magnitudes are not the norms of kernels."""
    rng = np.random.default_rng(0)
    flat = flatten(params)
    for path, leaf in flat.items():
        drawn = (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        if path.endswith(B):
            flat[path] = drawn
        elif path.endswith(MAGNITUDE):
            flat[path] = np.asarray(leaf) * (1 + drawn)
    return unflatten(flat)


@pytest.fixture(scope="module")
def log_probs(tiny_model, batch):
    """parameters -> their log-probs, as a compiled function."""
    return jax.jit(lambda params: response_log_probs(tiny_model[0], params, batch))


def test_targets_are_chosen_by_their_whole_path(tiny_model):
    model, _ = tiny_model
    both = ["language_model/layers/self_attn/q_proj", "language_model/layers/self_attn/v_proj"]
    assert sorted(targeted_layers(model, "language_model/layers/self_attn/[qv]_proj", ())) == both
    assert len(targeted_layers(model, ".*/q_proj", ())) == 2  # the vision tower's too
    assert targeted_layers(model, ".*/q_proj", ("vision_tower/.*",)) == [Q]
    everywhere = targeted_layers(model, ".*", ())
    assert sorted(everywhere) == sorted(dense_layers(model))
    assert "multi_modal_projector/linear_1" in everywhere
    for without in ("language_model/lm_head", "vision_tower/embeddings/patch_embedding"):
        assert without not in everywhere


def test_targets_that_are_not_there(tiny_model):
    model, _ = tiny_model
    with pytest.raises(
        ValueError, match=r"'language_model/layers/self_atn/q_proj' matches no"
    ) as e:
        targeted_layers(model, "language_model/layers/self_atn/q_proj", ())
    assert f"the nearest are {Q}, language_model/" in str(e.value)
    with pytest.raises(ValueError, match="matches no dense layer"):
        targeted_layers(model, "q_proj", ())  # a part of a path is not a path
    with pytest.raises(ValueError, match=r"all that '.*' matches is frozen by"):
        targeted_layers(model, Q, ("language_model/.*",))


@pytest.mark.slow
def test_a_fresh_adapter_changes_nothing(tiny_model, log_probs):
    model, params = tiny_model
    fresh = add_adapters(params, model, EVERYWHERE, (), 0)
    np.testing.assert_array_equal(log_probs(fresh), log_probs(params))
    flat = flatten(fresh)
    inputs, outputs = dense_layers(model)[Q][1:]
    a, b, scale = (flat[f"{Q}/{name}"] for name in (A, B, SCALE))
    assert (a.shape, b.shape, scale.shape) == ((2, inputs, 3), (2, 3, outputs), (2,))
    assert scale.tolist() == pytest.approx([5 / 3] * 2)
    assert np.abs(a).max() <= inputs**-0.5
    assert np.abs(a).max() > 0.9 * inputs**-0.5
    again, other = (
        flatten(add_adapters(params, model, EVERYWHERE, (), seed))[f"{Q}/{A}"] for seed in (0, 1)
    )
    np.testing.assert_array_equal(again, a)
    assert not np.any(other == a)
    few = flatten(add_adapters(params, model, Lora(target=Q, rank=3, alpha=5), (), 0))
    np.testing.assert_array_equal(few[f"{Q}/{A}"], a)  # whatever else is adapted


def test_adapters_that_are_there_stay(adapted, tiny_model):
    """Where they are those of the options; no others are put beside them."""
    model = tiny_model[0]
    assert add_adapters(adapted, model, EVERYWHERE, (), 0) is adapted
    for changes, message in (
        ({"target": Q}, r"lora.target: \S+ has an adapter in the run that is gone on with"),
        ({"rank": 2}, r"lora.rank is 2, and the adapters of the run \S+ \S+ gone on with have 3"),
        ({"alpha": 6}, "lora.alpha is 6"),
        ({"dora": True}, "lora.dora is True, .* have False"),
    ):
        with pytest.raises(ModelError, match=message):
            add_adapters(adapted, model, EVERYWHERE.model_copy(update=changes), (), 0)


@pytest.mark.slow
def test_fresh_magnitudes_change_nothing(tiny_model, log_probs):
    model, params = tiny_model
    lora = EVERYWHERE.model_copy(update={"dora": True})
    fresh = add_adapters(params, model, lora, (), 0)
    ours = log_probs(cast_params(fresh, np.float32))
    np.testing.assert_allclose(ours, log_probs(params), rtol=0, atol=1e-5)
    kernel = flatten(params)[f"{Q}/kernel"].astype(np.float64)
    magnitude = flatten(fresh)[f"{Q}/{MAGNITUDE}"]
    np.testing.assert_allclose(magnitude, np.sqrt((kernel**2).sum(axis=1)), rtol=1e-6)


def test_without_adapters_it_is_the_base(tiny_model, adapted, decomposed, log_probs):
    """The same arrays, not copies of them."""
    base = flatten(tiny_model[1])
    for params in (adapted, decomposed):
        ours = flatten(without_adapters(params))
        assert base.keys() == ours.keys()
        assert all(ours[path] is base[path] for path in base)
    assert np.abs(log_probs(adapted) - log_probs(tiny_model[1])).max() > 0.1


@pytest.mark.parametrize("kind", ["adapted", "decomposed"])
def test_merged_it_computes_the_same(tiny_model, kind, batch, request):
    adapted = request.getfixturevalue(kind)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), adapted)
        merged = merge_adapters(params)
        assert not adapted_layers(merged)
        apart, together = (
            np.asarray(jax.jit(functools.partial(response_log_probs, tiny_model[0]))(tree, batch))
            for tree in (cast_params(params, np.float64), merged)
        )
    assert apart.dtype == np.float64
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-10)


def test_merging_keeps_dtypes_and_places(tiny_model, adapted):
    model, params = tiny_model
    expected = flatten(merge_adapters(adapted))
    kernels = [f"{layer}/kernel" for layer in dense_layers(model)]
    base = flatten(params)
    moved = [path for path in base if not np.array_equal(base[path], expected[path])]
    assert sorted(moved) == sorted(kernels)

    placed = put_params(adapted, model.rules, make_mesh(2, 2, 2))
    for path, leaf in flatten(merge_adapters(placed)).items():
        assert leaf.sharding == flatten(placed)[path].sharding
        np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-6, err_msg=path)

    half = {
        path: leaf if "lora" in path else leaf.astype(jnp.bfloat16)
        for path, leaf in flatten(adapted).items()
    }
    merged = flatten(merge_adapters(unflatten(half)))
    assert {leaf.dtype for leaf in merged.values()} == {
        jnp.dtype(jnp.bfloat16),
        jnp.dtype(jnp.float32),
    }
    assert merged[f"{Q}/kernel"].dtype == jnp.float32
    kernel = f"{Q}/kernel"
    added = expected[kernel] - base[kernel]
    wanted = half[kernel].astype(np.float32) + added
    np.testing.assert_allclose(merged[kernel], wanted, rtol=0, atol=1e-6)


def test_saving_merges_one_layer_at_a_time(tiny_model, adapted, monkeypatch):
    """Nothing is summed before its turn, and never a whole stack."""
    model, _ = tiny_model
    summed = []

    def watched(kernel, *adapter):
        summed.append(kernel.ndim)
        return merge(kernel, *adapter)

    monkeypatch.setattr(huggingface, "merge", watched)
    tensors = new_tensors(put_params(adapted, model.rules, make_mesh(2, 2, 2)), model)
    assert not summed
    expected = dict(to_huggingface(merge_adapters(adapted), model))
    assert {tensor.name for tensor in tensors} == expected.keys()
    for tensor in tensors:
        np.testing.assert_allclose(tensor.fetch(), expected[tensor.name], rtol=0, atol=1e-6)
    assert set(summed) == {2}
    assert len(summed) == sum(math.prod(shape[:-2]) for shape in dense_layers(model).values())


def test_merging_in_place_needs_no_second_copy(tiny_model, adapted):
    model, _ = tiny_model
    expected = flatten(merge_adapters(adapted))
    for params in (
        put_params(adapted, model.rules, make_mesh(2, 2, 2)),
        jax.tree.map(np.array, adapted),
    ):
        before = flatten(params)
        merged = flatten(merge_adapters(params, in_place=True))
        for path, leaf in merged.items():
            np.testing.assert_allclose(leaf, expected[path], rtol=0, atol=1e-6, err_msg=path)
            if isinstance(leaf, np.ndarray):
                assert leaf is before[path]
            elif f"{path.removesuffix('kernel')}{A}" in before:
                assert before[path].is_deleted()


def test_adapters_are_split_as_their_kernels(tiny_model, decomposed):
    mesh = make_mesh(2, 2, 2)
    placed = flatten(put_params(decomposed, tiny_model[0].rules, mesh))
    specs = {path: leaf.sharding.spec for path, leaf in placed.items()}
    down = "language_model/layers/mlp/down_proj"  # its kernel is (None, "tensor", "fsdp")
    assert specs[f"{Q}/{A}"] == PartitionSpec(None, "fsdp", None)
    assert specs[f"{Q}/{B}"] == PartitionSpec(None, None, "tensor")
    assert specs[f"{down}/{A}"] == PartitionSpec(None, "tensor", None)
    assert specs[f"{down}/{B}"] == PartitionSpec(None, None, "fsdp")
    assert specs[f"multi_modal_projector/linear_1/{B}"] == PartitionSpec(None, "tensor")
    assert specs[f"{Q}/{SCALE}"] == PartitionSpec()
    assert specs[f"{Q}/{MAGNITUDE}"] == PartitionSpec(None, "tensor")
    assert specs[f"{down}/{MAGNITUDE}"] == PartitionSpec(None, "fsdp")
    assert specs[f"multi_modal_projector/linear_1/{MAGNITUDE}"] == PartitionSpec("tensor")


def test_layers_without_and_smaller_ranks_get_no_gradient(tiny_model, adapted, batch):
    """What fills up a stack stays zero in training."""
    flat = flatten(adapted)
    flat[f"{Q}/{SCALE}"] = np.float32([0, 1])
    flat[f"{Q}/{A}"] = flat[f"{Q}/{A}"] * np.float32([1, 1, 0])
    flat[f"{Q}/{B}"] = flat[f"{Q}/{B}"] * np.float32([[1], [1], [0]])
    trained = {name: flat[f"{Q}/{name}"] for name in (A, B)}

    @jax.jit
    @jax.grad
    def gradient(trained):
        tree = unflatten({**flat, **{f"{Q}/{name}": leaf for name, leaf in trained.items()}})
        return response_log_probs(tiny_model[0], tree, batch).sum()

    a, b = (np.asarray(leaf) for leaf in gradient(trained).values())
    assert not a[0].any()
    assert not b[0].any()
    assert not a[1, :, 2].any()
    assert not b[1, 2].any()
    assert np.abs(a[1, :, :2]).min() > 0
    assert np.abs(b[1, :2]).min() > 0


@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(tiny_model, adapted, batch):
    flat = flatten(adapted)
    trained = {f"{Q}/{name}": flat[f"{Q}/{name}"] for name in (A, B)}

    def gradient(remat):
        def total(trained):
            tree = with_dropout(unflatten({**flat, **trained}), 0.3, jax.random.key(0))
            return response_log_probs(tiny_model[0], tree, batch, remat=remat).sum()

        return jax.jit(jax.grad(total))(trained)

    expected = gradient("none")
    for path, leaf in gradient("dots").items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_dropout(tiny_model, adapted):
    """On one layer's own function: unbiased, by its key, another mask in every layer."""
    rate, size = 0.25, 400
    model, _ = tiny_model
    params = flatten(with_dropout(adapted, rate, jax.random.key(0)))
    assert flatten(with_dropout(adapted, 0.0, jax.random.key(0))).keys() == flatten(adapted).keys()
    x = np.random.default_rng(0).standard_normal((1, 2, 32)).astype(np.float32)

    @jax.jit
    def run(params):
        projector = model.bind(params).multi_modal_projector
        return projector.linear_2(x)

    def drawn(number):
        return np.asarray(run(with_dropout(adapted, rate, jax.random.key(number))))

    without = np.asarray(run(adapted))
    base = np.asarray(run(without_adapters(adapted)))
    samples = np.stack([drawn(number) for number in range(size)])
    np.testing.assert_array_equal(samples[3], drawn(3))
    assert np.abs(samples[3] - samples[4]).max() > 0.01
    spread = samples.std(axis=0).max()
    assert spread > 0.05
    np.testing.assert_allclose(samples.mean(axis=0), without, rtol=0, atol=5 * spread / size**0.5)
    assert np.abs(base - without).max() > 5 * spread / size**0.5  # as the adapter itself is not

    keys = [jax.random.key_data(leaf) for path, leaf in params.items() if path.endswith("lora_key")]
    rows = np.concatenate([np.asarray(key).reshape(-1, 2) for key in keys])
    assert len(np.unique(rows, axis=0)) == len(rows) == 3 * 6 + 2 * 7 + 2


def test_casting_leaves_factors_exact(adapted):
    flat = flatten(cast_params(adapted, jnp.bfloat16))
    assert flat[f"{Q}/{A}"].dtype == flat[f"{Q}/kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(flat[f"{Q}/{SCALE}"], flatten(adapted)[f"{Q}/{SCALE}"])


def test_norms_are_those_of_what_is_cast(decomposed):
    """In float64, of one layer of a stack; cast a second time they stay."""
    flat = flatten(decomposed)
    cast = cast_params(decomposed, jnp.bfloat16)
    again = flatten(cast_params(cast, jnp.float32))
    kernel, a, b = (np.float64(flat[f"{Q}/{name}"][1]) for name in ("kernel", A, B))
    expected = np.linalg.norm(kernel + 5 / 3 * a @ b, axis=0)
    np.testing.assert_allclose(again[f"{Q}/{NORM}"][1], expected, rtol=1e-6)
    np.testing.assert_array_equal(flatten(cast)[f"{Q}/{MAGNITUDE}"], flat[f"{Q}/{MAGNITUDE}"])


def test_a_layer_without_an_adapter_has_no_magnitudes(tiny_model, decomposed, batch, log_probs):
    """Whatever stands in their place, the base is computed there, merged or not."""
    flat = {path: np.array(leaf) for path, leaf in flatten(decomposed).items()}
    for path, leaf in flat.items():
        if path.endswith(SCALE):
            leaf[...] = 0
        if path.endswith(MAGNITUDE):
            leaf[...] = 1
    base = log_probs(tiny_model[1])
    np.testing.assert_array_equal(log_probs(merge_adapters(unflatten(flat))), base)
    ours = log_probs(cast_params(unflatten(flat), np.float32))
    np.testing.assert_allclose(ours, base, rtol=0, atol=1e-5)


def test_experts_have_no_magnitudes():
    layers = [Q, "language_model/layers/mlp/experts/up_proj"]
    with pytest.raises(ValueError, match=r"lora.dora: adapters of experts, such as .*/up_proj"):
        check_experts(layers, Lora(dora=True))
    check_experts(layers[:1], Lora(dora=True, dropout=0.1))


def test_dropout_beside_magnitudes(tiny_model, decomposed):
    """In float64, by the formula of PEFT's layer in training: the base alone sees inputs whole."""
    layer = "multi_modal_projector/linear_2"
    params = with_dropout(cast_params(decomposed, np.float32), 0.25, jax.random.key(0))
    flat = flatten(params)
    x = np.random.default_rng(0).standard_normal((1, 5, 32)).astype(np.float32)
    kept = jax.random.bernoulli(flat[f"{layer}/lora_key"], 0.75, x.shape)
    dropped = np.where(kept, x / 0.75, 0).astype(np.float64)
    kernel, bias, a, b, scale, magnitude = (
        np.float64(flat[f"{layer}/{name}"]) for name in ("kernel", "bias", A, B, SCALE, MAGNITUDE)
    )
    factor = magnitude / np.linalg.norm(kernel + scale * a @ b, axis=0)
    expected = x @ kernel + bias
    expected += (factor - 1) * (dropped @ kernel) + factor * scale * (dropped @ a @ b)
    actual = jax.jit(lambda p: tiny_model[0].bind(p).multi_modal_projector.linear_2(x))(params)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
