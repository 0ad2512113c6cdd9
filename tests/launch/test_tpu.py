"""`launch/tpu.sh`: the exact commands of gcloud, and runs whose hosts are taken away."""

import os
import shlex
import shutil
import signal
import stat

import pytest

PLACE = ["--project=my-project", "--zone=us-west4-a"]
RESOURCE = ["gcloud", "compute", "tpus", "queued-resources"]
DESCRIBE = [*RESOURCE, "describe", "pod", "--format=value(state.state)", *PLACE]
CREATE = [
    *RESOURCE,
    "create",
    "pod",
    "--node-id=pod",
    "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite",
    "--spot",
    *PLACE,
]
DELETE = [*RESOURCE, "delete", "pod", "--force", "--quiet", *PLACE]
OUTPUT = "output=gs://bucket/run"
WORDS = ["train", "data.path=it's here", 'x="y z"', "$HOME;`id`", "a  b", OUTPUT]
TOKENS = {"HF_TOKEN": "hf_secret", "WANDB_API_KEY": "wandb secret"}


def ssh(command):
    group = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"]
    return [*group, f"--command={command}", "--worker=all", *PLACE]


STATUS = ssh(
    "if cd .mmpo/source 2>/dev/null; then bash launch/run.sh status; "
    'else echo "$(hostname): uninstalled"; fi'
)


def on_host(*words):
    return ssh(f"cd .mmpo/source && bash launch/run.sh {' '.join(words)}")


def shown(output):
    """The commands of a dry run."""
    return [shlex.split(line, comments=True) for line in output.splitlines() if line[0] != "#"]


# --- create ---------------------------------------------------------------------------------------


def test_creating(world):
    _, told = world.run("tpu.sh", "create")
    assert world.calls() == [DESCRIBE, CREATE, DESCRIBE, DESCRIBE, DESCRIBE]
    states = [line for line in told.splitlines() if " is " in line]
    assert states == [
        f"tpu.sh: pod is {state}" for state in ("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    ]


def test_creating_without_waiting(world):
    world.run("tpu.sh", "create", "--no-wait")
    assert world.calls() == [DESCRIBE, CREATE]


@pytest.mark.parametrize(
    ("accelerator_type", "runtime"),
    [
        ("v4-32", "tpu-ubuntu2204-base"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-256", "v2-alpha-tpuv6e"),
    ],
)
def test_the_runtime_of_a_type(world, accelerator_type, runtime):
    world.run("tpu.sh", "create", "--set", f"accelerator_type={accelerator_type}")
    assert f"--runtime-version={runtime}" in world.calls()[1]
    output, _ = world.run("tpu.sh", "create", "--dry-run", "--set", "runtime_version=mine")
    assert "--runtime-version=mine" in shown(output)[1]


def test_more_flags(world):
    flags = "--network=mine --internal-ips"
    world.run("tpu.sh", "create", "--set", f"create_flags={flags}", "--set", "spot=false")
    assert world.calls()[1][8:] == ["--runtime-version=v2-alpha-tpuv5-lite", *flags.split(), *PLACE]


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_a_creation_that_fails_half_way_is_cleaned_up(world, state):
    world.lay_down(states_created=["PROVISIONING", state])
    _, told = world.run("tpu.sh", "create", status=1)
    assert world.calls()[-1] == DELETE
    assert f"pod is {state}" in told and "pod was not created" in told


def test_a_request_that_breaks_off_is_cleaned_up(world):
    world.lay_down(creation="fails_midway")
    _, told = world.run("tpu.sh", "create", status=1)
    assert world.calls() == [DESCRIBE, CREATE, DESCRIBE, DELETE]
    assert "the connection broke" in told


def test_an_interrupted_creation_is_cleaned_up(world):
    world.lay_down(states_created="WAITING_FOR_RESOURCES")
    process = world.start("tpu.sh", "create", "--set", "poll_seconds=1")
    while len(world.calls()) < 3:
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(180) == 1
    assert world.calls()[-1] == DELETE


@pytest.mark.parametrize("creation", ["fails", "somebody_else"])
def test_nothing_is_deleted_that_it_did_not_make(world, creation):
    world.lay_down(creation=creation)
    world.run("tpu.sh", "create", status=1)
    assert DELETE not in world.calls()


@pytest.mark.parametrize("state", ["ACTIVE", "FAILED", "SUSPENDED", "DELETING", "UNKNOWN"])
def test_what_was_there_before_is_left_alone(world, state):
    world.lay_down(states=state)
    world.run("tpu.sh", "create", status=0 if state == "ACTIVE" else 1)
    assert set(map(tuple, world.calls())) == {tuple(DESCRIBE)}


# --- install --------------------------------------------------------------------------------------


def test_installing_on_every_host(tpu):
    copied = ".mmpo/source/configs/recipe.yaml"
    for worker in range(2):
        assert (tpu.host(worker) / copied).read_text() == "model: a\n"
        assert (tpu.host(worker) / ".mmpo/venv/bin/mmpo").exists()
        assert not (tpu.host(worker) / ".mmpo/source/launch/config").exists()  # git does not see it
    tpu.run("tpu.sh", "install")
    assert not tpu.records("uv")
    (tpu.checkout / "configs" / "recipe.yaml").write_text("model: b\n")  # not even committed
    tpu.run("tpu.sh", "install")
    installed = [record["call"] for record in tpu.records("uv") if record["call"][0] == "pip"]
    assert len(installed) == 2 and installed[0][-1].endswith("[tpu]")
    assert (tpu.host(1) / copied).read_text() == "model: b\n"
    assert len(list((tpu.host(1) / ".mmpo").glob("checkout-*/"))) == 1


# --- run ------------------------------------------------------------------------------------------


def test_words_arrive_on_every_host(tpu):
    tpu.run("tpu.sh", "run", *WORDS)
    tpu.run("tpu.sh", "logs")
    assert sorted(start["host"] for start in tpu.started()) == ["pod-w-0", "pod-w-1"]
    assert [start["call"] for start in tpu.started()] == [WORDS, WORDS]


def test_the_commands_of_a_run(tpu):
    tpu.run("tpu.sh", "run", "train", OUTPUT)
    clean = ssh("rm -f .mmpo/secrets")
    assert tpu.calls() == [STATUS, clean, on_host("run", "train", OUTPUT)]


def test_the_recipe_is_copied_as_it_is_now(tpu):
    recipe = tpu.folder / "my recipe.yaml"
    recipe.write_text("model: mine\n")
    tpu.run("tpu.sh", "run", "mmpo", "align", recipe, OUTPUT)
    tpu.run("tpu.sh", "logs")
    for start in tpu.started():
        assert start["call"] == ["align", "../recipe.yaml", OUTPUT]
        home = tpu.folder / "hosts" / start["host"]
        assert (home / ".mmpo/source/../recipe.yaml").read_text() == "model: mine\n"


def test_the_bucket_is_the_output(tpu):
    tpu.run("tpu.sh", "run", "--set", "bucket=gs://mine/", "train", "configs/recipe.yaml")
    tpu.run("tpu.sh", "logs")
    assert tpu.started()[0]["call"][-1] == "output=gs://mine/pod"


def test_an_output_on_the_machine_is_told_of(tpu):
    _, told = tpu.run("tpu.sh", "run", "train", "output=here")
    assert "lost with the machine" in told
    _, told = tpu.run("tpu.sh", "run", "--keep", "train", "output=here", status=1)
    assert "lost with the machine" in told
    (tpu.checkout / "configs" / "recipe.yaml").write_text("model: a\noutput: gs://mine/run\n")
    _, told = tpu.run("tpu.sh", "run", "train", "configs/recipe.yaml")
    assert "lost" not in told


def test_secrets_go_in_a_file_that_nobody_else_reads(tpu):
    said = [tpu.run("tpu.sh", "run", "train", OUTPUT, **TOKENS), tpu.run("tpu.sh", "logs")]
    said.append(tpu.run("tpu.sh", "run", "--dry-run", "train", OUTPUT, **TOKENS))
    for start in tpu.started():
        assert start["environment"] == {**TOKENS, "OTHER_KEY": None}
    for worker in range(2):
        secrets = tpu.host(worker) / ".mmpo" / "secrets"
        assert stat.S_IMODE(secrets.stat().st_mode) == 0o600
        log = (tpu.host(worker) / ".mmpo" / "run" / "log").read_text()
        said.append((log, (tpu.host(worker) / ".mmpo" / "run" / "command").read_text()))
    everything = str(said) + str(tpu.calls())
    assert not any(token in everything for token in TOKENS.values())
    assert "holds HF_TOKEN WANDB_API_KEY" in said[2][0]
    assert not list((tpu.folder / "home").rglob("secrets"))
    tpu.run("tpu.sh", "run", "train", OUTPUT)
    assert not (tpu.host() / ".mmpo" / "secrets").exists()


def test_a_run_that_goes_on_already(tpu):
    tpu.lay_down(behaviour="wait")
    tpu.run("tpu.sh", "run", "train", OUTPUT)
    tpu.wait_for_starts(2)
    _, told = tpu.run("tpu.sh", "run", "train", OUTPUT, status=1)
    assert "a run is going on" in told and len(tpu.started()) == 2
    assert tpu.run("tpu.sh", "status")[0].count(": running:") == 2


def test_hosts_that_started_are_stopped_where_one_did_not(tpu):
    tpu.lay_down(behaviour="wait")
    (tpu.host(1) / ".mmpo" / "venv" / "bin" / "mmpo").unlink()
    _, told = tpu.run("tpu.sh", "run", "train", OUTPUT, status=1)
    assert "not every host started it" in told
    assert ": running:" not in tpu.run("tpu.sh", "status")[0]


def test_before_installing(world):
    world.run("tpu.sh", "create")
    _, told = world.run("tpu.sh", "run", "train", OUTPUT, status=1)
    assert "tpu.sh install" in told
    assert world.run("tpu.sh", "status")[0].count(": uninstalled\n") == 2


def test_status_logs_and_stop(tpu):
    tpu.lay_down(behaviour=["wait", "fail 3"])
    tpu.run("tpu.sh", "run", "train", OUTPUT)
    tpu.wait_for_starts(2)
    tpu.run("tpu.sh", "stop")
    output, _ = tpu.run("tpu.sh", "logs")
    for host in ("pod-w-0", "pod-w-1"):
        assert f"{host}: saved\n{host}: stopped: mmpo train" in output
    tpu.run("tpu.sh", "run", "train", OUTPUT)
    tpu.run("tpu.sh", "logs")
    output, _ = tpu.run("tpu.sh", "status", status=1)
    assert output.startswith("pod: ACTIVE\n")
    assert output.count(f": failed with status 3: mmpo train {OUTPUT}\n") == 2


# --- keep and resume ------------------------------------------------------------------------------


def test_a_preempted_run_is_brought_back(world):
    world.lay_down(behaviour=["wait"])
    world.run("tpu.sh", "create")
    world.run("tpu.sh", "install")
    world.forget()
    process = world.start("tpu.sh", "run", "--keep", *WORDS, **TOKENS)
    world.wait_for_starts(2)
    # It is taken away: what waits on its hosts ends, gcloud says so, and a new one runs to its end.
    world.lay_down(states=["SUSPENDING", "SUSPENDED"], behaviour="finish")
    _, told = process.communicate(timeout=180)
    assert process.returncode == 0, told
    assert [start["call"] for start in world.started()[-2:]] == [WORDS, WORDS]
    assert world.started()[-1]["environment"]["HF_TOKEN"] == TOKENS["HF_TOKEN"]
    calls = world.calls()
    after = calls[calls.index(DELETE) :]
    assert after[:6] == [DELETE, DESCRIBE, CREATE, DESCRIBE, DESCRIBE, DESCRIBE]
    assert calls.count(CREATE) == 1
    assert told.splitlines()[-1] == "tpu.sh: finished"
    assert "try 1 of 3" in told


def test_machines_that_are_gone_before_the_resource_says_so(tpu):
    tpu.lay_down(nodes="PREEMPTED", behaviour=["fail 1", "finish"])
    process = tpu.start("tpu.sh", "run", "--keep", "train", OUTPUT)
    tpu.wait_for_starts(2)
    while DELETE not in tpu.calls():
        assert process.poll() is None
    tpu.lay_down(nodes="READY", behaviour="finish")
    assert process.wait(180) == 0
    assert tpu.calls().count(CREATE) == 1 and len(tpu.started()) == 4


def test_a_host_that_restarts_keeps_its_tpu(tpu):
    tpu.lay_down(behaviour=["wait", "finish"])
    process = tpu.start("tpu.sh", "run", "--keep", "train", OUTPUT)
    tpu.wait_for_starts(2)
    for worker in range(2):
        os.kill(int((tpu.host(worker) / ".mmpo/run/pid").read_text()), signal.SIGKILL)
    assert process.wait(180) == 0
    assert len(tpu.started()) == 4 and DELETE not in tpu.calls()


def test_a_host_that_takes_the_others_with_it(tpu):
    behaviour = {"behaviour_pod-w-0": ["fail 1", "finish"], "behaviour_pod-w-1": ["wait", "finish"]}
    tpu.lay_down(**behaviour)
    process = tpu.start("tpu.sh", "run", "--keep", "train", OUTPUT)
    tpu.wait_for_starts(2)
    os.kill(int((tpu.host(1) / ".mmpo/run/pid").read_text()), signal.SIGKILL)
    assert process.wait(180) == 0
    assert len(tpu.started()) == 4 and DELETE not in tpu.calls()


@pytest.mark.parametrize("own", [0, 130])
def test_a_host_that_is_told_to_end_has_not_failed(tpu, own):
    """Where it saves or not; the command on the other ends with 0, as it learns of that."""
    behaviour = {"behaviour_pod-w-0": [f"wait {own}", "finish"], "behaviour_pod-w-1": "finish"}
    tpu.lay_down(**behaviour)
    process = tpu.start("tpu.sh", "run", "--keep", "train", OUTPUT)
    tpu.wait_for_starts(2)
    os.kill(int((tpu.host(0) / ".mmpo/run/pid").read_text()), signal.SIGTERM)
    assert process.wait(180) == 0
    assert len(tpu.started()) == 4 and DELETE not in tpu.calls()


def test_an_installation_that_fails_is_tried_again(tpu):
    tpu.lay_down(states="SUSPENDED", fails="uv pip", behaviour="finish")
    process = tpu.start("tpu.sh", "run", "--keep", "train", OUTPUT)
    tpu.wait_for_starts(2)
    while "that did not succeed" not in process.stderr.readline():
        assert process.poll() is None
    (tpu.folder / "fails").unlink()
    _, told = process.communicate(timeout=180)
    assert process.returncode == 0 and "uninstalled" in told
    assert tpu.calls().count(CREATE) == 1 and len(tpu.started()) == 4


def test_tries_of_a_run_that_went_well_are_forgotten(tpu):
    script = tpu.checkout / "launch" / "tpu.sh"
    script.write_text(script.read_text().replace("\nWELL=20\n", "\nWELL=2\n"))
    tpu.lay_down(behaviour="wait")
    process = tpu.start("tpu.sh", "run", "--keep", "--set", "max_tries=1", "train", OUTPUT)
    for loss in range(1, 3):
        tpu.wait_for_starts(2 * loss)
        looks = tpu.calls().count(STATUS)
        while tpu.calls().count(STATUS) < looks + 4:
            assert process.poll() is None
        tpu.lay_down(states="SUSPENDED")
    tpu.wait_for_starts(6)
    tpu.run("tpu.sh", "stop")
    assert process.wait(180) == 0


def test_a_run_that_fails_by_itself_is_not_repeated(tpu):
    tpu.lay_down(behaviour="fail 1")
    _, told = tpu.run("tpu.sh", "run", "--keep", "train", OUTPUT, status=1)
    assert "the run failed, and the TPU is well" in told
    assert len(tpu.started()) == 2 and DELETE not in tpu.calls()


def test_a_run_that_is_stopped_stays_so(tpu):
    tpu.lay_down(behaviour="wait")
    process = tpu.start("tpu.sh", "run", "--keep", "train", OUTPUT)
    tpu.wait_for_starts(2)
    tpu.run("tpu.sh", "stop")
    assert process.wait(180) == 0
    assert len(tpu.started()) == 2 and DELETE not in tpu.calls()


def test_it_gives_up_at_last(tpu):
    tpu.lay_down(behaviour="wait", states_created=["PROVISIONING", "FAILED"])
    process = tpu.start("tpu.sh", "run", "--keep", "train", OUTPUT)
    tpu.wait_for_starts(2)
    tpu.lay_down(states="SUSPENDED")
    _, told = process.communicate(timeout=180)
    assert process.returncode == 1 and "given up after 3 tries" in told
    assert tpu.calls().count(CREATE) == 3
    assert tpu.calls()[-2] == DELETE  # and leaves nothing behind that costs


def test_an_answer_that_does_not_come_is_no_preemption(tpu):
    tpu.lay_down(behaviour="wait")
    process = tpu.start("tpu.sh", "run", "--keep", "train", OUTPUT)
    tpu.wait_for_starts(2)
    tpu.lay_down(states=["UNKNOWN"] * 4 + ["ACTIVE"], ssh_fails="", behaviour="finish")
    seen = len(tpu.calls())
    while len(tpu.calls()) < seen + 14:
        assert process.poll() is None
    (tpu.folder / "ssh_fails").unlink()
    tpu.run("tpu.sh", "stop")
    assert process.wait(180) == 0
    assert DELETE not in tpu.calls()


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED", "ABSENT"])
def test_resuming_what_ran_last(tpu, state):
    tpu.run("tpu.sh", "run", *WORDS)
    tpu.run("tpu.sh", "logs")
    tpu.forget()
    tpu.lay_down(states=state)
    shutil.rmtree(tpu.folder / "hosts")
    tpu.run("tpu.sh", "resume")
    tpu.run("tpu.sh", "logs")
    assert [start["call"] for start in tpu.started()] == [WORDS, WORDS]
    deleted = [] if state == "ABSENT" else [DELETE]
    assert tpu.calls()[: 4 + len(deleted)] == [DESCRIBE, *deleted, DESCRIBE, CREATE, DESCRIBE]


def test_resuming_what_runs(tpu):
    tpu.lay_down(behaviour="wait")
    tpu.run("tpu.sh", "run", *WORDS)
    tpu.wait_for_starts(2)
    assert "it is running" in tpu.run("tpu.sh", "resume")[1]
    tpu.run("tpu.sh", "stop")
    tpu.lay_down(behaviour="finish")
    tpu.run("tpu.sh", "resume")  # what was stopped goes on
    tpu.run("tpu.sh", "logs")
    assert len(tpu.started()) == 4 and DELETE not in tpu.calls()


def test_watching_a_run_that_was_started_before(tpu):
    tpu.lay_down(behaviour="wait")
    tpu.run("tpu.sh", "run", *WORDS)
    tpu.wait_for_starts(2)
    watch = tpu.start("tpu.sh", "resume", "--keep")
    assert watch.stderr.readline() == "tpu.sh: it is running\n"
    tpu.run("tpu.sh", "stop")
    assert watch.communicate(timeout=180)[1].endswith("stopped; resume goes on\n")
    assert len(tpu.started()) == 2


def test_resuming_without_a_command(tpu):
    assert "give the command" in tpu.run("tpu.sh", "resume", status=1)[1]


def test_the_state_of_a_tpu_that_cannot_be_asked_for(tpu):
    tpu.lay_down(states="UNKNOWN")
    output, told = tpu.run("tpu.sh", "status", status=1)
    assert output == "pod: UNKNOWN\n"
    assert "could not reach the server" in told and "cannot be asked for" in told


def test_without_gcloud(world):
    programs = world.folder / "few"
    programs.mkdir()
    for name in ("bash", "dirname"):
        (programs / name).symlink_to(shutil.which(name))
    few = {"PATH": str(programs)}
    assert "gcloud is not installed here" in world.run("tpu.sh", "create", status=1, **few)[1]
    assert shown(world.run("tpu.sh", "logs", "--dry-run", **few)[0]) == [on_host("logs")]


# --- delete, slices, dry runs ---------------------------------------------------------------------


def test_deleting_asks(tpu):
    assert "nothing was done" in tpu.run("tpu.sh", "delete", status=1)[1]
    assert not tpu.calls()
    tpu.run("tpu.sh", "delete", "--yes")
    assert tpu.calls() == [DELETE]


def test_several_slices(world):
    two = ["--set", "slices=2"]
    world.run("tpu.sh", "create", *two)
    assert world.calls()[1][6:8] == ["--node-count=2", "--node-prefix=pod"]
    world.run("tpu.sh", "install", *two)
    world.run("tpu.sh", "run", *two, "train", OUTPUT)
    started = [*RESOURCE, "ssh", "pod", on_host("run", "train", OUTPUT)[6]]
    every = ["--worker=all", "--node=all", "--batch-size=all"]
    assert world.calls()[-1] == [*started, *every, *PLACE]


def test_dry_runs_show_all_and_run_nothing(world):
    def commands(*words):
        return shown(world.run("tpu.sh", *words, "--dry-run")[0])

    assert commands("create") == [DESCRIBE, CREATE, DESCRIBE]
    assert commands("delete") == [DELETE]
    assert commands("stop") == [on_host("stop")]
    assert commands("logs") == [on_host("logs")]
    assert commands("status") == [DESCRIBE, STATUS]
    install = commands("install")
    assert [call[4] for call in install] == ["ssh", "scp", "ssh"]
    start = [ssh("rm -f .mmpo/secrets"), on_host("run", "train", OUTPUT)]
    run = shown(world.run("tpu.sh", "--dry-run", "run", "--keep", "train", OUTPUT)[0])
    bring_back = [DELETE, DESCRIBE, CREATE, DESCRIBE, *install, *start]
    assert run == [*start, DESCRIBE, STATUS, *bring_back]
    resume = shown(world.run("tpu.sh", "--dry-run", "resume", "train", OUTPUT)[0])
    assert resume == [DESCRIBE, *bring_back]
    assert not world.calls() and not (world.folder / "home" / ".local").exists()
