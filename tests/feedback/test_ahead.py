"""Servers are asked ahead about what is finished, and what goes wrong there stops nothing."""

import contextlib
import logging
import threading
import types

import pytest
from helpers.alive import PATIENCE, wait_until
from helpers.judged import Scripted, responses_of

from mmpo_jax.core import processes, progress
from mmpo_jax.feedback import judge as judge_module
from mmpo_jax.feedback import rate
from mmpo_jax.feedback.ahead import asking_ahead
from mmpo_jax.feedback.claims import ClaimsJudge
from mmpo_jax.feedback.judge import AskingAhead, TooManyFailed, rows_in_parts
from mmpo_jax.feedback.labeler import Answer
from mmpo_jax.feedback.self_reward import SelfRewardJudge
from mmpo_jax.feedback.splitters import Claim, Division
from mmpo_jax.recipes.feedback import ClaimsFeedback, SelfRewardFeedback

SERVED = {"type": "chat", "url": "http://127.0.0.1:1/v1", "model": "m"}


class TestAskingAhead:
    def test_who_gives_does_not_wait(self):
        asked, may_go_on = [], threading.Event()

        def ask(item):
            assert may_go_on.wait(PATIENCE)
            asked.append(item)

        with asking_ahead(ask) as give:
            for item in range(5):
                give(item)
            assert not asked
            may_go_on.set()
            wait_until(lambda: len(asked) == 5)
        assert sorted(asked) == list(range(5))

    def test_what_waits_at_the_end_is_dropped(self):
        begun, may_go_on = [], threading.Event()

        def ask(item):
            begun.append(item)
            may_go_on.wait(PATIENCE)

        with asking_ahead(ask) as give:
            for item in range(5):
                give(item)
            wait_until(lambda: len(begun) == 2)
        may_go_on.set()
        wait_until(lambda: not any(thread.name == "ahead" for thread in threading.enumerate()))
        assert len(begun) == 2

    def test_the_first_failure_ends_it_and_is_said_once(self, caplog):
        calls, both = [], threading.Barrier(2)

        def ask(item):
            calls.append(item)
            both.wait(PATIENCE)
            raise TooManyFailed(f"{item} failed")

        with asking_ahead(ask) as give:
            give("first")
            give("second")
            wait_until(lambda: caplog.records)
            for item in range(5):
                give(item)
        wait_until(lambda: not any(thread.name == "ahead" for thread in threading.enumerate()))
        assert sorted(calls) == ["first", "second"]
        (told,) = [record.message for record in caplog.records]
        assert "failed; servers are not asked ahead any more" in told

    def test_an_end_that_others_make_is_no_failure(self, caplog):
        """As when clients are closed."""
        begun, closed = threading.Event(), threading.Event()

        def ask(_):
            begun.set()
            closed.wait(PATIENCE)
            raise RuntimeError("the chat client was closed")

        with asking_ahead(ask) as give:
            give(0)
            assert begun.wait(PATIENCE)
        closed.set()
        wait_until(lambda: not any(thread.name == "ahead" for thread in threading.enumerate()))
        assert not caplog.records

    def test_it_is_not_what_the_command_waits_for(self):
        asked = threading.Event()

        def ask(_):
            with progress.doing("asking the labeler", 10):
                progress.advance(3)
                asked.told = progress.describe()
            asked.set()

        with progress.doing("generate", 5, "prompts") as activity, asking_ahead(ask) as give:
            give(0)
            assert asked.wait(PATIENCE)
            assert activity.done == 0
        assert asked.told.startswith("generate: 0 of 5 prompts")


@pytest.mark.parametrize("index", [0, 1])
def test_of_several_processes_the_first_asks_ahead_alone(monkeypatch, index):
    """It does not wait for the others, who are not asking."""
    got, done = [], threading.Event()
    monkeypatch.setattr(processes, "member", lambda: processes.Member(index, 2))
    monkeypatch.setattr(processes, "_broadcast", None)

    def ask(_):
        got.append(processes.on_one(lambda: "reply"))
        done.set()

    with asking_ahead(ask) as give:
        give(0)
        assert index == 1 or done.wait(PATIENCE)
    assert got == (["reply"] if index == 0 else [])


def test_rows_come_as_many_at_a_time_as_a_part_has(tmp_path, monkeypatch):
    monkeypatch.setattr(judge_module, "PROMPTS_PER_PART", 4)
    responses = responses_of(tmp_path, {f"p{n}": ["a"] * (1 + n % 2) for n in range(9)})
    rows = responses.generated.table.slice(3)  # of p2 and the rest
    parts = list(rows_in_parts("round", responses.records, rows))
    assert [[record.id for record in part.records] for part in parts] == [
        ["p2", "p3", "p4"],
        ["p5", "p6", "p7", "p8"],
    ]
    tables = [part.generated.table.to_pylist() for part in parts]
    assert [row for table in tables for row in table] == rows.to_pylist()


class Splitter:
    """Every word is a claim."""

    key = "words"

    def __init__(self, before=lambda items: None):
        self.before = before

    def divide(self, items):
        self.before(items)
        return [
            Division(tuple(Claim(word, f"{word} ?") for word in item.response.split()))
            for item in items
        ]

    def release(self):
        pass


class Labeler:
    """Answers yes, and keeps what it was asked."""

    def __init__(self, asked):
        self.asked = asked

    def answer(self, items):
        given = []
        for name, _, questions in items:
            self.asked += [
                (name, question, threading.current_thread().name) for question in questions
            ]
            given.append([Answer(0.9, 0.1, "logprobs") for _ in questions])
        return given


def judge_of(given, asked, **options):
    return ClaimsJudge(ClaimsFeedback(**options), given, lambda: Labeler(asked), "labeler")


@pytest.mark.parametrize(
    ("splitter", "labeler", "asks"),
    [
        ("picture_world", {"type": "checkpoint"}, False),
        ("picture_world", SERVED, True),
        ("checkpoint", SERVED, False),
        ("checkpoint", {"type": "checkpoint"}, False),
        ("chat", {"type": "checkpoint"}, True),
        ("chat", SERVED, True),
    ],
)
def test_which_judges_ask_ahead(splitter, labeler, asks):
    splitter = SERVED if splitter == "chat" else {"type": splitter}
    judge = judge_of(Splitter(), [], splitter=splitter, labeler=labeler)
    assert isinstance(judge, AskingAhead) and judge.asks_ahead == asks


def test_a_part_is_split_and_labelled_ahead(tmp_path):
    asked: list = []
    judge = judge_of(Splitter(), asked, splitter=SERVED, labeler=SERVED, suffix="")
    judge.ask_ahead(responses_of(tmp_path, {"p": ["a b", "b c"], "q": ["", "d"]}))
    assert [(name, question) for name, question, _ in asked] == [
        ("p", "a ?"),
        ("p", "b ?"),
        ("p", "c ?"),
        ("q", "d ?"),
    ]
    assert {path.name for path in tmp_path.iterdir()} == {
        *("generate.parquet", "generate.json", "labeler_rate.json", "timings.json")
    }


def test_only_the_splitter_is_asked_where_the_labeler_needs_devices(tmp_path):
    seen: list = []
    judge = judge_of(Splitter(seen.extend), None, splitter=SERVED)
    judge.ask_ahead(responses_of(tmp_path, {"p": ["a b", "b c"]}))
    assert [item.response for item in seen] == ["a b", "b c"]


def test_a_served_judge_of_whole_responses_is_asked_ahead(tmp_path):
    model = Scripted(lambda text, attempt: "Score: 3")
    judge = SelfRewardJudge(SelfRewardFeedback(labeler=SERVED), model, "key")
    assert isinstance(judge, AskingAhead) and judge.asks_ahead
    assert not SelfRewardJudge(SelfRewardFeedback(), model, "key").asks_ahead
    responses = responses_of(tmp_path, {"p": ["a", "b"], "q": [""]})
    judge.ask_ahead(responses)
    ahead = [(ask.text, ask.images) for asks in model.rounds for ask in asks]
    assert len(ahead) == 2 and not (tmp_path / "judge.parquet").exists()
    judge.judge(responses)
    asked = [(ask.text, ask.images) for asks in model.rounds for ask in asks]
    assert asked == ahead * 2  # the same, which a client knows by then


def test_a_part_is_labelled_while_the_next_is_split(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(judge_module, "PROMPTS_PER_PART", 2)
    asked: list = []

    def before(items):
        """Does not split the last part before the first was labelled."""
        if items[0].id == "p4/0":
            wait_until(lambda: {name for name, _, _ in asked} >= {"p0", "p1"})

    caplog.set_level(logging.WARNING)
    texts = {f"p{n}": ["a b", "b"] for n in range(6)}
    checkpoint = {"type": "checkpoint", "model": "DIR"}
    judge = judge_of(Splitter(before), asked, splitter=checkpoint, labeler=SERVED)
    judged = judge.judge(responses_of(tmp_path / "ahead", texts))
    assert not caplog.records
    assert {thread for _, _, thread in asked} == {"ahead", "MainThread"}
    plain = judge_of(Splitter(), [], splitter=checkpoint)
    assert plain.judge(responses_of(tmp_path / "plain", texts)).table == judged.table


def test_time_in_which_two_are_busy_counts_once(monkeypatch):
    clock = types.SimpleNamespace(perf_counter=lambda: now)
    monkeypatch.setattr(rate, "time", clock)
    busy, now = rate.BusyTime(), 1.0
    with contextlib.ExitStack() as ahead:
        ahead.enter_context(busy)
        now = 2.0
        with busy:
            now = 5.0
        now = 6.0
        assert busy.take() == 6 - 1  # while the first goes on
        now = 8.0
    now = 10.0
    with busy:
        now = 13.0
    assert busy.take() == (8 - 6) + (13 - 10)
    assert busy.take() == 0
