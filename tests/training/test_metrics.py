"""Metrics of several steps: means over all that counts in any of them."""

import contextlib
import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import buckets, meshes
from helpers.run_files import reproducible_rows
from tensorboardX.record_writer import RecordWriter

from mmpo_jax import cli
from mmpo_jax.commands import train as training_run
from mmpo_jax.core import buckets as buckets_module
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.objectives.sums import WeightedSum
from mmpo_jax.training.metrics import MetricsWriter, means, read_metrics, reproducible

LABELS = [True, False, False, False, False, True, False, False]


def step(loss, chosen, rejected):
    """Metrics of a step with such (sum, weight) of rewards."""
    return {
        "loss": np.float32(loss),
        "rewards/chosen": WeightedSum(*np.float32(chosen)),
        "rewards/rejected": WeightedSum(*np.float32(rejected)),
    }


def test_steps_count_by_what_they_hold():
    """One desirable row in four steps of one row; the loss is a mean over steps."""
    steps = [step(0.5, (0, 0), (-1, 1)), step(1.5, (2, 1), (0, 0)), step(1, (0, 0), (-2, 1))]
    steps.append(step(1, (0, 0), (-3, 1)))
    assert means(steps) == {
        "loss": 1,
        "rewards/chosen": 2,
        "rewards/rejected": -2,
        "rewards/margins": 4,
    }


def test_what_counts_nothing_is_left_out():
    """Whatever its sum; there is no margin either."""
    steps = [step(1, (np.nan, 0), (-1, 1)), step(2, (0, 0), (-3, 3))]
    assert means(steps) == {"loss": 1.5, "rewards/rejected": -1}


def test_margins_of_pairs_are_their_own():
    """Their mean is of other pairs where sides have no pair."""
    pairs = step(1, (2, 1), (1, 1)) | {"rewards/margins": WeightedSum(np.float32(3), np.float32(2))}
    assert means([pairs])["rewards/margins"] == 1.5


def test_what_is_not_finite_is_null(tmp_path):
    """Also after a restart, which writes the lines anew."""
    for step in range(2):
        writer = MetricsWriter(tmp_path, step - 1, 2)
        writer.record(step, {"eval_loss": math.nan, "eval_kl": math.inf, "loss": 0.5})
        writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    line = '"eval_loss": null, "eval_kl": null, "loss": 0.5}'
    assert lines == [f'{{"step": {step}, {line}' for step in range(2)]
    for row in read_metrics(tmp_path / "metrics.jsonl"):
        assert math.isnan(row["eval_loss"]) and row["loss"] == 0.5


def test_what_is_measured_is_no_part_of_a_result():
    row = {"step": 3, "loss": 0.5, "perf/mfu": 0.4, "perf/step_time": 2.0}
    assert reproducible(row) == {"step": 3, "loss": 0.5}


def test_in_a_bucket(monkeypatch, tmp_path):
    """Lines are there when a checkpoint is saved; those after the resumed step go."""
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path))
    system = buckets.empty_bucket(monkeypatch)
    path = "gs://bucket/run/metrics.jsonl"
    killed = MetricsWriter("gs://bucket/run", -1, 4)
    killed.record(1, {"loss": 1.0})
    killed.record(2, {"loss": 2.0})
    assert not system.exists(path)
    killed.flush()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    writer = MetricsWriter("gs://bucket/run", 1, 4)
    assert writer.rows == [{"step": 1, "loss": 1.0}]
    writer.record(2, {"loss": 3.0})
    writer.close()
    assert [row["loss"] for row in read_metrics(path)] == [1.0, 3.0]
    assert len(system.ls("gs://bucket/run/tensorboard")) >= 1
    assert not list(tmp_path.glob("outputs/*"))


class Kept:
    """A tracker with a file of its own."""

    def __init__(self, folder):
        self.path = Path(folder, "wandb", "run.txt")
        self.path.parent.mkdir()

    def log(self, row):
        with open(self.path, "a") as file:
            file.write(f"{row['step']}\n")

    def close(self):
        with open(self.path, "a") as file:
            file.write("closed\n")


def test_lines_that_did_not_reach_the_bucket(monkeypatch, tmp_path):
    """Are still on the machine that goes on, and belong to what is there."""
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path))
    system = buckets.empty_bucket(monkeypatch)
    monkeypatch.setattr(buckets_module, "LAST_WAITS", ())
    writer = MetricsWriter("gs://bucket/run", -1, 4)
    writer.record(1, {"loss": math.nan})
    writer.flush()
    writer.record(2, {"loss": 0.5})

    def refuse(*args, **options):
        raise PermissionError("403")

    with monkeypatch.context() as patch:
        patch.setattr(type(system), "_open", refuse)
        with pytest.raises(MmpoError, match="cannot be written: 403"):
            writer.close()
    again = MetricsWriter("gs://bucket/run", 2, 4)
    assert [row["step"] for row in again.rows] == [1, 2]
    again.close()
    assert len(read_metrics("gs://bucket/run/metrics.jsonl")) == 2


def test_what_a_tracker_keeps_goes_to_the_bucket(monkeypatch, tmp_path):
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path))
    system = buckets.empty_bucket(monkeypatch)
    writer = MetricsWriter("gs://bucket/run", -1, 2, Kept)
    writer.record(1, {"loss": 1.0})
    writer.record(2, {"loss": 2.0})
    writer.close()
    assert system.cat("gs://bucket/run/wandb/run.txt") == b"1\n2\nclosed\n"


@pytest.mark.slow
def test_reports_of_single_responses(tiny_folder, tmp_path, monkeypatch):
    """`mmpo train` on one row at a time says the same of four steps as of each of them."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    one = meshes.one_device()
    monkeypatch.setattr(training_run, "make_mesh", lambda **_: one)
    data = tmp_path / "data.jsonl"
    texts = ["yes", "a red star", "two rings .", "no"]
    rows = [
        {"id": str(n), "prompt": "a ring ?", "completion": texts[n % 4], "label": label}
        for n, label in enumerate(LABELS)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(name, log_every):
        recipe = {
            "model": str(tiny_folder),
            "output": str(tmp_path / name),
            "data": {"source": "file", "path": str(data)},
            "lengths": {"prompt": [16], "response": [8]},
            "training": {
                "objective": {"type": "apo_zero_unpaired"},
                "optimizer": {"learning_rate": 1e-3},
                "schedule": {"warmup_ratio": 0},
                "batch_size": 1,
                "log_every": log_every,
            },
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        assert cli.main(["train", str(path)]) == 0
        return reproducible_rows(tmp_path / name / "metrics.jsonl")

    every, rows = train("every", 1), train("fourth", 4)
    chosen = [{"rewards/chosen", "logps/chosen"} <= row.keys() for row in every]
    assert sum(chosen) == 2
    assert [{"rewards/rejected", "logps/rejected"} <= row.keys() for row in every] == [
        not has for has in chosen
    ]
    assert not any("rewards/margins" in row for row in every)
    for row, steps in zip(rows, (every[:4], every[4:]), strict=True):
        for name in row.keys() - {"step", "rewards/margins"}:
            values = [one[name] for one in steps if name in one]
            assert row[name] == pytest.approx(np.mean(values), rel=1e-5, abs=1e-6), name
        assert len({name for one in steps for name in one}) == len(row.keys() - {"rewards/margins"})
        if "rewards/margins" in row:
            margin = row["rewards/chosen"] - row["rewards/rejected"]
            assert row["rewards/margins"] == pytest.approx(margin)
    assert any("rewards/margins" in row for row in rows)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_events_stops_the_run(tmp_path, monkeypatch):
    """Their thread ends with its error, which nobody hears; waiting for it would take for ever."""

    def full(self, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with contextlib.closing(MetricsWriter(tmp_path, -1, 9)) as writer:
        monkeypatch.setattr(RecordWriter, "write", full)
        thread = writer.events.file_writer.event_writer._worker
        writer.record(1, {"loss": 0.5})
        thread.join(60)
        with pytest.raises(MmpoError, match="tensorboard: events cannot be written any more"):
            writer.record(2, {"loss": 0.4})
