"""Which of two answers is better: replies as they come, and pairs as questions."""

import json

import pytest

from mmpo_jax.cli import main
from mmpo_jax.data.pair_questions import (
    ask_which,
    pairs_as_questions,
    read_conclusion,
    read_verdict,
)
from mmpo_jax.data.readers import iter_records
from mmpo_jax.data.records import Record, Response, Turn


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        ("<think>so</think><answer>1</answer>", "1"),
        ("<answer> Answer 2. </answer>", "2"),
        ("<answer>TIE</answer>", "tie"),
        ("<answer>1</answer> no, <answer>2</answer>", "2"),
        ("I take [[B]].", "2"),
        ("[[A]]? No: [[C]]", "tie"),
        ("Overall Judgment: Answer 1 is better.", "1"),
        ("Therefore, answer 2 is the slightly better one", "2"),
        ("<answer>1</answer> [[B]]", "1"),
        ("Answer 1 is better.", None),
        ("<answer>3</answer>", None),
        ("<answer>1 or 2</answer>", None),
        ("", None),
    ],
)
def test_verdicts(reply, verdict):
    assert read_verdict(reply) == verdict


@pytest.mark.parametrize(
    ("reply", "conclusion"),
    [
        ("<think>Answer 1 is better as it is short.</think><answer>2</answer>", "1"),
        ("Answer 1 is worse. <answer>2</answer>", "2"),
        ("Response 1 seems better. But in all, response 2 is clearly the better one.", "2"),
        ("Answer 1 is fine, but answer 2 is better.", "2"),
        ("Compared with answer 1, answer 2 is better.", "2"),
        ("Answer 2 is short; answer 1 is better", "1"),
        ("Answer 1 is better than answer 2.", "1"),
        ("Answer 2 is better. Is answer 1 better?", "2"),
        ("Answer 2 is better. Answer 1 isn't better.", "2"),
        ("Answer 1 is not better.", None),
        ("Answer 1 is good, " * 5000 + "better", "1"),
        ("both are good <answer>1</answer> Answer 2 is better", None),
    ],
)
def test_conclusions(reply, conclusion):
    assert read_conclusion(reply) == conclusion


def test_what_is_filled_in_is_not_looked_at_again():
    text = ask_which("{first}", "{second}", "b", "Q {question} A {first} B {second}")
    assert text == "Q {first} A {second} B b"


def test_pairs_in_both_orders():
    ranks = (2, 1, 2)
    responses = tuple(Response.of(text, rank=rank) for text, rank in zip("abc", ranks, strict=True))
    record = Record("7", (), (Turn("user", "which ?"),), responses)
    made = list(pairs_as_questions([record]))
    assert [question.id for question in made] == ["7/1-0/1", "7/1-0/2", "7/1-2/1", "7/1-2/2"]
    assert [question.solution for question in made] == ["1", "2", "1", "2"]
    text = made[1].prompt[0].text
    assert "Answer 1: a\n" in text and "Answer 2: b\n" in text and "Question: which ?" in text
    assert not made[0].responses
    assert list(pairs_as_questions([Record("8", (), record.prompt, (Response.of("a"),))])) == []


def test_a_file_of_pairs_becomes_questions(tmp_path, capsys):
    pairs = [
        {"id": "p", "prompt": "what ?", "chosen": "a cat", "rejected": "a dog"},
        {"id": "q", "prompt": "who ?", "chosen": "he", "rejected": "she"},
    ]
    source, target = tmp_path / "pairs.jsonl", tmp_path / "asked.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    assert main(["data", "convert", str(source), str(target), "--ask-which"]) == 0
    assert [(record.id, record.solution) for record in iter_records(str(target))] == [
        ("p/0-1/1", "1"),
        ("p/0-1/2", "2"),
        ("q/0-1/1", "1"),
        ("q/0-1/2", "2"),
    ]
    assert "4 rows" in capsys.readouterr().out
