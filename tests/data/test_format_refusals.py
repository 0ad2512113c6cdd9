"""Rows that are refused, and that nothing else is: of broken rows, and of formats that cannot hold
what a record says."""

import dataclasses
import json
import math

import pytest
from helpers.format_rows import (
    DIALOGUE,
    LLAMA_FACTORY,
    MM_RLHF,
    MM_RLHF_PAIRS,
    MS_SWIFT,
    PAIR,
    RANKED,
    RLAIF_V,
    RLHF_V,
    ROWS,
    SCORED,
    TRL,
    assistant,
    gpt,
    human,
    read_jsonl,
    scored,
    skip_one,
    user,
    write_jsonl,
)

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.format import finish
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.writing import STRIP, CannotHold, Writer, fields_of
from mmpo_jax.data.readers import iter_records
from mmpo_jax.data.records import Record, Response


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("rank_count", RANKED | {"final_ranking": [1, 2, 3]}),
        ("rank_count", RANKED | {"final_ranking": 1}),
        ("score_count", RANKED | {"ethical": [1]}),
        ("bad_rank", RANKED | {"final_ranking": [0, 1]}),
        ("bad_rank", RANKED | {"final_ranking": [1.5, 1]}),
        ("bad_rank", RANKED | {"final_ranking": [1, None]}),
        ("bad_rank", RANKED | {"final_ranking": [True, 2]}),
        ("bad_score", RANKED | {"ethical": [1, math.nan]}),
        ("bad_score", RANKED | {"ethical": [1, -math.inf]}),
        ("bad_score", RANKED | {"ethical": [1, "2"]}),
        ("bad_message", RANKED | {"models_output": "a"}),
        ("bad_message", RANKED | {"models_output": ["a", None]}),
        ("bad_message", RANKED | {"question": None}),
        ("image_missing", RANKED | {"video": "gone"}),
        ("image_missing", RANKED | {"image": "gone.png"}),
        ("image_outside_folder", RANKED | {"video": "../video"}),
        ("bad_video_entry", RANKED | {"video": "empty"}),
        ("bad_score", scored(scores={"score": math.inf})),
        ("bad_score", scored(scores=[1])),
        ("bad_rank", scored(rank="1")),
        ("bad_span", scored(spans=[{"start": 1, "end": 4}])),
        ("bad_span", scored(spans=[{"start": 1, "end": 1}])),
        ("bad_span", scored(spans=[{"start": 1}])),
        ("bad_span", scored(spans=[{"start": 0, "end": 1, "weight": math.nan}])),
        ("bad_label", scored(desirable=2)),
        ("bad_log_prob", scored(log_prob=math.nan)),
        ("bad_message", scored(rnak=1)),
        ("bad_text", scored(critique="\ud800")),
        (
            "rank_count",
            SCORED | {"responses": [*scored(rank=1)["responses"], *SCORED["responses"]]},
        ),
        ("bad_json", SCORED | {"extra": "{"}),
        ("bad_label", {"prompt": "p", "completion": "c", "label": "maybe"}),
        ("bad_label", {"conversations": [human("p"), gpt("c")], "kto_tag": [1]}),
        ("empty_response", {"conversations": [human("p")], "kto_tag": True}),
        ("bad_message", {"conversations": "p"}),
        ("bad_message", {"conversations": ["p"]}),
        ("bad_message", {"conversations": [{"from": [], "value": "p"}]}),
        ("incomplete_pair", {"conversations": [human("p")], "chosen": gpt("c")}),
        ("placeholder_count", LLAMA_FACTORY[0] | {"images": ["a.png", "b.png"]}),
        ("placeholder_count", MS_SWIFT[0] | {"rejected_images": ["a.png", "b.png"]}),
        ("image_missing", MS_SWIFT[1] | {"rejected_images": ["gone.png"]}),
        ("bad_log_prob", RLAIF_V[0] | {"image": "a.png", "logps": "[1, 2]"}),
        ("bad_log_prob", RLAIF_V[0] | {"image": "a.png", "logps": "["}),
        ("bad_log_prob", RLAIF_V[0] | {"image": "a.png", "logps": [math.nan, 0, [], 0, 0, []]}),
        ("bad_json", RLHF_V[0] | {"image": "a.png", "text": "{"}),
        ("bad_json", RLHF_V[0] | {"image": "a.png", "text": "[]"}),
        ("incomplete_pair", RLHF_V[0] | {"image": "a.png", "text": '{"question": "q"}'}),
        ("bad_score", MM_RLHF_PAIRS[0] | {"ls_factor": 1.5}),
        ("bad_score", MM_RLHF_PAIRS[0] | {"ls_factor": math.nan}),
        ("bad_score", PAIR | {"margin": math.nan}),
        ("bad_score", PAIR | {"score_chosen": math.nan, "score_rejected": 1}),
        ("bad_label", MM_RLHF_PAIRS[0] | {"is_tie": "none"}),
        ("bad_image_entry", MM_RLHF_PAIRS[0] | {"image": {"base64": "?"}}),
    ],
)
def test_bad_rows(folder, reason, row):
    (folder / "empty").mkdir()
    skipped = skip_one(folder, row)
    assert (skipped.reason, skipped.row) == (reason, 1), skipped


JUNK = [
    None,
    True,
    -1,
    1e400,
    "",
    "x",
    "\ud800",
    [],
    [None],
    [[]],
    [1],
    ["a", "b", "c"],
    {},
    {"a": 1},
]


def spoiled(value):
    """Every value with one of its parts replaced by something that does not belong there."""
    yield from JUNK
    if isinstance(value, dict):
        for name in value:
            yield from ({**value, name: junk} for junk in spoiled(value[name]))
    if isinstance(value, list):
        for place in range(len(value)):
            yield from (
                [*value[:place], junk, *value[place + 1 :]] for junk in spoiled(value[place])
            )


def spoiled_rows(name):
    """Rows of a format with one thing wrong, or only otherwise, in each."""
    own = scored(
        rank=1,
        scores={"score": 1.0},
        spans=[{"start": 0, "end": 1}],
        images=["a.png"],
        prompt=[user()],
        finished=True,
    )
    published = [{**row, "image": "a.png"} for row in RLAIF_V + RLHF_V]
    rows = ROWS | {"rlaif_v": published[:1], "rlhf_v": published[1:], "record": [own]}
    return [row for original in rows[name] for row in spoiled(original)]


ALL = [*sorted(ROWS), "rlaif_v", "rlhf_v", "record"]


@pytest.mark.parametrize("name", ALL)
def test_no_row_breaks_reading(folder, name):
    path = write_jsonl(folder / "rows.jsonl", spoiled_rows(name))
    for format in ("auto", name):
        items = list(iter_records(path, format=format))
        assert len(items) == len(spoiled_rows(name))
        assert any(isinstance(item, Record) for item in items)


@pytest.mark.parametrize("name", ALL)
def test_what_a_format_takes_it_gives_back(folder, name):
    """Whatever it does not refuse; what means nothing to us may be written otherwise."""
    writer, media = Writer(str(folder), str(folder / "copies")), MediaFolder(folder)
    path = write_jsonl(folder / "rows.jsonl", spoiled_rows(name)[::3])
    records = [item for item in iter_records(path, format=name) if isinstance(item, Record)]
    taken = 0
    for record in records:
        for to in set(ALL):
            format = FORMATS[to]
            if fields_of(record) - format.holds:
                continue
            try:
                row = format.write(record, writer)
            except CannotHold:
                continue
            row = {k: v for k, v in json.loads(json.dumps(row)).items() if v is not None}
            back = finish(format.read(row, media, "last_turn"), record.id, record.row, media)
            assert comparable(back) == comparable(record), (to, row)
            taken += 1
    assert taken >= len(records)


def comparable(record):
    videos = tuple((video.fps, [frame.read() for frame in video.frames]) for video in record.videos)
    extra = {name: v for name, v in record.extra.items() if name != "logps"}
    join = STRIP["places"]  # texts that stand in pieces are written as one where tags are
    whole = record if any(turn.media for turn in turns_of(record)) else join(record)
    responses = whole.responses
    if whole.ranked:  # a chosen response is written before the rejected one
        responses = tuple(sorted(responses, key=lambda response: response.rank))
    kept = {"videos": videos, "extra": extra, "responses": responses}
    return dataclasses.replace(whole, **kept, own_id=None, left_out=())


def turns_of(record):
    return [*record.prompt, *(turn for r in record.responses for turn in r.turns)]


@pytest.mark.parametrize(
    ("format", "row", "field"),
    [
        ("trl", RANKED | {"final_ranking": [1, 1]}, "rank"),
        ("trl", MM_RLHF[0], "critique"),
        ("trl", MM_RLHF[0] | {"score_reasons": "x"}, "scores"),
        ("trl", MS_SWIFT[1], "response.images"),
        ("trl", MS_SWIFT[2], "response.prompt"),
        ("trl", RLAIF_V[0] | {"image": "a.png"}, "log_prob"),
        ("ms_swift", TRL[6], "finished,fps"),
        ("llama_factory", TRL[6], "finished,fps"),
        ("llama_factory", scored(spans=[{"start": 0, "end": 1}]), "spans"),
        ("rlaif_v", TRL[0] | {"videos": [["a.png"]]}, "videos"),
        ("rlaif_v", TRL[4], "system"),
        ("mm_rlhf", TRL[3], "desirable"),
        ("ms_swift", scored() | {"other_images": ["a.png"]}, "other_images"),
        (
            "mm_rlhf_pairs",
            SCORED
            | {"responses": [SCORED["responses"][0] | {"rank": rank} for rank in (1, 2)]}
            | {"other_images": ["a.png", "b.png"]},
            "other_images",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused(folder, format, row, field):
    source = write_jsonl(folder / "rows.jsonl", [{"id": "x"} | row])
    with pytest.raises(MmpoError, match=rf"row 1 \(id 'x.*'\) as {format}: {field}: .*--drop"):
        convert_data(str(source), str(folder / "out.jsonl"), format=format)
    assert not (folder / "out.jsonl").exists()


def test_shapes_that_a_format_cannot_hold_are_refused(folder):
    three = {"prompt": [user()], "responses": [{"turns": [assistant(c)], "rank": 1} for c in "abc"]}
    for format, row, field in (
        ("trl", three, "responses: 3 responses"),
        ("rlaif_v", TRL[0], "images: 0 of them"),
        ("rlaif_v", TRL[0] | {"image": "a.png", "prompt": DIALOGUE[:3]}, "prompt: 3 turns"),
        ("llama_factory", {"prompt": "p", "responses": ["a", "b"]}, "responses: 2"),
        ("ms_swift", {"prompt": "p", "responses": ["a", "b"]}, "responses: 2"),
        ("mm_rlhf_pairs", MM_RLHF[1], r"responses: 5 with the ranks .*; a row holds a pair"),
        ("mm_rlhf", TRL[0] | {"images": ["a.png", "b.png"]}, "images: a row holds one"),
        ("trl", TRL[0] | {"models_output": 1, "finished": True}, "bad_message"),
    ):
        source = write_jsonl(folder / "rows.jsonl", [row])
        with pytest.raises(MmpoError, match=field):
            convert_data(str(source), str(folder / "out.jsonl"), format=format)


def test_columns_that_would_mean_something_else(folder):
    rows = [TRL[0] | {"is_tie": True}]
    source = write_jsonl(folder / "rows.jsonl", rows)
    out = str(folder / "out.jsonl")
    convert_data(str(source), str(folder / "kept.jsonl"), read_as="trl")
    with pytest.raises(MmpoError, match="extra: with is_tie it would look like another format"):
        convert_data(str(folder / "kept.jsonl"), out, format="trl")
    convert_data(str(folder / "kept.jsonl"), out, format="trl", drop=["extra"])
    assert "is_tie" not in read_jsonl(folder / "out.jsonl")[0]


def test_dropped_fields(folder):
    source = write_jsonl(folder / "rows.jsonl", [{"id": "x"} | MM_RLHF[0]])
    convert_data(
        str(source), str(folder / "out.jsonl"), format="trl", drop=["rank", "scores", "critique"]
    )
    (row,) = read_jsonl(folder / "out.jsonl")
    assert row["responses"] == [[assistant("a")], [assistant("b")], [assistant("c")]]
    assert row["answer"] == "gold"
    with pytest.raises(MmpoError, match="--drop score: no such field; known: source"):
        convert_data(str(source), str(folder / "o.jsonl"), drop=["score"])
    with pytest.raises(MmpoError, match="is the source"):
        convert_data(str(source), str(source))


def test_bad_rows_of_a_conversion(folder):
    (folder / "bad.png").write_bytes(b"")
    rows = [TRL[0], {"prompt": ""}, TRL[0], TRL[0] | {"images": [{"base64": "eHh4"}]}]
    source = write_jsonl(folder / "rows.jsonl", rows)
    with pytest.raises(MmpoError, match="2 of 4 rows cannot be used"):
        convert_data(str(source), str(folder / "out.jsonl"))
    done = convert_data(str(source), str(folder / "out.jsonl"), max_skipped=0.5)
    assert (done.written, len(done.skipped)) == (2, 2)
    found = read_jsonl(folder / "out.rejected_rows.jsonl")
    assert [(row["row"], row["reason"]) for row in found] == [
        (2, "empty_prompt"),
        (4, "image_broken"),
    ]


def test_every_field_of_a_record_can_be_dropped_or_is_its_substance():
    of_reading = {"row", "own_id", "left_out", "plain_text"}
    names = {*STRIP, *of_reading, "id", "images", "prompt", "responses", "turns"}
    fields = set(Record.__dataclass_fields__) | set(Response.__dataclass_fields__)
    assert fields <= names


def test_which_response_is_at_fault(folder):
    skipped = skip_one(folder, RANKED | {"models_output": ["a", " "]})
    assert (skipped.reason, skipped.detail.partition(":")[0]) == ("empty_response", "response 2")
