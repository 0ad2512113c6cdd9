"""Rows written by each tool's conventions: what is read, and that converting keeps every field."""

import dataclasses
import io
import json
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmpo_jax.data.conversion import convert_data
from mmpo_jax.data.formats import FORMATS, choose_format
from mmpo_jax.data.formats.format import finish
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.writing import STRIP, CannotHold, Writer, fields_of
from mmpo_jax.data.readers import iter_records, read_records
from mmpo_jax.data.records import ImageRef, Record, Response, Span, Turn, VideoRef
from mmpo_jax.errors import MmpoError


def png(color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(buffer, "png")
    return buffer.getvalue()


QUESTION = "What is this?"
PROMPT = (Turn("user", QUESTION),)
ALL_SIX = [-3.5, -0.7, [-1.0, -2.5], -9.0, -1.8, [-4.0, -5.0]]


def user(content=QUESTION):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def human(value):
    return {"from": "human", "value": value}


def gpt(value):
    return {"from": "gpt", "value": value}


def answers(*texts, **fields):
    """Responses with the values at their places in each list."""
    return tuple(
        Response((Turn("assistant", text),), **{name: values[i] for name, values in fields.items()})
        for i, text in enumerate(texts)
    )


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png", "short/c.png", "video/clip/f2.png", "video/clip/f10.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png("red" if name == "a.png" else "blue"))
    return tmp_path


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_jsonl(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_one(folder, row, **options) -> Record:
    (item,) = iter_records(write_jsonl(folder / "one.jsonl", [row]), **options)
    assert isinstance(item, Record), item
    return item


def skip_one(folder, row):
    records, skipped = read_records(write_jsonl(folder / "one.jsonl", [row]))
    assert records == []
    return skipped[0]


DIALOGUE = [user("1"), assistant("2"), user("3"), assistant("4")]
TRL = [
    {"prompt": [user()], "chosen": [assistant("a")], "rejected": [assistant("b")]},
    {
        "prompt": [user()],
        "chosen": [assistant("a")],
        "rejected": [assistant("b")],
        "score_chosen": 3.5,
        "score_rejected": 1.0,
        "margin": 2.5,
    },
    {"images": ["a.png", "b.png"], "prompt": [user()], "source": "mine", "category": {"n": 1}},
    {"images": ["a.png"], "prompt": [user()], "completion": [assistant("a")], "label": False},
    {"prompt": [{"role": "system", "content": "s"}, user()], "completion": [assistant("a")]},
    {"messages": DIALOGUE},
    {
        "videos": [{"frames": ["a.png", "b.png"], "fps": 2.0}],
        "prompt": DIALOGUE[:3],
        "responses": [[assistant("a")], [assistant("b")]],
        "finished": [True, False],
    },
]
LLAMA_FACTORY = [
    {
        "conversations": [human("<image>" + QUESTION)],
        "chosen": gpt("a"),
        "rejected": gpt("b"),
        "images": ["a.png"],
    },
    {
        "conversations": [human("<image><image>1"), gpt("2"), human("3")],
        "system": "Be brief.",
        "chosen": gpt("a"),
        "rejected": gpt("b"),
        "images": ["a.png", "b.png"],
        "tools": "",
    },
    {"conversations": [human("1"), gpt("2"), human("3"), gpt("4")], "kto_tag": True},
    {"conversations": [human("1"), gpt("2"), human("3"), gpt("4")]},
    {"conversations": [human("<video>1"), gpt("2")], "videos": [["a.png", "b.png"]]},
    {"conversations": [human("1")]},
]
MS_SWIFT = [
    {
        "messages": [user("<image>" + QUESTION), assistant("a")],
        "images": ["a.png"],
        "rejected_response": "b",
    },
    {
        "messages": [user("<image>" + QUESTION), assistant("a")],
        "images": ["a.png"],
        "rejected_images": ["b.png"],
        "rejected_response": "a",
    },
    {
        "messages": [user("<image>1"), assistant("a")],
        "images": ["a.png"],
        "rejected_messages": [user("<image>2"), assistant("b")],
    },
    {"messages": DIALOGUE, "label": False, "channel": "x"},
    {"messages": DIALOGUE, "rejected_response": "5"},
]
MM_RLHF = [
    {
        "image": "short/c.png",
        "question": QUESTION,
        "answer": "gold",
        "models_output": ["a", "b", "c"],
        "helpfulness": [1.0, None, 3.0],
        "faithfulness": [None, None, 0.0],
        "final_ranking": [2, 1, 2],
        "score_reasons": ["so", None, "so so"],
        "ranking_reason": "why",
    },
    {
        "video": "video/clip",
        "question": QUESTION,
        "models_output": ["a", "b", "c", "d", "e"],
        "final_ranking": [5, 4, 3, 2, 1],
        "score_reasons": "one text for all",
    },
]
MM_RLHF_PAIRS = [
    {
        "id": "p",
        "image": "short/c.png",
        "prompt": QUESTION,
        "chosen": "a",
        "rejected": "b",
        "chosen_reason": "right",
        "rejected_reason": "wrong",
    },
    {
        "id": "p",
        "image": "short/c.png",
        "prompt": QUESTION,
        "chosen": "a",
        "rejected": "c",
        "chosen_reason": "right",
        "is_tie": True,
        "ls_factor": 1.0,
        "reference_chosen_logp": -1.5,
        "reference_rejected_logp": -2.5,
        "mix_reference_rejected_logp": -4.5,
    },
    {
        "id": "q",
        "image": "short/c.png",
        "prompt": QUESTION,
        "chosen": "a",
        "rejected": "b",
        "mixed_up_image": "b.png",
        "mix_reference_chosen_logp": -3.5,
    },
    {
        "id": "v",
        "video": "video/clip",
        "prompt": "x",
        "chosen": "a",
        "rejected": "b",
        "is_tie": True,
    },
]
RLAIF_V = [
    {
        "ds_name": "RLAIF-V",
        "image": {"bytes": png(), "path": "000.jpg"},
        "question": QUESTION,
        "chosen": "a",
        "rejected": "b",
        "origin_dataset": "COCO",
        "origin_split": '{"model": "llava15_7b", "type": "question answering"}',
        "idx": "0",
        "image_path": "000.jpg",
        "logps": json.dumps({"logps": ALL_SIX}),
    }
]
RLHF_V = [
    {
        "ds_name": "RLHF-V",
        "image": {"bytes": png(), "path": "000.jpg"},
        "text": json.dumps(
            {"question": QUESTION, "chosen": "a", "rejected": "b", "logps": ALL_SIX}
        ),
        "origin_dataset": "VQAv2",
        "origin_split": "{}",
        "idx": 7,
        "image_path": "000.jpg",
    }
]
ROWS = {
    "trl": TRL,
    "llama_factory": LLAMA_FACTORY,
    "ms_swift": MS_SWIFT,
    "mm_rlhf": MM_RLHF,
    "mm_rlhf_pairs": MM_RLHF_PAIRS,
}


@pytest.mark.parametrize("via", ["record.jsonl", "record.array_record", "record.parquet"])
@pytest.mark.parametrize("name", sorted(ROWS))
def test_conversion_to_records_and_back_keeps_every_field(folder, name, via):
    rows = [{"id": f"row-{n}"} | row for n, row in enumerate(ROWS[name])]
    if via != "record.jsonl":  # Files that hold images keep no folder of frames.
        rows = [row for row in rows if "video" not in row]
    source = write_jsonl(folder / "rows.jsonl", rows)
    assert convert_data(str(source), str(folder / via)).written == len(rows)
    back = folder / "back.jsonl"
    done = convert_data(str(folder / via), str(back), format=name)
    assert (done.written, done.skipped) == (len(rows), [])
    written = [unnamed(row, folder) for row in read_jsonl(back)]
    assert written == [unnamed(row, folder) for row in rows]


def unnamed(value, folder):
    """A row with what its image files hold in place of their names."""
    if isinstance(value, dict):
        return {name: unnamed(entry, folder) for name, entry in value.items()}
    if isinstance(value, list):
        return [unnamed(entry, folder) for entry in value]
    if isinstance(value, str) and value.endswith(".png"):
        return (folder / value).read_bytes()
    return value


@pytest.mark.parametrize(("name", "rows"), [("rlaif_v", RLAIF_V), ("rlhf_v", RLHF_V)])
@pytest.mark.parametrize("via", ["record.jsonl", "record.array_record", "record.parquet"])
def test_published_parquet_to_records_and_back(folder, name, rows, via):
    source = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), source)
    convert_data(str(source), str(folder / via))
    convert_data(str(folder / via), str(folder / "back.parquet"), format=name)
    (row,) = pq.read_table(folder / "back.parquet").to_pylist()
    (original,) = pq.read_table(source).to_pylist()
    if via == "record.jsonl":  # Images are files there, named by content.
        row["image"].pop("path")
        original["image"].pop("path")
    assert row == original


@pytest.mark.parametrize("name", [*sorted(ROWS), "rlaif_v", "rlhf_v"])
def test_formats_are_told_apart(name):
    rows = ROWS | {"rlaif_v": RLAIF_V, "rlhf_v": RLHF_V}
    assert {choose_format(row).name for row in rows[name]} == {name}


def test_everything_a_record_holds_survives_our_own_format(folder):
    image = ImageRef("a.png", path=folder / "a.png")
    other = ImageRef("b.png", path=folder / "b.png")
    record = Record(
        id="x",
        images=(image,),
        prompt=PROMPT,
        responses=(
            Response(
                (Turn("assistant", "two red cats"),),
                finished=False,
                rank=1,
                scores={"helpfulness": 0.1, "faithfulness": 3.0},
                critique="Fine.",
                spans=(Span(0, 3, weight=5.0), Span(4, 7, phrase=2)),
                desirable=True,
                log_prob=-1 / 3,
            ),
            Response.of("a dog", rank=1),
            Response(
                (Turn("assistant", "a"), Turn("user", "b"), Turn("assistant", "c")),
                rank=2,
                images=(other, image),
                prompt=(Turn("user", "Another?"),),
            ),
        ),
        videos=(VideoRef("video 1 (from a.png on)", (image, other), 0.5),),
        other_images=(other,),
        source="made up",
        row=1,
        extra={"more": [1, None, "x"]},
    )
    row = FORMATS["record"].write(record, Writer(str(folder), str(folder / "copies")))
    assert read_one(folder, row) == record
    assert not (folder / "copies").exists()


def test_llama_factory(folder):
    record = read_one(folder, LLAMA_FACTORY[1])
    assert record.prompt == (
        Turn("system", "Be brief."),
        Turn("user", "1"),
        Turn("assistant", "2"),
        Turn("user", "3"),
    )
    assert record.responses == answers("a", "b", rank=[1, 2])
    assert [image.name for image in record.images] == ["a.png", "b.png"]
    assert read_one(folder, LLAMA_FACTORY[2]).responses == answers("4", desirable=[True])
    supervised = read_one(folder, LLAMA_FACTORY[3])
    assert (len(supervised.prompt), supervised.responses) == (3, answers("4"))
    whole = read_one(folder, LLAMA_FACTORY[3], messages_as="dialogue")
    assert (whole.prompt, len(whole.responses[0].turns)) == ((), 4)


def test_ms_swift_images_of_the_rejected_side(folder):
    record = read_one(folder, {k: v for k, v in MS_SWIFT[1].items() if k != "rejected_response"})
    chosen, rejected = record.responses
    assert (chosen.text, chosen.images, rejected.text) == ("a", None, "a")
    assert [image.path for image in record.images] == [folder / "a.png"]
    assert [image.path for image in rejected.images or ()] == [folder / "b.png"]
    assert record.ranked


def test_ms_swift_rejected_dialogue(folder):
    assert read_one(folder, MS_SWIFT[2]).responses[1].prompt == (Turn("user", "2"),)
    same = MS_SWIFT[2] | {"rejected_messages": [user("<image>1"), assistant("b")]}
    assert read_one(folder, same).responses == answers("a", "b", rank=[1, 2])


def test_scores_of_a_pair(folder):
    """As Uni-DPO's MM-RLHF has them, or only their difference, as TRL's reward trainer reads it."""
    row = {"prompt": QUESTION, "chosen": "a", "rejected": "b"}

    def scores(**more):
        return [r.scores for r in read_one(folder, row | more).responses]

    both = {"score_chosen": 3, "score_rejected": 1}
    for columns in (both, both | {"margin": 9}, both | {"chosen_reason": "x", "ls_factor": 0.5}):
        assert scores(**columns) == [{"score": 3.0}, {"score": 1.0}]
    assert scores(margin=2) == [{"score": 2.0}, {"score": 0.0}]
    assert scores() == [{}, {}]
    assert skip_one(folder, row | {"score_chosen": 3}).reason == "score_count"
    assert skip_one(folder, row | both | {"score_rejected": "x"}).reason == "bad_score"


def test_kto(folder):
    row = {"prompt": QUESTION, "completion": " a", "label": True}
    assert read_one(folder, row).responses == answers(" a", desirable=[True])


def test_rlaif_v_and_rlhf_v_are_one_record(folder):
    found = []
    for name, rows in (("rlaif_v", RLAIF_V), ("rlhf_v", RLHF_V)):
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
        (record,), skipped = read_records(folder / f"{name}.parquet")
        assert (skipped, record.source) == ([], rows[0]["ds_name"])
        found.append((record.prompt, record.images, record.responses))
    assert found[0] == found[1]
    assert found[0][0] == PROMPT
    assert found[0][2] == answers("a", "b", rank=[1, 2], log_prob=[-3.5, -9.0])


@pytest.mark.parametrize("logps", [ALL_SIX, json.dumps(ALL_SIX), {"logps": ALL_SIX}])
def test_forms_of_the_list_of_six(folder, logps):
    row = RLAIF_V[0] | {"image": "a.png", "logps": logps}
    record = read_one(folder, row)
    assert [response.log_prob for response in record.responses] == [-3.5, -9.0]


def test_sums_alone_are_written_as_a_list_of_six(folder):
    row = {
        "image": "a.png",
        "prompt": [user()],
        "responses": [
            {"turns": [assistant("b")], "rank": 2, "log_prob": -9.0},
            {"turns": [assistant("a")], "rank": 1, "log_prob": -3.5},
        ],
    }
    source = write_jsonl(folder / "rows.jsonl", [row])
    convert_data(str(source), str(folder / "out.parquet"), format="rlaif_v")
    (written,) = pq.read_table(folder / "out.parquet").to_pylist()
    assert (written["chosen"], written["rejected"]) == ("a", "b")
    assert json.loads(written["logps"]) == {"logps": [-3.5, None, [], -9.0, None, []]}


def test_mm_rlhf(folder):
    record = read_one(folder, MM_RLHF[0])
    assert record.prompt == PROMPT
    assert record.responses == answers(
        "a",
        "b",
        "c",
        rank=[2, 1, 2],
        scores=[{"helpfulness": 1.0}, {}, {"helpfulness": 3.0, "faithfulness": 0.0}],
        critique=["so", None, "so so"],
    )
    assert record.extra == {"answer": "gold", "ranking_reason": "why"}


def test_mm_rlhf_video_is_a_folder_of_frames_in_order(folder):
    (clip,) = read_one(folder, MM_RLHF[1]).videos
    assert [os.path.basename(frame.path) for frame in clip.frames] == ["f2.png", "f10.png"]


@pytest.mark.parametrize("top", ["mm/rlhf", "short"])
def test_mm_rlhf_archives_with_folders_on_top(tmp_path, top):
    """As unpacked with another folder around it, or without the folder that rows name."""
    image, clip = f"{top}/short/c.png", f"{top}/video/clip/1.png"
    if top == "short":
        image, clip = "c.png", "clip/1.png"
    for name in (image, clip):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    assert read_one(tmp_path, MM_RLHF[0]).images[0].path == tmp_path / image
    assert read_one(tmp_path, MM_RLHF[1]).videos[0].frames[0].path == tmp_path / clip


def test_mm_rlhf_pairs(folder):
    path = write_jsonl(folder / "rows.jsonl", MM_RLHF_PAIRS)
    (pair, tie, mixed, video), skipped = read_records(path)
    assert skipped == []
    assert [record.id for record in (pair, tie, mixed, video)] == ["p/1", "p/2", "q/1", "v/1"]
    assert pair.responses == answers("a", "b", rank=[1, 2], critique=["right", "wrong"])
    assert [response.rank for response in tie.responses] == [1, 1]
    assert [response.log_prob for response in tie.responses] == [-1.5, -2.5]
    assert not any(response.scores for response in tie.responses)
    assert mixed.responses == answers("a", "b", rank=[1, 2])
    assert [image.path for image in mixed.other_images] == [folder / "b.png"]
    assert read_one(folder, MM_RLHF_PAIRS[2]).extra["mix_reference_chosen_logp"] == -3.5
    assert len(video.videos[0].frames) == 2


@pytest.mark.parametrize("difference", [0.0, 0.5, 4.0, -1.0])
def test_mm_rlhf_factor_is_of_the_score_difference(folder, difference):
    """ls_factor = 1 - exp(-difference / 2)."""
    factor = 1 - math.exp(-difference / 2)
    row = MM_RLHF_PAIRS[0] | {"ls_factor": factor}
    chosen, rejected = read_one(folder, row).responses
    found = chosen.scores["score"] - rejected.scores["score"]
    assert found == pytest.approx(difference, abs=1e-12)
    source = write_jsonl(folder / "rows.jsonl", [row])
    convert_data(str(source), str(folder / "back.jsonl"), format="mm_rlhf_pairs")
    (back,) = read_jsonl(folder / "back.jsonl")
    assert back.pop("ls_factor") == pytest.approx(factor, abs=1e-12)
    assert back == MM_RLHF_PAIRS[0]


RANKED = {"question": QUESTION, "models_output": ["a", "b"], "final_ranking": [1, 2]}
SCORED = {"prompt": [user()], "responses": [{"turns": [assistant("abc")]}]}


def scored(**fields):
    return SCORED | {"responses": [SCORED["responses"][0] | fields]}


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
        ("bad_label", scored(desirable=1)),
        ("bad_log_prob", scored(log_prob=math.nan)),
        ("bad_message", scored(rnak=1)),
        ("bad_text", scored(critique="\ud800")),
        (
            "rank_count",
            SCORED | {"responses": [*scored(rank=1)["responses"], *SCORED["responses"]]},
        ),
        ("bad_json", SCORED | {"extra": "{"}),
        ("bad_label", {"prompt": "p", "completion": "c", "label": "yes"}),
        ("bad_label", {"conversations": [human("p"), gpt("c")], "kto_tag": 1}),
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
        ("bad_label", MM_RLHF_PAIRS[0] | {"is_tie": "no"}),
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
            back = finish(format.read(row, media, "last_turn"), record.id, record.row)
            assert comparable(back) == comparable(record), (to, row)
            taken += 1
    assert taken >= len(records)


def comparable(record):
    videos = tuple((video.fps, [frame.read() for frame in video.frames]) for video in record.videos)
    extra = {name: v for name, v in record.extra.items() if name not in ("id", "logps")}
    return dataclasses.replace(record, videos=videos, extra=extra)


def test_a_format_that_is_given_is_used(folder):
    row = {"id": "p", "prompt": QUESTION, "chosen": "a", "rejected": "b"}
    path = write_jsonl(folder / "rows.jsonl", [row, row | {"rejected": "c"}])
    assert [skipped.reason for skipped in read_records(path)[1]] == ["duplicate_id"]
    assert len(read_records(path, format="mm_rlhf_pairs")[0]) == 2
    for name in FORMATS:  # And no format breaks on the columns of another.
        assert all(iter_records(path, format=name))


@pytest.mark.parametrize(
    ("format", "row", "field"),
    [
        ("trl", RANKED | {"final_ranking": [1, 1]}, "rank"),
        ("trl", MM_RLHF[0], "critique"),
        ("trl", MM_RLHF[0] | {"score_reasons": "x"}, "scores"),
        ("trl", MS_SWIFT[1], "response.images"),
        ("trl", MS_SWIFT[2], "response.prompt"),
        ("trl", RLAIF_V[0] | {"image": "a.png"}, "log_prob"),
        ("ms_swift", TRL[6], "finished"),
        ("llama_factory", TRL[6], "finished"),
        ("llama_factory", scored(spans=[{"start": 0, "end": 1}]), "spans"),
        ("rlaif_v", TRL[0] | {"videos": [["a.png"]]}, "videos"),
        ("rlaif_v", TRL[4], "system"),
        ("mm_rlhf", TRL[3], "desirable"),
        ("mm_rlhf_pairs", MM_RLHF[1], "rank"),
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


def test_images_go_where_readers_may_follow(folder, tmp_path_factory):
    """Files beside the target are named, others copied; a text says nothing of either."""
    out = tmp_path_factory.mktemp("out")
    rows = [{"images": ["a.png", "b.png"]} | TRL[0], {"image": "a.png"} | TRL[0]]
    source = write_jsonl(folder / "rows.jsonl", rows)
    convert_data(str(source), str(out / "far.jsonl"), format="trl")
    (first, second), skipped = read_records(out / "far.jsonl")
    assert skipped == []
    assert [image.read() for image in first.images] == [png(), png("blue")]
    assert len(os.listdir(out / "far.images")) == 2
    assert second.images[0].path == first.images[0].path
    convert_data(str(source), str(out / "near.jsonl"), format="trl", image_root=str(folder))
    assert read_jsonl(out / "near.jsonl")[0]["images"] == ["a.png", "b.png"]


def test_frames_from_anywhere_make_a_folder(folder):
    rows = [TRL[0] | {"id": "x", "videos": [["b.png", "a.png"]]}]
    source = write_jsonl(folder / "rows.jsonl", rows)
    convert_data(str(source), str(folder / "out.jsonl"), format="mm_rlhf")
    (record,), _ = read_records(folder / "out.jsonl")
    assert [frame.read() for frame in record.videos[0].frames] == [png("blue"), png()]


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
    names = {*STRIP, "id", "images", "prompt", "responses", "row", "turns"}
    fields = set(Record.__dataclass_fields__) | set(Response.__dataclass_fields__)
    assert fields <= names


@pytest.mark.skipif(
    "MMPO_MM_REWARD_BENCH" not in os.environ,
    reason="MMPO_MM_REWARD_BENCH does not name MM-RLHF's mm_reward_bench.jsonl",
)
def test_the_published_reward_bench(tmp_path):
    """170 pairs over 46 prompts; the media are no part of it and made here."""
    rows = read_jsonl(Path(os.environ["MMPO_MM_REWARD_BENCH"]))
    for row in rows:
        name = row["image"] if "image" in row else f"{row['video']}/1.png"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(png())
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    records, skipped = read_records(path)
    assert (len(records), skipped) == (170, [])
    assert len({(record.prompt, record.images, record.videos) for record in records}) == 46
    for record, row in zip(records, rows, strict=True):
        assert record.id.rsplit("/", 1)[0] == row["id"]
        assert record.responses == answers(
            row["chosen"],
            row["rejected"],
            rank=[1, 2],
            critique=[row["chosen_reason"], row["rejected_reason"]],
        )
    convert_data(str(path), str(tmp_path / "record.jsonl"))
    back = tmp_path / "back.jsonl"
    convert_data(str(tmp_path / "record.jsonl"), str(back), format="mm_rlhf_pairs")
    assert read_jsonl(back) == rows
