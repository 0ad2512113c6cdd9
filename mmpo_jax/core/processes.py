"""The processes of one command: how they find each other, and what one of them does for all.

All run the same program on their own devices. Whatever touches files, or the world outside, is
done by the first alone, and all get what came of it (`on_one`), so that no two of them can decide
differently and no file has two writers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import glob
import importlib.util
import os
import pickle
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar

from mmpo_jax.core.errors import MmpoError

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Environment variables that say which process of how many this is, and where the first listens."""
VARIABLES = (ADDRESS, COUNT, INDEX)
HEARTBEAT_TIMEOUT = 60
"""Seconds after which JAX itself ends processes that lost another; `core.watch` is faster."""
METADATA = "http://metadata.google.internal/computeMetadata/v1/instance/attributes/"
METADATA_SECONDS = 3.0
SMALL, LARGE = 1 << 12, 1 << 26
"""Bytes that are broadcast at once, at least and at most."""
AGREED = "agreed"
"""Attribute of an error that all processes raise."""
PATIENCE, POLLING = 30.0, 0.5
"""Seconds for which a process waits for files that the first one sees, and from look to look."""

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Member:
    """This process among those of a command."""

    index: int
    count: int
    address: str | None = None
    """HOST:PORT where the first one listens; None where JAX finds it."""


SINGLE = Member(0, 1)

_local = threading.local()


@functools.cache
def member() -> Member:
    """Which process this is, by the environment: its variables, or a TPU pod's own description.

    Raises:
      MmpoError: some variables are set and others are not, or one is no number.
    """
    given = {name: os.environ[name] for name in VARIABLES if os.environ.get(name)}
    if not given:
        return _member_of_pod() or SINGLE
    missing = [name for name in VARIABLES if name not in given]
    if missing:
        raise MmpoError(
            f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} set, and "
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not: of several "
            "processes each needs all three"
        )
    try:
        count, index = int(given[COUNT]), int(given[INDEX])
    except ValueError as error:
        raise MmpoError(f"{COUNT} and {INDEX} are whole numbers: {error}") from error
    if not 0 <= index < count:
        raise MmpoError(
            f"{INDEX} is {index}: of {count} processes ({COUNT}) it is 0 to {count - 1}"
        )
    if not given[ADDRESS].rpartition(":")[2].isdigit():
        raise MmpoError(f"{ADDRESS} is HOST:PORT, not {given[ADDRESS]!r}")
    return SINGLE if count == 1 else Member(index, count, given[ADDRESS])


def several() -> bool:
    """Whether the command runs in several processes."""
    return member().count > 1


def is_first() -> bool:
    """Whether this is the process that writes and speaks."""
    return member().index == 0


@functools.cache
def start() -> None:
    """Joins the other processes, if there are any; once, before JAX looks for devices.

    Raises:
      MmpoError: they cannot be reached.
    """
    me = member()
    if me.count == 1:
        return
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # One program after another: those of several CPU devices that meet in different orders would
    # wait for each other for ever.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would swallow SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    in_pod = me.address is None  # where JAX finds all of it
    try:
        jax.distributed.initialize(
            coordinator_address=me.address,
            num_processes=None if in_pod else me.count,
            process_id=None if in_pod else me.index,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except (RuntimeError, ValueError) as error:
        where = "the other processes" if me.address is None else me.address
        told = str(error).strip().partition("\n")[0]
        raise MmpoError(f"process {me.index} of {me.count} cannot join {where}: {told}") from error


def on_one(function: Callable[[], Result]) -> Result:
    """What a function gives in the first process, which alone runs it; in all others the same.

    All processes have to call this, in the same order, in their main threads. Within the function
    it is a plain call, as it is where there is one process.

    Args:
      function: takes nothing; what it gives can be pickled.

    Raises:
      MmpoError, OSError: what the function raises is raised in all processes. Other errors are the
        first one's, whose end the others learn of (`core.watch`).
    """
    if not several() or _is_alone():
        return function()
    _check_thread()
    told = b""
    if is_first():
        try:
            with alone():
                value = function()
            told = pickle.dumps((value, None))
        except (MmpoError, OSError) as error:
            told = _pickled(error)
    value, failure = pickle.loads(_broadcast(told))
    if failure is not None:
        _raise_in_all(failure)
    return value


def in_shares(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """What a function gives for every item, each of which one process takes; all get all of it.

    As with `on_one`, all processes have to call this alike.

    Args:
      function: of an item; what it gives can be pickled.
      items: the same in all processes.

    Raises:
      MmpoError, OSError: what the function raises in one process is raised in all.
    """
    me = member()
    if me.count == 1 or _is_alone():
        return [function(item) for item in items]
    _check_thread()
    try:
        with alone():
            told = pickle.dumps(([function(item) for item in items[me.index :: me.count]], None))
    except (MmpoError, OSError) as error:
        told = _pickled(error)
    shares = [pickle.loads(share) for share in _gather(told)]
    for _, failure in shares:
        if failure is not None:
            _raise_in_all(failure)
    return [shares[place % me.count][0][place // me.count] for place in range(len(items))]


def check_same(what: str, *fingerprints: Callable[[], str]) -> None:
    """Checks that all processes have the same of something that each finds on its own host.

    As with `on_one`, all processes have to call this alike.

    Args:
      what: it is, for the message.
      fingerprints: of it, from the cheapest to the one that decides: where one is equal in all
        processes, none behind it is asked for.

    Raises:
      MmpoError: in all processes, naming one that differs from the first; or what a fingerprint
        raises in one of them.
    """
    me = member()
    if me.count == 1 or _is_alone():
        return
    different: list[int] = []
    for fingerprint in fingerprints:
        told = in_shares(lambda own: own(), [fingerprint] * me.count)
        different = [index for index, own in enumerate(told) if own != told[0]]
        if not different:
            return
    _raise_in_all(MmpoError(f"{what} of process {different[0]} differ from the first one's"))


def wait_for(look: Callable[[], Result | None], what: str) -> Result:
    """What the first process sees, once this one sees it too: file systems of networks show what
    another host wrote some seconds later.

    Args:
      look: gives it; None where it is not there yet.
      what: it is, for the message.

    Raises:
      MmpoError: it has not come.
    """
    until = time.monotonic() + PATIENCE
    while (found := look()) is None:
        if time.monotonic() > until:
            raise MmpoError(
                f"{what}: the first process sees it, this one does not after {PATIENCE:.0f} s; "
                "all hosts need the same files"
            )
        time.sleep(POLLING)
    return found


def is_agreed(error: BaseException) -> bool:
    """Whether all processes raise an error, as it is that of `on_one`."""
    return AGREED in vars(error)


def _raise_in_all(error: Exception) -> NoReturn:
    """Raises an error that every process has come to, and raises."""
    vars(error)[AGREED] = True
    raise error


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """What this process does without the others: no `on_one` in it waits for them."""
    before = _is_alone()
    _local.alone = True
    try:
        yield
    finally:
        _local.alone = before


def _is_alone() -> bool:
    return getattr(_local, "alone", False)


def _check_thread() -> None:
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("another thread than the main one cannot keep the processes' order")


def _pickled(error: Exception) -> bytes:
    try:
        told = pickle.dumps((None, error))
        pickle.loads(told)  # which some types of errors do not survive
    except Exception:
        return pickle.dumps((None, MmpoError(str(error))))
    return told


def _broadcast(data: bytes) -> bytes:
    """The bytes of the first process, in all; what others give is not read.

    The first message has the length and what fits behind it; few sizes follow, as each is compiled.
    """
    head = len(data).to_bytes(8, "little") + data[: SMALL - 8]
    head = _broadcast_padded(head, SMALL)
    size = int.from_bytes(head[:8], "little")
    parts, done = [head[8 : 8 + size]], SMALL - 8
    while done < size:
        length = min(LARGE, 1 << (size - done - 1).bit_length())
        parts.append(_broadcast_padded(data[done : done + length], length))
        done += length
    return b"".join(parts)[:size]


def _broadcast_padded(data: bytes, size: int) -> bytes:
    import numpy as np
    from jax.experimental import multihost_utils

    padded = np.zeros(size, np.uint8)
    padded[: len(data)] = np.frombuffer(data, np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes()


def _gather(data: bytes) -> list[bytes]:
    """The bytes of every process, in all, in the order of their numbers."""
    import numpy as np
    from jax.experimental import multihost_utils

    def gather(array: np.ndarray) -> np.ndarray:
        return np.asarray(multihost_utils.process_allgather(array))

    size = len(data)
    heads = gather(np.array([member().index, size >> 30, size & ((1 << 30) - 1)], np.int32))
    # They come in the order of the devices, which need not be that of the processes.
    order = np.argsort(heads[:, 0])
    sizes = [int(high) << 30 | int(low) for _, high, low in heads[order]]
    parts: list[list[bytes]] = [[] for _ in sizes]
    done = 0
    while done < max(sizes):
        length = max(SMALL, min(LARGE, 1 << (max(sizes) - done - 1).bit_length()))
        padded = np.zeros(length, np.uint8)
        piece = np.frombuffer(data[done : done + length], np.uint8)
        padded[: len(piece)] = piece
        for part, row in zip(parts, gather(padded)[order], strict=True):
            part.append(row.tobytes())
        done += length
    return [b"".join(part)[:size] for part, size in zip(parts, sizes, strict=True)]


def _member_of_pod() -> Member | None:
    """This process on a slice of a TPU pod, or on several slices; None where it has one host."""
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return None
    if importlib.util.find_spec("libtpu") is None:
        return None
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    worker = os.environ.get("TPU_WORKER_ID")
    described = {}
    if not hosts and (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/*")):
        hosts, worker = _attribute("worker-network-endpoints"), _attribute("agent-worker-number")
        lines = (line.partition(":") for line in (_attribute("tpu-env") or "").splitlines())
        described = {name.strip(): value.strip().strip("'") for name, _, value in lines}
    if not hosts or not worker:
        return None
    own = len(hosts.split(","))
    slices, number = (
        int(os.environ.get(name) or described.get(name) or default)
        for name, default in (("MEGASCALE_NUM_SLICES", 1), ("MEGASCALE_SLICE_ID", 0))
    )
    if own * slices == 1:
        return None
    return Member(number * own + int(worker), own * slices)


def _attribute(name: str) -> str | None:
    """What the metadata server says of this machine; None where there is no such server."""
    request = urllib.request.Request(METADATA + name, headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=METADATA_SECONDS) as reply:
            return reply.read().decode()
    except OSError:
        return None
