"""Keys of entries for images and videos beside which ones they are: read, refused or counted."""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("av")
from helpers import clips
from helpers.format_rows import PAIR, QUESTION, png, read_one, user, write_jsonl

from mmpo_jax import cli
from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.media_check import media_problem, with_known_images
from mmpo_jax.data.media_pixels import clip_of
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.pixel_cache import pixel_key
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import ImageRef, Record, Turn, VideoFacts, VideoRef
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.videos import read_frames, shown_range, spread_frames

CLIP = clips.encode(24, 8, (56, 84))
"""Three seconds."""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "a.mp4").write_bytes(CLIP)
    (tmp_path / "b.mp4").write_bytes(clips.encode(16, 8))
    (tmp_path / "1.png").write_bytes(png("red"))
    return tmp_path


CUT = {"video_start": 1.0, "video_end": 2.0}


@pytest.mark.parametrize(
    "entry",
    [
        {"video": "a.mp4", **CUT},
        {"path": "a.mp4", **CUT},
        {"frames": "a.mp4", **CUT, "fps": None},
        {"video": {"path": "a.mp4", **CUT}},
        {"video": {"path": "a.mp4"}, **CUT},
        {"bytes": CLIP, "path": "a.mp4", **CUT},
        {"type": "video", "video": "a.mp4", **CUT},
        {"type": "video_url", "video_url": {"url": "a.mp4", **CUT}},
        {"type": "video_url", "video_url": {"url": "a.mp4"}, **CUT},
    ],
    ids=str,
)
def test_seconds_of_every_spelling(folder, entry):
    media = MediaFolder(folder)
    video = media.part(entry) if "type" in entry else media.video(entry)
    assert video.seconds == (1.0, 2.0) and video.file.read() == CLIP
    assert list(shown_range(video)) == list(range(8, 17))
    assert not media.unread_keys


def of_facts(frames, rate, *seconds):
    facts = VideoFacts(frames, rate, (4, 4))
    return VideoRef("clip", file=ImageRef("clip", b"clip"), facts=facts, seconds=seconds)


@pytest.mark.parametrize(
    ("frames", "rate", "seconds", "shown"),
    [  # as qwen-vl-utils 0.0.14 has them
        (100, 10.0, (2, 5), range(20, 51)),
        (100, 10.0, (None, 5), range(51)),
        (100, 10.0, (9.85, None), None),
        (100, 10.0, (9.75, 1000), range(98, 100)),
        (300, 29.97, (1.0, 2.5), range(30, 75)),
        (300, 23.976, (0.5, None), range(12, 300)),
        (100, 10.0, (20, 30), None),
        (100, None, (2, 5), None),
    ],
)
def test_frames_of_seconds(frames, rate, seconds, shown):
    video = of_facts(frames, rate, *seconds)
    if shown is not None:
        assert shown_range(video) == shown
        return
    with pytest.raises(DataError, match=r"clip (has less than two frames|does not say)"):
        shown_range(video)
    file = ImageRef("clip", CLIP)
    late = dataclasses.replace(video, file=file, facts=None, seconds=(2.95, None))
    reason, detail = media_problem(Record("0", (), (Turn("user", "?"),), (), (late,)))
    assert reason == "bad_video_entry" and "it has 24 in 3.00 seconds" in detail


@pytest.mark.parametrize(
    "cut",
    [
        {"video_start": -1},
        {"video_start": "1"},
        {"video_end": float("nan")},
        {"video_start": 2, "video_end": 2},
        {"video_end": 0},
    ],
)
def test_seconds_that_cannot_be_meant(folder, cut):
    with pytest.raises(UnusableRow, match=r"video_(start|end)") as caught:
        MediaFolder(folder).video({"video": "a.mp4", **cut})
    assert caught.value.reason == "bad_video_entry"


def cut_of(seconds, fps=None):
    return VideoRef("a", fps=fps, file=ImageRef("a", CLIP), seconds=seconds)


def test_frames_are_chosen_among_those_of_the_seconds(family_case):
    processor = family_case("qwen3_vl").processor
    clip, chosen = clip_of(processor.videos, processor.video_settings, cut_of((1.0, 2.5), 4.0))
    # 13 frames from 8 on, 6 of which are shown, ends included; times are those of the file
    assert chosen == [8, 10, 13, 15, 18, 20]
    assert clip.times == tuple(number / 8 for number in chosen)
    assert clip.rate == pytest.approx(6 / 13 * 8)
    pixels, whole = (processor.pixels((), [cut_of(seconds)])[0] for seconds in [(1.0, 2.5), None])
    assert not np.array_equal(pixels, whole[: len(pixels)])
    assert pixel_key([], [cut_of((1.0, 2.5))]) != pixel_key([], [cut_of(None)])
    assert cut_of((1.0, 2.5)).fingerprint() != cut_of(None).fingerprint()


def test_frames_for_a_judge_are_of_the_seconds():
    file = ImageRef("a", CLIP)
    again = read_frames(file, [10, 14])
    spread = spread_frames(cut_of((1.0, 2.0)), 2)
    assert [image.name for image in spread] == ["a, frame 10", "a, frame 14"]
    assert len(spread_frames(cut_of((1.0, 2.0)), 30)) == 9
    assert all(np.asarray(frame).any() for frame in again)


def test_seconds_are_written_and_read_again(folder):
    row = PAIR | {"videos": [{"video": "a.mp4", "fps": 2, **CUT}, {"video": "b.mp4", **CUT}]}
    given = write_jsonl(folder / "rows.jsonl", [row])
    for format_ in ("record", "trl"):
        target = folder / f"{format_}.jsonl"
        convert_data(str(given), str(target), format=format_)
        (record,), _ = read_records(target)
        assert [(video.fps, video.seconds) for video in record.videos] == [
            (2, (1.0, 2.0)),
            (None, (1.0, 2.0)),
        ]
    with pytest.raises(MmpoError, match="seconds"):
        convert_data(str(given), str(folder / "no.jsonl"), format="ms_swift")
    known = with_known_images(read_one(folder, row)).videos[0]
    assert known.seconds == (1.0, 2.0) and known.facts.frames == 24


@pytest.mark.parametrize(
    ("row", "seconds"),
    [
        ({"videos": [{"video": "a.mp4", **CUT}]}, (1.0, 2.0)),
        ({"videos": ["a.mp4"]}, None),
        ({"videos": ["b.mp4"]}, "placeholder_count"),
        ({"videos": [{"video": "a.mp4", "video_start": 0.5}]}, "placeholder_count"),
    ],
)
def test_columns_that_repeat_a_part(folder, row, seconds):
    part = {"type": "video", "video": "a.mp4"}
    if seconds == "placeholder_count" and "video_start" in str(row):
        part |= CUT
    row = {**PAIR, "prompt": [user([part, {"type": "text", "text": QUESTION}])], **row}
    if seconds == "placeholder_count":
        with pytest.raises(AssertionError, match=seconds):
            read_one(folder, row)
    else:
        (video,) = read_one(folder, row).videos
        assert video.seconds == seconds and video.file.read() == CLIP


ROWS = [
    ({"video": "a.mp4", "fps": 2}, [(2, None)]),
    ({"video": "a.mp4", "fps": 2, **CUT}, [(2, (1.0, 2.0))]),
    ({"video": ["1.png", "1.png"], "fps": 0.5}, [(0.5, None)]),
    ({"videos": ["a.mp4", "b.mp4"], "fps": [1, 4], "video_end": 1}, [(1, (0, 1)), (4, (0, 1))]),
    ({"videos": ["a.mp4", {"video": "b.mp4", "fps": 3}], "fps": 2}, [(2, None), (3, None)]),
    ({"videos": ["a.mp4", "b.mp4"], "fps": [1, None]}, [(1, None), (None, None)]),
]


@pytest.mark.parametrize(("row", "said"), ROWS, ids=str)
def test_columns_beside_those_of_videos(folder, row, said):
    notes = Notes()
    rows = [
        PAIR | row,
        {"question": QUESTION, "chosen": "A cat.", "rejected": "A dog.", **row},
        {"messages": [user() | row, {"role": "assistant", "content": "A cat."}]},
    ]
    records, skipped = read_records(write_jsonl(folder / "rows.jsonl", rows), notes=notes)
    assert not skipped and not notes.ignored and len(records) == 3
    for record in records:
        found = [(v.fps, v.seconds and (v.seconds[0] or 0, v.seconds[1])) for v in record.videos]
        assert found == said
        assert not any(turn.keys for turn in record.turns)


def test_columns_of_rates_that_are_not_read(folder):
    notes = Notes()
    rows = [PAIR | {"images": ["1.png"], "fps": 2}]
    read_records(write_jsonl(folder / "rows.jsonl", rows), notes=notes)
    assert dict(notes.ignored) == {"fps": 1}
    for row in ({"videos": ["a.mp4"], "fps": [1, 2]}, {"video": "a.mp4", "fps": "2"}):
        with pytest.raises(AssertionError, match="bad_video_entry: fps"):
            read_one(folder, PAIR | row)


REFUSED = [
    *({"video": "a.mp4", name: 4} for name in ("nframes", "sample_fps", "max_pixels")),
    *({"video": "a.mp4", name: 4} for name in ("min_pixels", "total_pixels", "max_frames")),
    *({"video": "a.mp4", name: 28} for name in ("resized_height", "resized_width")),
    {"video": {"path": "a.mp4", "num_frames": 4}},
    {"frames": ["1.png", "1.png"], "sample_fps": 2.0},
    {"frames": [{"path": "1.png", "max_pixels": 100}]},
    {"frames": ["1.png", "1.png"], **CUT},
]


@pytest.mark.parametrize("entry", REFUSED, ids=str)
def test_keys_of_videos_that_are_refused(folder, entry):
    media = MediaFolder(folder)
    for read in (media.video, lambda one: media.part({"type": "video", **one})):
        with pytest.raises(UnusableRow) as caught:
            read(entry)
        assert caught.value.reason == "media_option"
        named = [key for key in str(entry).split("'") if key in caught.value.detail]
        assert {*named} & {*str(entry).split("'")} - {"video", "frames", "path"}


@pytest.mark.parametrize(
    "entry",
    [
        {"image": "1.png", "max_pixels": 100},
        {"path": "1.png", "resized_height": 28, "resized_width": 28},
    ],
    ids=str,
)
def test_keys_of_images_that_are_refused(folder, entry):
    media = MediaFolder(folder)
    for read in (media.image, lambda one: media.part({"type": "image", **one})):
        with pytest.raises(UnusableRow, match=r"image\.(max_pixels|resized)") as caught:
            read(entry)
        assert caught.value.reason == "media_option"


@pytest.mark.parametrize("part", [{"type": "video", "fps": 2}, {"type": "video", "nframes": 4}])
def test_parts_that_name_nothing_and_say_how_it_is_shown(folder, part):
    row = {**PAIR, "prompt": [user([part, {"type": "text", "text": QUESTION}])], "video": "a.mp4"}
    with pytest.raises(AssertionError, match=r"media_option.*(no video|nframes)"):
        read_one(folder, row)


def test_keys_that_nobody_knows_are_counted(folder):
    image = {"image_url": {"url": "1.png", "detail": "high"}, "width": 640, "cache_control": {}}
    rows = [
        PAIR | {"images": [image, {"path": "1.png", "width": 640, "alt": None}]},
        PAIR | {"videos": [{"video": "a.mp4", "fps": 1, "source_url": "x"}]},
        PAIR | {"images": ["1.png"]},
    ]
    notes = Notes()
    _, skipped = read_records(write_jsonl(folder / "rows.jsonl", rows), notes=notes)
    assert not skipped
    assert dict(notes.media_keys) == {"image.width": 1, "image.detail": 1, "video.source_url": 1}
    told = "mean nothing here: image.detail 1, image.width 1, video.source_url 1"
    assert any(told in line for line in notes.lines())


def test_the_check_names_the_key_and_tells_cuts_apart(folder, capsys):
    rows = [
        PAIR | {"video": "a.mp4"},
        PAIR | {"videos": [{"video": "a.mp4", **CUT}]},
        PAIR | {"videos": [{"video": "a.mp4", "nframes": 4}]},
    ]
    path = write_jsonl(folder / "rows.jsonl", rows)
    assert cli.main(["data", "check", str(path)]) == 0
    said = capsys.readouterr().out
    assert "media_option: 1" in said and "video.nframes: 4 is not read" in said
    assert "duplicate rows: 0" in said
