"""Divergences of a teacher against formulas in NumPy float64."""

import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest
from helpers.numeric import slopes
from jax.sharding import NamedSharding, PartitionSpec

from mmpo_jax.models.divergence import most_probable, token_divergence
from mmpo_jax.models.head import Taught, token_statistics
from mmpo_jax.parallel.mesh import make_mesh

V = 7


def log_softmax(x):
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def kl(p, q):
    """Of probabilities; 0 log 0 is 0."""
    return np.where(p > 0, p * (np.log(np.where(p > 0, p, 1)) - np.log(q)), 0).sum(-1)


def formula(logits, teacher, beta, top_k=None):
    """b KL(t || m) + (1 - b) KL(s || m), the tokens behind the teacher's k first ones as one."""
    s, t = np.exp(log_softmax(logits)), np.exp(log_softmax(teacher))
    if top_k is not None:
        order = np.argsort(-t, axis=-1)
        s, t = (np.take_along_axis(x, order, axis=-1) for x in (s, t))
        s, t = (
            np.concatenate([x[..., :top_k], x[..., top_k:].sum(-1, keepdims=True)], -1)
            for x in (s, t)
        )
        if top_k >= V:
            s, t = s[..., :V], t[..., :V]
    if beta in (0, 1):
        return kl(t, s) if beta == 0 else kl(s, t)
    m = beta * t + (1 - beta) * s
    return beta * kl(t, m) + (1 - beta) * kl(s, m)


@pytest.fixture
def both():
    rng = np.random.default_rng(0)
    return 2 * rng.standard_normal((3, 4, V)), 2 * rng.standard_normal((3, 4, V))


@pytest.mark.parametrize("top_k", [None, 1, 3, V - 1, V, 2 * V])
@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_divergences(both, beta, top_k):
    logits, teacher = both

    def ours(logits):
        student, of_teacher = jax.nn.log_softmax(logits), jax.nn.log_softmax(teacher)
        return token_divergence(student, of_teacher, beta, top_k).sum()

    with jax.enable_x64(True):
        value, slope = jax.value_and_grad(ours)(logits)
    assert float(value) == pytest.approx(formula(*both, beta, top_k).sum(), rel=1e-12)
    wanted = slopes(lambda x: formula(x, teacher, beta, top_k).sum(), logits)
    np.testing.assert_allclose(slope, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
def test_fewer_tokens_are_never_further_apart(both, beta):
    with jax.enable_x64(True):
        logs = [jax.nn.log_softmax(x) for x in both]
        found = [np.asarray(token_divergence(*logs, beta, k)) for k in (1, 2, 4, None)]
        same = token_divergence(logs[0], logs[0], beta, 2)
    assert all((fewer <= more + 1e-12).all() for fewer, more in itertools.pairwise(found))
    assert (found[-1] > 0).all()
    np.testing.assert_allclose(same, 0, atol=1e-12)


@pytest.mark.parametrize("top_k", [None, 2])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_sure_distributions_are_finite(beta, top_k):
    """In float32, with all of the probability on one token or another."""
    sure = 1000.0 * np.eye(V, dtype=np.float32)
    for teacher in (sure, np.roll(sure, 1, axis=1)):

        def value(x, teacher=teacher):
            logs = jax.nn.log_softmax(x), jax.nn.log_softmax(teacher)
            return token_divergence(*logs, beta, top_k).sum()

        found, slope = jax.value_and_grad(value)(sure)
        assert np.isfinite(found) and np.isfinite(slope).all()


@pytest.mark.parametrize("count", [1, 3, 12, 40])
@pytest.mark.parametrize("size", [48, 45])
def test_devices_that_share_a_vocabulary_find_the_same(size, count):
    """Also of equal numbers, where the first count, and where a part has fewer than are wanted."""
    rng = np.random.default_rng(size)
    values = rng.integers(0, 9, (4, 2, 3, size)).astype(np.float32)
    order = np.argsort(-values, axis=-1, kind="stable")[..., :count]
    wanted = np.zeros(values.shape, bool)
    np.put_along_axis(wanted, order, True, axis=-1)
    find = functools.partial(most_probable, count=count)
    np.testing.assert_array_equal(find(values), wanted)
    for sizes in ((2, 2, 2), (4, 1, 1)):
        with jax.set_mesh(make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])):
            np.testing.assert_array_equal(jax.jit(find)(values), wanted)


@pytest.mark.parametrize(
    ("sizes", "tokens"), [((2, 2, 2), 4096), ((2, 2, 2), 4091), ((8, 1, 1), 4096)]
)
def test_no_device_has_whole_logits(sizes, tokens):
    """In the compiled gradient of `top_k`, nothing is larger than a device's part of the logits."""
    width, vocab, chunk = 4, 4096, 4
    mesh = make_mesh(*sizes)

    def array(shape, *spec, dtype=np.float32):
        return jax.ShapeDtypeStruct(
            shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec))
        )

    rows = ("data", "fsdp")
    hidden, labels = array((8, 2, 8, width), rows), array((8, 2, 8), rows, dtype=np.int32)
    kernel = array((width, vocab), "fsdp", "tensor")

    def loss(hidden, kernel, theirs, their_kernel, labels):
        teacher = Taught(theirs, their_kernel, tokens, None, 0.5, 20)
        found = token_statistics(
            *(hidden, kernel, labels, ("divergence",)),
            chunk=chunk,
            vocab_size=tokens,
            teacher=teacher,
        )
        return found["divergence"].sum()

    with jax.set_mesh(mesh):
        lowered = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel, hidden, kernel, labels)
        compiled = lowered.compile().as_text()
    shapes = re.findall(r"\w+\[([\d,]+)\]", compiled)
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    own = 8 * 2 * chunk * vocab // mesh.size
    assert own <= largest < 1.1 * own
