"""The training loop: exact resume, refusal of what is not finite, metrics, freezing."""

import contextlib
import itertools
import json
import math
import re
import shutil
import struct
import types

import numpy as np
import pytest
from helpers import meshes
from helpers.loop_runs import (
    CONFIG,
    ROWS,
    STEPS,
    Killed,
    interrupted,
    poison,
    same,
)
from helpers.run_files import contents

from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.core.trees import flatten
from mmpo_jax.recipes.objectives import SECTIONS
from mmpo_jax.training import goodput, loop, reports
from mmpo_jax.training.metrics import MEASURED, read_metrics, reproducible
from mmpo_jax.training.plan import TrainingError
from mmpo_jax.training.times import PARTS

TRL_NAMES = {
    "loss",
    "grad_norm",
    "learning_rate",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
}


def test_it_trains(undisturbed, tiny_model):
    folder, params = undisturbed
    start = flatten(tiny_model[1])
    assert all(not np.array_equal(params[path], start[path]) for path in start if "kernel" in path)
    losses = [row["loss"] for row in read_metrics(folder / "metrics.jsonl")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses[-1] < 0.6


@pytest.mark.parametrize("step", [1, 2, 4, 8])
def test_resume_is_exact(run, undisturbed, tmp_path, step):
    """Killed before update 1 (nothing saved), 2, 4 and 8 (saved at 2, 4, 6), then run again."""
    whole, params = undisturbed
    with interrupted(step), pytest.raises(Killed):
        run(tmp_path)
    same(run(tmp_path), params)
    assert contents(tmp_path / "metrics.jsonl") == contents(whole / "metrics.jsonl")


def test_a_lost_tail_is_made_again(run, undisturbed, tmp_path):
    """The newest checkpoint gone and a metrics line cut off: as after a kill while saving."""
    whole, params = undisturbed
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    same(run(tmp_path), params)
    assert contents(metrics) == contents(whole / "metrics.jsonl")


def test_a_finished_run_does_no_step(run, undisturbed, monkeypatch, tmp_path):
    whole, params = undisturbed
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(loop, "put_batch", None)
    same(run(tmp_path), params)
    assert contents(tmp_path / "metrics.jsonl") == contents(whole / "metrics.jsonl")


@pytest.mark.slow
def test_the_data_position_is_restored(run, monkeypatch, tmp_path):
    """After a restart the rows go on where they were, and none is repeated or left out."""

    def rows_of(folder):
        seen = []
        add = reports.Reports.add
        with monkeypatch.context() as patch:

            def record(self, started):
                seen.append((started.step, started.ids))
                add(self, started)

            patch.setattr(reports.Reports, "add", record)
            with contextlib.suppress(Killed):
                run(folder)
        return seen

    expected = rows_of(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    flat = [name for _, ids in expected for name in ids]
    assert sorted(flat[:ROWS]) == sorted(flat[ROWS : 2 * ROWS]) == sorted(set(flat))
    with interrupted(6):
        before = rows_of(tmp_path / "cut")
    after = rows_of(tmp_path / "cut")
    assert (before, after) == (expected[:5], expected[4:])


@pytest.mark.slow
def test_not_finite(run, examples, tmp_path):
    with pytest.raises(TrainingError) as caught:
        run(tmp_path / "all", [e for x in examples for e in poison([x], x.id)])
    assert "step 1: the loss is nan" in str(caught.value)
    assert "last good checkpoint: none was saved yet" in str(caught.value)

    # Row 4 comes up at some step of the first epoch; find out which one from the message itself.
    with pytest.raises(TrainingError) as caught:
        run(tmp_path / "one", poison(examples, "row-4"), CONFIG.model_copy(update={"epochs": 4}))
    message = str(caught.value)
    step = int(re.match(r"step (\d+): ", message)[1])
    rows = re.search(r"rows of this batch: (.*?);", message)[1].split(", ")
    assert "row-4" in rows
    assert len(rows) == CONFIG.batch_size
    folder = tmp_path / "one" / "checkpoints" / str(step - 1)
    assert f"last good checkpoint: {folder if step > 1 else 'none was saved yet'}" in message


def test_metrics_and_events(undisturbed):
    folder, _ = undisturbed
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(reproducible(row).keys() - {"step", "useful_tokens"} == TRL_NAMES for row in rows)
    assert all(0 < row["useful_tokens"] <= 1 for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    (events,) = (folder / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.")
    scalars = list(read_scalars(events))
    assert {name for _, name, _ in scalars} == rows[0].keys() - {"step"}
    logged = {(step, name): value for step, name, value in scalars}
    for row in rows:
        for name in TRL_NAMES:
            assert logged[row["step"], name] == pytest.approx(row[name], rel=1e-6, abs=1e-30)


def test_what_is_measured(undisturbed):
    """Whatever the machine takes: parts of a step add up, and so do the rates of its rows."""
    rows = read_metrics(undisturbed[0] / "metrics.jsonl")
    for row in rows:
        took = {name: row[f"{MEASURED}{name}"] for name in ("compute", *PARTS)}
        assert sum(took.values()) == pytest.approx(row["perf/step_time"])
        assert all(seconds >= 0 for seconds in took.values())
        assert took["rollout"] == took["validation"] == 0
        assert 0 < row["perf/goodput"] <= 1
        updating = took["compute"] + took["data_wait"]
        assert row["perf/rows_per_second"] == pytest.approx(CONFIG.batch_size / updating)
        assert row["perf/pairs_per_second"] == row["perf/rows_per_second"]
        assert row["perf/responses_per_second"] == 2 * row["perf/rows_per_second"]
        useful = row["perf/tokens_per_second"] / row["perf/computed_tokens_per_second"]
        assert useful == pytest.approx(row["useful_tokens"])
        assert "perf/mfu" not in row  # nobody says what this machine could do at most
    assert rows[0]["perf/compile"] > 0
    saved = [row["step"] for row in rows if row["perf/checkpoint"] > 0]
    assert saved == [3, 5, 7]  # told in the line after


def test_goodput_goes_on_where_it_was(run, undisturbed, tmp_path, monkeypatch):
    """The first start stays, also where nothing was saved yet; steps that are done again count
    once."""
    days = itertools.count(1)
    clock = types.SimpleNamespace(time=lambda: 86400.0 * next(days))
    monkeypatch.setattr(goodput, "time", clock)
    shutil.copytree(undisturbed[0], tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    known = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(known | {"first_start": 0.0}))
    before = read_metrics(tmp_path / "metrics.jsonl")
    run(tmp_path)
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[:-2] == before[:-2]
    kept = sum(row["perf/compute"] for row in rows[:-1])
    assert rows[-2]["perf/goodput"] == pytest.approx(kept / 86400.0)


def read_scalars(path):
    """(step, name, value) of an event file: length-prefixed records with two checksums."""
    from tensorboardX.proto.event_pb2 import Event

    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        event = Event.FromString(data[12 : 12 + length])
        yield from ((event.step, value.tag, value.simple_value) for value in event.summary.value)
        data = data[12 + length + 4 :]


def test_step_0_is_exact(undisturbed):
    first = read_metrics(undisturbed[0] / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_reports_are_means_of_their_steps(run, undisturbed, tmp_path):
    config = CONFIG.model_copy(update={"log_every": 3, "save_every": 3})
    run(tmp_path, config=config)
    every = read_metrics(undisturbed[0] / "metrics.jsonl")
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == [3, 6, 8]
    for row, steps in zip(rows, (every[:3], every[3:6], every[6:]), strict=True):
        for name in TRL_NAMES:
            mean = np.mean([step[name] for step in steps])
            assert row[name] == pytest.approx(mean, rel=1e-5, abs=1e-6)


@pytest.mark.slow
def test_progress_lines(run, tmp_path, capsys):
    run(tmp_path, config=CONFIG.model_copy(update={"max_steps": 2}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "1/2"], ["step", "2/2"]]
    assert all("loss" in line and "steps/s" in line for line in lines)


def test_nothing_to_train_on(run, tmp_path):
    with pytest.raises(TrainingError, match="no row is left"):
        run(tmp_path, [])


def test_a_batch_that_does_not_fit_the_devices(run, tmp_path):
    eight = meshes.mesh_of(1, 8, 1)
    with pytest.raises(TrainingError, match="2 rows at a time cannot be split over 8 devices"):
        run(tmp_path, mesh=eight)


@pytest.mark.parametrize(
    ("freeze", "told"), [(("visoin.*",), "matches no parameter"), ((".*",), "nothing to train")]
)
def test_impossible_freezing_is_an_error_for_people(run, tmp_path, freeze, told):
    with pytest.raises(TrainingError, match=told):
        run(tmp_path, config=CONFIG.model_copy(update={"freeze": freeze}))


@pytest.mark.slow
def test_frozen_parameters_stay_and_are_saved(run, tiny_model, tmp_path, mesh):
    config = CONFIG.model_copy(
        update={"max_steps": 2, "freeze": ("vision_tower/.*",), "objective": (SECTIONS["sft"](),)}
    )
    params, start = run(tmp_path, config=config), flatten(tiny_model[1])
    frozen = [path for path in start if path.startswith("vision_tower/")]
    assert frozen
    for path in start:
        assert (path in frozen) == np.array_equal(params[path], start[path]), path
    loaded = flatten(load_checkpoint(str(tmp_path), mesh).params)
    same({path: np.asarray(leaf) for path, leaf in loaded.items()}, params)


def test_metrics_lines_are_json(undisturbed):
    for line in (undisturbed[0] / "metrics.jsonl").read_text().splitlines():
        assert next(iter(json.loads(line))) == "step"
