"""`launch/sky.sh` and `launch/sky.yaml`: the exact commands of SkyPilot."""

import shlex
import subprocess

import pytest
import yaml

OUTPUT = "output=gs://bucket/run"
WORDS = ["train", "data.path=it's here", 'x="y z"', "$HOME;`id`", "a  b", OUTPUT]


def options(world, command, *, resources=True):
    where = ["--gpus=tpu-v5litepod-16", "--infra=gcp/us-west4/us-west4-a", "--use-spot"]
    rest = [f"--workdir={world.checkout}", f"--env=MMPO_COMMAND={command}"]
    rest.append("--env=MMPO_EXTRAS=tpu")
    return [*(where if resources else []), *rest]


def task(world):
    return str(world.checkout / "launch" / "sky.yaml")


def test_a_managed_job(world):
    said = world.run("sky.sh", "run", "train", OUTPUT, HF_TOKEN="hf_secret")
    launch = ["sky", "jobs", "launch", "--yes", "--detach-run", "--name=pod"]
    options_of_job = [*options(world, f"train {OUTPUT}"), "--secret=HF_TOKEN"]
    assert world.calls() == [[*launch, *options_of_job, task(world)]]
    assert "hf_secret" not in str(said) + str(world.calls())
    world.run("sky.sh", "resume", HF_TOKEN="hf_secret")
    assert world.calls()[0] == world.calls()[1]


def test_the_task_runs_the_words(world):
    world.run("sky.sh", "run", *WORDS)
    start = "--env=MMPO_COMMAND="
    (value,) = [w[len(start) :] for w in world.calls()[0] if w.startswith(start)]
    name = "MMPO_COMMAND"
    with open(task(world)) as file:
        steps = yaml.safe_load(file)
    environment = {**world.environment, **steps["envs"], name: value}
    for step in ("setup", "run"):
        shell = ["bash", "-c", steps[step]]
        subprocess.run(shell, cwd=world.checkout, env=environment, check=True)
    assert [start["call"] for start in world.started()] == [WORDS]
    subprocess.run(shell, cwd=world.checkout, env={**environment, name: ""}, check=True)
    assert len(world.started()) == 1
    assert 143 in steps["resources"]["job_recovery"]["recover_on_exit_codes"]
    assert set(steps["envs"]) == {name, "MMPO_EXTRAS"}


def test_a_cluster(world):
    world.lay_down(says_sky="NAME  STATUS\n")
    world.run("sky.sh", "create")
    world.run("sky.sh", "run", "--cluster", "train", OUTPUT)
    for subcommand in ("status", "logs", "stop"):
        world.run("sky.sh", subcommand, "--cluster")
    world.run("sky.sh", "delete", "--yes")
    command = options(world, f"train {OUTPUT}", resources=False)
    assert world.calls() == [
        ["sky", "status", "pod"],
        ["sky", "launch", "--yes", "--cluster=pod", *options(world, ""), task(world)],
        ["sky", "exec", "--detach-run", *command, "pod", task(world)],
        ["sky", "queue", "pod"],
        ["sky", "logs", "pod"],
        ["sky", "cancel", "--yes", "--all", "pod"],
        ["sky", "down", "--yes", "pod"],
    ]


@pytest.mark.parametrize("there", [False, True])
def test_a_creation_that_fails(world, there):
    world.lay_down(fails="sky launch", says_sky="NAME  STATUS\n" + "pod   UP\n" * there)
    world.run("sky.sh", "create", status=1)
    assert (world.calls()[-1] == ["sky", "down", "--yes", "pod"]) is not there


def test_the_other_subcommands(world):
    for subcommand in ("status", "logs", "stop"):
        world.run("sky.sh", subcommand)
    assert "nothing was done" in world.run("sky.sh", "delete", status=1)[1]
    assert world.calls() == [
        ["sky", "jobs", "queue"],
        ["sky", "jobs", "logs", "--name=pod"],
        ["sky", "jobs", "cancel", "--yes", "--name=pod"],
    ]


def test_place_and_price(world):
    anywhere = ["--set", "zone=", "--set", "project=", "--set", "spot=false"]
    world.run("sky.sh", "run", *anywhere, "train", OUTPUT)
    assert {"--infra=gcp", "--no-use-spot"} < set(world.calls()[0])


def test_slices(world):
    _, told = world.run("sky.sh", "run", "--set", "slices=2", "train", OUTPUT, status=1)
    assert "slices" in told


def test_dry_runs(world):
    for words in (["create"], ["run", *WORDS], ["stop"], ["delete"]):
        output, _ = world.run("sky.sh", "--dry-run", *words, HF_TOKEN="hf_secret")
        assert "hf_secret" not in output
        lines = [line for line in output.splitlines() if line[0] != "#"]
        assert {shlex.split(line)[0] for line in lines} == {"sky"}
    assert not world.calls() and not (world.folder / "home" / ".local").exists()
