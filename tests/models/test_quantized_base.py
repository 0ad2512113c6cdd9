"""Quantised kernels below adapters: their numbers, what they compute, splitting, bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.huggingface import load_params, to_huggingface
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.models.lora import (
    MAGNITUDE,
    B,
    Lora,
    add_adapters,
    cast_params,
    dequantize_base,
    is_adapter,
    merge_adapters,
    without_adapters,
)
from mmpo_jax.models.quantized import SCALES, dequantize, quantize
from mmpo_jax.models.quantized_base import as_quantized, quantize_base, quantized_paths
from mmpo_jax.parallel.mesh import make_mesh, placed_shapes, put_params

KINDS = ("int8", "int4")
Q = "language_model/layers/self_attn/q_proj"


@pytest.fixture(scope="module")
def batch(tiny_model):
    return tiny.random_batch(tiny_model[0].config, [6, 9], [(3, 5), (5, 1)])


@pytest.fixture(scope="module", params=KINDS)
def quantized(request, tiny_model):
    """(kind, parameters of the tiny model, with random adapters with magnitudes in the decoder)."""
    model, params = tiny_model
    base = quantize_base(params, model, request.param)
    flat = flatten(add_adapters(base, model, Lora(rank=3, alpha=5, dora=True), (), 0))
    rng = np.random.default_rng(0)
    for path, leaf in flat.items():
        drawn = (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32)
        if path.endswith(B):
            flat[path] = drawn
        elif path.endswith(MAGNITUDE):
            flat[path] = np.asarray(leaf) * (1 + drawn)
    return request.param, unflatten(flat)


@pytest.mark.parametrize(("kind", "steps", "group"), [("int8", 127.5, 192), ("int4", 7.5, 64)])
def test_numbers_are_rounded_to_the_nearest_step(kind, steps, group):
    """By a computation in float64: a step is the greatest of a group over 127.5 or 7.5."""
    kernel = np.random.default_rng(0).standard_normal((2, 192, 40)).astype(np.float32)
    kernel[:, :, 3] = 0
    made = quantize(kernel, kind=kind)
    assert made.values.dtype == getattr(jnp, kind)
    assert made.scales.shape == (2, 192 // group, 40)
    grouped = np.float64(kernel).reshape(2, -1, group, 40)
    step = np.abs(grouped).max(axis=2, keepdims=True) / steps
    zero = step == 0
    expected = np.clip(np.round(grouped / np.where(zero, 1, step)), -steps - 0.5, steps - 0.5)
    values = np.asarray(made.values.astype(jnp.int8)).reshape(grouped.shape)
    off = np.abs(values - expected)
    assert off.max() <= 1  # the greatest itself is half-way between two steps
    assert (off > 0).mean() < 0.02
    np.testing.assert_allclose(made.scales, np.where(zero, 1, step)[:, :, 0], rtol=1e-6)
    error = np.abs(np.float64(dequantize(made)).reshape(grouped.shape) - grouped)
    assert (error <= 0.5 * step * (1 + 1e-4)).all()
    assert error.mean() > 0.2 * step.mean()


@pytest.mark.parametrize(("kind", "size"), [("int8", 1e-3), ("int4", 1e-2)])
def test_an_update_is_rounded_away_where_its_kernel_was_quantised_before(kind, size):
    """And not where it was not: why what was trained above a quantised base is not quantised."""
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((1, 256, 256)).astype(np.float32)
    factors = rng.standard_normal((1, 256, 8)), rng.standard_normal((1, 8, 256))
    update = (size / 8**0.5 * factors[0] @ factors[1]).astype(np.float32)
    base = np.asarray(dequantize(quantize(kernel, kind=kind)))
    left = [
        np.sum((np.asarray(dequantize(quantize(whole + update, kind=kind))) - base) * update)
        / np.sum(update**2)
        for whole in (base, kernel)
    ]
    assert left[0] < 0.2
    assert left[1] == pytest.approx(1, abs=0.2)


def test_groups_that_do_not_divide_the_inputs_are_smaller():
    kernel = np.random.default_rng(0).standard_normal((1, 96, 8)).astype(np.float32)
    assert quantize(kernel, kind="int4").scales.shape == (1, 3, 8)  # of 32 inputs


def test_what_is_quantised(tiny_model, quantized):
    """The decoder's dense layers; all else is the same arrays."""
    kind, params = quantized
    base, ours = flatten(tiny_model[1]), flatten(without_adapters(params))
    paths = quantized_paths(tiny_model[0])
    assert len(paths) == 7
    assert ours.keys() - base.keys() == {path.replace("kernel", SCALES) for path in paths}
    for path, leaf in base.items():
        if path in paths:
            assert ours[path].dtype == getattr(jnp, kind)
        else:
            assert ours[path] is leaf


def test_it_computes_what_its_dequantised_kernels_do(tiny_model, quantized, batch):
    """Log-probs and gradients of adapters, merged or not, and what is written of them."""
    model, (_, params) = tiny_model[0], quantized
    whole = flatten(dequantize_base(params))
    assert not any(path.endswith(SCALES) for path in whole)
    trained = {path: leaf for path, leaf in whole.items() if is_adapter(path)}

    @jax.jit
    def of(trained, params):
        def total(trained):
            tree = cast_params(unflatten({**params, **trained}), jnp.float32)
            log_probs = response_log_probs(model, tree, batch)
            return log_probs.sum(), log_probs

        return jax.grad(total, has_aux=True)(trained)

    expected, theirs = of(trained, whole)
    gradients, ours = of(trained, flatten(params))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
    for path, leaf in expected.items():
        np.testing.assert_allclose(gradients[path], leaf, rtol=1e-3, atol=1e-4, err_msg=path)
    merged = flatten(merge_adapters(params))
    assert merged.keys() == flatten(tiny_model[1]).keys()
    for path, leaf in flatten(merge_adapters(unflatten(whole))).items():
        np.testing.assert_allclose(merged[path], leaf, rtol=0, atol=1e-6, err_msg=path)
    written = dict(to_huggingface(params, model))
    for name, tensor in to_huggingface(unflatten(merged), model):
        assert written[name].dtype == np.float32
        np.testing.assert_allclose(written[name], tensor, rtol=0, atol=1e-6, err_msg=name)


def test_it_stays_near_the_base(tiny_model, batch):
    """int8 nearer than int4: errors of the log-probs against those of the whole base."""
    model, params = tiny_model
    log_probs = jax.jit(lambda params: response_log_probs(model, params, batch))
    expected = np.asarray(log_probs(params))
    errors = [
        np.abs(log_probs(quantize_base(params, model, kind)) - expected).max() for kind in KINDS
    ]
    assert 0 < 4 * errors[0] < errors[1] < 0.3 * np.abs(expected).max()


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.slow
def test_rematerialisation_changes_no_gradient(tiny_model, quantized, batch, remat):
    model, (_, params) = tiny_model[0], quantized
    trained = {path: leaf for path, leaf in flatten(params).items() if is_adapter(path)}

    def gradient(remat):
        def total(trained):
            tree = cast_params(unflatten({**flatten(params), **trained}), jnp.float32)
            return response_log_probs(model, tree, batch, remat=remat).sum()

        return jax.jit(jax.grad(total))(trained)

    expected = gradient("none")
    for path, leaf in gradient(remat).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-4, atol=1e-4, err_msg=path)


def test_split_over_devices_it_is_the_same(tiny_model, quantized, batch):
    """Quantised where it lies, to the bit, and what it computes."""
    model, (kind, params) = tiny_model[0], quantized
    mesh = make_mesh(2, 2, 2)
    there = quantize_base(put_params(tiny_model[1], model.rules, mesh), model, kind)
    flat = flatten(there)
    for path, leaf in flatten(without_adapters(params)).items():
        np.testing.assert_array_equal(np.asarray(flat[path]), np.asarray(leaf), err_msg=path)
    shapes = flatten(placed_shapes(jax.eval_shape(lambda: there), model.rules, mesh))
    for path, leaf in flat.items():
        assert leaf.sharding.is_equivalent_to(shapes[path].sharding, leaf.ndim), path
    assert flat[f"{Q}/kernel"].sharding.spec[1:] == ("fsdp", "tensor")
    assert flat[f"{Q}/{SCALES}"].sharding.spec[2] == "tensor"

    @jax.jit
    def log_probs(params):
        return response_log_probs(model, cast_params(params, jnp.float32), batch)

    expected = log_probs(params)
    with jax.set_mesh(mesh):
        ours = log_probs(put_params(params, model.rules, mesh))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


def test_files_are_quantised_as_they_are_read(tiny_model, tiny_folder, quantized):
    kind, params = quantized
    model = tiny_model[0]
    read = flatten(load_params(tiny_folder, model, change=as_quantized(model, kind)))
    for path, leaf in flatten(without_adapters(params)).items():
        np.testing.assert_array_equal(np.asarray(read[path]), np.asarray(leaf), err_msg=path)


def test_bytes_fall(quantized, tiny_model):
    """A kernel in float32 has 4 bytes a number; int4 takes one on CPU, where nothing packs it."""
    _, params = quantized
    flat, base = flatten(params), flatten(tiny_model[1])
    paths = quantized_paths(tiny_model[0])
    numbers = sum(base[path].size for path in paths)
    assert sum(base[path].nbytes for path in paths) == 4 * numbers
    assert sum(flat[path].nbytes for path in paths) == numbers


def test_experts_are_not_quantised(family_case):
    with pytest.raises(ModelError, match=r"lora\.quantize_base: a mixture of experts"):
        quantized_paths(family_case("qwen3_moe").model)
