"""A judge that compares responses two by two."""

import itertools
import logging
import math

import numpy as np
import pytest
from helpers.judged import Scripted, prompt, responses_of

from mmpo_jax.core.errors import DataError
from mmpo_jax.feedback.judge import EMPTY
from mmpo_jax.feedback.pair_judge import NOBODY, PairJudge, meetings
from mmpo_jax.feedback.text_model import Reply
from mmpo_jax.recipes.feedback import PairFeedback

PROMPT = "{question}|{first}|{second}"


def judge_of(says, **options):
    model = Scripted(says)
    return PairJudge(PairFeedback(prompt=PROMPT, **options), model, "key"), model


def longer(text, attempt=0):
    """The longer answer is better."""
    _, first, second = text.split("|")
    if len(first) == len(second):
        return "<answer>tie</answer>"
    return f"<answer>{1 if len(first) > len(second) else 2}</answer>"


def first_always(text, attempt=0):
    return "<answer>1</answer>"


def test_the_score_is_the_share_of_comparisons_that_are_won(tmp_path):
    texts = {"p": ["aa", "aaaa", "a"], "q": ["x", "yy", "zz"]}
    judge, model = judge_of(longer)
    rows = judge.judge(responses_of(tmp_path, texts)).table.to_pylist()
    assert [row["score"] for row in rows] == [0.5, 1.0, 0.0, 0.0, 0.75, 0.75]
    assert sum(map(len, model.rounds)) == 12
    asked = model.rounds[0][0]
    assert (asked.id, asked.text) == ("p/0-1", "what is in p ?|aa|aaaa")
    assert asked.images == prompt("p").images
    assert '"in_front": "2", "behind": "1"' in rows[0]["details"]


def test_a_judge_that_goes_by_places_says_nothing(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    judge, _ = judge_of(first_always)
    rows = judge.judge(responses_of(tmp_path, {"p": ["a", "b", "c"]})).table
    assert rows["score"].to_pylist() == [0.5, 0.5, 0.5]
    assert "preferred in 100 % of the verdicts; the two orders agree on 0 % of 3" in caplog.text


def test_equal_texts_share_a_score_and_empty_ones_have_none(tmp_path):
    judge, model = judge_of(longer)
    rows = judge.judge(responses_of(tmp_path, {"p": ["aa", "a", " ", "aa"], "q": ["b", "b"]})).table
    scores = rows["score"].to_pylist()
    assert scores[:2] == [1, 0] and scores[3] == 1 and math.isnan(scores[2])
    assert rows["reason"].to_pylist() == [None, None, EMPTY, None, NOBODY, NOBODY]
    assert sum(map(len, model.rounds)) == 2


def test_one_order_is_enough_and_what_nobody_reads_is_counted(tmp_path):
    def says(text, attempt):
        _, first, second = text.split("|")
        if "c" in (first, second):
            return "no idea"
        return "no idea" if first == "b" else longer(text)

    texts = {"p": ["aa", "b"], "q": ["c", "d"]}
    judge, model = judge_of(says, attempts=2)
    rows = judge.judge(responses_of(tmp_path, texts)).table.to_pylist()
    assert [row["score"] for row in rows[:2]] == [1.0, 0.0]
    assert [row["reason"] for row in rows[2:]] == ["no_verdict"] * 2
    assert "no_verdict: no idea" in rows[2]["details"]
    assert len(model.rejected) == 6
    judge, _ = judge_of(lambda text, attempt: Reply(None, "refused", final=True), max_failed=0)
    told = r"comparing responses: 4 of 4 responses failed \(refused 4\)"
    with pytest.raises(DataError, match=told):
        judge.judge(responses_of(tmp_path / "other", texts))


def test_a_finished_stage_asks_nobody(tmp_path):
    responses = responses_of(tmp_path, {"p": ["a", "bb"]})
    first = judge_of(longer)[0].judge(responses)
    again, model = judge_of(longer)
    assert again.judge(responses) == first and not model.rounds
    other, model = judge_of(longer, opponents=1)
    other.judge(responses)
    assert model.rounds


@pytest.mark.parametrize(("count", "opponents"), [(2, 1), (5, 2), (6, 3), (10, 4), (7, 20)])
def test_all_meet_as_many(count, opponents):
    met = meetings(count, opponents)
    assert set(met) <= set(itertools.combinations(range(count), 2)) and len(met) == len(set(met))
    times = np.bincount(np.ravel(met), minlength=count)
    assert min(times) == max(times) >= min(opponents, count - 1)
    assert meetings(count, None) == list(itertools.combinations(range(count), 2))


def test_a_prompt_without_its_places_is_refused():
    with pytest.raises(ValueError, match=r"it has no \{second\}"):
        PairFeedback(prompt="{question} {first}")
