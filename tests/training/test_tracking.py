"""Metrics on Weights & Biases, against a stand-in for its package."""

import json
import sys
import types

import pytest
import yaml
from helpers import meshes
from helpers.loop_runs import CONFIG, STEPS, Killed, interrupted

from mmpo_jax import cli
from mmpo_jax.commands import train as training_run
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.recipes.training import WandB
from mmpo_jax.training.metrics import read_metrics
from mmpo_jax.training.tracking import WandbRun, check_tracking

OPTIONS = WandB(project="alignment", entity="team", mode="offline")


class Failed(Exception):
    """As the package says that something is wrong."""


class Refused(Failed):
    """As it says that it cannot do what it is told to."""


class FakeRun:
    def __init__(self, options):
        self.options, self.rows, self.steps = options, [], {}
        self.is_finished = False

    def define_metric(self, name, step_metric=None):
        self.steps[name] = step_metric

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.is_finished = True


@pytest.fixture
def wandb(monkeypatch):
    """A stand-in for the package; `runs` are those that were opened, in order."""
    package = types.ModuleType("wandb")
    package.runs, package.logins = [], []
    package.errors = types.SimpleNamespace(Error=Failed, UsageError=Refused)
    package.Settings = lambda **options: options
    package.login = lambda **options: package.logins.append(options)

    def init(**options):
        package.runs.append(FakeRun(options))
        return package.runs[-1]

    package.init = init
    monkeypatch.setitem(sys.modules, "wandb", package)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return package


def open_run(folder="here"):
    return WandbRun(OPTIONS, "run", "0123456789abcdef", {"seed": 1}, folder)


def test_a_run_is_opened_by_its_id(wandb):
    open_run("there")
    (run,) = wandb.runs
    assert run.options == {
        "project": "alignment",
        "entity": "team",
        "name": "run",
        "id": "0123456789abcdef",
        "resume": "allow",
        "mode": "offline",
        "dir": "there",
        "config": {"seed": 1},
        "settings": {
            "console": "off",
            "quiet": True,
            "finish_timeout": 120.0,  # whatever the network does
            "finish_timeout_raises": True,
        },
    }
    assert run.steps == {"step": None, "*": "step"}


def test_the_recipes_name_goes_first(wandb):
    named = OPTIONS.model_copy(update={"name": "mine"})
    WandbRun(named, "run", "0", {}, "")
    assert wandb.runs[0].options["name"] == "mine"


def test_lines_are_sent(wandb):
    run = open_run()
    run.log({"step": 1, "loss": 0.5})
    run.close()
    assert wandb.runs[0].rows == [{"step": 1, "loss": 0.5}] and wandb.runs[0].is_finished


def test_a_failure_ends_no_training(wandb, caplog):
    """It is said once, and nothing is sent behind it."""
    run = open_run()

    def fail(*_):
        raise RuntimeError("the connection is lost")

    wandb.runs[0].log = wandb.runs[0].finish = fail
    run.log({"step": 1})
    run.log({"step": 2})
    run.close()
    assert [line.partition(": ")[2] for line in caplog.messages] == [
        "nothing more is sent: the connection is lost",
        "not all was sent: the connection is lost; `wandb sync` sends the rest from here/wandb",
    ]


def test_a_server_that_is_down_ends_no_training(wandb, run, tmp_path, caplog):
    def init(**_):
        raise Failed("the server does not answer")

    wandb.init = init
    run(tmp_path, config=CONFIG.model_copy(update={"wandb": OPTIONS}))
    assert "no run can be opened, and nothing is sent: the server does not answer" in caplog.text
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == STEPS


@pytest.mark.parametrize(
    ("mode", "environment", "asked"),
    [
        ("online", None, True),
        ("offline", None, False),
        (None, None, True),
        (None, "offline", False),
        ("online", "offline", True),
    ],
)
def test_a_key_is_looked_for_where_one_is_needed(wandb, monkeypatch, mode, environment, asked):
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    check_tracking(OPTIONS.model_copy(update={"mode": mode}))
    assert bool(wandb.logins) == asked


def test_nothing_is_asked_for_where_nothing_is_tracked(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # which cannot be imported
    check_tracking(None)


def test_without_a_key(wandb):
    def login(**_):
        raise Refused("No API key configured.")

    wandb.login = login
    with pytest.raises(MmpoError, match="No API key configured; set WANDB_API_KEY"):
        check_tracking(OPTIONS.model_copy(update={"mode": "online"}))


def test_a_server_that_does_not_answer_is_asked_again_later(wandb, caplog):
    def login(**_):
        raise Failed("the server does not answer")

    wandb.login = login
    check_tracking(OPTIONS.model_copy(update={"mode": "online"}))
    assert caplog.messages == ["training.wandb: the server does not answer"]


@pytest.mark.parametrize(
    ("command", "training"), [("train", {"objective": {"type": "sft"}}), ("align", {})]
)
def test_without_the_package_nothing_starts(
    command, training, monkeypatch, tmp_path, tiny_folder, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    recipe = {
        "model": str(tiny_folder),
        "output": str(tmp_path / "out"),
        "data": {"source": "picture_world"},
        "training": {**training, "wandb": {"project": "alignment"}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert cli.main([command, str(path)]) == 1
    told = capsys.readouterr().err
    assert "the package wandb is not installed: pip install 'mmpo_jax[wandb]'" in told
    assert not (tmp_path / "out").exists()


def test_a_key_does_not_belong_into_a_recipe():
    with pytest.raises(ValueError, match="api_key") as caught:
        WandB(project="alignment", api_key="0a1b2c3d")
    assert "0a1b2c3d" not in str(caught.value)


def test_a_resumed_training_goes_on_with_its_run(wandb, run, tmp_path):
    """Killed before update 6; steps behind the last checkpoint are sent again."""
    config = CONFIG.model_copy(update={"wandb": OPTIONS})
    with interrupted(6), pytest.raises(Killed):
        run(tmp_path, config=config)
    run(tmp_path, config=config)
    first, second = wandb.runs
    assert first.options["id"] == second.options["id"]
    assert first.options["dir"] == str(tmp_path)
    assert first.is_finished and second.is_finished
    assert [row["step"] for row in first.rows] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in second.rows] == [5, 6, 7, 8]
    assert second.rows == read_metrics(tmp_path / "metrics.jsonl")[4:]


@pytest.mark.slow
def test_held_out_rows_are_sent_too(wandb, tiny_folder, tmp_path, monkeypatch):
    """By `mmpo train`, which names the run after its output."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    one = meshes.one_device()
    monkeypatch.setattr(training_run, "make_mesh", lambda **_: one)
    data = tmp_path / "data.jsonl"
    rows = [
        {"id": str(n), "prompt": f"a {word} ?", "chosen": "yes", "rejected": "no"}
        for n, word in enumerate(["ring", "star", "circle", "square"])
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(tiny_folder),
        "output": str(tmp_path / "my_dpo"),
        "data": {"source": "file", "path": str(data)},
        "lengths": {"prompt": [16], "response": [8]},
        "training": {"batch_size": 1, "log_every": 1, "wandb": {"project": "p", "mode": "offline"}},
        "validation": {"share": 0.25, "every": 2},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert cli.main(["train", str(path)]) == 0
    (sent,) = wandb.runs
    assert sent.options["name"] == "my_dpo"
    assert [row["step"] for row in sent.rows if "eval_loss" in row] == [0, 2, 3]
    assert sent.options["config"]["training"]["batch_size"] == 1
    assert "wandb" not in sent.options["config"]["training"]


def test_every_step_is_sent_once_without_a_kill(wandb, run, tmp_path):
    run(tmp_path, config=CONFIG.model_copy(update={"wandb": OPTIONS}))
    assert [row["step"] for row in wandb.runs[0].rows] == list(range(1, STEPS + 1))
