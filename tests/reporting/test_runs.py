"""Runs as folders have them: how far they came, and which belong together."""

import json
import shutil

import pytest
from helpers import buckets
from helpers.report_runs import write_alignment, write_training

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.reporting.measured import group_runs, measured
from mmpo_jax.reporting.runs import read_runs
from mmpo_jax.reporting.tables import benchmark_table


def write_evaluation(folder, model):
    """What `mmpo evaluate` leaves, with as many points as the model's name has letters."""
    key = "world/points"
    shown = {"key": key, "benchmark": "world", "heading": "points", "better": "more"}
    told = {"model": model, "recipe": {"model": model}, "metrics": {key: len(model)}}
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps({**told, "shown": [shown]}))
    return folder


def state(folder):
    return read_runs([str(folder)])[0].state


def test_how_far_an_alignment_came(tmp_path):
    run = write_alignment(tmp_path / "run", prompts=3)
    assert state(run) == "finished: 2 rounds"
    (run / "model.json").unlink()
    rows = json.loads((run / "rounds.json").read_text())
    (run / "rounds.json").write_text(json.dumps(rows[:2]))
    assert state(run) == "not finished: round 2 of 2: trained, not measured yet"
    (run / "round-2" / "train.json").unlink()
    assert state(run) == "not finished: round 2 of 2: training, 20 updates done"
    shutil.rmtree(run / "round-2" / "train")
    (run / "round-2" / "reference.parts-0123").mkdir()
    (run / "round-2" / "reference.parts-0123" / "00000.parquet").write_bytes(b"")
    assert state(run) == "not finished: round 2 of 2: reference, 1 part made"
    shutil.rmtree(run / "round-2")
    assert state(run) == "not finished: 1 round of 2 done"
    (run / "rounds.json").write_text("[")  # damaged
    shutil.rmtree(run / "round-1")
    assert state(run) == "not finished: the start model is measured"
    shutil.rmtree(run / "round-0")
    assert state(run) == "not finished: nothing is done yet"


def test_how_far_a_training_came(tmp_path):
    assert state(write_training(tmp_path / "a")) == "finished: 300 updates"
    assert state(write_training(tmp_path / "b", finished=False)) == "not finished: 300 updates done"


def test_an_evaluation_is_one_model(tmp_path):
    folders = [str(write_evaluation(tmp_path / name, name)) for name in ("first", "aligned")]
    runs = read_runs(folders)
    groups = group_runs(runs)
    assert [(run.kind, run.state) for run in runs] == [("evaluate", "finished")] * 2
    (benchmark,) = measured(runs, groups)
    assert list(benchmark.columns) == [(0, 0), (1, 0)]
    (metric,) = benchmark.metrics
    assert [metric.values[column].mean for column in benchmark.columns] == [5, 7]
    assert metric.verdict(metric.values[1, 0]) == ""  # nobody says which of them is the start
    assert "start" not in str(benchmark_table(benchmark, groups).head)


def test_what_is_no_run(tmp_path):
    with pytest.raises(MmpoError, match="there is no such folder"):
        read_runs([str(tmp_path / "missing")])
    (tmp_path / "other").mkdir()
    with pytest.raises(
        MmpoError, match=r"other: is no run: .*mmpo align.*mmpo train.*mmpo evaluate"
    ):
        read_runs([str(tmp_path / "other")])


def test_names_tell_runs_apart(tmp_path):
    for place in ("a/run", "b/run", "b/other"):
        write_training(tmp_path / place)
    folders = [str(tmp_path / place) for place in ("a/run", "b/run", "b/other")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run", "b/other"]
    assert [run.name for run in read_runs([folders[0] + "/", folders[2]])] == ["run", "other"]


def test_seeds_are_one_group_with_their_spread(tmp_path):
    folders = [str(write_alignment(tmp_path / f"run-seed{s}", 2, seed=s)) for s in range(3)]
    folders.append(str(write_alignment(tmp_path / "longer", 2, rounds=3)))
    runs = read_runs(folders)
    groups = group_runs(runs)
    assert [(group.label, list(group.runs)) for group in groups] == [
        ("run (3 seeds)", [0, 1, 2]),
        ("longer", [3]),
    ]
    (benchmark,) = measured(runs, groups)
    assert (benchmark.name, benchmark.kind) == ("picture_world", "align")
    assert list(benchmark.columns) == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (1, 3)]
    recall = next(each for each in benchmark.metrics if each.name == "sampled/recall")
    value = recall.values[0, 2]
    assert value.mean == pytest.approx(0.93 + 0.01)
    assert value.deviation == pytest.approx(0.01)
    assert value.start == pytest.approx(0.95 + 0.01)
    assert recall.verdict(value) == "worse"
    panels = [metric.panel for metric in benchmark.metrics]
    assert panels == ["CHAIR_s", "CHAIR_s", "recall", "recall", "length", "", ""]
    assert recall.values[1, 3].deviation is None


def test_runs_in_buckets(tmp_path, monkeypatch):
    buckets.file_bucket(monkeypatch, tmp_path / "buckets")
    write_alignment(tmp_path / "buckets" / "bucket" / "run", prompts=2)
    (run,) = read_runs(["gs://bucket/run"])
    assert (run.name, run.state, len(run.rounds)) == ("run", "finished: 2 rounds", 3)
    assert run.rounds[2].curves[-1]["step"] == 20


def test_a_training_is_measured_by_its_updates(tmp_path):
    run = write_training(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    for step, share in ((100, 0.6), (200, 0.7)):
        lines[step - 1] = json.dumps(json.loads(lines[step - 1]) | {"pope/Accuracy": share})
    start = {"step": 0, "pope/Accuracy": 0.5, "eval_loss": 0.7}
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(start), *lines]) + "\n")
    row = {"benchmark": "pope", "metric": "Accuracy", "better": "more", "cells": [], "panel": ""}
    (run / "tax.json").write_text(json.dumps({"rows": [row]}))
    runs = read_runs([str(run)])
    (benchmark,) = measured(runs, group_runs(runs))
    (metric,) = benchmark.metrics
    assert (benchmark.kind, metric.name, metric.better) == ("train", "Accuracy", "more")
    assert {place: value.mean for (_, place), value in metric.values.items()} == {
        0: 0.5,
        100: 0.6,
        200: 0.7,
    }
    assert not any("pope/Accuracy" in row for row in runs[0].rounds[0].curves)
    (run / "tax.json").unlink()  # as of a training that is under way
    card = json.loads((run / "base" / "card.json").read_text())
    card["recipe"]["evaluation"] = [{"type": "pope", "name": None}]
    (run / "base" / "card.json").write_text(json.dumps(card))
    runs = read_runs([str(run)])
    (benchmark,) = measured(runs, group_runs(runs))
    assert [metric.name for metric in benchmark.metrics] == ["Accuracy"]
    assert not any("pope/Accuracy" in row for row in runs[0].rounds[0].curves)
