"""Checkpoints of training: whole or refused, read back by any spelling, on any devices."""

import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import meshes
from helpers.loop_runs import CONFIG, IDENTITY, STEPS, files, poison, same

from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.checkpoints.huggingface import load_params, save_model
from mmpo_jax.checkpoints.orbax import find_checkpoint
from mmpo_jax.checkpoints.steps import CheckpointError
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.training import loop
from mmpo_jax.training.plan import TrainingError

ROOT = Path(__file__).parents[2]


def test_the_last_good_checkpoint_is_intact(run, examples, undisturbed, tmp_path, mesh):
    """Only the steps from the third on see the poisoned row: the first two of it are as ever."""
    whole, params = undisturbed
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    for step in (8, 6):
        shutil.rmtree(tmp_path / "checkpoints" / str(step))
    good = tmp_path / "checkpoints" / "4"
    before = files(good)
    with pytest.raises(TrainingError, match=rf"last good checkpoint: {good}$") as caught:
        run(tmp_path, [e for x in examples for e in poison([x], x.id)])
    assert str(caught.value).startswith("step 5: the loss is nan")
    assert files(good) == before
    # Mended, the run goes on from there and ends as if nothing had been.
    same(run(tmp_path), params)


def test_checkpoints_of_another_run_are_refused(run, undisturbed, tmp_path):
    """And nothing of that run is touched, such as the config beside its checkpoints."""
    copy = shutil.copytree(undisturbed[0], tmp_path / "run")
    (copy / "base" / "generation_config.json").write_text("{}")
    before = files(copy)
    objective = [{"type": "dpo", "beta": 0.2}]
    identity = IDENTITY | {"rows": "c" * 64, "training": {"objective": objective}}
    changed = r"recipe: rows, training\.objective\.0\.beta \(0\.1 there, 0\.2 here\); give"
    with pytest.raises(CheckpointError, match=changed):
        run(copy, identity=identity)
    assert files(copy) == before


def test_old_checkpoints_are_removed(undisturbed):
    kept = {path.name for path in (undisturbed[0] / "checkpoints").iterdir()}
    assert kept == {"4", "6", "8"}


@pytest.mark.slow
def test_every_spelling_of_a_checkpoint(
    undisturbed, tiny_model, tiny_processor, tmp_path, mesh, monkeypatch
):
    """The run, its `checkpoints/`, a step of it and the Hugging Face folder hold the same."""
    folder, params = undisturbed
    save_model(tmp_path / "model", tiny_model[0], unflatten(params), tiny_processor.folder)
    expected = flatten(load_params(tmp_path / "model", tiny_model[0]))
    same(params, expected)
    steps = folder / "checkpoints"
    for name in (folder, steps, steps / str(STEPS), tmp_path / "model"):
        checkpoint = load_checkpoint(str(name), mesh)
        same({path: np.asarray(leaf) for path, leaf in flatten(checkpoint.params).items()}, params)
        assert checkpoint.model == tiny_model[0]
        assert checkpoint.processor.fingerprints() == tiny_processor.fingerprints()
    earlier = flatten(load_checkpoint(str(steps / "4"), mesh).params)
    assert any(not np.array_equal(earlier[path], params[path]) for path in params)
    # The base folder makes a run whole: it can be moved, and its start model removed.
    moved = shutil.copytree(folder, tmp_path / "moved")
    moved_params = load_checkpoint(str(moved), mesh).params
    same({path: np.asarray(leaf) for path, leaf in flatten(moved_params).items()}, params)


ONE_DEVICE = """
import sys, jax, numpy
from mmpo_jax.core.trees import flatten
from mmpo_jax.checkpoints.orbax import load_checkpoint_params
assert jax.device_count() == 1
numpy.savez(sys.argv[2], **flatten(load_checkpoint_params(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_on_one(run, mesh, tmp_path):
    """Also where the other seven do not exist."""
    eight = meshes.mesh_of(1, 8, 1)
    config = CONFIG.model_copy(update={"max_steps": 1, "batch_size": 8, "micro_batch_size": None})
    params = run(tmp_path, config=config, mesh=eight)
    step, _ = find_checkpoint(tmp_path)
    command = [sys.executable, "-c", ONE_DEVICE, step, str(tmp_path / "params.npz")]
    subprocess.run(command, check=True, env=os.environ | {"XLA_FLAGS": ""}, cwd=ROOT)
    with np.load(tmp_path / "params.npz") as loaded:
        same(dict(loaded), params)


def test_a_broken_checkpoint(undisturbed, tmp_path, mesh):
    copy = shutil.copytree(undisturbed[0], tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / str(STEPS) / "params" / "d", ignore_errors=True)
    for file in (copy / "checkpoints" / str(STEPS) / "params").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        load_checkpoint(str(copy), mesh)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written(run, undisturbed, tmp_path, monkeypatch):
    """A disk that is full after step 6, in the shape of files that may not grow."""
    put_batch, taken = loop.put_batch, itertools.count(1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_up(*args, **options):
        if next(taken) == 7:  # the checkpoint of step 6 may be on its way
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        return put_batch(*args, **options)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "put_batch", fill_up)
            with pytest.raises(CheckpointError, match=r"written: .*File too large") as told:
                run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    [last] = re.findall(r"last good checkpoint: (.*?);", str(told.value))
    assert last in (f"{tmp_path}/checkpoints/4", f"{tmp_path}/checkpoints/6")
    assert find_checkpoint(tmp_path)[0] == last
    same(run(tmp_path), undisturbed[1])
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["4", "6", "8"]  # and nothing half-written


def test_folders_that_are_no_checkpoint(tmp_path):
    assert find_checkpoint(tmp_path) is None
    (tmp_path / "checkpoints" / "7" / "params").mkdir(parents=True)
    assert find_checkpoint(tmp_path) is None  # no base folder beside
    (tmp_path / "base").mkdir()
    assert find_checkpoint(tmp_path) == (f"{tmp_path}/checkpoints/7", f"{tmp_path}/base")
