"""Which process of how many this is, and what happens where it is the only one."""

import importlib.util
import pickle

import numpy as np
import pytest

from mmpo_jax.core import processes
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.processes import SINGLE, Member


@pytest.fixture
def member(monkeypatch):
    """The member that an environment describes."""

    def member(**variables):
        for name in processes.VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        processes.member.cache_clear()
        return processes.member()

    yield member
    processes.member.cache_clear()


def test_by_variables(member):
    assert member() == SINGLE
    given = {"JAX_COORDINATOR_ADDRESS": "host:1234", "JAX_NUM_PROCESSES": "4"}
    assert member(**given, JAX_PROCESS_ID="2") == Member(2, 4, "host:1234")
    assert processes.several()
    assert not processes.is_first()
    assert member(**given | {"JAX_NUM_PROCESSES": "1"}, JAX_PROCESS_ID="0") == SINGLE


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"JAX_PROCESS_ID": "1"}, "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are not"),
        (
            {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2"},
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are set, and JAX_PROCESS_ID is not",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host:1",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "2",
            },
            "JAX_PROCESS_ID is 2: of 2 processes",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
            },
            "JAX_COORDINATOR_ADDRESS is HOST:PORT, not 'host'",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "host:1",
                "JAX_NUM_PROCESSES": "two",
                "JAX_PROCESS_ID": "0",
            },
            "whole numbers",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_named(member, variables, told):
    with pytest.raises(MmpoError, match=told):
        member(**variables)


def test_of_a_pod(member, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    pod = {"JAX_PLATFORMS": "tpu,cpu", "TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "3"}
    assert member(**pod) == Member(3, 4)
    slices = {"MEGASCALE_NUM_SLICES": "2", "MEGASCALE_SLICE_ID": "1"}
    assert member(**pod, **slices) == Member(7, 8)
    for name in slices:
        monkeypatch.delenv(name)
    assert member(**pod | {"TPU_WORKER_HOSTNAMES": "a", "TPU_WORKER_ID": "0"}) == SINGLE
    assert member(**pod | {"JAX_PLATFORMS": "cpu"}) == SINGLE


def test_of_a_pod_by_its_metadata(member, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(processes.glob, "glob", lambda pattern: [pattern])
    described = {
        "worker-network-endpoints": "x:y:10.0.0.1,x:y:10.0.0.2",
        "agent-worker-number": "1",
        "tpu-env": "ACCELERATOR_TYPE: 'v4-32'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'",
    }
    monkeypatch.setattr(processes, "_attribute", described.get)
    assert member(JAX_PLATFORMS="tpu") == Member(3, 4)
    monkeypatch.setattr(processes, "_attribute", lambda name: None)
    assert member(JAX_PLATFORMS="tpu") == SINGLE


def test_one_process_just_calls(member):
    member()
    assert processes.on_one(lambda: 3) == 3
    with pytest.raises(KeyError):
        processes.on_one(lambda: {}["missing"])


def test_what_one_does_alone_waits_for_nobody(member):
    variables = dict(zip(processes.VARIABLES, ("host:1", "2", "1"), strict=True))
    member(**variables)
    with processes.alone():
        assert processes.on_one(lambda: 4) == 4


@pytest.fixture
def gathered(member, monkeypatch):
    """Three processes, of which this is one, and what the others say when all tell something."""
    first = dict(zip(processes.VARIABLES, ("host:1", "3", "0"), strict=True))
    others = []
    monkeypatch.setattr(processes, "_gather", lambda data: [data, *others.pop(0)])

    def told(*rounds):
        member(**first)
        others[:] = [[pickle.dumps(([one], None)) for one in each] for each in rounds]

    return told


def test_what_is_cheaply_the_same_is_not_looked_at_further(gathered):
    gathered(["a", "a"])
    processes.check_same("the data", lambda: "a", lambda: 1 // 0)
    gathered(["b", "a"], ["c", "c"])
    processes.check_same("the data", lambda: "a", lambda: "c")


def test_who_has_something_else_is_named_to_all(gathered):
    gathered(["a", "b"], ["c", "d"])
    with pytest.raises(MmpoError, match="data of process 2 differ from the first one's") as e:
        processes.check_same("the data", lambda: "a", lambda: "c")
    assert processes.is_agreed(e.value)


def test_one_process_has_nothing_to_compare_with(member):
    member()
    processes.check_same("the data", lambda: 1 // 0)


def test_what_another_host_wrote_is_waited_for(monkeypatch):
    looks = iter([None, None, "found"])
    monkeypatch.setattr(processes, "POLLING", 0)
    assert processes.wait_for(lambda: next(looks), "model") == "found"
    monkeypatch.setattr(processes, "PATIENCE", 0.01)
    with pytest.raises(MmpoError, match="model: the first process sees it, this one does not"):
        processes.wait_for(lambda: None, "model")


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_gathered_in_the_order_of_processes(member, monkeypatch, order):
    """However the devices, whose order JAX gathers in, stand."""
    said = [b"zero" * 3000, b"", b"two"]
    rows = [[index, 0, len(data)] for index, data in enumerate(said)]

    def allgather(array):
        if array.dtype == np.int32:
            return np.array(rows, np.int32)[order]
        padded = [data.ljust(len(array), b"?") for data in said]
        return np.array([np.frombuffer(padded[index], np.uint8) for index in order])

    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", allgather)
    member(**dict(zip(processes.VARIABLES, ("host:1", "3", "1"), strict=True)))
    assert processes._gather(said[1]) == said


class Told:
    """What the first process broadcasts, as another gets it."""

    def __init__(self, monkeypatch):
        self.bytes = b""
        monkeypatch.setattr(processes, "_broadcast", self.broadcast)

    def broadcast(self, data):
        self.bytes = data or self.bytes
        return self.bytes


def test_results_and_errors_are_those_of_the_first(member, monkeypatch):
    told = Told(monkeypatch)
    first = dict(zip(processes.VARIABLES, ("host:1", "2", "0"), strict=True))
    second = first | {"JAX_PROCESS_ID": "1"}

    def never():
        raise AssertionError

    member(**first)
    assert processes.on_one(lambda: {"a": 1}) == {"a": 1}
    member(**second)
    assert processes.on_one(never) == {"a": 1}

    class Odd(MmpoError):
        """An error that cannot be pickled."""

        def __init__(self, *, text):
            super().__init__(text)

    for raised, expected in (
        (OSError(28, "No space left on device", "file"), OSError),
        (MmpoError("free some space"), MmpoError),
        (Odd(text="odd"), MmpoError),
    ):
        member(**first)
        with pytest.raises(expected) as caught:
            processes.on_one(lambda raised=raised: (_ for _ in ()).throw(raised))
        assert processes.is_agreed(caught.value)
        member(**second)
        with pytest.raises(expected) as caught:
            processes.on_one(never)
        assert str(caught.value) == str(raised)
        assert processes.is_agreed(caught.value)
    assert told.bytes
    member(**first)
    with pytest.raises(ZeroDivisionError):  # which ends the first; the others learn of that
        processes.on_one(lambda: 1 // 0)


@pytest.mark.parametrize("size", [0, 1, 4088, 4089, 5000, 70_000])
def test_bytes_of_any_length_are_broadcast(member, monkeypatch, size):
    sizes = []

    def padded(data, length):
        sizes.append(length)
        return data + bytes(length - len(data))

    monkeypatch.setattr(processes, "_broadcast_padded", padded)
    monkeypatch.setattr(processes, "LARGE", 1 << 14)
    data = bytes(number % 251 for number in range(size))
    assert processes._broadcast(data) == data
    assert all(length & (length - 1) == 0 for length in sizes)
    assert sizes[0] == processes.SMALL
