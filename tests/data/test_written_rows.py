"""What is written is read back as it was: arguments of templates, and places of media."""

import dataclasses

import pytest
from format_rows import QUESTION, assistant, read_one, user, write_jsonl

from mmpo_jax.data.conversion import convert_data
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.results import Results
from mmpo_jax.generation.run import _line

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
