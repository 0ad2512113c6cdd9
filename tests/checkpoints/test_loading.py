"""Checkpoint files onto devices: every number in its place, read once, and what is refused."""

import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers import meshes, tiny
from jax.sharding import NamedSharding, PartitionSpec

from mmpo_jax.checkpoints import loading
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.checkpoints.huggingface import load_params, save_model
from mmpo_jax.checkpoints.safetensors_files import (
    INDEX_FILE,
    SINGLE_FILE,
    read_header,
    weight_files,
)
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.model import Model
from mmpo_jax.models.vocabulary import TABLES
from mmpo_jax.parallel.mesh import placed_shapes

ROOT = Path(__file__).parents[2]
MESHES = {"fsdp": (1, 8, 1), "tensor": (1, 1, 8), "all-axes": (2, 2, 2)}
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
KEY = "language_model.model.layers.1.self_attn.k_proj.weight"


@pytest.fixture(scope="module")
def model(tiny_folder):
    return Model.create(load_config(tiny_folder))


@pytest.fixture(scope="module", params=[(d, n) for d in DTYPES for n in ("single", "sharded")])
def stored(request, tiny_folder, tiny_model, tmp_path_factory):
    """(folder, its tensors as the safetensors library reads them)."""
    dtype, kind = request.param
    folder = tmp_path_factory.mktemp("stored") / "model"
    size = 20_000 if kind == "sharded" else 10**9
    save_model(folder, *tiny_model, tiny_folder, dtype=dtype, max_shard_bytes=size)
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= safetensors.numpy.load_file(file)
    assert (len(list(folder.glob("*.safetensors"))) > 3) == (kind == "sharded")
    return folder, tensors


def by_hand(model, tensors):
    """The parameters put together without the loader: LLaVA's names and torch's axes."""
    made = {}
    for path, leaf in flatten(model.abstract_params()).items():
        key = path.replace("/", ".").replace("vision_tower.", "vision_tower.vision_model.")
        key = key.replace("vision_model.layers", "vision_model.encoder.layers")
        if "lm_head" not in key:
            key = key.replace("language_model.", "language_model.model.")
        for ours in (".kernel", ".scale", ".embedding"):
            key = key.removesuffix(ours) + ".weight" if key.endswith(ours) else key
        stacked = ".layers." in key
        keys = [key]
        if stacked:
            keys = [key.replace("layers.", f"layers.{i}.") for i in range(leaf.shape[0])]
        arrays = [tensors[key] for key in keys]
        if path.endswith("kernel"):
            arrays = [array.reshape(len(array), -1).T for array in arrays]
        made[path] = np.stack(arrays) if stacked else arrays[0]
    return made


def places_on(model, shape):
    return placed_shapes(model.abstract_params(), model.rules, meshes.mesh_of(*shape))


def same(actual, expected):
    assert actual.keys() == expected.keys()
    for path, leaf in expected.items():
        assert actual[path].dtype == leaf.dtype, path
        np.testing.assert_array_equal(np.asarray(actual[path]), leaf, err_msg=path)


def test_onto_the_host(stored, model):
    folder, tensors = stored
    params = flatten(load_params(folder, model))
    assert all(isinstance(leaf, np.ndarray) for leaf in params.values())
    same(params, by_hand(model, tensors))


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_onto_devices(stored, model, shape):
    folder, tensors = stored
    places = places_on(model, shape)
    params = flatten(load_params(folder, model, places))
    same(params, by_hand(model, tensors))
    for path, place in flatten(places).items():
        assert params[path].sharding == place.sharding, path
    split = params["language_model/layers/self_attn/q_proj/kernel"].addressable_shards
    assert len({str(shard.index) for shard in split}) == 8 // shape[0]


@pytest.mark.parametrize("wanted", DTYPES)
def test_cast_while_loading(stored, model, wanted):
    folder, tensors = stored
    expected = {path: leaf.astype(wanted) for path, leaf in by_hand(model, tensors).items()}
    same(flatten(load_params(folder, model, dtype=wanted)), expected)
    same(flatten(load_params(folder, model, places_on(model, (1, 4, 2)), dtype=wanted)), expected)


def test_layers_of_two_dtypes(model, tiny_folder, tmp_path):
    """The wider one holds both."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    tensors = safetensors.numpy.load_file(folder / SINGLE_FILE)
    tensors[KEY] = tensors[KEY].astype(ml_dtypes.bfloat16)
    safetensors.numpy.save_file(tensors, folder / SINGLE_FILE)
    loaded = flatten(load_params(folder, model))["language_model/layers/self_attn/k_proj/kernel"]
    assert loaded.dtype == np.float32
    np.testing.assert_array_equal(loaded[1], tensors[KEY].astype(np.float32).T)


def test_dimensions_that_devices_do_not_divide(tmp_path):
    config = tiny.make_config(text={"vocab_size": tiny.VOCAB_SIZE + 3, "intermediate_size": 43})
    folder = tiny.make_folder(tmp_path / "odd", config)
    model = Model.create(load_config(folder))
    places = flatten(places_on(model, (1, 4, 2)))
    specs = {path: place.sharding.spec for path, place in places.items()}
    assert specs["language_model/layers/mlp/up_proj/kernel"] == PartitionSpec(None, "fsdp", None)
    assert specs["language_model/lm_head/kernel"] == PartitionSpec("fsdp", "tensor")
    expected = by_hand(model, safetensors.numpy.load_file(folder / SINGLE_FILE))
    # The vocabulary is filled up with zeros.
    for path, axis in TABLES.items():
        missing = -expected[path].shape[axis] % 8
        assert missing
        expected[path] = np.pad(expected[path], [(0, missing * (axis == at)) for at in (0, 1)])
    same(flatten(load_params(folder, model, unflatten(places))), expected)


def test_layers_on_different_devices(tiny_folder, model):
    """No family's rules ask for it, shardings may."""
    places = flatten(places_on(model, (1, 4, 2)))
    path = "language_model/layers/mlp/down_proj/kernel"
    leaf = places[path]
    split = NamedSharding(leaf.sharding.mesh, PartitionSpec("tensor", None, "fsdp"))
    places[path] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=split)
    params = flatten(load_params(tiny_folder, model, unflatten(places)))
    same(params, by_hand(model, safetensors.numpy.load_file(tiny_folder / SINGLE_FILE)))
    assert {shard.data.shape for shard in params[path].addressable_shards} == {(1, 48, 8)}


class Memory:
    """Counts what the loader reads and what it allocates."""

    def __init__(self, monkeypatch):
        self.read, self.buffers = [], []
        read_rows, aligned = loading.read_rows, loading._aligned

        def read(tensor, start, stop, columns):
            rows = read_rows(tensor, start, stop, columns)
            self.read.append((tensor.name, start, stop, rows.nbytes))
            return rows

        def allocate(shape, dtype):
            self.buffers.append(aligned(shape, dtype))
            return self.buffers[-1]

        monkeypatch.setattr(loading, "read_rows", read)
        monkeypatch.setattr(loading, "_aligned", allocate)


@pytest.mark.parametrize("shape", MESHES.values(), ids=MESHES)
def test_nothing_is_read_or_held_twice(tiny_folder, model, shape, monkeypatch):
    """Every byte is read once, in small pieces, into the memory that the devices then use."""
    monkeypatch.setattr(loading, "READ_BYTES", 512)
    memory = Memory(monkeypatch)
    params = flatten(load_params(tiny_folder, model, places_on(model, shape)))
    total = sum(leaf.nbytes for leaf in params.values())
    assert sum(size for *_, size in memory.read) == total
    assert len({row[:3] for row in memory.read}) == len(memory.read)
    assert max(size for *_, size in memory.read) <= 1024  # one row of the widest matrix
    assert sum(buffer.nbytes for buffer in memory.buffers) == total
    used = {
        shard.data.unsafe_buffer_pointer()
        for leaf in params.values()
        for shard in leaf.addressable_shards
    }
    assert used == {buffer.ctypes.data for buffer in memory.buffers}


def test_arrays_survive_the_donation_of_their_twins(tiny_folder, model):
    """Replicas share memory; a step that is given one must not write into the other."""
    places = places_on(model, (8, 1, 1))
    leaf = flatten(load_params(tiny_folder, model, places))["language_model/norm/scale"]
    before = np.array(leaf)
    donated = jax.device_put(leaf, leaf.sharding)
    kept = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    jax.jit(lambda array: array * 2, donate_argnums=0)(donated).block_until_ready()
    for shard in kept:
        np.testing.assert_array_equal(shard, before)


TWO_PROCESSES = """
import json, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")
process, port, folder, target = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(process))
from mmpo_jax.checkpoints import loading
from mmpo_jax.checkpoints.huggingface import load_params, save_model
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.models.model import Model
from mmpo_jax.parallel.mesh import make_mesh, placed_shapes
read, real = [], loading.read_rows
def count(tensor, start, stop, columns):
    read.append((tensor.name, start, stop, columns))
    return real(tensor, start, stop, columns)
loading.read_rows = count
model = Model.create(load_config(folder))
places = placed_shapes(model.abstract_params(), model.rules, make_mesh(1, 2, 2))
params = load_params(folder, model, places)
with open(f"{target}-{process}.json", "w") as file:
    json.dump(read, file)
save_model(target, model, params, folder, max_shard_bytes=20_000)
"""


@pytest.mark.slow
def test_two_processes_share_the_reading_and_one_writes(tiny_folder, model, tmp_path):
    target = tmp_path / "out"
    port = 20_000 + os.getpid() % 20_000
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(i), str(port), tiny_folder, target],
            env=environment,
        )
        for i in range(2)
    ]
    assert [process.wait(timeout=400) for process in processes] == [0, 0]
    first, second = (json.loads((tmp_path / f"out-{i}.json").read_text()) for i in range(2))
    # Matrices by halves; by both what four devices do not divide, and vectors, which all hold.
    both = {
        name
        for name, _, stop, columns in first
        if columns > 1 and [name, 0, stop, columns] in second
    }
    assert both == {"vision_tower.vision_model.embeddings.position_embedding.weight"}
    sizes = [sum((stop - start) * n for _, start, stop, n in rows) for rows in (first, second)]
    total = sum(leaf.size for leaf in flatten(model.abstract_params()).values())
    assert total / 2 <= sizes[0] == sizes[1] <= 0.55 * total
    same(flatten(load_params(target, model)), flatten(load_params(tiny_folder, model)))


@pytest.fixture
def folder(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.fixture
def sharded(tiny_folder, tiny_model, tmp_path):
    save_model(tmp_path / "sharded", *tiny_model, tiny_folder, max_shard_bytes=40_000)
    return tmp_path / "sharded"


def test_a_missing_shard(sharded, model):
    name = sorted(file.name for file in sharded.glob("*.safetensors"))[1]
    (sharded / name).unlink()
    with pytest.raises(ModelError, match=rf"{name}: not found; {INDEX_FILE} names it"):
        load_params(sharded, model)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ("{", "not an index of safetensors files"),
        ("[]", "not an index of safetensors files"),
        ('{"weight_map": {"a": 3}}', "3 is not the name of a file beside it"),
        ('{"weight_map": {"a": "../secret"}}', r"'\.\./secret' is not the name of a file beside"),
    ],
)
def test_a_broken_index(sharded, model, index, told):
    (sharded / INDEX_FILE).write_text(index)
    with pytest.raises(ModelError, match=rf"{INDEX_FILE}: {told}"):
        load_params(sharded, model)


def test_a_tensor_in_two_files(sharded, model):
    first, second = sorted(sharded.glob("*.safetensors"))[:2]
    tensors = safetensors.numpy.load_file(first)
    again = min(tensors)
    safetensors.numpy.save_file(
        {again: tensors[again]} | safetensors.numpy.load_file(second), second
    )
    told = rf"{second.name}: {again} is there again; .*{first.name} has {again}"
    with pytest.raises(ModelError, match=told):
        load_params(sharded, model)


def test_what_is_missing_is_named_as_files_have_it(folder, sharded, model):
    tensors = safetensors.numpy.load_file(folder / SINGLE_FILE)
    kept = {key: value for key, value in tensors.items() if "lm_head" not in key}
    safetensors.numpy.save_file(kept, folder / SINGLE_FILE)
    told = r"model\.safetensors: no weights for language_model/lm_head/kernel "
    with pytest.raises(ModelError, match=told + r"\(language_model\.lm_head\.weight\)"):
        load_params(folder, model)
    for file in sharded.glob("*.safetensors"):
        left = {k: v for k, v in safetensors.numpy.load_file(file).items() if "lm_head" not in k}
        safetensors.numpy.save_file(left, file)
    with pytest.raises(ModelError, match=rf"{INDEX_FILE}: no weights for language_model/lm_head"):
        load_params(sharded, model)


def write_raw(file, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "length", "told"),
    [
        (b"", b"", None, "a header of 0 bytes in a file of 8"),
        (b"{}", b"", 2**60, "a header of 1152921504606846976 bytes in a file of 10"),
        (b"{nonsense", b"", None, "property name"),
        (b"\xff\xfe\xfd", b"", None, "can't decode|invalid start byte"),
        (b"[1, 2]", b"", None, "the header is no JSON object"),
        (b"[" * 100_000, b"", None, "recursion"),
        ({"a": 3}, b"", None, "tensor a: the header says 3"),
        ({"a": {"dtype": "F32"}}, b"", None, "tensor a: the header says"),
        ({"a": entry(shape=[-2])}, bytes(8), None, "tensor a: the header says"),
        ({"a": entry(offsets=(8, 0))}, bytes(8), None, "tensor a: -8 bytes for F32"),
        ({"a": entry(shape=[3])}, bytes(8), None, r"tensor a: 8 bytes for F32 of shape \(3,\)"),
        ({"a": entry()}, bytes(5), None, "truncated: tensor a ends at byte"),
        ({"a": entry()}, bytes(9), None, "1 bytes after the last tensor"),
        ({"a": entry(), "b": entry()}, bytes(16), None, "tensor b: begins at byte"),
        ({"a": entry(offsets=(4, 12))}, bytes(12), None, "tensor a: begins at byte"),
    ],
)
def test_broken_headers(folder, model, header, data, length, told):
    write_raw(folder / SINGLE_FILE, header, data, length)
    with pytest.raises(ModelError, match=rf"{SINGLE_FILE}: not a readable safetensors file: .*"):
        read_header(str(folder / SINGLE_FILE))
    with pytest.raises(ModelError, match=told):
        load_params(folder, model)


def test_a_file_that_is_cut_off(folder, model):
    file = folder / SINGLE_FILE
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors: .*truncated: tensor vision_tower"):
        load_params(folder, model)


def test_a_file_that_shrinks_while_it_is_read(folder, model, monkeypatch):
    read_rows, file = loading.read_rows, folder / SINGLE_FILE

    def cut(*arguments):
        os.truncate(file, 2000)
        return read_rows(*arguments)

    monkeypatch.setattr(loading, "read_rows", cut)
    with pytest.raises(ModelError, match=r"model\.safetensors: truncated while tensor \S+ was"):
        load_params(folder, model)


def test_weights_in_integers(folder, model):
    tensors = safetensors.numpy.load_file(folder / SINGLE_FILE)
    tensors[KEY] = tensors[KEY].astype(np.int8)
    safetensors.numpy.save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(ModelError, match=rf"{KEY} is I8; weights are read as F32, BF16, F16"):
        load_params(folder, model)


def test_nothing_is_read_before_all_of_it_is_known_to_fit(folder, model, monkeypatch):
    memory = Memory(monkeypatch)
    tensors = safetensors.numpy.load_file(folder / SINGLE_FILE)
    last = max(tensors)
    tensors[last] = np.zeros(7, np.float32)
    safetensors.numpy.save_file(tensors, folder / SINGLE_FILE)
    with pytest.raises(ModelError, match=rf"{last} has shape \(7,\)"):
        load_params(folder, model)
    assert not memory.read
    assert not memory.buffers


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "m.pt", "last.ckpt"])
def test_pickles_are_never_loaded(folder, name):
    (folder / SINGLE_FILE).unlink()
    (folder / name).write_bytes(b"cos\nsystem\n(S'touch /tmp/never'\ntR.")
    with pytest.raises(ModelError, match=rf"{name}, a pickle, which may run code and is never"):
        weight_files(folder)
