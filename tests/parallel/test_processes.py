"""Commands in several processes end as in one: the same files, each written once."""

import json
import os
import re
import shutil
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from helpers import processes
from helpers.reward_heads import save_headed
from helpers.world_files import write_pairs
from safetensors.numpy import load_file

from mmpo_jax.training.metrics import reproducible

LENGTHS = {"prompt": [16, 24], "response": [16]}
TRAINING = {
    "objective": {"type": "dpo"},
    # With so large an epsilon a step is in proportion to its gradient: AdamW as it is makes steps
    # of what rounding leaves of gradients that are none.
    "optimizer": {"learning_rate": 1e-2, "epsilon": 1e-2},
    "batch_size": 8,
    "epochs": 8,
    "max_steps": 4,
    "log_every": 1,
    "save_every": 2,
}
PER_PROCESS = ("/checkpoints/", "/best/")
"""Folders in which every process writes what its devices hold."""


def recipe(folder, name, **keys):
    """A recipe's file, which lies beside the folder of outputs."""
    path = folder.parent / f"{folder.name}-{name}.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / name), **keys}))
    return str(path)


def train_commands(folder, model, data, **training):
    common = {
        "model": str(model),
        "data": {"source": "file", "path": str(data)},
        "lengths": LENGTHS,
    }
    common["training"] = TRAINING | training
    if not training:
        common["validation"] = {"share": 0.3, "every": 2}
    return [["train", recipe(folder, "full", **common)]]


def score_commands(folder, model, data):
    given = ["--model", str(model), "--data", str(data)]
    return [["score", *given, "--output", str(folder / "scores.jsonl")]]


def generate_commands(folder, model, data):
    given = ["--model", str(model), "--data", str(data), "--output", str(folder / "said.jsonl")]
    drawn = ["--num-samples", "3", "--max-new-tokens", "6", "--batch-size", "8"]
    return [["generate", *given, *drawn]]


def evaluate_commands(folder, model):
    world = {"type": "picture_world", "size": 9, "questions": 2, "image_size": 24}
    evaluation = world | {"batch_size": 8, "max_new_tokens": 6}
    keys = {"model": str(model), "lengths": LENGTHS, "evaluation": evaluation}
    return [["evaluate", recipe(folder, "evaluated", **keys)]]


COUNTS = pytest.mark.parametrize(
    "count", [2, pytest.param(4, marks=pytest.mark.slow)], ids=["two", "four"]
)


def run_both(tmp_path, make, count):
    """Runs commands in one process and in several; (folder of one, folder of several)."""
    one, several = tmp_path / "one", tmp_path / "several"
    for folder in (one, several):
        folder.mkdir()
    alone = processes.Running(make(one), one, 1)
    reports, _ = processes.run(make(several), several, count)
    for status, out, err in alone.wait():
        assert status == 0, out + err[-6000:]
    for written in reports[1:]:
        assert [path for path in written if not any(part in path for part in PER_PROCESS)] == []
    return one, several


def files(folder):
    """Path below the folder -> path, but for what differs from run to run."""
    found = (path for path in folder.rglob("*") if path.is_file())
    left_out = ("tensorboard/", "checkpoints/", "best/", "labeler_rate.json", "rounds.txt")
    left_out += ("run.json", "timings.json", "report.html")
    names = ((path.relative_to(folder).as_posix(), path) for path in found)
    return {name: path for name, path in names if not any(part in name for part in left_out)}


def assert_same(one, several):
    """The same files with the same bytes, but for the rounding of sums over devices."""
    ours, theirs = files(one), files(several)
    assert ours.keys() == theirs.keys()
    for name, path in ours.items():
        if path.read_bytes() == theirs[name].read_bytes():
            continue
        if name.endswith(".safetensors"):
            a, b = load_file(path), load_file(theirs[name])
            for key in a:
                np.testing.assert_allclose(b[key], a[key], rtol=0, atol=1e-6, err_msg=key)
        else:
            assert path.suffix in READERS, f"{name} differs"
            close(READERS[path.suffix](path), READERS[path.suffix](theirs[name]), name)


def number_or_word(word):
    return float(word) if re.fullmatch(r"-?\d+\.\d*(e-?\d+)?", word) else word


READERS = {
    "": lambda path: path.read_text(),
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": lambda path: [
        reproducible(json.loads(line)) for line in path.read_text().splitlines()
    ],
    ".parquet": lambda path: pq.read_table(path).to_pylist(),
    ".md": lambda path: [number_or_word(word) for word in path.read_text().split()],
    ".txt": lambda path: [number_or_word(word) for word in path.read_text().split()],
}


def close(a, b, name):
    """Equal but for rounding, and for fingerprints of what was rounded."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), name
        # Rates, and where a model lies.
        for key in a.keys() - {"questions_per_second", "stages", "model"}:
            margin = a.get(key.replace("accuracies", "margins"), 1)
            if "accuracies" not in key or abs(margin) > 1e-6:  # else noise decides
                close(a[key], b[key], f"{name}: {key}")
    elif isinstance(a, list):
        assert len(a) == len(b), name
        for x, y in zip(a, b, strict=True):
            close(x, y, name)
    elif isinstance(a, float):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5), name
    else:
        is_fingerprint = isinstance(a, str) and re.fullmatch(r"[0-9a-f]{64}", a)
        assert a == b or is_fingerprint, name


@COUNTS
def test_scores_and_samples(tmp_path, tiny_folder, count):
    data = write_pairs(tmp_path / "data", 21)

    def make(folder):
        given = folder, tiny_folder, data
        return [*score_commands(*given), *generate_commands(*given)]

    assert_same(*run_both(tmp_path, make, count))


@pytest.mark.slow
@COUNTS
def test_reward_models(tmp_path, tiny_folder, tiny_model, count):
    """Trained, and asked for rewards behind several critiques of its own."""
    data = write_pairs(tmp_path / "data", 9)
    critic = save_headed(tmp_path / "critic", tiny_folder, *tiny_model, critique_prompt="and ?")

    def make(folder):
        given = ["--model", str(critic), "--data", str(data), "--critiques", "2"]
        given += ["--output", str(folder / "rewards.jsonl"), "--max-new-tokens", "5"]
        trained = {
            "model": str(tiny_folder),
            "reward_head": "two_layer",
            "data": {"source": "file", "path": str(data)},
            "lengths": LENGTHS,
            "training": TRAINING | {"objective": {"type": "bradley_terry"}},
        }
        return [["reward", *given], ["train", recipe(folder, "head", **trained)]]

    one, several = run_both(tmp_path, make, count)
    assert_same(one, several)
    rows = [json.loads(line) for line in (one / "rewards.jsonl").read_text().splitlines()]
    assert len(rows) == 9 and all(len(own) == 2 for row in rows for own in row["critiques"])


@pytest.mark.slow
@COUNTS
def test_training_and_evaluation(tmp_path, tiny_folder, count):
    data = write_pairs(tmp_path / "data", 21)

    def make(folder):
        trained = train_commands(folder, tiny_folder, data)
        return [*trained, *evaluate_commands(folder, folder / "full" / "model")]

    one, several = run_both(tmp_path, make, count)
    assert_same(one, several)
    assert len((several / "full" / "metrics.jsonl").read_text().splitlines()) == 5


@pytest.mark.slow
@COUNTS
def test_adapters_rollouts_selection_and_conversion(tmp_path, tiny_folder, count):
    data = write_pairs(tmp_path / "data", 21)

    def make(folder):
        common = {"model": str(tiny_folder), "lengths": LENGTHS}
        lora = {"target": "language_model/layers/.*", "rank": 2, "alpha": 4, "dropout": 0.1}
        given = {"source": "file", "path": str(data)}
        adapters = TRAINING | {"lora": lora, "micro_batch_size": 8, "batch_size": 16}
        world = {"source": "picture_world", "split": "align", "size": 16, "image_size": 24}
        rollout = {
            "num_samples": 2,
            "max_new_tokens": 6,
            "rewards": [{"type": "picture_world_caption"}],
            "num_iterations": 2,
        }
        sampled = TRAINING | {"objective": {"type": "grpo"}}
        full = folder / "full"
        select = ["select", "--policy", str(folder / "lora"), "--reference", str(tiny_folder)]
        select += ["--data", str(data), "--output", str(folder / "best.jsonl")]
        return [
            *train_commands(folder, tiny_folder, data),
            ["train", recipe(folder, "lora", **common, data=given, training=adapters)],
            [
                "train",
                recipe(folder, "grpo", **common, data=world, training=sampled, rollout=rollout),
            ],
            [*select, "--num-samples", "2", "--max-new-tokens", "6"],
            ["convert", str(full), str(folder / "converted")],
            ["convert", str(folder / "converted"), str(folder / "back")],
        ]

    assert_same(*run_both(tmp_path, make, count))


@pytest.mark.slow
def test_a_run_above_a_quantised_base_is_gone_on_with(tmp_path, tiny_folder):
    data = write_pairs(tmp_path / "data", 21)
    lora = {"target": "language_model/layers/.*/[qv]_proj", "rank": 2, "quantize_base": "int8"}

    def make(folder):
        keys = {"data": {"source": "file", "path": str(data)}, "lengths": LENGTHS}
        keys["training"] = TRAINING | {"lora": lora}
        models = {"first": tiny_folder, "second": folder / "first"}
        return [
            ["train", recipe(folder, name, **keys, model=str(model))]
            for name, model in models.items()
        ]

    one, several = run_both(tmp_path, make, 2)
    for name in ("first/metrics.jsonl", "second/metrics.jsonl"):
        close(*(READERS[".jsonl"](folder / name) for folder in (one, several)), name)
    for name in ("first", "second"):  # whose card names another folder
        assert_same(one / name / "adapter", several / name / "adapter")
    below = json.loads((several / "second" / "base" / "below.json").read_text())
    assert below["model"] == str(tiny_folder)


def align_commands(folder, rounds):
    overrides = {
        "rounds": rounds,
        "prompts_per_round": 24,
        "data.size": 24 * rounds,
        "sampling.num_samples": 6,
        "sampling.batch_size": 8,
        "feedback.labeler.batch_size": 8,
        "training.batch_size": 8,
        "training.max_steps": 4,
        "training.log_every": 1,
        "training.save_every": 2,
        "evaluation.size": 8,
        "evaluation.batch_size": 8,
        "output": folder / "align",
    }
    given = [f"{name}={value}" for name, value in overrides.items()]
    return [["align", str(processes.ROOT / "configs" / "picture_world_align.yaml"), *given]]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "rounds"), [(2, 2), (4, 1)])
def test_alignment(tmp_path, count, rounds):
    one, several = run_both(tmp_path, lambda folder: align_commands(folder, rounds), count)
    assert_same(one, several)
    reports = json.loads((several / "align" / "rounds.json").read_text())
    assert len(reports) == rounds + 1 and all(report["pairs"] for report in reports[1:])


ELSEWHERE = """
import os
os.chdir(os.path.join(FOLDER, os.environ["JAX_PROCESS_ID"]))
"""
"""Each process has files of its own."""


def with_own_files(tmp_path, commands):
    folder = tmp_path / "out"
    folder.mkdir()
    program = ELSEWHERE.replace("FOLDER", repr(str(tmp_path))) + processes.PROCESS
    return processes.Running(commands(folder), folder, 2, program).wait()


@pytest.mark.slow
@pytest.mark.parametrize("changed", ["a picture", "a prompt", "a row", "a weight"])
def test_copies_that_differ_stop_all(tmp_path, tiny_folder, changed):
    for index in ("0", "1"):
        data = write_pairs(tmp_path / index / "data", 21)
        model = shutil.copytree(tiny_folder, tmp_path / index / "model")
    if changed == "a picture":  # under the name of another
        first, second, *_ = sorted(data.parent.glob("*.png"))
        second.write_bytes(first.read_bytes())
    elif changed == "a weight":
        file = bytearray((model / "model.safetensors").read_bytes())
        file[-3] ^= 1
        (model / "model.safetensors").write_bytes(file)
    else:
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        rows[3]["prompt"] += " please"
        rows = rows[: 20 if changed == "a row" else 21]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = with_own_files(
        tmp_path, lambda folder: score_commands(folder, "model", f"data/{data.name}")
    )
    assert [status for status, _, _ in ended] == [1, 1], ended
    what = "model: the files" if changed == "a weight" else f"data/{data.name}: the data"
    assert f"{what} of process 1 differ from the first one's" in ended[0][2]
    assert "Traceback" not in ended[0][2] + ended[1][2]


@pytest.mark.slow
def test_copies_that_are_alike(tmp_path, tiny_folder):
    for index in ("0", "1"):
        data = write_pairs(tmp_path / index / "data", 21)
        shutil.copytree(tiny_folder, tmp_path / index / "model")
    ended = with_own_files(
        tmp_path,
        lambda folder: train_commands(
            folder, "model", f"data/{data.name}", objective={"type": "sft"}
        ),
    )
    assert [status for status, _, _ in ended] == [0, 0], ended


STOPPING = """
import os, sys, time
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.training import loop

put, taken = loop.put_batch, []

def stop_at_third(*arguments, **options):
    taken.append(0)
    if len(taken) == 3 and os.environ.get("JAX_PROCESS_ID") == "1":
        with open(BEGUN, "w") as file:
            file.write(str(time.time()))
        STOP
    return put(*arguments, **options)

loop.put_batch = stop_at_third
"""
"""Stops process 1 when it takes the batch of the third step."""


def stopped(tmp_path, model, stop, **training):
    """What two processes say and how they end whose second one stops in the third step, and the
    seconds from then on."""
    folder = tmp_path / "out"
    folder.mkdir()
    data, supervised = write_pairs(tmp_path / "data", 21), {"objective": {"type": "sft"}}
    commands = train_commands(folder, model, data, **supervised, **training)
    begun = tmp_path / "begun"
    program = STOPPING.replace("STOP", stop).replace("BEGUN", repr(str(begun)))
    ended = processes.Running(commands, folder, 2, program + processes.PROCESS).wait()
    return folder, commands, ended, time.time() - float(begun.read_text())


@pytest.mark.slow
def test_the_error_of_one_stops_all(tmp_path, tiny_folder):
    stop = 'raise MmpoError("7.png: the file is missing")'
    _, _, ended, seconds = stopped(tmp_path, tiny_folder, stop)
    (status, _, said), (other, _, told) = ended
    assert status == other == 1 and seconds < 60
    assert "process 1 stopped: 7.png: the file is missing" in said
    assert "process 1: 7.png: the file is missing" in told and "Traceback" not in told


@pytest.mark.slow
def test_a_killed_one_stops_all(tmp_path, tiny_folder):
    _, _, ended, seconds = stopped(tmp_path, tiny_folder, "os.kill(os.getpid(), 9)")
    (status, _, said), (other, _, _) = ended
    assert status == 1 and other == -signal.SIGKILL and seconds < 60
    assert "process 1 stopped: nothing was heard of it" in said


FREEZING = """
import os, signal, time
from mmpo_jax.core import processes, watch

processes.start()
watch.watch()
time.sleep(10)
if processes.is_first():
    os.kill(os.getpid(), signal.SIGSTOP)
time.sleep(200)
"""


@pytest.mark.slow
def test_a_first_process_that_is_frozen_is_not_waited_for(tmp_path):
    first, second = processes.Running([], tmp_path / "out", 2, FREEZING).processes
    try:
        _, told = second.communicate(timeout=150)
    finally:
        first.kill()
        second.kill()
        first.communicate()
    assert second.returncode == 1
    assert "process 1: process 0 cannot be reached: no answer for 30 s" in told


TOLD = """
import os, signal
from mmpo_jax.inference import loop

put = loop.put_batch

def end(*arguments, **options):
    if os.environ["JAX_PROCESS_ID"] == "1":
        signal.raise_signal(signal.SIGTERM)
    return put(*arguments, **options)

loop.put_batch = end
"""


@pytest.mark.slow
def test_told_to_end_outside_of_training(tmp_path, tiny_folder):
    folder = tmp_path / "out"
    folder.mkdir()
    data = write_pairs(tmp_path / "data", 21)
    commands = score_commands(folder, tiny_folder, data)
    ended = processes.Running(commands, folder, 2, TOLD + processes.PROCESS).wait()
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert "mmpo: process 1 was told to end; the same command goes on" in ended[0][2]
    assert "mmpo score: process 1: was told to end; the same command goes on" in ended[1][2]
    assert not (folder / "scores.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "saved"), [(8, 4), (3, 3)])
def test_asked_to_stop_all_save_the_same_step(tmp_path, tiny_folder, steps, saved):
    """Also in the last step, behind which the result would be written."""
    lasting = {"max_steps": steps, "save_every": 8}
    stop = "os.kill(os.getpid(), 15)"
    folder, commands, ended, _ = stopped(tmp_path, tiny_folder, stop, **lasting)
    assert [status for status, _, _ in ended] == [0, 0], ended
    assert f"saved step {saved} of {steps}" in ended[0][2]
    assert os.path.isdir(folder / "full" / "checkpoints" / str(saved))
    assert not (folder / "full" / "model").exists()
    processes.run(commands, folder, 2)
    assert len((folder / "full" / "metrics.jsonl").read_text().splitlines()) == steps
    assert (folder / "full" / "model").is_dir()
