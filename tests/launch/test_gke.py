"""`launch/gke.sh`: the exact commands of xpk, docker and kubectl."""

import shlex
import subprocess

import pytest

WHERE = ["--cluster=my-cluster", "--project=my-project", "--zone=us-west4-a"]
EXISTS = ["gcloud", "container", "clusters", "list", "--project=my-project"]
EXISTS += ["--filter=name=my-cluster", "--format=value(name)"]
CREATE = ["xpk", "cluster", "create", *WHERE, "--tpu-type=v5litepod-16", "--num-slices=1", "--spot"]
DELETE = ["xpk", "cluster", "delete", *WHERE, "--force"]
DELETE_RUN = ["xpk", "workload", "delete", *WHERE, "--workload=pod", "--force"]
OUTPUT = "output=gs://bucket/run"


def image_of(world):
    build, push = world.calls(of="docker")
    tag = push[-1]
    assert push == ["docker", "push", tag]
    assert build[2:3] == [f"--tag={tag}"] and build[-1] == str(world.checkout)
    return tag


def test_creating_the_cluster(world):
    world.run("gke.sh", "create")
    assert world.calls() == [EXISTS, CREATE]
    world.forget()
    world.run("gke.sh", "create", "--set", "create_flags=--reservation=mine")
    assert world.calls()[1] == [*CREATE[:-1], "--reservation=mine"]
    world.forget()
    world.run("gke.sh", "create", "--set", "spot=false")
    assert world.calls()[1] == [*CREATE[:-1], "--on-demand"]


def test_a_creation_that_fails_is_cleaned_up(world):
    world.lay_down(fails="xpk cluster create")
    world.run("gke.sh", "create", status=1)
    assert world.calls() == [EXISTS, CREATE, DELETE]


def test_a_cluster_that_was_there_is_left(world):
    world.lay_down(fails="xpk cluster create", clusters="my-cluster")
    _, told = world.run("gke.sh", "create", status=1)
    assert "was there before" in told and world.calls() == [EXISTS, CREATE]


def test_clusters_that_cannot_be_asked_for(world):
    world.lay_down(fails="gcloud")
    world.run("gke.sh", "create", status=1)
    assert world.calls() == [EXISTS]


def test_the_image_and_the_run(world):
    world.run("gke.sh", "install")
    image = image_of(world)
    world.run("gke.sh", "run", "mmpo", "align", "configs/recipe.yaml", OUTPUT)
    command = f"exec bash launch/run.sh run --foreground align configs/recipe.yaml {OUTPUT}"
    assert world.calls(of="xpk") == [
        [
            "xpk",
            "workload",
            "create",
            *WHERE,
            "--workload=pod",
            "--tpu-type=v5litepod-16",
            "--num-slices=1",
            f"--docker-image={image}",
            f"--command={command}",
            "--max-restarts=3",
            "--restart-on-exit-codes=1",
            "--termination-grace-period-seconds=300",
        ]
    ]
    (world.checkout / "configs" / "recipe.yaml").write_text("model: b\n")
    world.forget()
    world.run("gke.sh", "install")
    assert image_of(world) != image


def test_words_arrive_in_the_container(world):
    words = ["train", "data.path=it's here", 'x="y z"', "$HOME;`id` $(HOME)", "a  b", OUTPUT]
    world.run("gke.sh", "run", *words)
    (command,) = [w[10:] for w in world.calls()[-1] if w.startswith("--command=")]
    assert "$(" not in command  # Kubernetes would put a variable there
    world.run("run.sh", "install")
    shell = ["bash", "-c", f"({command})"]
    subprocess.run(shell, cwd=world.checkout, env=world.environment, check=True)
    assert world.started()[0]["call"] == words


def test_secrets_are_named_alone(world):
    said = world.run("gke.sh", "run", "train", OUTPUT, HF_TOKEN="hf_secret")
    (file,) = [w.partition("=")[2] for w in world.calls()[-1] if w.startswith("--env-file=")]
    with open(file) as names:
        assert names.read() == "HF_TOKEN\n"
    assert "hf_secret" not in str(said) + str(world.calls())


def test_resuming(world):
    world.run("gke.sh", "run", "train", OUTPUT)
    first = world.calls()[-1]
    world.run("gke.sh", "resume")
    assert world.calls()[1:] == [DELETE_RUN, first]


def test_the_other_subcommands(world):
    for subcommand in ("status", "logs", "stop"):
        world.run("gke.sh", subcommand)
    assert "nothing was done" in world.run("gke.sh", "delete", status=1)[1]
    world.run("gke.sh", "delete", "--yes")
    assert world.calls() == [
        ["xpk", "workload", "list", *WHERE, "--filter-by-job=pod"],
        [
            *["gcloud", "container", "clusters", "get-credentials", "my-cluster"],
            *["--project=my-project", "--region=us-west4"],
        ],
        [
            *["kubectl", "logs", "--follow", "--prefix", "--all-containers", "--tail=-1"],
            *["--max-log-requests=1024", "--selector=jobset.sigs.k8s.io/jobset-name=pod"],
        ],
        DELETE_RUN,
        DELETE,
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "output=here"], "is lost with the machine"),
        (["train", "/etc/hostname", OUTPUT], "does not lie in"),
        (["--set", "image=", "train", OUTPUT], "image has no value"),
        (["--set", "image=mmpo:latest", "train", OUTPUT], "has a tag"),
    ],
)
def test_what_cannot_run(world, words, told):
    assert told in world.run("gke.sh", "run", *words, status=1)[1]
    assert not world.calls()


def test_dry_runs(world):
    for words in (["create"], ["install"], ["run", "train", OUTPUT], ["delete"], ["logs"]):
        output, _ = world.run("gke.sh", "--dry-run", *words, HF_TOKEN="hf_secret")
        assert "hf_secret" not in output
        first = next(line for line in output.splitlines() if line[0] != "#")
        assert shlex.split(first)[0] in ("gcloud", "docker", "xpk")
    assert not world.calls() and not (world.folder / "home" / ".local").exists()
