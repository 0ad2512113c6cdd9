"""Rewards of `mmpo reward` as the scores of rows, and what is refused of such a file."""

import json

import pytest
from helpers.reward_heads import write_jsonl
from pydantic import ValidationError

from mmpo_jax.core.errors import DataError
from mmpo_jax.data import reward_files
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.reward_files import read_rewards
from mmpo_jax.data.row_stage import tokenized_rows
from mmpo_jax.data.sources import LearnedFile, with_scores
from mmpo_jax.objectives.terms import make_term, needs
from mmpo_jax.recipes.training import CachedReference
from mmpo_jax.training.examples import make_examples
from mmpo_jax.training.row_use import LearnedUse

ROWS = [
    {"id": "a", "prompt": "a ?", "chosen": "yes", "rejected": "no"},
    {"id": "a", "prompt": "a star ?", "chosen": "a star", "rejected": "no"},
    {"id": "b", "prompt": "a ?", "responses": ["a ring", 7, "a star"], "ranks": [2, 3, 1]},
    {"id": "c", "prompt": "a ?", "chosen": "a ring", "rejected": "no"},
]
REWARDS = [
    {"id": "a", "rewards": [1.5, -0.5]},
    {"id": "a (row 2)", "rewards": [0.25, 0.75]},
    {"id": "b", "rewards": [0.0, None, 2.0]},
]


@pytest.fixture
def data(tmp_path):
    def data(rows=ROWS, rewards=REWARDS, **options):
        given = write_jsonl(tmp_path / "rewards.jsonl", rewards)
        path = write_jsonl(tmp_path / "rows.jsonl", rows)
        return LearnedFile(path=str(path), rewards=str(given), max_skipped=0.9, **options)

    return data


def scores(record_set):
    return {r.id: [x.scores.get("score") for x in r.responses] for r in record_set.records}


def test_rows_are_told_by_their_ids(data):
    given = data()
    found = scores(with_scores(given.load(supervised=True), given))
    assert found["a"] == [1.5, -0.5]
    assert found["a (row 2)"] == [0.25, 0.75]
    assert found["c"] == [None, None]


def test_margins_of_mm_dpo(data, tiny_processor, tmp_path):
    """In the stage that training reads; a row without rewards is left out, and other rewards make
    another stage."""
    use = LearnedUse.of([make_term("mm_dpo")], CachedReference())

    def rows(given):
        return tokenized_rows(
            given,
            use,
            tiny_processor,
            Lengths(prompt=(32,), response=(16,)),
            folder=str(tmp_path / "out"),
            name="rows",
            skipped_file=str(tmp_path / "skipped.jsonl"),
            workers=1,
        )

    found = rows(data())
    assert found.ids[:2] == ["a", "a (row 2)"] and "c" not in found.ids
    examples = make_examples(found, needs([make_term("mm_dpo")]))
    assert examples[0].fields["score"].tolist() == [1.5, -0.5]
    skipped = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert {"c": "no_score"}.items() <= {row["id"]: row["reason"] for row in skipped}.items()
    changed = [{"id": "a", "rewards": [9.0, 1.0]}, *REWARDS[1:]]
    examples = make_examples(rows(data(rewards=changed)), needs([make_term("mm_dpo")]))
    assert examples[0].fields["score"].tolist() == [9, 1]


@pytest.mark.parametrize(
    ("rewards", "told"),
    [
        ([{"id": "a", "rewards": [1.0, float("nan")]}], "line 1 .* finite number or null, not nan"),
        ([{"id": "a", "rewards": [1.0, "2"]}], "line 1 .* finite number or null, not '2'"),
        ([{"id": "a"}], r"rewards\.jsonl: line 1 is no row of `mmpo reward`: 'rewards'"),
        ([{"id": "a", "rewards": [1.0]}], "row 'a' has 1 rewards, and the data have 2 responses"),
        ([REWARDS[0], REWARDS[0]], "line 2: the id 'a' is there again"),
    ],
)
def test_what_is_refused(data, rewards, told):
    given = data(rewards=rewards)
    with pytest.raises(DataError, match=told):
        with_scores(given.load(supervised=True), given)


def test_a_file_in_a_bucket_is_asked_for_once(monkeypatch):
    """Not for every record: asking how it is takes as long as reading it."""
    asked, read = [], []
    text = "".join(json.dumps(row) + "\n" for row in REWARDS).encode()
    monkeypatch.setattr(reward_files, "state_of", lambda path: asked.append(path))
    monkeypatch.setattr(reward_files, "read_bytes", lambda path: read.append(path) or text)
    record = Record("a", (), (), (Response.of("yes"), Response.of("no")))
    for _ in range(3):
        found = reward_files.rewarded(record, "gs://bucket/rewards of test_reward_files.jsonl")
        assert [one.scores for one in found.responses] == [{"score": 1.5}, {"score": -0.5}]
    assert (len(asked), len(read)) == (0, 1)


def test_a_missing_file_and_options_that_do_not_go_together(data, tmp_path):
    with pytest.raises(DataError, match=r"cannot read .*nowhere"):
        read_rewards(str(tmp_path / "nowhere.jsonl"))
    for other in ({"score": "help"}, {"join_pairs": True}):
        with pytest.raises(ValidationError, match=f"leave {next(iter(other))} out"):
            data(**other)
