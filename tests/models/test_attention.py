"""Attention's backends against each other and against softmax written out, forward and backward."""

import dataclasses
import functools
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tiny
from helpers.sampling import sample

from mmpo_jax.core.trees import flatten
from mmpo_jax.generation.sampler import sample_keys
from mmpo_jax.models import attention, cudnn, splash
from mmpo_jax.models.attention import choose_backend, shared_prompt_attention
from mmpo_jax.models.layers import rematerialise
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.parallel.mesh import make_mesh, put_batch, put_params
from mmpo_jax.recipes.sampling import Decoding

TOLERANCE = 2e-5


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of one comparison."""

    prompts: tuple[int, ...]
    """Real tokens of every prompt."""
    p: int
    r: int
    t: int
    heads: int = 2
    kv_heads: int = 2
    d: int = 16


CASES = {
    "uneven-prompts": Case((3, 40, 21), p=40, r=1, t=11),
    "several-responses": Case((70, 33), p=75, r=5, t=29),
    "several-blocks": Case((450, 601), p=601, r=2, t=55, heads=1, kv_heads=1),
    "grouped-queries": Case((5, 9), p=9, r=2, t=7, heads=6, kv_heads=2),
    "one-key-head": Case((5, 9), p=9, r=2, t=7, heads=3, kv_heads=1),
    "prompt-only": Case((5, 9), p=9, r=0, t=0),
    "whole-blocks": Case((100, 128), p=128, r=2, t=64),
    "a-row-without-prompt": Case((0, 9), p=9, r=2, t=6),
}


def draw(case: Case):
    """(query, key, value), (prompt_mask, response_mask), real tokens bool[B, S]."""
    rng = np.random.default_rng(0)
    b, s = len(case.prompts), case.p + case.r * case.t
    prompt_mask = np.arange(case.p) < np.array(case.prompts)[:, None]
    lengths = rng.integers(1, case.t + 1, (b, case.r)) if case.r else np.zeros((b, 0))
    response_mask = np.arange(case.t) < lengths[:, :, None]
    arrays = [
        jnp.asarray(rng.standard_normal((b, s, heads, case.d)), jnp.float32)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]
    real = np.concatenate([prompt_mask, response_mask.reshape(b, -1)], axis=1)
    return arrays, (prompt_mask, response_mask), real


def dense(query, key, value, prompt_mask, response_mask, window=None, scale=None, softcap=None):
    """Softmax over what a query may see by the tokens' own positions, written out."""
    b, s, h, d = query.shape
    p, (r, t) = prompt_mask.shape[1], response_mask.shape[1:]
    owner = np.concatenate([np.full(p, -1), np.repeat(np.arange(r), t)])
    real = np.concatenate([prompt_mask, response_mask.reshape(b, -1)], axis=1)
    steps = np.tile(np.arange(t), r)
    place = np.stack([np.concatenate([np.arange(p), row.sum() + steps]) for row in prompt_mask])
    apart = place[:, :, None] - place[:, None, :]
    seen = (owner == -1) | (owner[:, None] == owner)
    seen = seen & (apart >= 0) & real[:, None, :] & real[:, :, None]
    if window is not None:
        seen &= apart < window
    seen |= ~real[:, :, None] & np.eye(s, dtype=bool)  # padding must not divide by zero here
    key, value = (jnp.repeat(x, h // x.shape[2], axis=2) for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * (scale or d**-0.5)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf))
    return jnp.einsum("bhqk,bkhd->bqhd", weights, value)


def values_and_gradients(function, arrays, masks, real):
    """What real tokens get, and gradients of it; padding may hold anything that is finite."""
    rng = np.random.default_rng(1)
    cotangent = rng.standard_normal(arrays[0].shape).astype(np.float32) * real[..., None, None]

    @jax.jit
    def run(*arrays):
        def loss(*arrays):
            out = function(*arrays, *masks)
            return (out * cotangent).sum(), out

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(*arrays)

    gradients, out = run(*arrays)
    assert np.isfinite(out).all()
    return [np.asarray(out) * real[..., None, None], *map(np.asarray, gradients)]


def assert_same(actual, expected):
    for name, a, b in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert np.abs(b).max() > 0.1
        np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE, err_msg=name)


def backend(name):
    return lambda *arguments: shared_prompt_attention(*arguments, backend=name)


@pytest.fixture(scope="module", params=CASES)
def compared(request):
    """(inputs, what XLA makes of them)."""
    inputs = draw(CASES[request.param])
    return inputs, values_and_gradients(backend("xla"), *inputs)


def test_xla_equals_softmax_written_out(compared):
    inputs, expected = compared
    assert_same(values_and_gradients(dense, *inputs), expected)


def test_splash_equals_xla(compared):
    inputs, expected = compared
    assert_same(values_and_gradients(backend("splash"), *inputs), expected)


def test_cudnn_arrangement_equals_xla(compared):
    """Everything but cuDNN itself, which needs a GPU."""
    inputs, expected = compared
    scale = inputs[0][0].shape[-1] ** -0.5
    arranged = functools.partial(cudnn.cudnn_attention, scale=scale, implementation="xla")
    assert_same(values_and_gradients(arranged, *inputs), expected)


@pytest.mark.parametrize("name", ["xla", "splash"])
def test_scores_of_another_scale_and_below_a_limit(name):
    scores = {"scale": 0.7, "softcap": 1.5}
    inputs = draw(CASES["grouped-queries"])
    expected = values_and_gradients(functools.partial(dense, **scores), *inputs)
    given = functools.partial(shared_prompt_attention, backend=name, **scores)
    assert_same(values_and_gradients(given, *inputs), expected)
    inputs = draw(dataclasses.replace(CASES["grouped-queries"], d=32))
    only_scaled = functools.partial(cudnn.cudnn_attention, scale=0.7, implementation="xla")
    expected = values_and_gradients(functools.partial(dense, scale=0.7), *inputs)
    assert_same(values_and_gradients(only_scaled, *inputs), expected)


@pytest.mark.parametrize("window", [2, 4, 9])
def test_windows_equal_softmax_written_out(window):
    """Counted over a prompt's real tokens; known when it is compiled, or not."""
    inputs = draw(CASES["grouped-queries"])
    expected = values_and_gradients(functools.partial(dense, window=window), *inputs)
    windowed = functools.partial(shared_prompt_attention, window=window)
    assert_same(values_and_gradients(windowed, *inputs), expected)


@pytest.mark.parametrize(
    "case",
    [
        Case((3, 9, 5, 9, 1, 2, 3, 4), p=9, r=2, t=5, heads=8, kv_heads=2),
        Case((3, 9, 5), p=9, r=2, t=5, heads=6, kv_heads=1),
        Case((3, 9, 5, 2, 4, 7), p=9, r=1, t=5, heads=4, kv_heads=2),
        Case((3, 9, 5, 2), p=9, r=5, t=5, heads=3, kv_heads=1),
    ],
    ids=["split", "undivided", "heads-split", "rows-split"],
)
def test_splash_on_a_mesh(case):
    inputs = draw(case)
    expected = values_and_gradients(backend("xla"), *inputs)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        assert_same(values_and_gradients(backend("splash"), *inputs), expected)


def test_empty_blocks_are_not_visited():
    """A prompt of 2 blocks sees 3, each of 4 responses of a block sees 3: 15 of 36."""
    mask = splash.SharedPromptMask(6 * 128, 2 * 128, 128)
    kernel = splash._make_kernel(mask, 2, 128, None, True)
    for info in (kernel.fwd_mask_info, kernel.dq_mask_info, kernel.dkv_mask_info):
        assert (np.asarray(info.block_mask) > 0).sum() == 15
    # The grid of the forward pass is as wide as the longest row of blocks.
    assert kernel.fwd_mask_info.data_next.shape == (1, 6, 3)


def test_the_mask_is_never_made_whole():
    mask = splash.SharedPromptMask(2**20, 2**19, 2**16)
    begin = 2**19 + 3 * 2**16
    queries = slice(begin, begin + 4)
    assert mask[queries, :2].all()
    assert not mask[queries, begin - 2 : begin].any()
    np.testing.assert_array_equal(mask[queries, queries], np.tri(4, dtype=bool))


def test_block_sizes():
    for length, size in [(1, 128), (128, 128), (129, 256), (512, 512), (513, 384), (10_000, 512)]:
        assert splash.block_size(length) == size


@pytest.mark.parametrize(("policy", "kept"), [("dots", True), ("full", False)])
def test_rematerialisation_keeps_what_the_kernel_made(capsys, policy, kept):
    arrays, masks, _ = draw(CASES["whole-blocks"])

    def layer(*arrays):
        return shared_prompt_attention(*arrays, *masks, backend="splash").sum()

    jax.ad_checkpoint.print_saved_residuals(rematerialise(layer, policy), *arrays)
    lines = capsys.readouterr().out.splitlines()
    made = [line.split()[0] for line in lines if "_splash_attention" in line]
    assert sorted(made) == (["f32[2,2,256,16]", "f32[2,2,256]"] if kept else [])


# The choice of a backend ------------------------------------------------------------------------


def choose(monkeypatch, platform, asked="auto", dtype=jnp.bfloat16, window=None, p=8, d=64):
    monkeypatch.setattr(attention, "platform", lambda: platform)
    attention._warn_once.cache_clear()
    query = jax.ShapeDtypeStruct((2, p + 8, 4, d), dtype)
    masks = jax.ShapeDtypeStruct((2, p), bool), jax.ShapeDtypeStruct((2, 2, 4), bool)
    return choose_backend(asked, query, *masks, window)


def test_every_platform_has_its_own(monkeypatch, caplog):
    for platform, expected in [("cpu", "xla"), ("tpu", "splash"), ("gpu", "cudnn")]:
        assert choose(monkeypatch, platform) == expected
        assert choose(monkeypatch, platform, "xla") == "xla"
    assert choose(monkeypatch, "tpu", dtype=jnp.float32) == "splash"
    assert not caplog.messages
    assert choose(monkeypatch, "cpu", "splash") == "splash"
    assert "interpreted" in caplog.text
    with pytest.raises(ValueError, match="'flash'; there are auto, xla, splash, cudnn"):
        choose(monkeypatch, "cpu", "flash")


@pytest.mark.parametrize(
    ("platform", "options", "reason"),
    [
        ("tpu", {"window": 4}, "windows"),
        ("tpu", {"dtype": jnp.float16}, "bfloat16 and float32, and not in float16"),
        ("gpu", {"window": 4}, "windows"),
        ("gpu", {"dtype": jnp.float32}, "bfloat16 and float16, and not in float32"),
        ("gpu", {"d": 160}, "up to 128 wide, and not 160"),
        ("gpu", {"p": 9}, "P = 9"),
        ("tpu", {"asked": "cudnn"}, "tpu is no GPU"),
    ],
)
def test_xla_takes_over_and_says_why(monkeypatch, caplog, platform, options, reason):
    with caplog.at_level(logging.WARNING):
        assert choose(monkeypatch, platform, **options) == "xla"
    assert "attention is computed by xla" in caplog.text
    assert reason in caplog.text


def test_a_window_over_everything_is_none(monkeypatch):
    monkeypatch.setattr(attention, "xla_attention", None)
    arrays, masks, _ = draw(CASES["grouped-queries"])
    reach = sum(masks[i].shape[-1] for i in range(2))
    shared_prompt_attention(*arrays, *masks, reach, "splash")
    with pytest.raises(TypeError):
        shared_prompt_attention(*arrays, *masks, reach - 1, "splash")


def test_the_platform_is_that_of_the_mesh():
    assert attention.platform() == "cpu"
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    mesh = jax.sharding.AbstractMesh((2,), ("data",), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        assert attention.platform() == "tpu"


def test_cudnn_is_what_a_gpu_program_calls(monkeypatch):
    """Lowered for a GPU that is not there; the version is asked of a library that is not either."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    shapes = [((2, 16, h, 64), jnp.bfloat16) for h in (4, 2, 2)] + [
        ((2, 8), bool),
        ((2, 2, 4), bool),
    ]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    scaled = functools.partial(cudnn.cudnn_attention, scale=0.125)
    gradient = jax.jit(jax.grad(lambda *xs: scaled(*xs).sum(), argnums=(0, 1, 2)))
    text = gradient.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    calls = re.findall(r"__cudnn\$(\w+)", text)
    assert sum(call.endswith("Softmax") for call in calls) == 2
    assert sum(call.endswith("SoftmaxBackward") for call in calls) == 2


# The whole model --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "remat"))
def score(model, params, batch, remat):
    def loss(params):
        log_probs = response_log_probs(model, params, batch, remat=remat)
        return (log_probs * batch.response_mask).sum(), log_probs

    return jax.grad(loss, has_aux=True)(params)


@pytest.mark.slow
def test_a_model_with_splash_is_the_same_model(tiny_model):
    model, params = tiny_model
    with_splash = dataclasses.replace(model, attention="splash")
    batch = tiny.random_batch(
        model.config, [6, 9, 8, 7, 9, 6, 7, 9], [(3, 5), (5, 1), (2, 4), (5, 5)] * 2
    )
    expected_gradient, expected = score(model, params, batch, "none")
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = put_params(params, model.rules, mesh), put_batch(batch, mesh)
        gradient, log_probs = score(with_splash, *placed, "dots")
    np.testing.assert_allclose(log_probs, expected, rtol=0, atol=TOLERANCE)
    for path, leaf in flatten(expected_gradient).items():
        np.testing.assert_allclose(
            flatten(gradient)[path], leaf, rtol=1e-4, atol=1e-4, err_msg=path
        )


@pytest.mark.slow
def test_prefill_with_splash_samples_the_same(tiny_model):
    model, params = tiny_model
    batch = tiny.random_batch(model.config, [7, 10], [(1,)] * 2)
    keys = sample_keys(0, 0, np.uint32([3, 5]), 2)
    options = {
        "decoding": Decoding(num_samples=2, max_new_tokens=6),
        "eos_ids": (),
        "pad_id": tiny.PAD_ID,
    }
    expected = sample(model, params, batch, keys, **options)
    with_splash = dataclasses.replace(model, attention="splash")
    actual = sample(with_splash, params, batch, keys, **options)
    np.testing.assert_array_equal(actual, expected)
