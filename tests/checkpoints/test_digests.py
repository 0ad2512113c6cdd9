"""Digests of arrays: any flipped bit changes them, no sharding does."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mmpo_jax.checkpoints.digests import _digest, _on_all_devices, digests

DTYPES = (np.float32, ml_dtypes.bfloat16, np.float16, np.int32, np.uint8, np.int8, np.bool_)


def digest(array):
    return digests({"a": array})["a"]


def reference(array):
    """The same with Python's own integers."""

    def mixed(word):
        word = (word ^ word >> 16) * 0x85EBCA6B % 2**32
        word = (word ^ word >> 13) * 0xC2B2AE35 % 2**32
        return word ^ word >> 16

    kind, total = {1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize], 0
    for indices, word in np.ndenumerate(array.view(kind)):
        place = 0x9E3779B9
        for index in indices:
            place = mixed((place + index) % 2**32)
        total += mixed(int(word) ^ place) - mixed(place)
    return total % 2**32


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 5)], ids=str)
def test_the_sum_of_hashed_words(dtype, shape):
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    assert digest(values) == digest(jnp.asarray(values)) == reference(values)


def test_every_bit_counts():
    values = np.random.default_rng(1).standard_normal((3, 4)).astype(np.float32)
    found = {digest(values)}
    for place in range(values.size):
        for bit in range(32):
            changed = values.copy()
            changed.view(np.uint32).ravel()[place] ^= np.uint32(1 << bit)
            found.add(digest(changed))
    assert len(found) == 1 + 32 * values.size


def test_places_count():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert len({digest(each) for each in (values, values[::-1], values[:, ::-1], values.T)}) == 4


def test_zeros_that_fill_up_do_not_count():
    """As a mesh fills up the rows of an embedding, or the columns of a head."""
    values = np.random.default_rng(3).standard_normal((3, 4)).astype(np.float32)
    for more in ((2, 0), (0, 5), (1, 1)):
        assert digest(np.pad(values, [(0, size) for size in more])) == digest(values)
    assert digest(np.zeros((3, 4), np.float32)) == 0


@pytest.mark.parametrize("spec", [("x", "y"), ("y", None), (None, "x"), (("x", "y"),), ()], ids=str)
def test_no_sharding_counts(spec):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    values = np.random.default_rng(2).standard_normal((8, 16)).astype(np.float32)
    placed = jax.device_put(values, NamedSharding(mesh, PartitionSpec(*spec)))
    assert digest(placed) == digest(values)
    with jax.set_mesh(mesh):
        assert digest(placed) == digest(values)


def test_names_of_a_tree():
    tree = {"a/b": np.zeros(2), "c": (np.ones(1), {"d": np.int32(1)})}
    assert digests(tree).keys() == {"a/b", "c.0", "c.1.d"}


def test_one_program_is_compiled_for_all_devices():
    mesh = jax.make_mesh((2, 4), ("p", "q"), axis_types=(AxisType.Auto,) * 2)
    spec = PartitionSpec("p", "q")
    array = jax.device_put(np.ones((4, 12), np.float32), NamedSharding(mesh, spec))
    before = _digest._cache_size()
    assert digest(array) == digest(np.ones((4, 12), np.float32))
    assert _on_all_devices(mesh, spec)._cache_size() == 1
    assert _digest._cache_size() <= before + 1  # that of NumPy's
