"""What is written is read back as it was: arguments of templates, and places of media."""

import dataclasses

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.format_rows import (
    QUESTION,
    assistant,
    read_jsonl,
    read_one,
    text_part,
    user,
    write_jsonl,
)

from mmpo_jax.cli import main
from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.commands.generate import _line
from mmpo_jax.commands.results import Results
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.readers import iter_records, read_records
from mmpo_jax.data.records import Medium, Response, placed

WRITERS = ["record", "trl", "llama_factory", "ms_swift"]


def kept(folder, row, via):
    """(a row's record, the same once it was written and read again)."""
    format, _, ending = via.partition(".")
    before = read_one(folder, {"id": "r"} | row)
    if format == "generate":
        before = dataclasses.replace(before, responses=())
        line = _line(before, [sampled("a"), sampled("b")], results(folder))
        return before, dataclasses.replace(read_one(folder, line), responses=())
    source = write_jsonl(folder / "rows.jsonl", [{"id": "r"} | row])
    target = folder / f"written.{ending}"
    convert_data(str(source), str(target), format=format)
    (after,), _ = read_records(target)
    return before, after


def sampled(text):
    return {"text": text, "finished": True, "token_ids": [5]}


def results(folder):
    return Results(*(str(folder / name) for name in ("made.jsonl", "s", "p", "images")))


VIA = [f"{format}.{ending}" for format in WRITERS for ending in ("jsonl", "parquet")]
VIA.append("generate")
PAIR = {"prompt": [user()], "chosen": [assistant("a")], "rejected": [assistant("b")]}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"x": {"type": "string"}}}}
OTHER = {"type": "function", "function": {"name": "g", "parameters": {"y": {"enum": [1]}}}}


@pytest.mark.parametrize("via", VIA)
@pytest.mark.parametrize(
    "columns",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"tools": [TOOL, OTHER], "documents": [{"title": QUESTION}]},
        {
            "tools": [TOOL],
            "chat_template_kwargs": {"a": 0, "documents": "none", "b": [TOOL, OTHER]},
        },
    ],
)
def test_arguments_of_the_template(folder, columns, via):
    before, after = kept(folder, PAIR | columns, via)
    assert len(before.template) >= 1
    assert after.template == before.template
    assert after.extra == {}


def image(text):
    return [{"type": "image"}, {"type": "text", "text": text}]


def shown(record):
    """What a template is given of each dialogue; a line break behind a tag is another one."""
    made = []
    for response in record.responses or (Response(()),):
        turns = placed((*record.prompt, *response.turns), len(record.images), len(record.videos))
        made.append([(turn.role, list(pieces(turn))) for turn in turns])
    return made


def pieces(turn):
    behind = False
    for piece in (turn.content,) if isinstance(turn.content, str) else turn.content:
        broken = turn.tagged and behind and isinstance(piece, str) and piece.startswith("\n")
        yield ("break", piece[1:]) if broken else piece
        behind = isinstance(piece, Medium)


LITERAL = "Is <image> a tag, and \\<image>?"
DIALOGUES = {
    "a line break behind a tag": [user("<image>\n" + QUESTION)],
    "behind two": [user("<image><image>\n" + QUESTION)],
    "in a later turn": [user("1"), assistant("2"), user("<image>\n3")],
    "in one of two": [user("<image>1"), assistant("2"), user("<image>\n3")],
    "beside a literal": [user("<image>\n1"), assistant("2"), user("Is \\<image> a tag?")],
    "no line break": [user("1 <image> 2"), assistant("2"), user("Is \\<image> a tag?")],
    "a literal beside parts": [user([*image("1"), *image("2")]), assistant("3"), user(LITERAL)],
    "a literal behind parts": [user(image(LITERAL))],
    "parts behind text": [user(image("1")[::-1]), assistant("2"), user([text_part(LITERAL)])],
}
BROKEN = [user(image("\n" + QUESTION))]


COUNTS = {"behind two": 2, "in one of two": 2, "a literal beside parts": 2}
ANSWERS = {"chosen": [assistant("a")], "rejected": [assistant("b <image>")]}


@pytest.mark.parametrize("via", VIA)
@pytest.mark.parametrize("name", DIALOGUES)
def test_places_and_line_breaks(folder, name, via):
    row = {"images": ["a.png", "b.png"][: COUNTS.get(name, 1)], "prompt": DIALOGUES[name]}
    before, after = kept(folder, row | ANSWERS, via)
    assert shown(after) == shown(before)
    assert len(after.images) == len(before.images)


@pytest.mark.parametrize("via", VIA)
def test_a_line_break_behind_a_part(folder, via):
    """Is kept, or the row is refused."""
    row = {"images": ["a.png"], "prompt": BROKEN, **ANSWERS}
    if via in ("generate", "record.jsonl", "trl.jsonl", "record.parquet", "trl.parquet"):
        before, after = kept(folder, row, via)
        assert shown(after) == shown(before)
    else:
        with pytest.raises(MmpoError, match="a line break begins the text behind an image"):
            kept(folder, row, via)


def calls(name, **arguments):
    function = {"name": name, "arguments": arguments}
    return assistant("") | {"tool_calls": [{"type": "function", "function": function}]}


@pytest.mark.parametrize("via", VIA[:-1])
def test_calls_of_tools(folder, via):
    """The columns of Parquet give every object the keys of all."""
    format, _, ending = via.partition(".")
    several = [calls("f", x=1), calls("g", y="a", z=None), calls("h")]
    keys = {"name": "Ann", "meta": {"a": 1}}, {"meta": {"b": ["x"]}}, {}
    rows = [
        {"id": str(n), "prompt": [user() | more], "chosen": [call], "rejected": [assistant("b")]}
        for n, (call, more) in enumerate(zip(several, keys, strict=True))
    ]
    source = write_jsonl(folder / "rows.jsonl", rows)
    convert_data(str(source), str(folder / f"out.{ending}"), format=format)
    (before, _), (after, _) = map(read_records, (source, folder / f"out.{ending}"))
    assert [shown(record) for record in after] == [shown(record) for record in before]
    assert [record.prompt[0].keys for record in after] == [*keys]
    assert [record.responses[0].turns[0].keys for record in after] == [
        {"tool_calls": call["tool_calls"]} for call in several
    ]


def test_keys_that_columns_cannot_hold(folder):
    row = PAIR | {"prompt": [user() | {"meta": {"a": None}}]}
    with pytest.raises(MmpoError, match="message keys: meta holds null"):
        kept(folder, row, "trl.parquet")
    before, after = kept(folder, row, "trl.jsonl")
    assert after.prompt == before.prompt


@pytest.mark.parametrize("meta", [{"u": None, "v": 1}, {"w": {}}, [{"u": None}]])
def test_other_columns_that_columns_cannot_hold(folder, meta):
    row = PAIR | {"meta": meta}
    with pytest.raises(MmpoError, match=r"extra: meta holds null .*--drop extra leaves it out"):
        kept(folder, row, "trl.parquet")
    for via in ("trl.jsonl", "record.parquet"):
        kept(folder, row, via)
        (after,) = iter_records(folder / f"written.{via.partition('.')[2]}")
        assert after.extra == {"meta": meta}


def test_calls_that_other_columns_unified(folder):
    several = [calls("f", x=1), calls("g", y=2)]
    rows = [PAIR | {"chosen": [call]} for call in several]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    records, _ = read_records(folder / "rows.parquet")
    assert [record.responses[0].turns[0].keys["tool_calls"] for record in records] == [
        call["tool_calls"] for call in several
    ]


@pytest.mark.parametrize("format", ["rlaif_v", "rlhf_v", "mm_rlhf", "mm_rlhf_pairs"])
def test_tags_that_are_text_in_a_question(folder, format):
    question = r"<image>What is \<image> in SVG, and a\\<image>?"
    row = {"images": ["a.png"], "prompt": question, **ANSWERS}
    before, after = kept(folder, row, f"{format}.jsonl")
    assert after.prompt == before.prompt
    assert [image.name for image in after.images] == ["a.png"]


def test_responses_left_out_of_a_conversion_are_told(folder, capsys):
    rows = [{"prompt": QUESTION, "responses": ["a", None, "b"]}, PAIR]
    source = write_jsonl(folder / "rows.jsonl", rows)
    assert main(["data", "convert", str(source), str(folder / "out.jsonl")]) == 0
    assert "responses left out of rows that are used: bad_message 1" in capsys.readouterr().out
    (left_out,) = read_jsonl(folder / "out.rejected_rows.jsonl")
    assert (left_out["row"], left_out["reason"]) == (1, "bad_message")
    assert left_out["detail"].startswith("response 2: ")
