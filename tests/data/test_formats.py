"""Rows written by each tool's conventions: what is read of them."""

import json
import math
import os
from pathlib import Path
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.format_rows import (
    ALL_SIX,
    LLAMA_FACTORY,
    MM_RLHF,
    MM_RLHF_PAIRS,
    MS_SWIFT,
    MULTIMODAL_REWARDBENCH,
    PROMPT,
    QUESTION,
    RLAIF_V,
    RLHF_V,
    ROWS,
    VL_REWARDBENCH,
    answers,
    assistant,
    png,
    read_jsonl,
    read_one,
    skip_one,
    user,
    write_jsonl,
)

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.data.formats import FORMATS, choose_format
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.readers import iter_records, read_records
from mmpo_jax.data.records import Turn
from mmpo_jax.data.rows import FormatName


@pytest.mark.parametrize("name", [*sorted(ROWS), "rlaif_v", "rlhf_v"])
def test_formats_are_told_apart(name):
    rows = ROWS | {"rlaif_v": RLAIF_V, "rlhf_v": RLHF_V}
    assert {choose_format(row).name for row in rows[name]} == {name}


def test_every_format_can_be_named():
    assert set(get_args(FormatName)) == {"auto", *FORMATS}


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


@pytest.mark.parametrize("own", [{}, {"rejected_images": ["b.png"]}])
def test_ms_swift_prompts_that_are_the_same_in_place(folder, own):
    """A bare part, a tag, and nothing said: the picture is before the text."""
    part = [{"type": "image"}, {"type": "text", "text": "1"}]
    for ours, theirs in ((part, "1"), ("1", part), ("<image>1", "1")):
        row = {"messages": [user(ours), assistant("a")], "images": ["a.png"], **own}
        record = read_one(folder, row | {"rejected_messages": [user(theirs), assistant("b")]})
        assert [response.prompt for response in record.responses] == [None, None]
        assert bool(record.responses[1].images) == bool(own)


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


def test_questions_about_images_are_not_of_rlhf_v(folder):
    """POPE's columns: `text` is a question there, and a JSON object in RLHF-V."""
    row = {
        "question_id": 1,
        "image": "a.png",
        "text": "Is there a dog in the image?",
        "label": "no",
    }
    assert skip_one(folder, row).reason == "no_prompt"


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
    assert [record.id for record in (pair, tie, mixed, video)] == ["p", "p (row 2)", "q", "v"]
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


def test_published_reward_benchmarks(folder):
    """Responses keep their order, ranks say which is better, and ids are told apart."""
    for rows, name in ((VL_REWARDBENCH, "a"), (MULTIMODAL_REWARDBENCH, "Math7")):
        rows = [{"id": "a"} | row if "ID" not in row else row for row in rows]
        records, skipped = read_records(write_jsonl(folder / "rows.jsonl", rows))
        assert skipped == []
        assert [record.id for record in records] == [name, f"{name} (row 2)"]
        for record in records:
            assert [response.text for response in record.responses] == ["A dog.", "A cat."]
            assert record.images[0].read() == png() and record.prompt == PROMPT
    assert [[r.rank for r in record.responses] for record in records] == [[1, 2], [2, 1]]
    for row, reason in (
        (VL_REWARDBENCH[0] | {"human_ranking": [0, 0]}, "bad_rank"),
        (VL_REWARDBENCH[0] | {"response": ["a"]}, "incomplete_pair"),
        (MULTIMODAL_REWARDBENCH[0] | {"Better": "A"}, "bad_rank"),
    ):
        ((), (skip,)) = read_records(write_jsonl(folder / "rows.jsonl", [row]))
        assert skip.reason == reason


def test_a_format_that_is_given_is_used(folder):
    row = {"id": "p", "prompt": QUESTION, "chosen": "a", "rejected": "b"}
    path = write_jsonl(folder / "rows.jsonl", [row, row | {"rejected": "c"}])
    for name, claimed in (("auto", "trl"), ("mm_rlhf_pairs", "mm_rlhf_pairs")):
        notes = Notes()
        assert len(read_records(path, format=name, notes=notes)[0]) == 2
        assert notes.formats == {claimed: 2}
    for name in FORMATS:  # And no format breaks on the columns of another.
        assert all(iter_records(path, format=name))


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
        assert record.id.partition(" (row ")[0] == row["id"]
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
