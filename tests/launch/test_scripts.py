"""What all scripts of launch/ have in common: options, the config file, shellcheck."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mmpo_jax import flags

LAUNCH = Path(__file__).parent.parent.parent / "launch"
SCRIPTS = ("tpu.sh", "gke.sh", "sky.sh")


def test_shellcheck_passes():
    folder = Path(sys.executable).parent
    shellcheck = shutil.which("shellcheck", path=f"{folder}:/usr/bin")
    assert shellcheck, "the extra `test` brings it"
    files = sorted(LAUNCH.glob("*.sh"))
    checked = subprocess.run([shellcheck, "-x", *files], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "run.sh"])
def test_help_names_every_subcommand(world, script):
    output, _ = world.run(script, "--help")
    text = (LAUNCH / script).read_text()
    cases = text.rpartition("case $subcommand in")[2]
    subcommands = {
        name
        for line in re.findall(r"^ +([a-z |]+)\)", cases, re.M)
        for name in line.strip().split(" | ")
        if name != "supervise"
    }
    assert len(subcommands) > 4
    for name in subcommands:
        assert f"{script} {name}" in output
    assert "--dry-run" in output


def test_the_example_has_every_key(world):
    example = (LAUNCH / "config.example").read_text()
    (keys,) = re.findall(r"^KEYS='([^']*)'", (LAUNCH / "lib.sh").read_text(), re.M)
    assert re.findall(r"^(\w+) =", example, re.M) and keys.split()
    assert set(re.findall(r"^(\w+) =", example, re.M)) == set(keys.split())
    text = "".join((LAUNCH / script).read_text() for script in SCRIPTS)
    text += (LAUNCH / "lib.sh").read_text().partition("# --- what runs")[2]  # behind its checks
    for key in keys.split():
        assert re.search(rf"\${{?{key}\b", text), f"nothing reads {key}"
    shutil.copy(LAUNCH / "config.example", world.checkout / "launch" / "config")
    _, told = world.run("tpu.sh", "create", status=1)
    assert told.endswith("config: project has no value\n")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("zoen=a", "there is no key 'zoen'; there are: project zone"),
        ("zone=us-west4", "a region has no letter at its end"),
        ("project=My Project", "is no id of a Google Cloud project"),
        ("name=my_pod", "small letters, digits and inner dashes"),
        ("accelerator_type=", "accelerator_type has no value"),
        ("accelerator_type=v5e-64", "v5e is called v5litepod-64 there"),
        ("accelerator_type=v5litepod-63", "is none, such as"),
        ("accelerator_type=v5p-12", "counts cores, two to a chip"),
        ("accelerator_type=h100-8", "is none, such as"),
        ("spot=yes", "neither true nor false"),
        ("slices=0", "no number above 0"),
        ("max_tries=often", "no number above 0"),
        ("poll_seconds=1m", "no number of seconds"),
        ("python=3.10", "no version from 3.11 on"),
        ("extras=[tpu]", "no names with commas between"),
        ("secrets=hf_abc", "not the secrets themselves"),
    ],
)
def test_values_that_are_wrong(world, script, setting, told):
    assert told in world.run(script, "status", "--set", setting, status=1)[1]
    assert not world.calls()


def test_the_subcommands_are_those_of_mmpo():
    cases = (LAUNCH / "command.sh").read_text().partition("case $command in")[2]
    listed = re.findall(r"^    ([a-z |-]+)\)", cases, re.M)
    names = {name for line in listed for name in line.split(" | ")}
    assert names - {"-h", "--help"} == {*flags.RECIPES, *flags.OTHERS, "data"}


def test_tpu7x_is_on_gke_alone(world):
    seven = ["--set", "accelerator_type=tpu7x-4x4x4"]
    world.run("gke.sh", "status", *seven)
    assert "gke.sh" in world.run("tpu.sh", "status", *seven, status=1)[1]


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("zone us-west4-a\n", "line 1: no KEY = VALUE: zone us-west4-a"),
        ("name = a\n# more\nname = b\n", "line 3: name stands twice"),
        ("nmae = a\n", "line 1: there is no key 'nmae'"),
    ],
)
def test_lines_that_are_wrong(world, lines, told):
    (world.checkout / "launch" / "config").write_text(lines)
    assert told in world.run("tpu.sh", "status", status=1)[1]


def test_the_config_is_read_and_never_run(world):
    (world.checkout / "launch" / "config").write_text("zone = $(touch ran)\n")
    others = ["--set", "name=a", "--set", "accelerator_type=v6e-8"]
    _, told = world.run("sky.sh", "status", *others, status=1)
    assert "'$(touch ran)' is no zone" in told
    assert not list(world.folder.rglob("ran"))


def test_a_config_elsewhere(world):
    config = world.folder / "other config"
    (world.checkout / "launch" / "config").rename(config)
    assert "config.example" in world.run("tpu.sh", "stop", "--dry-run", status=1)[1]
    world.run("tpu.sh", "stop", "--dry-run", "--config", config)
    world.run("tpu.sh", "stop", "--dry-run", MMPO_LAUNCH_CONFIG=str(config))


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which subcommand"),
        (["fly"], "no subcommand 'fly'"),
        (["status", "--yes"], "status has no option --yes"),
        (["stop", "now"], "stop takes no now"),
        (["run"], "needs an mmpo command"),
        (["run", "mmpo"], "needs an mmpo command"),
        (["run", "--often", "train"], "run has no option --often"),
        (["run", "train", "output=gs://b/x", "--dry-run"], "put --dry-run before run"),
        (["run", "mmpo", "train", "--set", "zone=a"], "put --set before run"),
        (["resume", "train", "--config=here"], "put --config before resume"),
        (["run", "alig", "configs/recipe.yaml"], "mmpo has no subcommand 'alig'"),
        (["run", "align", "configs/recip.yaml"], "there is no recipe configs/recip.yaml here"),
        (["status", "--set"], "--set needs a value"),
        (["status", "--set", "zone"], "no KEY=VALUE"),
    ],
)
def test_what_is_misused(world, script, words, told):
    assert told in world.run(script, *words, status=2)[1]
    assert not world.calls()
