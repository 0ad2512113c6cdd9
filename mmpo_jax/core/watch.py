"""The end of one process of a command is that of all, with its reason.

Processes that compute together wait for each other, without an end where one of them is gone. So
a thread in each listens for the reason of whoever stops, and the first process also notices those
that cannot give one any more. All of it goes through the key-value store of JAX's coordination
service, which needs no devices.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from typing import Any, NoReturn

from mmpo_jax.core.processes import Member, member, several

INTERVAL = 5.0
"""Seconds between two signs of life."""
SILENCE = 30.0
"""Seconds without one after which a process counts as gone."""
LEAVING = 10.0
"""Seconds, at most, in which the first process waits for the others to learn of the end: the
store ends with it."""
REASON, ALIVE, LEFT = "mmpo/stopped", "mmpo/alive/", "mmpo/left/"
"""Keys of the store."""
TOLD_TO_END = "was told to end; the same command goes on from what is finished"
"""What is said of a process that got SIGTERM; no failure."""
LOST = ("gloo", "connection", "unavailable", "socket", "deadline", "heartbeat", "peer")
"""Words by which an error of JAX tells that another process is out of reach."""

THREAD = "watch"

_failing, _finishing = threading.Event(), threading.Event()
"""Set where this process ends by itself: with a reason of its own, and without any."""


def watch() -> None:
    """Begins to listen, once JAX has joined the processes; nothing where there is one."""
    client = _store()
    _finishing.clear()
    if client is not None and not any(each.name == THREAD for each in threading.enumerate()):
        answered = threading.Event()
        for function, arguments in ((_watch, (client, member(), answered)), (_miss, (answered,))):
            threading.Thread(target=function, args=arguments, name=THREAD, daemon=True).start()


def finish() -> None:
    """Notes that this process has done all it had to do, so that the first one may go."""
    _finishing.set()


def is_failing() -> bool:
    """Whether this process ends and has told the others why."""
    return _failing.is_set()


def stop_others(reason: str) -> None:
    """Tells the other processes why this one stops, for which they stop as well.

    Args:
      reason: one line.
    """
    if not several():
        return
    _tell_others(f"stopped: {reason}")


def end_others() -> None:
    """Tells the other processes that this one was told to end, which they do as it does."""
    if several():
        _tell_others(TOLD_TO_END)


def _tell_others(told: str) -> None:
    me, client = member(), _store()
    _failing.set()
    if client is None:
        return
    with contextlib.suppress(Exception):  # another was faster, or the first one is gone
        client.key_value_set(REASON, f"process {me.index} {told}")
    _leave(client, me)


def wait_for_reason(error: BaseException) -> None:
    """Gives the reason time to come where an error of JAX may only say that another process is
    gone; with it this process ends here."""
    text = str(error).casefold()
    is_lost = type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError", "ValueError")
    if is_lost and any(word in text for word in LOST):
        time.sleep(SILENCE + 2 * INTERVAL)


def _store() -> Any:
    """The client of the key-value store; None where there is one process."""
    # It has no public name; Orbax takes it from here too.
    from jax._src import distributed

    return distributed.global_state.client


def _miss(answered: threading.Event) -> None:
    """Ends this process once the store has not answered for too long.

    A first process that is frozen, or whose network is, leaves calls without an end or lets them
    reach their deadlines. Intervals are counted, and no time: where this process was frozen itself,
    the thread that asks has had none either.

    Args:
      answered: is set whenever the store has taken a sign of life.
    """
    silent = 0.0
    while silent < SILENCE:
        time.sleep(INTERVAL)
        silent = 0.0 if answered.is_set() else silent + INTERVAL
        answered.clear()
    if not (_failing.is_set() or _finishing.is_set()):
        _end(f"process 0 cannot be reached: no answer for {SILENCE:.0f} s")


def _watch(client: Any, me: Member, answered: threading.Event) -> None:
    """Listens until there is a reason to end, giving signs of life.

    Args:
      client: of the store.
      me: this process.
      answered: is set whenever the store has taken a sign.
    """
    count = 0
    heard = {str(index): ("", time.monotonic()) for index in range(1, me.count)}
    while True:
        try:
            client.key_value_set(f"{ALIVE}{me.index}", str(count), allow_overwrite=True)
            answered.set()
            if me.index == 0:
                for name in _silent(client, heard):
                    told = f"nothing was heard of it for {SILENCE:.0f} s: it was killed, or is lost"
                    with contextlib.suppress(Exception):  # there is a reason already
                        client.key_value_set(REASON, f"process {name} stopped: {told}")
            reason = client.blocking_key_value_get(REASON, int(1000 * INTERVAL))
        except Exception as error:
            if "DEADLINE_EXCEEDED" in str(error):
                count += 1
                continue
            if _failing.is_set() or _finishing.is_set():
                return
            _end(f"process 0 stopped: it cannot be reached ({_first_line(error)})")
        if _failing.is_set():
            return
        _leave(client, me)
        _end(reason)


def _silent(client: Any, heard: dict[str, tuple[str, float]]) -> list[str]:
    """Names of processes that have given no sign of life for too long.

    Args:
      client: of the store.
      heard: name -> (last sign, when it was new); is brought up to date.
    """
    now = time.monotonic()
    for key, sign in client.key_value_dir_get(ALIVE):
        name = key.rpartition("/")[2]
        if name in heard and heard[name][0] != sign:
            heard[name] = sign, now
    gone = {name for name, _ in _entries(client, LEFT)}
    return [name for name, (_, at) in heard.items() if now - at > SILENCE and name not in gone]


def _entries(client: Any, folder: str) -> list[tuple[str, str]]:
    return [(key.rpartition("/")[2], value) for key, value in client.key_value_dir_get(folder)]


def _leave(client: Any, me: Member) -> None:
    """Says that this process knows of the end; the first waits until all do."""
    try:
        client.key_value_set(f"{LEFT}{me.index}", "", allow_overwrite=True)
        until = time.monotonic() + LEAVING
        while me.index == 0 and time.monotonic() < until:
            if len(_entries(client, LEFT)) == me.count:
                return
            time.sleep(0.1)
    except Exception:  # the first one is gone
        return


def _end(reason: str) -> NoReturn:
    """Ends this process, whatever its main thread waits for: as the one whose reason it is."""
    status = 0 if re.fullmatch(rf"process \d+ {TOLD_TO_END}", reason) else 1
    prefix = "" if member().index == 0 else f"process {member().index}: "
    print(f"mmpo: {prefix}{reason}", file=sys.stderr, flush=True)
    os._exit(status)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
