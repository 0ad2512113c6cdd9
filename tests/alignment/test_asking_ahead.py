"""Served judges are asked while the round's model still generates: nothing twice, the same files,
and neither a kill nor a server that is down loses anything."""

import contextlib
import logging
import time

import pytest
from helpers.alive import wait_until
from helpers.chat_server import ChatTestServer, reply
from helpers.served_rounds import MODELS, Feedback, journal_keys, right_reply, served_recipe

from mmpo_jax.alignment import round
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.chat import client
from mmpo_jax.chat.pacing import Backoff
from mmpo_jax.feedback import ahead, claims, judge
from mmpo_jax.feedback.judge import TooManyFailed
from mmpo_jax.generation import responses

PARTS = 4
SAID = "servers are not asked ahead any more"


@pytest.fixture(scope="module", autouse=True)
def small_parts(one_device):
    """One device, short waits between tries, and parts of three prompts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "Backoff", lambda: Backoff(0.005, 0.02))
        patch.setattr(responses, "PROMPTS_PER_PART", 3)
        patch.setattr(judge, "PROMPTS_PER_PART", 3)
        yield


@pytest.fixture(scope="module")
def server():
    with ChatTestServer(models=MODELS) as server:
        yield server


@pytest.fixture(scope="module")
def in_turn(server, tiny_folder, tmp_path_factory):
    """(the requests of a round that asks in turn, its files)."""
    output = tmp_path_factory.mktemp("in_turn") / "run"
    server.script = script = Feedback({})
    with pytest.MonkeyPatch.context() as patch:
        for module in (round, claims):
            patch.setattr(module, "asking_ahead", lambda ask: ahead.asking_ahead(None))
        run_alignment(served_recipe(output, tiny_folder, server.url))
    assert set(script.right.values()) == {1}
    return script.right.keys(), stage_files(output)


def stage_files(output):
    """All tables and manifests of the round, and its weights."""
    folder = output / "round-1"
    found = [*folder.glob("*.parquet"), *folder.glob("*.json"), output / "model/model.safetensors"]
    measured = ("labeler_rate.json", "timings.json")
    return {path.name: path.read_bytes() for path in found if path.name not in measured}


@pytest.fixture
def before_part(monkeypatch):
    """Sets what happens before a part is generated: number of the part -> function."""
    todo, generate, calls = {}, responses.generate_responses, []

    def generating(*args, **options):
        calls.append(None)
        todo.get(len(calls) - 1, lambda: None)()
        return generate(*args, **options)

    monkeypatch.setattr(responses, "generate_responses", generating)
    return todo


def asked_of(script, model):
    return sum(count for text, count in script.right.items() if f'["{model}"' in text)


def wait_for_both(script):
    """Until both models were asked, and all that can be asked is answered."""
    wait_until(lambda: all(asked_of(script, model) for model in MODELS))
    before = -1
    while before != (before := sum(script.right.values())):
        time.sleep(0.3)


def test_requests_arrive_while_responses_are_generated(
    in_turn, server, tiny_folder, tmp_path, before_part
):
    requests, files = in_turn
    server.script = script = Feedback({})
    early = []

    def wait():
        wait_for_both(script)
        early.append(sum(script.right.values()))

    before_part[PARTS - 1] = wait
    run_alignment(served_recipe(tmp_path, tiny_folder, server.url))
    assert len(requests) / 2 < early[0] < len(requests)
    assert script.right.keys() == requests and set(script.right.values()) == {1}
    keys = journal_keys(tmp_path)
    assert len(set(keys)) == len(keys) == len(requests)
    assert stage_files(tmp_path) == files


def test_a_kill_in_the_middle_loses_nothing(in_turn, server, tiny_folder, tmp_path, before_part):
    requests, files = in_turn
    server.script = script = Feedback({})

    def kill():
        wait_for_both(script)
        raise KeyboardInterrupt

    before_part[2] = kill
    recipe = served_recipe(tmp_path, tiny_folder, server.url)
    with pytest.raises(KeyboardInterrupt):
        run_alignment(recipe)
    kept = journal_keys(tmp_path)
    assert 0 < len(kept) < len(requests)
    run_alignment(recipe)
    assert script.right.keys() == requests and set(script.right.values()) == {1}
    assert stage_files(tmp_path) == files


@pytest.mark.slow
def test_finished_parts_of_an_earlier_run_are_asked_ahead(
    in_turn, server, tiny_folder, tmp_path, before_part, monkeypatch
):
    """They were made when nobody asked ahead."""
    requests, files = in_turn
    recipe = served_recipe(tmp_path, tiny_folder, server.url)

    def kill():
        raise KeyboardInterrupt

    before_part[2] = kill
    server.script = script = Feedback({})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(round, "asking_ahead", lambda ask: contextlib.nullcontext(lambda part: None))
        run_alignment(recipe)
    assert not script.right
    before_part[3] = lambda: wait_for_both(script)  # the first that this run makes
    run_alignment(recipe)
    assert script.right.keys() == requests and set(script.right.values()) == {1}
    assert stage_files(tmp_path) == files


@pytest.mark.slow
def test_a_server_that_is_down_meanwhile(
    in_turn, server, tiny_folder, tmp_path, before_part, caplog
):
    requests, files = in_turn
    caplog.set_level(logging.WARNING)
    server.script = script = Feedback({})

    def until_said():
        wait_until(lambda: SAID in caplog.text)

    def back():
        until_said()
        server.start()

    before_part[1], before_part[PARTS - 1] = server.stop, back
    recipe = served_recipe(tmp_path, tiny_folder, server.url, server={"max_outage": 0.2})
    run_alignment(recipe)
    assert caplog.text.count(SAID) == 1
    assert script.right.keys() == requests
    keys = journal_keys(tmp_path)
    assert len(set(keys)) == len(keys) == len(requests)
    assert stage_files(tmp_path) == files


@pytest.mark.slow
def test_a_splitter_that_nobody_can_read(
    in_turn, server, tiny_folder, tmp_path, before_part, caplog
):
    """It is said while the round generates, and stops it in its turn; mended, it is asked anew."""
    requests, files = in_turn
    caplog.set_level(logging.WARNING)

    def until_said():
        wait_until(lambda: SAID in caplog.text)

    before_part[PARTS - 1] = until_said
    server.script = lambda body, seen: (
        reply(body, "Hm.") if body["model"] == "splitter" else right_reply(body)
    )
    recipe = served_recipe(tmp_path, tiny_folder, server.url)
    with pytest.raises(TooManyFailed, match="splitting into claims"):
        run_alignment(recipe)
    assert caplog.text.count(SAID) == 1
    server.script = script = Feedback({})
    run_alignment(recipe)
    assert script.right.keys() == requests and set(script.right.values()) == {1}
    assert stage_files(tmp_path) == files
