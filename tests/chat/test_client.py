"""Every fault of a server ends as a reply or as a counted failure: none twice, none lost."""

import email.utils
import itertools
import logging
import re
import threading
import time

import pytest
from etils import epath
from helpers import pictures
from helpers.chat_server import Answer, Cut, Hang, error, images, question, reply

from mmpo_jax.chat import pacing
from mmpo_jax.chat.client import GIVEN_UP
from mmpo_jax.chat.pacing import Backoff
from mmpo_jax.chat.replies import ChatFailure, ChatReply
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.core import progress
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.records import ImageRef

TOP = [("Yes", -0.2), ("No", -1.7)]


def ask_for(text, max_tokens=8, images=(), **options):
    return ChatRequest((ChatMessage.user(text, images),), max_tokens, **options)


def first(fault):
    """A script: everything meets the fault once, and a reply the next time."""
    return lambda body, seen: reply(body, question(body), TOP) if seen else fault


def always(fault):
    """A script: questions with `!` meet the fault always."""
    return lambda body, seen: fault if "!" in question(body) else reply(body, question(body), TOP)


# What passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        error(429, "slow down"),
        error(429, "slow down", retry_after="0.01"),
        error(408, "late"),
        error(409, "conflict"),
        error(500, "boom"),
        error(503, "queue full"),
        error(504, "gateway"),
        Cut(20),
        Cut(0),
        Answer(b"<html>not JSON"),
        Answer({"choices": []}),
        Answer({"choices": [{"message": {"content": ""}, "finish_reason": "stop"}]}),
    ],
    ids=lambda fault: f"{type(fault).__name__}-{getattr(fault, 'status', '')}",
)
def test_what_passes_is_sent_again_until_there_is_a_reply(serve, connect, fault):
    server = serve(first(fault))
    client = connect(server)
    requests = [ask_for(f"question {number}") for number in range(20)]
    outcomes = client.ask(requests)
    assert [outcome.texts for outcome in outcomes] == [(f"question {n}",) for n in range(20)]
    assert set(server.questions.values()) == {2} and len(server.questions) == 20
    counts = client.counts
    assert (counts.sent, counts.replies, counts.retries, counts.failures) == (40, 20, 20, {})


def test_a_server_that_hangs(serve, connect):
    server = serve(first(Hang()))
    client = connect(server, timeout=0.3)
    assert client.ask([ask_for("a")])[0].texts == ("a",)
    assert client.counts.retries == 1


@pytest.mark.parametrize(
    ("fault", "reason", "sent"),
    [
        (error(429, "slow down"), "rate_limited", 3),
        (error(500, "boom"), "server_error", 3),
        (Cut(), "cut_connection", 3),
        (Answer(b"no JSON"), "malformed", 3),
        (error(400, "maximum context length is 4096"), "too_long", 1),
        (error(400, "no", code="content_filter"), "refused", 1),
        (error(400, "cannot identify image"), "bad_request", 1),
        (error(400, "'temperature' is not supported"), "unknown_field", 1),
    ],
)
def test_what_stays_is_a_failure_that_is_counted(serve, connect, fault, reason, sent):
    server = serve(always(fault))
    client = connect(server, max_retries=2)
    outcomes = client.ask([ask_for("a"), ask_for("b!"), ask_for("c")])
    assert [outcome.texts for outcome in outcomes[::2]] == [("a",), ("c",)]
    failure = outcomes[1]
    assert isinstance(failure, ChatFailure) and failure.reason == reason and failure.detail
    assert client.counts.failures == {reason: 1} and client.counts.replies == 2
    assert server.questions == {"a": 1, "b!": sent, "c": 1}


def test_a_server_that_always_hangs(serve, connect):
    server = serve(always(Hang()))
    client = connect(server, timeout=0.2, max_retries=1)
    assert client.ask([ask_for("b!")])[0].reason == "timed_out"
    assert server.questions == {"b!": 2}


def test_unreadable_replies_are_asked_for_a_few_times_only(serve, connect):
    server = serve(always(Answer(b"no JSON")))
    client = connect(server, max_retries=9)
    assert client.ask([ask_for("b!")])[0].raw == "no JSON"
    assert server.questions == {"b!": 3}


def test_missing_log_probs(serve, connect):
    server = serve(lambda body, seen: reply(body, "Yes"))
    client = connect(server, max_retries=1)
    outcome = client.ask([ask_for("a", top_logprobs=2)])[0]
    assert outcome.reason == "no_logprobs" and server.questions == {"a": 2}


# What a later run finds ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "is_kept"),
    [
        (error(400, "maximum context length is 4096"), True),
        (error(400, "no", code="content_filter"), True),
        (error(400, "cannot identify image"), True),
        (error(400, "'temperature' is not supported"), False),
        (error(500, "boom"), False),
        (Answer(b"no JSON"), False),
    ],
)
def test_replies_and_what_would_fail_again_are_kept(serve, connect, fault, is_kept):
    server = serve(always(fault))
    requests = [ask_for("a"), ask_for("b!"), ask_for("a", attempt=1)]
    with connect(server, max_retries=0) as client:
        before = client.ask(requests)
        assert client.ask(requests) == before
    sent = len(server.bodies)
    client = connect(server, max_retries=0)
    assert client.ask(requests) == before
    assert client.counts.journal_hits == 2 + is_kept
    assert len(server.bodies) == sent + (not is_kept)


def test_a_bad_request_is_kept_also_where_nothing_else_was_asked(serve, connect):
    server = serve(always(error(400, "cannot identify image")))
    for _ in range(2):
        with connect(server) as client:
            assert client.ask([ask_for("b!")])[0].reason == "bad_request"
    assert len(server.bodies) == 1


def test_a_server_that_takes_no_request_at_all_stops_and_nothing_is_kept(serve, connect):
    server = serve(lambda body, seen: error(400, "At most 0 image(s) may be provided"))
    requests = [ask_for(f"{number}") for number in range(GIVEN_UP + 20)]
    client = connect(server, max_concurrent=1)
    with pytest.raises(MmpoError, match="At most 0 image"):
        client.ask(requests)
    client.close()
    server.script = first(error(500, "boom"))
    client = connect(server)
    assert all(isinstance(outcome, ChatReply) for outcome in client.ask(requests))
    assert client.counts.journal_hits == 0


def test_requests_that_break_the_server_do_not_stop_the_run(serve, connect):
    server = serve(always(error(500, "boom")))
    client = connect(server, max_retries=0)
    outcomes = client.ask([ask_for(f"{number}!") for number in range(2 * GIVEN_UP)])
    assert [outcome.reason for outcome in outcomes] == ["server_error"] * 2 * GIVEN_UP
    assert 1 <= server.questions["Say yes."] <= 2


def test_failures_between_replies_say_nothing_of_the_server(serve, connect):
    server = serve(always(error(500, "boom")))
    client = connect(server, max_retries=0, max_concurrent=1)
    requests = [ask_for(f"{number}{'!' * (number % 2)}") for number in range(3 * GIVEN_UP)]
    client.ask(requests)
    assert "Say yes." not in server.questions
    assert client.counts.failures == {"server_error": 3 * GIVEN_UP // 2}


def test_a_server_that_only_fails_stops_the_run(serve, connect):
    server = serve(lambda body, seen: error(500, "EngineCore died"))
    client = connect(server, max_retries=0, max_concurrent=4)
    with pytest.raises(MmpoError, match=f"{GIVEN_UP} requests in a row.*EngineCore died"):
        client.ask([ask_for(f"{number}") for number in range(5 * GIVEN_UP)])
    assert len(server.bodies) < 2 * GIVEN_UP


# What stops the run -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        error(401, "Incorrect API key"),
        error(403, "Forbidden"),
        error(404, "The model `judge` does not exist"),
        error(429, "You exceeded your quota", code="insufficient_quota"),
        error(429, "slow down", retry_after="5000"),
    ],
    ids=lambda fault: str(fault.status),
)
def test_what_no_waiting_mends_stops_at_once(serve, connect, fault):
    server = serve(lambda body, seen: fault if question(body) == "5" else reply(body, "Yes"))
    client = connect(server, max_concurrent=1)
    requests = [ask_for(f"{number}") for number in range(10)]
    with pytest.raises(MmpoError, match=r"judge.*is kept") as found:
        client.ask(requests)
    assert server.url in str(found.value)
    assert server.questions == {str(number): 1 for number in range(6)}
    # Once it is mended, the same client goes on.
    server.script = first(error(500, "boom"))
    server.bodies.clear()
    assert len(client.ask(requests)) == 10
    assert server.questions == {str(number): 2 - (number == 5) for number in range(5, 10)}


# Waits --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds(serve, connect, status):
    server = serve(first(error(status, "wait", retry_after="0.3")))
    connect(server).ask([ask_for("a")])
    assert 0.3 <= server.times[1] - server.times[0] < 2


def test_retry_after_as_a_date(serve, connect):
    server = serve(lambda body, seen: reply(body, "Yes") if seen else late())

    def late():
        return error(429, "wait", retry_after=email.utils.formatdate(time.time() + 2, usegmt=True))

    connect(server).ask([ask_for("a")])
    assert 0.9 <= server.times[1] - server.times[0] < 5  # dates have whole seconds


def test_all_wait_where_the_server_has_too_many_requests(serve, connect, caplog, monkeypatch):
    def script(body, seen):
        if not server.limited_at:
            server.limited_at = time.monotonic()
            return error(429, "wait", retry_after="0.4")
        # The one beside it is answered after the client knows that it is to wait.
        while "too many requests" not in caplog.text:
            time.sleep(0.01)
        return reply(body, "Yes")

    monkeypatch.setattr(pacing, "TOLD_WAIT", 0.0)
    server = serve(script)
    server.limited_at = None
    client = connect(server, max_concurrent=2)
    client.ask([ask_for(f"{number}") for number in range(4)])
    assert sum(at < server.limited_at + 0.4 for at in server.times) <= 2


def test_a_rate_limit_lowers_the_concurrency_and_it_recovers(serve, connect):
    together = threading.Barrier(16, timeout=10)

    def limited(body, seen):
        together.wait()
        server.most_at_once = 0
        return error(429, "slow down")

    def working(body, seen):
        return reply(body, "Yes", delay=0.05)

    server = serve(lambda body, seen: working(body, seen) if seen else limited(body, seen))
    client = connect(server, max_concurrent=16)
    client.ask([ask_for(f"{number}") for number in range(16)])
    # They came together, so it is halved once. 16 replies raise it by 3.
    server.script = working
    server.most_at_once = 0
    client.ask([ask_for(f"{number}") for number in range(100, 116)])
    assert server.most_at_once < 16
    client.ask([ask_for(f"{number}") for number in range(200, 240)])
    server.most_at_once = 0
    client.ask([ask_for(f"{number}") for number in range(300, 364)])
    assert server.most_at_once == 16


def test_a_long_rate_limit_fails_no_request(serve, connect):
    ends = time.monotonic() + 0.5
    server = serve(
        lambda body, seen: (
            reply(body, question(body)) if time.monotonic() > ends else error(429, "slow down")
        )
    )
    client = connect(server, max_concurrent=8, max_retries=6, backoff=Backoff(0.01, 0.05))
    outcomes = client.ask([ask_for(f"{number}") for number in range(30)])
    assert [outcome.texts for outcome in outcomes] == [(f"{number}",) for number in range(30)]


def test_a_rate_limit_without_end_stops_the_run(serve, connect):
    server = serve(lambda body, seen: error(429, "slow down"))
    client = connect(server, max_outage=0.2, max_retries=100)
    with pytest.raises(MmpoError, match=r"nothing but rate limits.*max_outage.*is kept"):
        client.ask([ask_for(f"{number}") for number in range(30)])


def test_waits_grow(serve, connect):
    server = serve(lambda body, seen: reply(body, "Yes") if seen == 3 else error(500, "boom"))
    connect(server, backoff=Backoff(first=0.05, longest=9)).ask([ask_for("a")])
    waits = [after - before for before, after in itertools.pairwise(server.times)]
    assert waits[0] >= 0.75 * 0.05 and waits[1] >= 0.75 * 0.1 and waits[2] >= 0.75 * 0.2


# Outages ------------------------------------------------------------------------------------------


def test_a_server_that_dies_and_comes_back(serve, connect, caplog):
    caplog.set_level(logging.WARNING, "mmpo_jax")
    died = threading.Event()

    def script(body, seen):
        if question(body) == "30" and not died.is_set():
            died.set()
            return Hang()
        return reply(body, question(body))

    server = serve(script)

    def restart():
        died.wait()
        server.stop()
        time.sleep(0.4)
        server.start()

    restarting = threading.Thread(target=restart)
    restarting.start()
    # Few retries, for connections that are cut; those that are refused use none.
    client = connect(server, max_concurrent=4, max_retries=3)
    outcomes = client.ask([ask_for(f"{number}") for number in range(60)])
    restarting.join()
    assert [outcome.texts for outcome in outcomes] == [(f"{number}",) for number in range(60)]
    assert "cannot be reached: " in caplog.text and "answers again" in caplog.text


def test_a_server_that_stays_away_stops_the_run(serve, connect):
    server = serve()
    client = connect(server, max_outage=0.3)
    client.ask([ask_for("a")])
    server.stop()
    began = time.monotonic()
    with pytest.raises(MmpoError, match=r"Connection refused.*is kept") as found:
        client.ask([ask_for("a"), ask_for("b")])
    assert 0.3 <= time.monotonic() - began < 3
    assert server.url in str(found.value) and "max_outage" in str(found.value)
    server.start()
    assert len(client.ask([ask_for("a"), ask_for("b")])) == 2
    assert server.questions == {"a": 1, "b": 1}


# What a server does not know ----------------------------------------------------------------------


def picky(*unknown):
    """A script of a server that does not know some fields."""

    def script(body, seen):
        for name in unknown:
            if name in body:
                return error(400, f"Unrecognized request argument supplied: {name}")
        return reply(body, "Yes", TOP)

    return script


def test_fields_that_the_server_does_not_know_are_left_out(serve, connect, caplog):
    server = serve(picky("response_format", "logprobs"))
    client = connect(server, max_concurrent=2)
    options = {"response_format": {"type": "json_object"}, "top_logprobs": 5, "seed": 3}
    requests = [ask_for(f"{number}", **options) for number in range(20)]
    outcomes = client.ask([*requests, ask_for("plain", seed=3)])
    assert {outcome.left_out for outcome in outcomes[:-1]} == {("response_format", "top_logprobs")}
    assert outcomes[0].first_top_logprobs == (None,) and outcomes[-1].left_out == ()
    assert client.counts.left_out == ("response_format", "top_logprobs")
    assert len(server.bodies) <= 21 + 2 * 2  # what was under way
    assert caplog.text.count("does not know response_format") == 1
    assert caplog.text.count("does not know top_logprobs") == 1
    assert all("seed" in body for body in server.bodies)


def test_the_newer_name_of_max_tokens(serve, connect):
    server = serve(picky("max_tokens"))
    outcomes = connect(server).ask([ask_for("a", 7)])
    assert outcomes[0].left_out == ()
    assert server.bodies[-1]["max_completion_tokens"] == 7 and "max_tokens" not in server.bodies[-1]


def test_a_field_that_nothing_stands_for_is_told(serve, connect):
    server = serve(picky("chat_template_kwargs"))
    client = connect(server, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    outcome = client.ask([ask_for("a")])[0]
    assert (outcome.reason, outcome.field) == ("unknown_field", "chat_template_kwargs")


def test_a_server_that_goes_on_about_a_field_that_it_was_not_sent(serve, connect):
    server = serve(lambda body, seen: error(400, "Unrecognized request argument: seed"))
    outcome = connect(server).ask([ask_for("a", seed=1)])[0]
    assert outcome.reason == "bad_request" and len(server.bodies) == 2


# What is sent and what comes back -----------------------------------------------------------------


def test_images_arrive_as_they_are(serve, connect):
    server = serve()
    shown = pictures.refs("photograph", "palette")
    outcomes = connect(server).ask([ask_for("Red?", images=shown)])
    assert outcomes[0].texts == ("You said: Red?",)
    assert images(server.bodies[0]) == [
        ("image/jpeg", pictures.IMAGES["photograph"]),
        ("image/gif", pictures.IMAGES["palette"]),
    ]


def test_an_image_that_cannot_be_sent_is_a_failure(serve, connect, tmp_path):
    server = serve()
    client = connect(server)
    missing = ImageRef("no", path=epath.Path(tmp_path / "missing.png"))
    broken = ImageRef("broken", b"no image")
    outcomes = client.ask([ask_for("a", images=[ref]) for ref in (missing, broken)])
    assert [outcome.reason for outcome in outcomes] == ["unreadable_image"] * 2
    assert client.counts.failures == {"unreadable_image": 2} and not server.bodies


def test_log_probs_n_texts_and_counts(serve, connect):
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 8},
    }
    server = serve(lambda body, seen: reply(body, ["Yes", "No"], TOP, model="other", usage=usage))
    client = connect(server)
    outcome = client.ask([ask_for("a", n=2, top_logprobs=2)])[0]
    assert outcome == ChatReply(
        ("Yes", "No"), ("stop", "stop"), (tuple(TOP), tuple(TOP)), "other", 10, 4, 8
    )
    counts = client.counts
    assert (counts.prompt_tokens, counts.completion_tokens, counts.cached_tokens) == (10, 4, 8)
    assert counts.models == ("other",) and counts.replies_per_second > 0


def test_progress_is_counted(serve, connect):
    server = serve(always(error(400, "bad")))
    client = connect(server)
    requests = [ask_for("a"), ask_for("b!"), ask_for("a")]
    for total in (3, 6):
        with progress.doing("asking", 3) as activity:
            client.ask(requests)
        assert activity.done == 3, total


# The check ----------------------------------------------------------------------------------------


def test_the_check(serve, connect):
    connect(serve(models=["other", "judge"])).check()


def test_the_check_of_a_model_that_is_not_there(serve, connect):
    with pytest.raises(MmpoError, match=r"no model judge; it has a, b"):
        connect(serve(models=["a", "b"])).check()


def test_the_check_of_a_server_without_a_list(serve, connect, caplog):
    connect(serve(models=None)).check()
    assert "has no list of its models (HTTP 404)" in caplog.text


def test_the_check_of_a_server_without_a_list_asks_for_a_word(serve, connect):
    server = serve(models=None)
    with connect(server) as client:
        client.check()
        assert len(server.bodies) == 1
        client.ask([ask_for("a")])
    client = connect(server)
    client.check()  # the journal shows that it replies
    assert len(server.bodies) == 2


@pytest.mark.parametrize("fault", [error(400, "text alone is not taken"), error(503, "busy")])
def test_the_check_goes_on_where_that_word_fails(serve, connect, caplog, fault):
    connect(serve(lambda body, seen: fault, models=None)).check()
    assert "has no list of its models (HTTP 404)" in caplog.text


def test_the_check_of_a_wrong_address(serve, connect):
    client = connect(serve(lambda body, seen: error(404, "Not Found"), models=None))
    tried = f"{client.server.url}/chat/completions is not found (HTTP 404: Not Found); look at url"
    with pytest.raises(MmpoError, match=re.escape(tried)):
        client.check()


def test_an_answer_that_stops_the_run_is_counted_as_failed(serve, connect):
    client = connect(serve(lambda body, seen: error(404, "Not Found")))
    with pytest.raises(MmpoError, match="is not found"):
        client.ask([ask_for("a")])
    assert client.counts.failures == {"stopped": 1}


def test_what_this_run_asked_was_not_known_before(serve, connect):
    server = serve()
    with connect(server) as client:
        for _ in range(2):
            client.ask([ask_for("a")])
        assert client.counts.journal_hits == 0
    client = connect(server)
    for _ in range(2):
        client.ask([ask_for("a"), ask_for("b")])
    assert client.counts.journal_hits == 1


def test_the_check_of_a_server_that_is_not_there(serve, connect):
    server = serve()
    server.stop()
    with pytest.raises(MmpoError, match=f"{server.url}: the chat server cannot be reached"):
        connect(server).check()
