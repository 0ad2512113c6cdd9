"""Self-reward: the number in a reply, and what has none."""

import math
import re

import pyarrow as pa
import pytest
from helpers.judged import Scripted, responses_of

from mmpo_jax.core.errors import DataError
from mmpo_jax.feedback.judge import EMPTY
from mmpo_jax.feedback.self_reward import PROMPT, SelfRewardJudge, read_number
from mmpo_jax.feedback.text_model import TRIAL, Reply, UnreadableReply
from mmpo_jax.recipes.feedback import SelfRewardFeedback


@pytest.mark.parametrize(
    ("reply", "number"),
    [
        ("7", 7),
        (" 7.5.\n", 7.5),
        ("7/10", 7),
        ("**8**", 8),
        ("-1", -1),
        (".5", 0.5),
        ("The dog is red.\nScore: 3", 3),
        ("Score: 3/10", 3),
        ("**Score:** 8.25", 8.25),
        ("**Score**: 8", 8),
        ("score:9.", 9),
        ("Score: .5", 0.5),
        ("Score: 2, no.\nScore: 4", 4),
        ("I give it this.\nSCORE: 10", 10),
    ],
)
def test_numbers(reply, number):
    assert read_number(reply) == number


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "It is good.",
        "I counted 3 dogs.",
        "Score: good",
        "The score is between 0 and 10.",
        "Score (0-10)",
        "Score: 8,5",
        "Score: 7-8",
        "Score: \u22123",
        "underscore: 3",
        "8,5",
        "7 or 8",
    ],
)
def test_no_number(reply):
    with pytest.raises(UnreadableReply) as caught:
        read_number(reply)
    assert caught.value.reason == "no_number"


def judge_of(says, **options):
    model = Scripted(says)
    return SelfRewardJudge(SelfRewardFeedback(**options), model, "key"), model


def length(text, attempt=0):
    """As many points as the answer has words."""
    return f"Let me see.\nScore: {len(text.rpartition('Answer: ')[2].split())}"


def test_scores_in_order(tmp_path):
    responses = responses_of(tmp_path, {"p": ["a", "a b c"], "q": ["a b"]})
    judge, model = judge_of(length)
    judged = judge.judge(responses).table
    assert judged["prompt_id"].to_pylist() == ["p", "p", "q"]
    assert judged["sample"].to_pylist() == [0, 1, 0]
    assert judged["score"].to_pylist() == [1, 3, 2]
    assert judged["reason"].null_count == 3
    assert "Let me see." in judged["details"][0].as_py()
    first = model.rounds[0][0]
    assert (first.id, first.images) == ("p/0", responses.records[0].images)
    assert "from 0 to 10" in first.text and "what is in p ?" in first.text
    assert "{" in PROMPT and "{" not in first.text


def test_a_finished_stage_asks_nobody(tmp_path):
    responses = responses_of(tmp_path, {"p": ["a", "b"]})
    first = judge_of(length)[0].judge(responses)
    again, model = judge_of(length)
    assert again.judge(responses) == first and not model.rounds
    other, model = judge_of(length, high=100)
    other.judge(responses)
    assert model.rounds


def test_outside_the_range_is_asked_again_and_then_fails(tmp_path):
    responses = responses_of(tmp_path, {"p": ["a", "b"], "q": ["c"] * 18})

    def says(text, attempt):
        return "Score: 11" if text.endswith("Answer: a") else "Score: 10"

    judge, model = judge_of(says, attempts=2)
    row = judge.judge(responses).table.to_pylist()[0]
    assert math.isnan(row["score"]) and row["reason"] == "no_number"
    assert "Score: 11" in row["details"]
    assert [len(asked) for asked in model.rounds] == [TRIAL, 1, 20 - TRIAL]
    assert model.rejected == [("p/0", 0), ("p/0", 1)]


def test_too_many_failures_stop_with_reasons(tmp_path):
    responses = responses_of(tmp_path, {"p": ["a", "b", "c", "d", "e", "f"]})

    def says(text, attempt):
        return {"a": "hm", "b": "hm", "c": Reply(None, "refused", "", final=True)}.get(
            text[-1], "Score: 1"
        )

    judge, _ = judge_of(says, max_failed=0.4)
    told = re.escape("asking for a score: 3 of 6 responses failed (no_number 2, refused 1)")
    with pytest.raises(DataError, match=told):
        judge.judge(responses)
    judge, _ = judge_of(says, max_failed=0.5)
    assert judge.judge(responses).table["score"].to_pylist()[3:] == [1, 1, 1]


def test_empty_responses_have_no_score_and_are_no_failures(tmp_path):
    responses = responses_of(tmp_path, {"p": ["", " \n", "a"]})
    judge, model = judge_of(length, max_failed=0)
    judged = judge.judge(responses).table
    assert judged["reason"].to_pylist() == [EMPTY, EMPTY, None]
    assert [len(asked) for asked in model.rounds] == [1]


def test_nothing_but_empty_responses(tmp_path):
    judged = judge_of(length)[0].judge(responses_of(tmp_path, {"p": ["", ""]}))
    assert isinstance(judged.table, pa.Table) and judged.table.num_rows == 2
