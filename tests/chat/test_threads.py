"""Several threads ask one client; nothing is sent twice, and nothing hangs when somebody leaves."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from helpers.chat_server import Hang, error, question, reply

from mmpo_jax.chat.journal import Journal
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.core.errors import MmpoError


def ask_for(text, **options):
    return ChatRequest((ChatMessage.user(text),), 8, **options)


def in_threads(*works):
    """What each returned, or the error that it raised."""
    found = [None] * len(works)

    def run(place, work):
        try:
            found[place] = work()
        except Exception as error:
            found[place] = error

    threads = [threading.Thread(target=run, args=item) for item in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    return found


def wait_until(is_true):
    for _ in range(1000):
        if is_true():
            return
        time.sleep(0.005)
    raise AssertionError("it did not come to that")


def test_the_same_asked_by_several_threads_is_sent_once(serve, connect):
    server = serve(lambda body, seen: reply(body, question(body), delay=0.01))
    client = connect(server, max_concurrent=4)
    requests = [ask_for(f"{number % 25}") for number in range(50)]
    found = in_threads(*[lambda: client.ask(requests)] * 4)
    assert found[0] == found[1] == found[2] == found[3]
    assert [outcome.texts for outcome in found[0]] == [(f"{n % 25}",) for n in range(50)]
    assert server.questions == {f"{number}": 1 for number in range(25)}
    assert client.counts.replies == 25


def test_the_same_under_another_attempt_is_sent_again(serve, connect):
    server = serve()
    connect(server).ask([ask_for("a"), ask_for("a", attempt=1), ask_for("a")])
    assert server.questions == {"a": 2}


def test_the_bound_of_concurrency_is_over_all_threads(serve, connect):
    server = serve(lambda body, seen: reply(body, "Yes", delay=0.03))
    client = connect(server, max_concurrent=5)
    works = [
        lambda start=start: client.ask([ask_for(f"{start} {number}") for number in range(30)])
        for start in range(3)
    ]
    assert [len(outcomes) for outcomes in in_threads(*works)] == [30] * 3
    assert server.most_at_once == 5


def test_requests_are_sent_in_order(serve, connect):
    server = serve()
    connect(server, max_concurrent=1).ask([ask_for(f"{number}") for number in range(50)])
    assert [question(body) for body in server.bodies] == [f"{number}" for number in range(50)]


def test_what_stops_the_run_reaches_all_threads(serve, connect):
    arrived = threading.Barrier(3, timeout=10)

    def script(body, seen):
        arrived.wait()
        return error(401, "no") if question(body) == "bad" else Hang()

    client = connect(serve(script))
    found = in_threads(
        lambda: client.ask([ask_for("bad")]),
        lambda: client.ask([ask_for("a")]),
        lambda: client.ask([ask_for("b"), ask_for("b")]),
    )
    assert [type(error) for error in found] == [MmpoError] * 3


def test_closing_ends_those_who_wait(serve, connect):
    others = set(threading.enumerate())
    server = serve(lambda body, seen: Hang())
    client = connect(server)

    def close():
        wait_until(lambda: len(server.bodies) == 3)
        client.close()

    began = time.monotonic()
    found = in_threads(lambda: client.ask([ask_for(f"{number}") for number in range(3)]), close)
    assert isinstance(found[0], RuntimeError) and "closed" in str(found[0])
    assert time.monotonic() - began < 3
    client.close()
    with pytest.raises(RuntimeError, match="closed"):
        client.ask([ask_for("a")])
    left = set(threading.enumerate()) - others
    assert not [thread for thread in left if thread.name.startswith("chat")]


def test_who_leaves_takes_only_what_nobody_else_waits_for(serve, connect, monkeypatch):
    release = threading.Event()

    def script(body, seen):
        release.wait(10)
        return reply(body, question(body))

    server = serve(script)
    client = connect(server, max_concurrent=2)
    mine = [ask_for(f"{number}") for number in range(10)]

    class Left(BaseException):
        pass

    def leave(futures):
        wait_until(lambda: len(server.bodies) == 2)
        raise Left

    def stay():
        return client.ask(mine[:1])

    staying = threading.Thread(target=stay)
    staying.start()
    wait_until(lambda: server.bodies)
    with monkeypatch.context() as patch:
        patch.setattr("mmpo_jax.chat.client.concurrent.futures.as_completed", leave)
        with pytest.raises(Left):
            client.ask(mine)
    release.set()
    staying.join(10)
    assert client.ask(mine[:1])[0].texts == ("0",)
    assert server.questions == {"0": 1, "1": 1}  # which was under way
    assert [outcome.texts for outcome in client.ask(mine)] == [(f"{n}",) for n in range(10)]
    assert server.questions["1"] == 2 and server.questions["0"] == 1


INTERRUPTED = """
import signal
import sys
from mmpo_jax.chat.client import ChatClient
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.server import ChatServer

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs begin without
url, journal = sys.argv[1:]
with ChatClient(ChatServer(url=url, model="judge"), journal) as client:
    client.ask([ChatRequest((ChatMessage.user(f"{number}"),), 8) for number in range(1000)])
"""


def test_ctrl_c_ends_it_promptly(serve, tmp_path):
    server = serve(lambda body, seen: Hang())
    process = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, server.url, os.fspath(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for _ in range(2000):
            if server.bodies or process.poll() is not None:
                break
            time.sleep(0.01)
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=20)
    finally:
        process.kill()
    assert "KeyboardInterrupt" in told and time.monotonic() - began < 5
    assert "never retrieved" not in told and "was destroyed" not in told


def test_what_nobody_was_given_when_the_client_ended_is_forgotten_with_the_rest(
    serve, connect, tmp_path
):
    """A thread that asks ahead waits for more replies while another one stops the run."""
    server = serve(lambda body, seen: Hang() if question(body) == "slow" else reply(body, "hm"))
    client = connect(server)
    good, bad = ask_for("good"), ask_for("bad")
    client.ask([good, bad])
    client.reject([bad])
    ahead = [ask_for("early"), ask_for("slow")]

    def stop():
        wait_until(lambda: client.counts.replies == 3)
        client.end()
        client.forget_rejected()
        client.close()

    error, _ = in_threads(lambda: client.ask(ahead), stop)
    assert "was closed" in str(error)
    with contextlib.closing(Journal(tmp_path / "journal")) as journal:
        known = [request.key(client.server) in journal for request in (good, bad, *ahead)]
    assert known == [True, False, False, False]
