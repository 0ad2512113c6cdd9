"""`launch/run.sh`: an mmpo command on one host."""

import os
import signal

import pytest

WORDS = ["align", "a recipe.yaml", "data.path=it's here", 'x="y z"', "$HOME;`id`", "a\nb", ""]


@pytest.fixture(autouse=True)
def recipes(world):
    for name in ("a", "b", "a recipe", "my recipe"):
        (world.checkout / f"{name}.yaml").write_text("model: a\n")


@pytest.fixture
def host(world):
    world.run("run.sh", "install", "--digest", "one")
    return world


def home(world, name=""):
    return world.folder / "home" / ".mmpo" / name


def wait_until_ended(world):
    world.run("run.sh", "logs")  # follows until then


def test_installing_once(world):
    world.run("run.sh", "install", "--extras", "tpu", "--digest", "one")
    venv, pip = [record["call"] for record in world.records("uv")]
    assert venv == ["venv", "--quiet", "--python", "3.12", str(home(world, "venv"))]
    python = str(home(world, "venv/bin/python"))
    assert pip == ["pip", "install", "--quiet", "--python", python, f"{world.checkout}[tpu]"]
    _, told = world.run("run.sh", "install", "--extras", "tpu", "--digest", "one")
    assert "installed already" in told and len(world.records("uv")) == 2
    for changed in (["--digest", "two"], ["--digest", "two", "--python", "3.13"]):
        world.run("run.sh", "install", "--extras", "tpu", *changed)
    assert len(world.records("uv")) == 6


def test_an_installation_that_failed_is_made_again(world):
    world.lay_down(fails="uv pip")
    world.run("run.sh", "install", "--digest", "one", status=1)
    (world.folder / "fails").unlink()
    world.run("run.sh", "install", "--digest", "one")
    assert [record["call"][0] for record in world.records("uv")] == ["venv", "venv", "pip"]


def test_words_arrive_as_they_are(host):
    host.run("run.sh", "run", "--foreground", *WORDS)
    host.run("run.sh", "run", *WORDS)
    wait_until_ended(host)
    assert [start["call"] for start in host.started()] == [WORDS, WORDS]


def test_from_idle_to_finished(host):
    host.lay_down(behaviour="wait")
    assert host.run("run.sh", "status")[0] == "home: idle\n"
    host.run("run.sh", "run", "train", "my recipe.yaml")
    host.wait_for_starts(1)
    assert host.run("run.sh", "status")[0] == "home: running: mmpo train my\\ recipe.yaml\n"
    assert "is going on" in host.run("run.sh", "run", "train", "b.yaml", status=1)[1]
    assert "is going on" in host.run("run.sh", "install", "--digest", "two", status=1)[1]
    assert host.run("run.sh", "stop")[0] == "home: stopped: mmpo train my\\ recipe.yaml\n"
    host.lay_down(behaviour="finish")
    host.run("run.sh", "run", "mmpo", "train", "my recipe.yaml")
    log = host.run("run.sh", "logs")[0].splitlines()
    assert [line[: len("home: ")] for line in log] == ["home: "] * len(log)
    assert log[1:3] == ["home: mmpo says hello, 2 words", "home: saved"]
    assert log[-1] == "home: finished: mmpo train my\\ recipe.yaml"
    assert len(host.started()) == 2


def test_how_a_run_has_ended(host):
    host.lay_down(behaviour=["fail 3", "wait", "wait"])
    host.run("run.sh", "run", "train", "a.yaml")
    wait_until_ended(host)
    assert "failed with status 3" in host.run("run.sh", "status")[0]
    host.run("run.sh", "run", "train", "a.yaml")
    host.wait_for_starts(2)
    # As from a machine that shuts down: the run saves and ends with 0, and has not finished.
    os.kill(int(home(host, "run/pid").read_text()), signal.SIGTERM)
    wait_until_ended(host)
    assert ": interrupted:" in host.run("run.sh", "status")[0]
    host.run("run.sh", "run", "train", "a.yaml")
    host.wait_for_starts(3)
    os.kill(int(home(host, "run/pid").read_text()), signal.SIGKILL)
    wait_until_ended(host)
    assert ": lost:" in host.run("run.sh", "status")[0]


@pytest.mark.parametrize("own", [0, 1, 130])
def test_a_signal_in_the_foreground(host, own):
    """Whether it could save, failed at that or was cut off."""
    host.lay_down(behaviour=f"wait {own}")
    process = host.start("run.sh", "run", "--foreground", "train", "a.yaml")
    host.wait_for_starts(1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert output.endswith("saved\n")
    assert process.returncode == 143  # its own would read as finished or failed


def test_the_status_in_the_foreground(host):
    host.lay_down(behaviour="fail 7")
    host.run("run.sh", "run", "--foreground", "train", "a.yaml", status=7)


def test_secrets_of_the_host(host):
    home(host, "secrets").write_text("HF_TOKEN=a=b c\nOTHER_KEY=$x\n")
    host.run("run.sh", "run", "--foreground", "train", "a.yaml")
    (start,) = host.started()
    assert start["environment"] == {"HF_TOKEN": "a=b c", "OTHER_KEY": "$x", "WANDB_API_KEY": None}


def test_several_hosts_without_the_environment_of_a_tpu(host):
    one = {"JAX_COORDINATOR_ADDRESS": "first:1234"}
    words = ["run", "--foreground", "train", "a.yaml"]
    _, told = host.run("run.sh", *words, status=1, **one)
    assert "JAX_NUM_PROCESSES" in told and not host.started()
    host.run("run.sh", *words, **one, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="0")
    assert host.started()


def test_a_dry_run_runs_nothing(world):
    output, _ = world.run("run.sh", "install", "--dry-run")
    assert "pip install" in output
    output, _ = world.run("run.sh", "run", "--dry-run", "align", "a recipe.yaml")
    assert output == "mmpo align a\\ recipe.yaml \n"
    assert not world.records("uv") and not home(world).exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which subcommand"),
        (["fly"], "no subcommand 'fly'"),
        (["run"], "needs an mmpo command"),
        (["run", "mmpo"], "needs an mmpo command"),
        (["run", "--often", "align"], "no option --often"),
        (["run", "train", "a.yaml", "--foreground"], "put --foreground before run"),
        (["run", "trian", "a.yaml"], "mmpo has no subcommand 'trian'"),
        (["run", "train", "c.yaml"], "there is no recipe c.yaml here"),
        (["status", "now"], "takes no now"),
        (["install", "--extras", "[tpu]"], "no names with commas between"),
        (["install", "--python"], "needs a value"),
    ],
)
def test_what_is_misused(world, words, told):
    assert told in world.run("run.sh", *words, status=2)[1]


def test_mmpo_that_is_not_there(world):
    assert "run.sh install" in world.run("run.sh", "run", "align", "a.yaml", status=1)[1]
