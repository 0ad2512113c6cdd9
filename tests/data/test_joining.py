"""Pairs of a prompt become one ranking where they say one order, and stay where they do not."""

import dataclasses
import itertools
import logging
import random

import pytest
from helpers.format_rows import QUESTION, png, read_jsonl, write_jsonl

from mmpo_jax.cli import main
from mmpo_jax.data.joining import Joined, join_pairs
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.sources import LearnedFile
from mmpo_jax.data.tally import Tally, settle
from mmpo_jax.data.usable import usable_records

PROMPT = (Turn("user", QUESTION),)


def row(number, *ranked, **fields):
    """A record of (text, rank) responses."""
    responses = tuple(Response.of(text, rank) for text, rank in ranked)
    return dataclasses.replace(Record(f"{number}", (), PROMPT, responses, row=number), **fields)


def pairs(text, **fields):
    """``a>b b>c a=d`` as records."""
    made = []
    for number, pair in enumerate(text.split(), start=1):
        better, sign, worse = pair
        made.append(row(number, (better, 1), (worse, 1 if sign == "=" else 2), **fields))
    return made


def ranks(record):
    return {response.text: response.rank for response in record.responses}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a>b b>c", {"a": 1, "b": 2, "c": 3}),
        ("b>c a>b", {"b": 2, "c": 3, "a": 1}),
        ("a>b a>c b>c c>d", {"a": 1, "b": 2, "c": 3, "d": 4}),
        ("a>b b=c", {"a": 1, "b": 2, "c": 2}),
        ("a=b b>c", {"a": 1, "b": 1, "c": 2}),
        ("a>b a>b", {"a": 1, "b": 2}),
        ("a>b a>c b=c", {"a": 1, "b": 2, "c": 2}),
        ("a>b b>c a>b a>c", {"a": 1, "b": 2, "c": 3}),
    ],
)
def test_orders(text, expected):
    done = join_pairs(pairs(text))
    (record,) = done.records
    assert ranks(record) == expected
    assert (record.id, record.row) == ("1", 1)
    assert (done.rankings, done.rows, done.absorbed) == (
        1,
        len(text.split()),
        len(text.split()) - 1,
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a>b b>a", "contradicting"),
        ("a>b b>c c>a", "contradicting"),
        ("a=b a>b", "contradicting"),
        ("a=b b=c a>c", "contradicting"),
        ("a>a a>b", "contradicting"),
        ("a>b b>c c>d d>b", "contradicting"),
        ("a>b a>c", "incomparable"),
        ("a>b c>b", "incomparable"),
        ("a>b a>c a>b", "incomparable"),
        ("a>c b>c", "incomparable"),
        ("a>b c>d", "incomparable"),
        ("a>b b>c a>d", "incomparable"),
    ],
)
def test_what_is_no_order_stays_as_it_is(text, why):
    records = pairs(text)
    assert join_pairs(records) == Joined(records, **{why: len(records)})


def test_rankings_agree_with_every_row_and_nothing_is_made_up():
    """Against trying all orders: joined if and only if exactly one fits."""
    draw = random.Random(0)
    orders = {
        size: {
            tuple(sorted(set(levels)).index(level) for level in levels)
            for levels in itertools.product(range(size), repeat=size)
        }
        for size in (2, 3, 4)
    }
    joined = 0
    for _ in range(400):
        size = draw.choice((2, 3, 4))
        rows = [
            (*draw.sample("abcd"[:size], 2), draw.choice((1, 2, 2, 2)))
            for _ in range(draw.randint(2, 6))
        ]
        records = [row(n, (one, 1), (other, rank)) for n, (one, other, rank) in enumerate(rows)]
        named = sorted({text for one, other, _ in rows for text in (one, other)})
        fitting = [
            order
            for order in orders[len(named)]
            if all(
                (order[named.index(one)] < order[named.index(other)])
                if rank == 2
                else (order[named.index(one)] == order[named.index(other)])
                for one, other, rank in rows
            )
        ]
        done = join_pairs(records)
        if len(fitting) == 1:
            (record,) = done.records
            assert ranks(record) == {
                n: level + 1 for n, level in zip(named, fitting[0], strict=True)
            }
            joined += 1
        else:
            assert done.records == records
            assert (done.incomparable if fitting else done.contradicting) == len(records)
    assert joined > 50


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": (Turn("system", "x"), *PROMPT)},
        {"images": (ImageRef("a", data=png()),)},
        {"source": "else"},
        {"template": {"tools": [{"name": "f"}]}},
        {"template": {"enable_thinking": False}},
        {"extra": {"answer": 3}},
        {"responses": (Response((Turn("assistant", "b"),), rank=1, prompt=PROMPT),) * 2},
        {"responses": (Response.of("b"), Response.of("c"))},
    ],
)
def test_only_rows_about_the_same_are_joined(fields):
    first, second = pairs("a>b b>c")
    records = [first, dataclasses.replace(second, **fields)]
    assert join_pairs(records) == Joined(records)


def test_images_are_the_same_by_their_bytes():
    first, second = pairs("a>b b>c")
    images = [(ImageRef(name, data=png()),) for name in ("a", "b")]
    records = [
        dataclasses.replace(r, images=i) for r, i in zip((first, second), images, strict=True)
    ]
    assert join_pairs(records).rankings == 1


def test_order_of_the_data_and_other_rows_stay():
    other = row(9, ("x", 1), ("y", 2), source="else")
    alone = row(10, source="else")
    first, second = pairs("a>b b>c")
    assert [r.id for r in join_pairs([alone, first, other, second]).records] == ["10", "1", "9"]


def test_what_is_said_of_responses_is_kept_where_rows_agree():
    def said(record, *fields, extra=None):
        responses = [
            dataclasses.replace(r, **f) for r, f in zip(record.responses, fields, strict=True)
        ]
        return dataclasses.replace(record, responses=tuple(responses), extra=extra or {})

    first, second = pairs("a>b b>c")
    one = said(
        first,
        {"scores": {"help": 3.0, "score": 1.0}, "critique": "Good."},
        {"scores": {"help": 2.0, "score": 0.0}, "critique": "Fair.", "log_prob": -2.0},
        extra={"lang": "en", "annotator": 1},
    )
    two = said(
        second,
        {"scores": {"help": 2.0, "score": 1.0}, "log_prob": -2.0},
        {"scores": {"score": 0.0}, "critique": "Bad."},
        extra={"lang": "en", "annotator": 2},
    )
    done = join_pairs([dataclasses.replace(one, own_id="7"), two])
    (record,) = done.records
    assert [dict(r.scores) for r in record.responses] == [{"help": 3.0}, {"help": 2.0}, {}]
    assert [r.critique for r in record.responses] == ["Good.", "Fair.", "Bad."]
    assert [r.log_prob for r in record.responses] == [None, -2.0, None]
    assert (record.own_id, record.extra) == ("7", {"lang": "en"})
    assert done.differing == 1


def test_arguments_are_the_same_in_any_order():
    first, second = pairs("a>b b>c")
    first = dataclasses.replace(first, template={"x": 1, "y": [2]})
    second = dataclasses.replace(second, template={"y": [2], "x": 1})
    assert len(join_pairs([first, second]).records) == 1


def test_what_was_left_out_is_told_of_its_own_row(tmp_path, tiny_processor):
    """And the ranking has none, whose places would be those of several rows."""
    image = tiny_processor.placeholders[0]

    def response(text, rank, **more):
        return {"turns": [{"role": "assistant", "content": text}], "rank": rank, **more}

    bad, worst = response("a", "x"), response("star", 3, token_ids=[image])
    rows = [
        {"prompt": [{"role": "user", "content": prompt}], "responses": responses}
        for prompt, responses in [
            ("a ?", [response("a", 1), bad, response("ring", 2)]),
            ("a ?", [bad, response("ring", 1), worst, response("yes", 2)]),
            ("star ?", [response("a", 1), bad, response("ring", 2)]),
        ]
    ]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    source = LearnedFile(path=path, join_pairs=True).load(supervised=True)
    skipped = tmp_path / "skipped.jsonl"
    usable_records(source, tiny_processor, None, str(skipped))
    told = [(line["row"], line["detail"].partition(":")[0]) for line in read_jsonl(skipped)]
    # What tokens show is known of the ranking, as its third one.
    shown = (1, "response 3")
    assert told == [(1, "response 2"), (2, "response 1"), shown, (3, "response 2")]


def test_many_pairs_of_a_prompt_take_no_matrix():
    """As many responses as no matrix of all of them would hold."""
    count = 4_000
    records = [row(n, (f"{n}", 1), (f"{n + 1}", 2)) for n in range(count)]
    random.Random(0).shuffle(records)
    (record,) = join_pairs(records).records
    assert ranks(record) == {f"{n}": n + 1 for n in range(count + 1)}
    apart = [row(n, (f"{2 * n}", 1), (f"{2 * n + 1}", 1 + n % 2)) for n in range(count)]
    assert join_pairs(apart).incomparable == count


ROWS = [
    {"id": "7", "prompt": QUESTION, "chosen": "a", "rejected": "b"},
    {"id": "7", "prompt": QUESTION, "chosen": "b", "rejected": "c"},
    {"id": "8", "prompt": "Else?", "chosen": "b", "rejected": "c"},
]


def test_in_training_and_in_conversion(tmp_path, caplog, capsys):
    path = str(write_jsonl(tmp_path / "rows.jsonl", [*ROWS, {"prompt": "x", "chosen": "y"}]))
    caplog.set_level(logging.INFO)
    source = LearnedFile(path=path, join_pairs=True, max_skipped=0.25).load(supervised=True)
    assert [len(record.responses) for record in source.records] == [3, 2]
    assert "2 rows of 1 prompts joined into rankings" in caplog.text
    tally = Tally(unreadable=source.skipped, joined=source.joined, usable=len(source.records))
    # One of four rows is left out, not one of three.
    settle(tally, path, str(tmp_path / "skipped.jsonl"), source.max_skipped, True, None)
    assert len(LearnedFile(path=path).load(supervised=True).records) == 3
    out = tmp_path / "out.jsonl"
    options = ["--join-pairs", "--max-skipped", "0.25"]
    assert main(["data", "convert", path, str(out), *options]) == 0
    assert "2 rows of 1 prompts joined into rankings" in capsys.readouterr().out
    ranking, pair = read_jsonl(out)
    assert [response["rank"] for response in ranking["responses"]] == [1, 2, 3]
    assert (ranking["id"], pair["id"]) == ("7", "8")
