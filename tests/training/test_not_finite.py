"""A step that is not finite: what was learned before is saved, its batch can be looked at."""

import json
import shutil
import types

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.loop_runs import CONFIG, files, poison, same
from helpers.run_files import contents

from mmpo_jax.checkpoints.steps import CheckpointError
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.training import reports as reports_module
from mmpo_jax.training.plan import TrainingError
from mmpo_jax.training.reports import Reports, StartedStep

SELDOM = CONFIG.model_copy(update={"log_every": 4, "save_every": 4})


def test_weights_that_are_not_finite_are_not_blamed_on_rows():
    weights = jnp.array([1.0, jnp.inf])
    state = TrainState(jnp.int32(0), {"a": jnp.ones(2)}, {"b/kernel": weights}, ())
    checkpoints = types.SimpleNamespace(steps=lambda: [], folder="nowhere")
    reports = Reports(CONFIG, 8, checkpoints, None, None, None, None, None, {}, [])
    reports.add(
        StartedStep(1, ("row-1",), {"finite": False, "loss": jnp.nan, "grad_norm": jnp.nan}, {})
    )
    with pytest.raises(TrainingError, match="step 1: the weights themselves are not") as caught:
        reports.report(1, state, {})
    assert "b/kernel; last good checkpoint: none" in str(caught.value)
    assert "row-1" not in str(caught.value)


class NoMemory:
    """A recorder that has none left."""

    def record(self, *args):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocator statistics")


def not_finite(checkpoints):
    """What is said of a second step that is not finite."""
    state = TrainState(jnp.int32(1), {"a": jnp.ones(2)}, {}, ())
    reports = Reports(CONFIG, 8, checkpoints, None, None, None, None, NoMemory(), {}, [])
    metrics = {"finite": False, "loss": jnp.nan, "grad_norm": jnp.nan}
    reports.add(StartedStep(2, ("row-1",), metrics, {}))
    with pytest.raises(TrainingError) as caught:
        reports.report(2, state, {})
    return str(caught.value)


def test_the_batch_may_not_be_kept():
    """Which hides nothing of what is wrong."""
    saved = []
    checkpoints = types.SimpleNamespace(
        steps=lambda: [1], folder="nowhere", latest=lambda: None, save=lambda *all: saved.append(1)
    )
    told = not_finite(checkpoints)
    assert told.startswith("step 2: the loss is nan") and "row-1" in told and saved
    assert "the batch cannot be kept: RESOURCE_EXHAUSTED: Out of memory; last good" in told


@pytest.mark.parametrize("several", [False, True])
def test_a_checkpoint_that_one_process_cannot_write(several, monkeypatch, caplog):
    """Ends that process, for which the others wait; where it is the only one, it goes on."""

    def full(*_):
        raise CheckpointError("checkpoints: the disk is full")

    monkeypatch.setattr(reports_module, "several", lambda: several)
    checkpoints = types.SimpleNamespace(folder="nowhere", latest=lambda: None, save=full)
    told = not_finite(checkpoints)
    assert told.startswith("step 2: the loss is nan")
    assert ("the disk is full" in told) == several == ("cannot be kept" not in told)
    assert ("the disk is full" in caplog.text) == (not several)


@pytest.fixture(scope="module")
def broken(run, examples, tmp_path_factory):
    """(folder, step, message) of a run with a row whose reference is no number, of which nothing is
    known until four steps are done."""
    folder = tmp_path_factory.mktemp("broken") / "train"
    with pytest.raises(TrainingError) as caught:
        run(folder, poison(examples, "row-7"), SELDOM)
    told = str(caught.value)
    return folder, int(told.split()[1].rstrip(":")), told


def test_what_was_learned_before_is_saved(broken, run, undisturbed, tmp_path):
    folder, step, told = broken
    assert (step - 1) % SELDOM.save_every  # or it would be saved anyhow
    last = folder / "checkpoints" / str(step - 1)
    assert told.endswith(f"last good checkpoint: {last}") and last.is_dir()
    # Mended, the run goes on with the batch that failed and ends as if nothing had been.
    copy = shutil.copytree(folder, tmp_path / "run")
    same(run(copy, config=SELDOM), undisturbed[1])
    # Also its means of four steps, of which some were done before.
    run(tmp_path / "whole", config=SELDOM)
    lines = [contents(folder / "metrics.jsonl") for folder in (copy, tmp_path / "whole")]
    assert lines[0] == lines[1]


def test_the_batch_can_be_looked_at(broken):
    folder, step, told = broken
    path = folder / "not_finite" / f"step-{step}"
    assert f"the batch is in {path}.npz" in told
    about = json.loads(path.with_suffix(".json").read_text())
    assert about["step"] == step and "row-7" in about["rows"] and len(about["rows"]) == 4
    assert about["not_finite"] == ["reference/sums"]
    assert about["metrics"]["loss"] is None and about["metrics"]["finite"] == 0
    with np.load(path.with_suffix(".npz")) as arrays:
        assert np.isnan(arrays["reference/sums"]).sum() == 1
        assert arrays["prompts/loss_mask"].any()


def test_failing_again_leaves_everything_as_it_was(broken, run, examples, tmp_path):
    folder, _, told = broken
    copy = shutil.copytree(folder, tmp_path / "run")
    before = files(copy / "checkpoints")
    with pytest.raises(TrainingError) as caught:
        run(copy, poison(examples, "row-7"), SELDOM)
    assert str(caught.value) == told.replace(str(folder), str(copy))
    assert files(copy / "checkpoints") == before
