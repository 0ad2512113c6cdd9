"""Rounds whose splitter and labeler are served by a server that fails: every response ends with a
verdict or is counted, nothing is asked twice, and the result is that of an undisturbed run."""

import logging
import re
import threading
import time

import pytest
from helpers.chat_server import ChatTestServer, error, question, reply
from helpers.served_rounds import (
    FAULTS,
    MODELS,
    NUMBERS,
    UNREADABLE,
    Feedback,
    journal_keys,
    result_files,
    right_reply,
    served_recipe,
)
from helpers.small_rounds import PROMPTS, SAMPLES

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.chat import client
from mmpo_jax.chat.pacing import Backoff
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import read_table
from mmpo_jax.feedback.judge import EMPTY, TooManyFailed

KEY = "sk-0123456789abcdef+/="


@pytest.fixture(scope="module", autouse=True)
def quick(one_device):
    """One device, and short waits between tries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "Backoff", lambda: Backoff(0.005, 0.02))
        yield


@pytest.fixture(scope="module")
def server():
    with ChatTestServer(models=MODELS) as server:
        yield server


@pytest.fixture(scope="module", params=["json", "rlaif_v"])
def undisturbed(request, server, tiny_folder, tmp_path_factory):
    """(style, requests that it takes, files of the result)."""
    output = tmp_path_factory.mktemp("undisturbed") / request.param
    server.script = script = Feedback({})
    run_alignment(served_recipe(output, tiny_folder, server.url, request.param))
    assert set(script.right.values()) == {1}
    assert len(journal_keys(output)) == len(script.right)
    return request.param, script.right.keys(), result_files(output)


@pytest.fixture(scope="module")
def plain(server, tiny_folder, tmp_path_factory):
    """As `undisturbed`, of style json."""
    output = tmp_path_factory.mktemp("plain") / "run"
    server.script = script = Feedback({})
    run_alignment(served_recipe(output, tiny_folder, server.url))
    return script.right.keys(), result_files(output)


@pytest.mark.slow
def test_faults_change_nothing(undisturbed, server, tiny_folder, tmp_path):
    style, requests, files = undisturbed
    unreadable = ("talk", *NUMBERS) if style == "rlaif_v" else ("half",)  # half a list is a list
    faults = FAULTS | {name: UNREADABLE[name] for name in unreadable}
    server.script = script = Feedback(faults)
    recipe = served_recipe(tmp_path, tiny_folder, server.url, style, server={"timeout": 3})
    run_alignment(recipe)
    assert script.met.keys() == faults.keys()
    assert script.right.keys() == requests  # none lost
    assert set(script.right.values()) == {1}  # none twice
    keys = journal_keys(tmp_path)
    assert len(set(keys)) == len(keys)
    judged = read_table(tmp_path / "round-1" / "judge.parquet")
    assert judged.num_rows == PROMPTS * SAMPLES
    assert set(judged["reason"].to_pylist()) == {None, EMPTY}
    assert result_files(tmp_path) == files


@pytest.mark.slow
def test_a_server_that_dies_and_comes_back(plain, server, tiny_folder, tmp_path):
    requests, files = plain
    script, deaths = Feedback({}), [5, len(requests) // 2, len(requests) - 3]

    def die():
        server.stop()
        time.sleep(0.3)
        server.start()

    def dying(body, seen):
        if deaths and sum(script.right.values()) >= deaths[0]:
            deaths.pop(0)
            threading.Thread(target=die).start()
        return script(body, seen)

    server.script = dying
    run_alignment(served_recipe(tmp_path, tiny_folder, server.url))
    assert not deaths
    assert script.right.keys() == requests
    assert sum(script.right.values()) <= len(requests) + 3 * 8  # what was under way, of both models
    keys = journal_keys(tmp_path)
    assert len(set(keys)) == len(keys) == len(requests)
    assert result_files(tmp_path) == files


def test_failures_are_counted_and_the_rest_goes_on(server, tiny_folder, tmp_path):
    """Of the responses one in some is refused by the splitter, and questions by the labeler."""

    def script(body, seen):
        text = question(body)
        if body["model"] == "splitter" and sum(text.encode()) % 9 == 0:
            return error(400, "content management policy", code="content_filter")
        if body["model"] == "labeler" and sum(text.encode()) % 7 == 0:
            return reply(body, "The", [("The", -0.1), ("A", -3.0)])
        return right_reply(body)

    server.script = script
    feedback = {"max_failed": 0.8}
    (_, report) = run_alignment(served_recipe(tmp_path, tiny_folder, server.url, feedback=feedback))
    judged = read_table(tmp_path / "round-1" / "judge.parquet").to_pylist()
    assert len(judged) == PROMPTS * SAMPLES
    for row in judged:
        assert (row["reason"] is None) == (row["score"] == row["score"])
    reasons = [row["reason"] for row in judged if row["reason"] is not None]
    assert {"refused", "no_yes_or_no", EMPTY} == set(reasons)
    assert report.failed == len(reasons)
    assert report.counts["responses_refused"] == reasons.count("refused")
    assert report.counts["responses_usable"] == len(judged) - len(reasons)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sick", "told"),
    [
        ("splitter", "splitting into claims: "),
        ("labeler", "asking the labeler: "),
    ],
)
def test_too_many_failures_stop_and_a_mended_server_goes_on(
    plain, server, tiny_folder, tmp_path, sick, told
):
    requests, files = plain
    right = Feedback({})

    def script(body, seen):
        if body["model"] != sick or sum(question(body).encode()) % 2:
            return right(body, seen)
        kind = sum(question(body).encode()) // 2 % 3
        if kind == 0:
            return error(400, "no such picture")
        return error(500, "down") if kind == 1 else reply(body, "Hm", [("Hm", -0.1)])

    server.script = script
    recipe = served_recipe(tmp_path, tiny_folder, server.url, feedback={"max_failed": 0.1})
    with pytest.raises(TooManyFailed, match=told) as caught:
        run_alignment(recipe)
    reasons = {"splitter": "no_json", "labeler": "no_yes_or_no"}
    for reason in ("server_error", reasons[sick], "bad_request"):
        assert re.search(rf"{reason} \d", str(caught.value))
    assert "of 35 responses failed" in str(caught.value)  # one says nothing
    assert 0 < sum(right.right.values()) < len(requests)
    kept = set(journal_keys(tmp_path))
    assert kept
    server.script = right
    run_alignment(recipe)
    assert right.right.keys() == requests and set(right.right.values()) == {1}
    assert kept <= set(journal_keys(tmp_path))
    assert result_files(tmp_path) == files


@pytest.mark.slow
def test_the_key_is_nowhere(server, tiny_folder, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("FEEDBACK_KEY", KEY)
    monkeypatch.setattr(server, "key", KEY)

    def script(body, seen):
        if sum(question(body).encode()) % 7 == 0 and not seen:
            return error(500, f"what is {KEY}?")
        if body["model"] == "splitter" and sum(question(body).encode()) % 5 == 0:
            return reply(body, f"your key is {KEY}")
        return right_reply(body)

    server.script = script
    options = {"server": {"api_key_env": "FEEDBACK_KEY"}, "feedback": {"max_failed": 0.9}}
    run_alignment(served_recipe(tmp_path, tiny_folder, server.url, **options))
    read = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(read) > 10 and not any(KEY.encode() in data for data in read)
    assert any(b"your key is [key]" in data for data in read)
    assert KEY not in caplog.text and "labeler: " in caplog.text


def test_a_server_that_is_not_there_is_said_before_anything_is_computed(tiny_folder, tmp_path):
    with ChatTestServer(models=MODELS) as gone:
        url = gone.url
    began = time.monotonic()
    with pytest.raises(MmpoError, match=re.escape(f"{url}: the chat server cannot be reached")):
        run_alignment(served_recipe(tmp_path, tiny_folder, url))
    assert time.monotonic() - began < 5
    assert not (tmp_path / "round-1").exists()


def test_a_server_without_the_model(server, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "models", ("labeler",))
    with pytest.raises(MmpoError, match="has no model splitter; it has labeler"):
        run_alignment(served_recipe(tmp_path, tiny_folder, server.url))


@pytest.mark.slow
def test_what_is_finished_needs_no_server(tiny_folder, tmp_path):
    with ChatTestServer(Feedback({}), models=MODELS) as server:
        recipe = served_recipe(tmp_path, tiny_folder, server.url)
        reports = run_alignment(recipe)
    assert run_alignment(recipe) == reports


def test_two_sections_that_ask_one_model_otherwise(server, tiny_folder, tmp_path):
    both = {"type": "chat", "url": server.url, "model": "labeler"}
    feedback = {"splitter": {**both, "timeout": 9}, "labeler": {**both, "timeout": 8}}
    recipe = served_recipe(tmp_path, tiny_folder, server.url, feedback=feedback)
    with pytest.raises(MmpoError, match="two sections ask it, with different timeout"):
        run_alignment(recipe)
