"""The training loop: exact resume, refusal of what is not finite, checkpoints and metrics."""

import contextlib
import dataclasses
import itertools
import json
import math
import os
import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from jax.sharding import AxisType

from mmpo_jax.checkpoint import load_checkpoint
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.models.huggingface import flatten, load_params, save_model, unflatten
from mmpo_jax.parallel.mesh import AXES
from mmpo_jax.recipe import Lengths
from mmpo_jax.recipe_objectives import SECTIONS
from mmpo_jax.recipe_training import Optimizer, Training
from mmpo_jax.shapes.render import png_bytes
from mmpo_jax.shapes.world import sample_scene
from mmpo_jax.training import loop
from mmpo_jax.training.checkpoints import CheckpointError, find_checkpoint
from mmpo_jax.training.loop import TrainingError, train
from mmpo_jax.training.metrics import read_metrics
from mmpo_jax.training.reference import score_records

ROOT = Path(__file__).parents[2]
LENGTHS = Lengths(prompt=(16, 24), response=(8,))
ROWS, STEPS = 10, 8
CONFIG = Training(
    objective={"type": "dpo"},
    optimizer=Optimizer(learning_rate=1e-2, weight_decay=0.01),
    epochs=5,
    max_steps=STEPS,
    batch_size=4,
    micro_batch_size=2,
    log_every=1,
    save_every=2,
    keep_checkpoints=3,
)
IDENTITY = {
    "model": "a" * 64,
    "rows": "b" * 64,
    "training": {"objective": [{"type": "dpo", "beta": 0.1}]},
}
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


class Killed(BaseException):
    """What nothing expects."""


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )


def make_record(number: int) -> Record:
    long = "is there a red star in the picture and a ring ?"
    return Record(
        id=f"row-{number}",
        images=(ImageRef(f"{number}", png_bytes(sample_scene("train", 0, number), 24)),),
        prompt=(Turn("user", long if number % 3 == 0 else "a ring ?"),),
        responses=(Response.of("a red star" if number % 2 else "yes"), Response.of("two rings")),
    )


@pytest.fixture(scope="module")
def examples(tiny_model, tiny_processor, mesh):
    """Pairs whose reference is the tiny model itself."""
    records, skipped = tokenize_records(
        [make_record(number) for number in range(ROWS)], tiny_processor, LENGTHS
    )
    assert not skipped
    sums = score_records(*tiny_model, tiny_processor, records, LENGTHS, mesh, 4)
    return [tiny.example(record, row) for record, row in zip(records, sums, strict=True)]


@pytest.fixture(scope="module")
def run(tiny_model, tiny_processor, examples, mesh):
    """Trains into a folder; returns the parameters by path. Equal steps are compiled once."""
    steps = {}
    make_step = loop.make_step

    def run(folder, examples=examples, config=CONFIG, identity=IDENTITY, mesh=mesh):
        def make_once(*args):
            key = config.model_dump_json(), mesh
            if key not in steps:
                steps[key] = make_step(*args)
            return steps[key]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "make_step", make_once)
            params = train(
                *tiny_model,
                tiny_processor,
                examples,
                config,
                LENGTHS,
                mesh,
                folder=str(folder),
                identity=identity,
                seed=0,
            )
        return {path: np.asarray(leaf) for path, leaf in flatten(params).items()}

    return run


@pytest.fixture(scope="module")
def undisturbed(run, tmp_path_factory):
    """(run folder, its parameters); do not write there."""
    folder = tmp_path_factory.mktemp("undisturbed") / "train"
    return folder, run(folder)


@contextlib.contextmanager
def interrupted(before_step):
    """Makes runs stop, as suddenly as nothing expects, when they take the batch of a step."""
    put_batch = loop.put_batch
    taken = itertools.count(1)

    def fragile(*args, **options):
        if next(taken) == before_step:
            raise Killed
        return put_batch(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "put_batch", fragile)
        yield


def files(folder):
    """Path -> contents."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert ours[path].tobytes() == theirs[path].tobytes(), path


def poison(examples, row):
    """The same pairs, one with a reference that is no number."""
    return [
        dataclasses.replace(e, reference={"sums": np.float32([[np.nan, 0]])}) if e.id == row else e
        for e in examples
    ]


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
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_lost_tail_is_made_again(run, undisturbed, tmp_path):
    """The newest checkpoint gone and a metrics line cut off: as after a kill while saving."""
    whole, params = undisturbed
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / str(STEPS))
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:-20])
    same(run(tmp_path), params)
    assert metrics.read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_a_finished_run_does_no_step(run, undisturbed, monkeypatch, tmp_path):
    whole, params = undisturbed
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(loop, "put_batch", None)
    same(run(tmp_path), params)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_the_data_position_is_restored(run, monkeypatch, tmp_path):
    """After a restart the rows go on where they were, and none is repeated or left out."""

    def rows_of(folder):
        seen = []
        close = loop.Window.close
        with monkeypatch.context() as patch:

            def record(window, state):
                seen.extend((step, ids) for step, ids, _ in window.steps)
                return close(window, state)

            patch.setattr(loop.Window, "close", record)
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
    good = (step - 1) // CONFIG.save_every * CONFIG.save_every
    folder = tmp_path / "one" / "checkpoints" / str(good)
    assert f"last good checkpoint: {folder if good else 'none was saved yet'}" in message


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


def test_metrics_and_events(undisturbed):
    folder, _ = undisturbed
    rows = read_metrics(folder / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row.keys() - {"step"} == TRL_NAMES for row in rows)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    (events,) = (folder / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents.")
    scalars = list(read_scalars(events))
    assert {name for _, name, _ in scalars} == TRL_NAMES
    logged = {(step, name): value for step, name, value in scalars}
    for row in rows:
        for name in TRL_NAMES:
            assert logged[row["step"], name] == pytest.approx(row[name], rel=1e-6, abs=1e-30)


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


def test_progress_lines(run, tmp_path, capsys):
    run(tmp_path, config=CONFIG.model_copy(update={"max_steps": 2}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "1/2"], ["step", "2/2"]]
    assert all("loss" in line and "steps/s" in line for line in lines)


def test_old_checkpoints_are_removed(undisturbed):
    kept = {path.name for path in (undisturbed[0] / "checkpoints").iterdir()}
    assert kept == {"4", "6", "8"}


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
from mmpo_jax.models.huggingface import flatten
from mmpo_jax.training.checkpoints import load_checkpoint_params
assert jax.device_count() == 1
numpy.savez(sys.argv[2], **flatten(load_checkpoint_params(sys.argv[1])))
"""


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_on_one(run, mesh, tmp_path):
    """Also where the other seven do not exist."""
    eight = jax.make_mesh((1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)
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


def test_nothing_to_train_on(run, tmp_path):
    with pytest.raises(TrainingError, match="no row is left"):
        run(tmp_path, [])


def test_a_batch_that_does_not_fit_the_devices(run, tmp_path):
    eight = jax.make_mesh((1, 8, 1), AXES, axis_types=(AxisType.Auto,) * 3)
    with pytest.raises(TrainingError, match="2 rows at a time cannot be split over 8 devices"):
        run(tmp_path, mesh=eight)


@pytest.mark.parametrize(
    ("freeze", "told"), [(("visoin.*",), "matches no parameter"), ((".*",), "nothing to train")]
)
def test_impossible_freezing_is_an_error_for_people(run, tmp_path, freeze, told):
    with pytest.raises(TrainingError, match=told):
        run(tmp_path, config=CONFIG.model_copy(update={"freeze": freeze}))


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
