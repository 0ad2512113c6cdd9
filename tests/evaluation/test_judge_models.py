"""Judges of benchmarks: a served one, a checkpoint, and judgements that are there."""

import contextlib
import json
import os

import pytest
from helpers.chat_server import ChatTestServer, error, question, reply

from mmpo_jax.benchmarks.judging import FILE, Judge, JudgePrompt, Question
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.evaluation.judge_models import asked_judge
from mmpo_jax.feedback.judge import TooManyFailed
from mmpo_jax.recipes.judging import ChatJudging, CheckpointJudging, JudgedAnswers

PROMPT = JudgePrompt(
    "numbers-1", official="gpt-4", max_new_tokens=8, system="Be fair.", temperature=0.2, attempts=2
)
QUESTIONS = [Question(name, f"rate {name}") for name in "abc"]


def is_number(text):
    return text.isdigit()


@pytest.fixture
def serve():
    with contextlib.ExitStack() as stack:
        yield lambda *args, **options: stack.enter_context(ChatTestServer(*args, **options))


def asked(server, folder, questions=QUESTIONS, given=None, **options):
    section = ChatJudging(url=server.url, model="judge", **options)
    with asked_judge(section, str(folder), given) as judge:
        return judge.ask(PROMPT, questions, is_number), judge.told[PROMPT.name]


def numbers(body, seen):
    return reply(body, "7", model="judge-2024")


def test_a_served_judge_is_asked_once_as_the_prompt_says(tmp_path, serve):
    server = serve(numbers)
    found, told = asked(server, tmp_path)
    assert [(one.id, one.text, one.readable) for one in found] == [(n, "7", True) for n in "abc"]
    body = server.bodies[0]
    assert [message["role"] for message in body["messages"]] == ["system", "user"]
    assert body["messages"][0]["content"] == "Be fair."
    assert (body["temperature"], body["max_tokens"]) == (0.2, 8) and "top_p" not in body
    assert told["models"] == {"judge-2024": 3} and told["official_judge"] == "gpt-4"
    assert (told["judge"], told["temperature"]) == ("judge", 0.2)
    server.stop()
    again, _ = asked(server, tmp_path)  # nobody is there to be asked
    assert again == found
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [(row["id"], row["text"], row["prompt"]) for row in rows] == [
        (n, "7", "numbers-1") for n in "abc"
    ]


def test_only_what_changed_is_asked(tmp_path, serve):
    server = serve(numbers)
    asked(server, tmp_path)
    changed = [*QUESTIONS[:2], Question("c", "rate another"), Question("c", "rate c", run=1)]
    asked(server, tmp_path, changed)
    assert len(server.bodies) == 5
    asked(server, tmp_path, temperature=0.5)
    assert len(server.bodies) == 8


def test_an_unreadable_reply_is_asked_for_again_and_kept(tmp_path, serve):
    def script(body, seen):
        if "rate b" in question(body):
            return reply(body, "no idea")
        return reply(body, "5" if body["seed"] or "rate a" not in question(body) else "well")

    server = serve(script)
    found, _ = asked(server, tmp_path)
    assert [(one.text, one.readable) for one in found] == [
        ("5", True),
        ("no idea", False),
        ("5", True),
    ]
    assert len(server.bodies) == 5
    rows = [json.loads(line) for line in (tmp_path / FILE).read_text().splitlines()]
    assert [row["text"] for row in rows if row["id"] == "a"] == ["well", "5"]
    assert asked(server, tmp_path)[0] == found and len(server.bodies) == 5


def test_a_judge_whom_nobody_can_read_is_no_judge(tmp_path, serve):
    says = ["no idea"]
    server = serve(lambda body, seen: reply(body, says[0]))
    with pytest.raises(MmpoError, match=r"none of its 6 replies to numbers-1 can be read.*no idea"):
        asked(server, tmp_path)
    says[0] = "3"  # mended
    assert [one.text for one in asked(server, tmp_path)[0]] == ["3"] * 3


def test_a_request_without_a_reply_is_no_judgement(tmp_path, serve):
    def script(body, seen):
        return error(400, "bad", code="x") if "rate b" in question(body) else numbers(body, seen)

    found, _ = asked(serve(script), tmp_path)
    assert [(one.text, one.reason) for one in found][1] == (None, "bad_request")
    with pytest.raises(TooManyFailed, match=r"1 of 3 responses failed \(bad_request 1\)"):
        asked(serve(script), tmp_path / "other", max_failed=0)


def test_judgements_that_are_there_are_read(tmp_path, serve):
    server = serve(numbers)
    found, _ = asked(server, tmp_path)
    path = str(tmp_path / FILE)
    given = Judge(given=path)
    assert given.published is None
    assert given.ask(PROMPT, QUESTIONS, is_number) == found
    assert given.told[PROMPT.name]["models"] == {"judge-2024": 3}
    other = [Question("d", "rate d")]
    with pytest.raises(MmpoError, match="has no judgement of the answer to 'd'"):
        given.ask(PROMPT, other, is_number)
    with pytest.raises(MmpoError, match="needs a judge: --judge url=http"):
        Judge().ask(PROMPT, QUESTIONS, is_number)
    asked(server, tmp_path / "more", [*QUESTIONS, *other], path)
    assert len(server.bodies) == 4  # the same judge goes on from them
    asked(server, tmp_path / "hot", QUESTIONS, path, temperature=1.0)
    assert len(server.bodies) == 7  # and another one does not


def test_replies_of_two_judges_are_told_apart(tmp_path, serve):
    server = serve(numbers)
    asked(server, tmp_path)
    asked(server, tmp_path, temperature=1.0)
    with pytest.raises(MmpoError, match=r"row 4: 'a' was judged twice, by judge and by judge"):
        Judge(given=str(tmp_path / FILE))


def test_a_checkpoint_judges(tmp_path):
    section = CheckpointJudging(model="builtin:picture_world", batch_size=2)
    with asked_judge(section, str(tmp_path)) as judge:
        first = judge.ask(PROMPT, QUESTIONS)
        assert all(one.text is not None for one in first)
    before = os.stat(tmp_path / FILE).st_mtime_ns
    with asked_judge(section, str(tmp_path)) as judge:
        judge.model.say = None  # not asked
        assert judge.ask(PROMPT, QUESTIONS) == first
    assert os.stat(tmp_path / FILE).st_mtime_ns == before


def test_the_section_says_who_judges():
    served = JudgedAnswers(judge={"url": "http://127.0.0.1:1/v1", "model": "x"}).judge
    assert isinstance(served, ChatJudging)
    assert isinstance(JudgedAnswers(judge={"model": "x"}).judge, CheckpointJudging)
