"""What all judges share: parts of a round, the table of verdicts, and when failures stop a run."""

import json
import math
import re

import pytest
from helpers.judged import responses_of

from mmpo_jax.chat.connection import _parse
from mmpo_jax.core.errors import DataError
from mmpo_jax.feedback import judge
from mmpo_jax.feedback.judge import (
    EMPTY,
    Judgement,
    TooManyFailed,
    check_failed,
    judged_table,
    scored_responses,
)


@pytest.mark.parametrize("count", [1, 4, 5, 6, 9, 13])
def test_parts_hold_every_prompt_once_and_are_equal(tmp_path, monkeypatch, count):
    """Of a few left over, one that fails would be more than may."""
    monkeypatch.setattr(judge, "PROMPTS_PER_PART", 4)
    responses = responses_of(tmp_path, {f"p{n}": ["a"] * (n % 3) for n in range(count)})
    parts = [responses.part(number) for number in range(responses.num_parts)]
    sizes = [len(part.records) for part in parts]
    assert max(sizes) <= 4 and max(sizes) - min(sizes) <= 1
    assert [record for part in parts for record in part.records] == list(responses.records)
    tables = [part.generated.table.to_pylist() for part in parts]
    assert [row for rows in tables for row in rows] == responses.generated.table.to_pylist()
    for part in parts:
        assert {*part.prompt_ids()} <= {record.id for record in part.records}


def test_a_part_without_responses(tmp_path):
    responses = responses_of(tmp_path, {"p": [], "q": []})
    assert responses.part(0).generated.table.num_rows == 0
    assert [texts for _, texts in responses.by_prompt()] == [[], []]


def test_scores_and_reasons(tmp_path):
    responses = responses_of(tmp_path, {"p": ["a", "b"], "q": ["c"]})
    given = [
        Judgement(1.5, {"reply": "\N{BUS}"}),
        Judgement(math.nan),
        Judgement(math.nan, {}, "refused"),
    ]
    table = judged_table(responses, given)
    assert table["reason"].to_pylist() == [None, "no_verdict", "refused"]
    assert json.loads(table["details"][0].as_py()) == {"reply": "\N{BUS}"}
    scored = scored_responses(responses.generated.table, table)
    assert [(one.prompt_id, one.sample, one.text, one.reason) for one in scored] == [
        ("p", 0, "a", None),
        ("p", 1, "b", "no_verdict"),
        ("q", 0, "c", "refused"),
    ]
    with pytest.raises(DataError, match="2 scores for 3 responses"):
        judged_table(responses, given[:2])
    with pytest.raises(DataError, match="response 0 to prompt 'q'"):
        judged_table(responses, [*given[:2], Judgement(math.inf)])


@pytest.mark.parametrize(
    ("reasons", "share", "stops"),
    [
        ([], 0, False),
        ([None] * 9 + ["a"], 0.1, False),
        ([None] * 8 + ["a", "b"], 0.1, False),  # two may, of however few
        ([None] * 7 + ["a", "b", "b"], 0.1, True),
        ([None] * 28 + ["a", "b", "b"], 0.1, False),
        ([None] * 28 + ["a", "b", "b", "b"], 0.1, True),
        (["a"], 1, False),
        (["a"], 0, True),
        ([None, EMPTY, EMPTY], 0, False),  # nobody was asked about those
        ([None] * 3 + ["a", "b", "b", EMPTY, EMPTY], 0.4, True),
    ],
)
def test_when_failures_stop_a_run(reasons, share, stops):
    if not stops:
        check_failed(reasons, share, "asking")
        return
    with pytest.raises(TooManyFailed, match=re.escape("asking: ")) as caught:
        check_failed(reasons, share, "asking")
    assert "a 1" in str(caught.value) and f"allows {share:g}" in str(caught.value)


def test_halves_of_characters_of_a_server():
    """No file can hold one."""
    assert _parse(b'{"a": ["\\ud83d \\uD83D\\uDE8c"]}') == {"a": ["? \N{BUS}"]}
    assert _parse(b'{"a": "\\\\ud83d"}') == {"a": "\\ud83d"}
