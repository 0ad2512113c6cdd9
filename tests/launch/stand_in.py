"""Stand-ins for gcloud, xpk, sky, docker and kubectl, and on a host for uv, mmpo and hostname.

Called as `stand_in.py NAME ARGUMENT ...`. Each records its call in the folder `$STAND_IN` and does
what a test has laid down in files there:

    states            what `queued-resources describe` says, a line per call, the last one for good
    states_created    the same once it was created; by default it waits and becomes ACTIVE
    creation          `fails`, `fails_midway`, or `somebody_else` was there in the meantime
    nodes             what `tpu-vm describe` says
    hosts/NAME        the home folders of its hosts, in which the shell commands really run
    behaviour         what mmpo does, a line per start on one host, the last one for good:
                      finish, fail STATUS, or wait, until SIGTERM; behaviour_HOST of one host
    fails             programs that fail, by their first words, a line each
"""

import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

WORLD = Path(os.environ["STAND_IN"])


def lines(name, default=""):
    file = WORLD / name
    return (file.read_text() if file.exists() else default).splitlines()


def next_line(name, default):
    """The first line of a file, which the file loses unless it is the last."""
    first, *rest = lines(name) or [default]
    if rest:
        (WORLD / name).write_text("\n".join(rest))
    return first


def record(name, **fields):
    with (WORLD / name).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(json.dumps(fields) + "\n")


def fail(message, status=1):
    print(message, file=sys.stderr)
    sys.exit(status)


def main(program, arguments):
    for start in lines("fails"):
        if [program, *arguments][: len(shlex.split(start))] == shlex.split(start):
            record("calls", call=[program, *arguments])
            fail(f"{program}: failed on purpose")
    if program == "hostname":
        print(Path.home().name)
    elif program == "uv":
        make_venv(arguments)
    elif program == "mmpo":
        run_mmpo(arguments)
    else:
        record("calls", call=[program, *arguments])
        if program == "gcloud":
            gcloud(arguments)
        elif (WORLD / f"says_{program}").exists():
            print((WORLD / f"says_{program}").read_text(), end="")


def gcloud(arguments):
    if arguments[:2] == ["container", "clusters"]:
        print(*lines("clusters"))
        return
    assert arguments[:2] == ["compute", "tpus"], arguments
    group, verb, *rest = arguments[2:]
    if verb == "describe":
        describe(group, rest[0])
    elif verb == "create":
        create(rest[0])
    elif verb == "delete":
        (WORLD / "states").write_text("ABSENT")
        shutil.rmtree(WORLD / "hosts", ignore_errors=True)
    elif verb == "ssh":
        ssh(rest)
    elif verb == "scp":
        source, target = rest[0], rest[1].partition(":")[2]
        for home in homes():
            shutil.copy(source, home / target)
    else:
        raise AssertionError(arguments)


def describe(group, name):
    state = next_line("states", "ABSENT") if group == "queued-resources" else "READY"
    if group == "tpu-vm":
        state = next_line("nodes", "READY")
    if state == "ABSENT":
        fail(f"ERROR: NOT_FOUND: {name}")
    if state == "UNKNOWN":
        fail("ERROR: could not reach the server")
    print(state)


def create(name):
    state = (lines("states") or ["ABSENT"])[0]
    kind = (lines("creation") or [""])[0]
    if kind == "somebody_else":
        state = "PROVISIONING"
        (WORLD / "states").write_text(state)
    if state != "ABSENT":
        fail(f"ERROR: ALREADY_EXISTS: {name}")
    if kind == "fails":
        fail("ERROR: no quota")
    created = lines("states_created") or ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (WORLD / "states").write_text("\n".join(created))
    for worker in range(2):
        (WORLD / "hosts" / f"{name}-w-{worker}").mkdir(parents=True)
    if kind == "fails_midway":
        fail("ERROR: the connection broke")


def homes():
    found = sorted((WORLD / "hosts").glob("*"))
    if not found:
        fail("ERROR: the TPU has no hosts")
    return found


def ssh(rest):
    (command,) = [word[len("--command=") :] for word in rest if word.startswith("--command=")]
    # What gcloud and ssh make of it: words are taken apart at blanks and put together again.
    command = " ".join(command.split(" "))
    if (WORLD / "ssh_fails").exists():
        fail("ERROR: no route to host", 255)
    statuses = []
    for home in homes():
        environment = {"HOME": str(home), "PATH": os.environ["PATH"], "STAND_IN": str(WORLD)}
        run = subprocess.run(["bash", "-c", command], cwd=home, env=environment)
        statuses.append(run.returncode)
    sys.exit(max(statuses))


def make_venv(arguments):
    record("uv", host=Path.home().name, call=arguments)
    if arguments[0] == "venv":
        bin_folder = Path(arguments[-1]) / "bin"
        bin_folder.mkdir(parents=True)
        shutil.copy(shutil.which("mmpo_of_the_tests"), bin_folder / "mmpo")
        (bin_folder / "python").touch()


def run_mmpo(arguments):
    host = Path.home().name
    starts = [json.loads(line) for line in lines("mmpo")]
    turn = sum(start["host"] == host for start in starts)
    plan = lines(f"behaviour_{host}") or lines("behaviour") or ["finish"]
    wait_for = signal.SIGTERM
    signal.pthread_sigmask(signal.SIG_BLOCK, [wait_for])
    environment = {key: os.environ.get(key) for key in ("HF_TOKEN", "WANDB_API_KEY", "OTHER_KEY")}
    cwd = os.getcwd()
    record("mmpo", host=host, call=arguments, environment=environment, cwd=cwd, pid=os.getpid())
    print(f"mmpo says hello, {len(arguments)} words", flush=True)
    what, _, status = plan[min(turn, len(plan) - 1)].partition(" ")
    if what == "wait":
        signal.sigwait([wait_for])
        print("saved", flush=True)
    sys.exit(int(status or 0))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
