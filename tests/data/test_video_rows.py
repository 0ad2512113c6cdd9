"""Rows that name video files, through every layer up to pixels."""

import base64
import copy
import dataclasses
import json

import numpy as np
import pytest

pytest.importorskip("av")
from helpers import clips, pictures
from helpers.format_rows import QUESTION, write_jsonl

import mmpo_jax
from mmpo_jax import cli
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.media_check import media_problem
from mmpo_jax.data.media_pixels import clip_of
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import ImageRef, Record, Response, Turn, VideoRef
from mmpo_jax.data.row_tables import decode_row, encode_rows, table_bytes
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.data.videos import read_frames, video_facts

CLIP = clips.encode(24, 8, (56, 84))
FAMILIES = (
    *("llava_onevision", "internvl", "smolvlm", "qwen2_5_vl", "qwen3_vl"),
    *("gemma4", "gemma4_unified"),
)
CHOOSE = ("qwen3_vl", "gemma4", "gemma4_unified")
"""Families whose files say how many frames are chosen, or that do so by default."""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(CLIP)
    (tmp_path / "b.webm").write_bytes(clips.encode(6, 3, kind="webm"))
    return tmp_path


NAMED = "clips/a.mp4"
URL = "data:video/mp4;base64," + base64.b64encode(CLIP).decode()


@pytest.mark.parametrize(
    "row",
    [
        {"video": NAMED},
        {"video": [NAMED]},
        {"videos": [NAMED]},
        {"videos": [[NAMED]]},
        {"videos": [{"video": NAMED}]},
        {"videos": [{"path": NAMED}]},
        {"videos": [{"frames": NAMED}]},
        {"video": {"path": NAMED, "bytes": None}},
        {"video": {"bytes": CLIP, "path": "a.mp4"}},
        {"video": {"base64": base64.b64encode(CLIP).decode()}},
        {"video": CLIP},
        {"video": URL},
    ],
    ids=lambda row: str(row)[:40],
)
def test_every_spelling(folder, row):
    (video,) = MediaFolder(folder).videos(row)
    assert video.file.read() == CLIP and video.frames == () and video.fps is None
    assert video_facts(video).frames == 24


def test_rates_and_several(folder):
    media = MediaFolder(folder)
    row = {"videos": [{"video": NAMED, "fps": 2}, "b.webm"]}
    first, second = media.videos(row)
    assert (first.fps, second.fps) == (2, None)
    assert [video_facts(video).frames for video in (first, second)] == [24, 6]
    assert [len(media.videos({"video": [NAMED, "b.webm"]}))] == [2]
    part = media.part({"type": "video", "video": NAMED, "fps": 1})
    assert part.fps == 1 and part.file.read() == CLIP


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("gone.mp4", "image_missing"),
        ("../up.mp4", "image_outside_folder"),
        ("https://example.org/a.mp4", "image_url"),
        ({"video": NAMED, "fps": 0}, "bad_video_entry"),
        ("clip.avi", "bad_video_entry"),
    ],
)
def test_entries_that_cannot_be_used(folder, entry, reason):
    with pytest.raises(UnusableRow) as caught:
        MediaFolder(folder).video(entry)
    assert caught.value.reason == reason


PAIR = {"chosen": "A ball.", "rejected": "A cube."}
MESSAGES = [{"role": "user", "content": "<video>" + QUESTION}]
ROWS = {
    "record": {"prompt": QUESTION, "responses": ["A ball."], "videos": [NAMED]},
    "trl": {"prompt": QUESTION, **PAIR, "videos": [NAMED]},
    "ms_swift": {
        "messages": [*MESSAGES, {"role": "assistant", "content": "A ball."}],
        "rejected_response": "A cube.",
        "videos": [NAMED],
    },
    "llama_factory": {
        "conversations": [{"from": "human", "value": "<video>" + QUESTION}],
        "chosen": {"from": "gpt", "value": "A ball."},
        "rejected": {"from": "gpt", "value": "A cube."},
        "videos": [NAMED],
    },
    "alpaca": {"instruction": "<video>" + QUESTION, **PAIR, "videos": [NAMED]},
    "rlaif_v": {"question": QUESTION, **PAIR, "video": NAMED},
    "mm_rlhf": {"question": QUESTION, **PAIR, "video": NAMED},
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format(folder, name):
    file = folder / "rows.jsonl"
    write_jsonl(file, [ROWS[name]])
    (record,), skipped = read_records(file)
    assert not skipped
    (video,) = record.videos
    assert video.file.read() == CLIP


def test_written_rows_read_again(folder, tmp_path):
    there = VideoRef("a", fps=2.0, file=ImageRef("a", path=folder / NAMED))
    held = VideoRef("held", file=ImageRef("held", CLIP[:-1] + b"\0"))
    for embed in ("no", "bytes", "base64"):
        writer = Writer(str(folder), str(folder / "copies"), embed)
        row = writer.media(Record("0", (), (Turn("user", "?"),), (), (there, held)))
        if embed == "no":
            assert json.loads(json.dumps(row))["videos"][0] == {"video": NAMED, "fps": 2.0}
            assert row["videos"][1].startswith("copies/") and row["videos"][1].endswith(".mp4")
        again = MediaFolder(folder).videos(row)
        assert [video.fingerprint() for video in again] == [
            video.fingerprint() for video in (there, held)
        ]


def of_frames(video, chosen):
    """The same video as the list of the frames that are chosen."""
    frames = read_frames(video.file, chosen)
    refs = [ImageRef(f"{i}", pictures.encode(frame)) for i, frame in enumerate(frames)]
    facts = video_facts(video)
    return VideoRef("frames", tuple(refs), len(chosen) / facts.frames * facts.rate)


@pytest.mark.parametrize("fps", [None, 2.0])
@pytest.mark.parametrize("name", FAMILIES)
def test_pixels_and_tokens_are_those_of_the_frames(family_case, name, fps):
    processor = family_case(name).processor
    video = VideoRef("clip", fps=fps, file=ImageRef("clip.mp4", CLIP))
    _, chosen = clip_of(processor.videos, processor.video_settings, video)
    if fps is None and name not in CHOOSE:
        assert list(chosen) == list(range(24))
    else:
        assert len(chosen) == 6
    frames = of_frames(video, chosen)
    np.testing.assert_array_equal(
        processor.pixels((), [video])[0], processor.pixels((), [frames])[0]
    )
    (ours,), (expected,) = processor.layouts((), [video]), processor.layouts((), [frames])
    if name == "qwen3_vl":  # says when frames are, by their numbers in the file
        seconds = np.asarray(chosen) / 8
        assert ours.times == tuple((seconds[::2] + seconds[1::2]) / 2)
    else:
        np.testing.assert_array_equal(ours.ids, expected.ids)
    np.testing.assert_array_equal(ours.steps, expected.steps)


@pytest.mark.parametrize("path", [True, False])
def test_rows_in_tables(family_case, folder, path):
    processor = family_case("qwen3_vl").processor
    file = ImageRef("a", path=folder / NAMED) if path else ImageRef("a", CLIP)
    given = VideoRef("a", fps=2.0, file=file)
    record = Record("0", (), (Turn("user", "what is this ?"),), (Response.of("a ring"),), (given,))
    row = tokenize(record, processor, 2**20, 2**20)
    table = encode_rows([row], [{}], [])
    (folder / "rows.arrow").write_bytes(table_bytes(table))
    again = decode_row(table, 0, str(folder / "rows.arrow"), "", processor)
    (video,) = again.videos
    assert video.file.read() == CLIP and (video.fps, video.facts) == (2.0, video_facts(given))
    assert (video.file.path is None) == (not path)
    np.testing.assert_array_equal(again.layouts[0].ids, row.layouts[0].ids)


def test_a_short_clip_is_sound(family_case):
    """A model that is shown more frames than it has cannot take it, and no byte of it is wrong."""
    processor = copy.copy(family_case("llava_onevision").processor)
    processor.video_settings = {**processor.video_settings, "num_frames": 8}
    video = VideoRef("short.mp4", file=ImageRef("short.mp4", clips.encode(5, 8)))
    record = Record("0", (), (Turn("user", "what ?"),), (Response.of("a ring"),), (video,))
    assert media_problem(record) is None
    with pytest.raises(UnusableRow, match="8 frames are to be shown of a video of 5") as caught:
        tokenize(record, processor, 2**20, 2**20)
    assert caught.value.reason == "video_length"
    cut = VideoRef("cut.mp4", file=ImageRef("cut.mp4", CLIP[:300]))
    with pytest.raises(UnusableRow, match="damaged") as caught:
        tokenize(dataclasses.replace(record, videos=(cut,)), processor, 2**20, 2**20)
    assert caught.value.reason == "image_broken"


def test_all_formats_that_hold_videos_are_tried():
    assert set(ROWS) <= set(FORMATS)


def test_the_check_tells_sizes_of_frames(folder, capsys):
    rows = [
        {"prompt": QUESTION, "chosen": "a", "rejected": "b", "video": name}
        for name in (NAMED, "b.webm")
    ]
    path = write_jsonl(folder / "rows.jsonl", rows)
    assert cli.main(["data", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "images: none" in said
    assert "videos: 2 of 2 sizes, 64 x 48 to 84 x 56" in said
    assert "  frames: 6 to 24\n  frames a second: 3 to 8" in said


def test_the_check_says_where_all_rows_of_a_reason_are(folder, capsys):
    rows = [{"prompt": QUESTION, "chosen": "a", "rejected": "b", "video": "gone.mp4"}] * 6
    assert cli.main(["data", "check", str(write_jsonl(folder / "rows.jsonl", rows))]) == 0
    assert "    and 3 more: rows 4, 5, 6\n" in capsys.readouterr().out


def test_records_of_the_library_have_videos(folder):
    frame = pictures.noise("RGB", 4, 6)
    made = mmpo_jax.record("?", videos=[folder / NAMED, CLIP, [frame, frame]], responses=["a"])
    named, held, frames = made.videos
    assert video_facts(named) == video_facts(held) and len(frames.frames) == 2
    for given in (CLIP, [3], [[]]):
        with pytest.raises(DataError, match="video"):
            mmpo_jax.record("?", videos=given)
