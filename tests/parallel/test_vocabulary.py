"""A vocabulary that eight devices do not share evenly: filled up on them, and nowhere else."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import tiny
from helpers.meshes import one_device
from helpers.sampling import sample

from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.checkpoints.digests import digests
from mmpo_jax.checkpoints.huggingface import load_model, save_model
from mmpo_jax.checkpoints.orbax import save_base
from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.core.trees import flatten
from mmpo_jax.generation.sampler import sample_keys
from mmpo_jax.models.vocabulary import TABLES, filled, without_added
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel.mesh import make_mesh, put_batch
from mmpo_jax.recipes.optimizers import Adafactor, AdamW, Constant, Muon
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.training import moments
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.optimizer import make_optimizer, make_schedule
from mmpo_jax.training.step import create_state, make_step

TOKENS = tiny.VOCAB_SIZE + 3
SHAPES = [(1, 8, 1), (1, 1, 8), (2, 2, 2)]
FILLED = {(1, 8, 1): TOKENS + 5, (1, 1, 8): TOKENS + 5, (2, 2, 2): TOKENS + 1}
OPTIMIZER = AdamW(learning_rate=3e-3, epsilon=1e-3, weight_decay=0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny.make_config(text={"vocab_size": TOKENS})
    return tiny.make_folder(tmp_path_factory.mktemp("odd") / "llava", config)


def trained(checkpoint, mesh, steps=2, config=OPTIMIZER):
    """(state after some steps, a batch)."""
    model = checkpoint.model
    batch = tiny.random_batch(model.config, [6, 9] * 4, [(3, 5), (5, 1)] * 4)
    schedule = make_schedule(Constant(warmup_ratio=0), config.learning_rate, 10)
    optimizer = make_optimizer(config, schedule, TOKENS)
    reference = np.zeros((8, 2), np.float32)
    inputs = jax.tree.map(lambda leaf: leaf[None], tiny.train_batch(batch, reference))
    with jax.set_mesh(mesh):
        state = create_state(checkpoint.params, model, optimizer, (), mesh)
        step = make_step(make_loss(model, [make_term("dpo", beta=0.1)]), optimizer, schedule, state)
        for _ in range(steps):
            state, _ = step(state, put_batch(inputs, mesh, leading=1))
    return state, batch


@pytest.fixture(scope="module")
def on_one(folder):
    return trained(load_checkpoint(str(folder), one_device()), one_device())[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_device_holds_its_part(folder, shape):
    params = flatten(load_checkpoint(str(folder), make_mesh(*shape)).params)
    stored = flatten(load_model(folder)[1])
    for path, axis in TABLES.items():
        leaf = params[path]
        assert leaf.shape[axis] == FILLED[shape]
        assert leaf.addressable_shards[0].data.size == leaf.size // (shape[1] * shape[2])
        np.testing.assert_array_equal(without_added(path, np.asarray(leaf), TOKENS), stored[path])
    same = params.keys() - TABLES.keys()
    assert all(params[path].shape == stored[path].shape for path in same)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_added_learns_nothing(folder, on_one, shape):
    """Moments and weight decay leave zeros as they are, and the rest is what one device trains."""
    state, _ = trained(load_checkpoint(str(folder), make_mesh(*shape)), make_mesh(*shape))
    for path, leaf in state.params.items():
        if path in TABLES:
            added = np.take(np.asarray(leaf), range(TOKENS, leaf.shape[TABLES[path]]), TABLES[path])
            assert added.size
            assert not added.any()
        own = without_added(path, np.asarray(leaf), TOKENS)
        np.testing.assert_allclose(own, on_one.params[path], rtol=0, atol=1e-5, err_msg=path)


@pytest.mark.slow
def test_what_is_added_is_never_sampled(folder):
    """At a temperature at which all tokens are as likely."""
    drawn = {}
    for name, mesh in {"one": one_device(), "all": make_mesh(1, 2, 4)}.items():
        checkpoint = load_checkpoint(str(folder), mesh)
        batch = tiny.random_batch(checkpoint.model.config, [6, 9] * 4, [(3, 5)] * 8)
        with jax.set_mesh(mesh):
            drawn[name] = sample(
                checkpoint.model,
                checkpoint.params,
                batch,
                sample_keys(0, 0, np.arange(8), 10),
                decoding=Decoding(num_samples=10, max_new_tokens=16, temperature=1e3),
                eos_ids=(TOKENS,),
                pad_id=tiny.PAD_ID,
                mesh=mesh,
            )
    assert len(np.unique(drawn["all"])) == TOKENS
    np.testing.assert_array_equal(drawn["all"], drawn["one"])


def test_files_are_those_of_one_device(folder, tmp_path):
    for name, mesh in {"one": one_device(), "all": make_mesh(1, 2, 4)}.items():
        checkpoint = load_checkpoint(str(folder), mesh)
        save_model(tmp_path / name, checkpoint.model, checkpoint.params, folder)
    one, every = (tmp_path / name / "model.safetensors" for name in ("one", "all"))
    assert one.read_bytes() == every.read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_run_goes_on_on_other_devices(folder, tmp_path):
    """Saved where eight devices share the vocabulary, restored where four do, and one."""
    start = load_checkpoint(str(folder), make_mesh(1, 8, 1))
    state, _ = trained(start, make_mesh(1, 8, 1))
    run = Checkpoints(tmp_path, {}, keep=1)
    run.save(2, state, {})
    run.close()
    save_base(tmp_path, folder)
    for mesh in (make_mesh(2, 1, 4), one_device()):
        like, _ = trained(load_checkpoint(str(folder), mesh), mesh, steps=0)
        restored, *_ = Checkpoints(tmp_path, {}, keep=1).restore(like)
        for path, leaf in restored.params.items():
            assert leaf.shape == like.params[path].shape
            own = without_added(path, np.asarray(leaf), TOKENS)
            expected = without_added(path, np.asarray(state.params[path]), TOKENS)
            np.testing.assert_array_equal(own, expected)
            shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
            np.testing.assert_array_equal(np.asarray(leaf), filled(path, own, shards))
        named = flatten(load_checkpoint(str(tmp_path), mesh).params)
        for path, leaf in named.items():
            assert leaf.shape == like.params[path].shape
            np.testing.assert_array_equal(leaf, restored.params[path])


OPTIMIZERS = {
    "adafactor": Adafactor(learning_rate=3e-3, min_dim_size_to_factor=8),
    "unfactored": Adafactor(learning_rate=3e-3, min_dim_size_to_factor=1024),
    "int8": AdamW(learning_rate=3e-3, epsilon=1e-3, moments="int8"),
    "muon": Muon(learning_rate=3e-3, moments="int8"),
}


def updated(checkpoint, mesh, config):
    """A state whose moments are those of one gradient, the same on any mesh."""
    schedule = make_schedule(Constant(warmup_ratio=0), config.learning_rate, 10)
    optimizer = make_optimizer(config, schedule, TOKENS)
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    with jax.set_mesh(mesh):
        state = create_state(checkpoint.params, checkpoint.model, optimizer, (), mesh)
        grads = {}
        for number, (path, leaf) in enumerate(state.params.items()):
            own = without_added(path, np.zeros(leaf.shape, np.bool_), TOKENS).shape
            drawn = np.random.default_rng(number).standard_normal(own).astype(np.float32)
            grads[path] = jax.device_put(filled(path, drawn, shards), leaf.sharding)
        places = jax.tree.map(lambda leaf: leaf.sharding, state.optimizer)
        update = jax.jit(lambda *given: optimizer.update(*given)[1], out_shardings=places)
        after = update(grads, state.optimizer, state.params)
    return dataclasses.replace(state, optimizer=after)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_are_those_that_were_saved(folder, tmp_path, name, monkeypatch):
    """Whatever the optimizer keeps of a token, from more devices to fewer and back."""
    monkeypatch.setattr(moments, "SMALL", 64)
    config, meshes = OPTIMIZERS[name], {"one": one_device(), "all": make_mesh(2, 1, 4)}
    starts = {each: load_checkpoint(str(folder), mesh) for each, mesh in meshes.items()}
    states = {each: updated(starts[each], mesh, config) for each, mesh in meshes.items()}
    for one, other in (("one", "all"), ("all", "one")):
        run = Checkpoints(tmp_path / one, {}, keep=1)
        run.save(2, states[one], {})
        run.close()
        restored, *_ = Checkpoints(tmp_path / one, {}, keep=1).restore(states[other])
        assert digests(restored.optimizer) == digests(states[one].optimizer)


def test_tables_alone_are_filled_up():
    table = np.ones((5, 3), np.float32)
    path = "language_model/embed_tokens/embedding"
    assert filled(path, table, 4).tolist() == [*table.tolist(), *[[0, 0, 0]] * 3]
    assert filled("language_model/layers/mlp/up_proj/kernel", table, 4) is table
    assert filled(path, table, 5) is table
    assert isinstance(filled(path, jax.numpy.asarray(table), 4), jax.Array)
