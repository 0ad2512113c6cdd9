"""Every accepted form of a row gives the same record; bad ones are in test_bad_rows.py."""

import dataclasses
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.format_rows import (
    IMAGE_PART,
    PAIR,
    PROMPT,
    QUESTION,
    assistant,
    inner_folder,
    png,
    read_one,
    skip_one,
    text_part,
    user,
    write_jsonl,
)
from PIL import Image

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.media_check import check_images
from mmpo_jax.data.readers import iter_records, read_records
from mmpo_jax.data.records import Medium, Response, Turn

GOOD, BAD = Response.of("A cat."), Response.of("A dog.")
PAIRED = (Response.of("A cat.", rank=1), Response.of("A dog.", rank=2))


@pytest.fixture
def folder(tmp_path):
    return inner_folder(tmp_path)


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"question": QUESTION, "chosen": "A cat.", "rejected": "A dog.", "prompt": None},
        {"prompt": [user()], "chosen": [assistant("A cat.")], "rejected": [assistant("A dog.")]},
        {
            "prompt": [user([IMAGE_PART, text_part(QUESTION)])],
            "chosen": [assistant([text_part("A cat.")])],
            "rejected": [assistant([text_part("A dog.")])],
        },
        PAIR | {"prompt": "<image>What is this?"},
        PAIR | {"prompt": [user([text_part("<image>What is this?")])]},
        {
            "chosen": [user(), assistant("A cat.")],
            "rejected": [user(), assistant("A dog.")],
        },
        {"prompt": QUESTION, "responses": ["A cat.", "A dog."]},
        {"prompt": QUESTION, "responses": [[assistant("A cat.")], "A dog."]},
        {"messages": [user(), assistant("A cat.")], "rejected_response": "A dog."},
    ],
)
@pytest.mark.parametrize("images", [{"image": "a.png"}, {"images": ["a.png"]}])
def test_all_forms_of_a_preference_are_one_record(folder, row, images):
    record = read_one(folder, row | images | {"id": "x"})
    answers = tuple(dataclasses.replace(response, rank=None) for response in record.responses)
    assert (record.id, record.prompt, answers) == ("x", PROMPT, (GOOD, BAD))
    assert record.ranked == ("responses" not in row)
    (image,) = record.images
    assert image.name == "a.png"
    assert image.path == folder / "a.png"
    assert image.read() == png()


def test_prompt_only(folder):
    assert read_one(folder, {"question": QUESTION}).responses == ()
    assert read_one(folder, {"question": QUESTION, "responses": []}).responses == ()


def test_system_turn_and_ranking(folder):
    prompt = [{"role": "system", "content": "Be brief."}, user()]
    record = read_one(folder, {"prompt": prompt, "responses": ["1", "2", "3"]})
    assert record.prompt == (Turn("system", "Be brief."), *PROMPT)
    assert [response.text for response in record.responses] == ["1", "2", "3"]


def test_text_is_kept_verbatim(folder):
    row = {"prompt": " What?\n", "chosen": " é\n", "rejected": "b "}
    record = read_one(folder, row)
    assert record.prompt[0].text == " What?\n"
    assert [response.text for response in record.responses] == [" é\n", "b "]


def test_messages(folder):
    dialogue = [user("1"), assistant("2"), user("3"), assistant("4")]
    turns = (Turn("user", "1"), Turn("assistant", "2"), Turn("user", "3"), Turn("assistant", "4"))
    last = read_one(folder, {"messages": dialogue})
    assert (last.prompt, last.responses) == (turns[:3], (Response(turns[3:]),))
    whole = read_one(folder, {"messages": dialogue}, messages_as="dialogue")
    assert (whole.prompt, whole.responses) == ((), (Response(turns),))
    assert whole.responses[0].text == "4"


def test_many_dialogues_about_one_image(folder):
    dialogues = [[user([IMAGE_PART, text_part(q)]), assistant("yes")] for q in ("1?", "2?")]
    record = read_one(folder, {"image": "a.png", "responses": dialogues})
    assert record.prompt == ()
    assert [response.turns[0].text for response in record.responses] == ["1?", "2?"]


def test_common_prompt_ends_with_a_user(folder):
    start = [user("1"), assistant("2")]
    row = {
        "chosen": [*start, user("3"), assistant("4")],
        "rejected": [*start, user("5"), assistant("6")],
    }
    record = read_one(folder, row)
    assert record.prompt == (Turn("user", "1"),)
    assert [len(response.turns) for response in record.responses] == [3, 3]


def test_ids(folder):
    rows = [{"id": "x"}, {"idx": 7}, {}, {"id": None, "idx": "y"}]
    path = write_jsonl(folder / "rows.jsonl", [row | PAIR for row in rows])
    assert [record.id for record in read_records(path)[0]] == ["x", "7", "row 3", "y"]


def test_image_root(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = write_jsonl(tmp_path / "elsewhere" / "rows.jsonl", [PAIR | {"image": "a.png"}])
    assert len(read_records(path, image_root=folder)[0]) == 1
    assert read_records(path)[1][0].reason == "image_missing"


def test_parquet_as_published(folder):
    """The columns of openbmb/RLAIF-V-Dataset, images as bytes, in several batches."""
    rows = [
        {
            "idx": str(number),
            "image": {"bytes": png(), "path": "somewhere/a.png"},
            "question": QUESTION,
            "chosen": "A cat.",
            "rejected": "A dog." if number != 100 else "",
            "origin_split": "{}",
        }
        for number in range(150)
    ]
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    records, skipped = read_records(path)
    assert [record.id for record in records] == [str(n) for n in range(150) if n != 100]
    assert [(row.row, row.id, row.reason) for row in skipped] == [(101, "100", "empty_response")]
    assert records[0].images[0].data == png()
    assert records[0].images[0].name == "somewhere/a.png"
    assert (records[0].prompt, records[0].responses) == (PROMPT, PAIRED)


def test_parquet_in_trl_format(folder):
    """Arrow gives every content part the keys of all parts."""
    row = {
        "images": [{"bytes": png(), "path": None}, {"bytes": None, "path": "b.png"}],
        "prompt": [user([IMAGE_PART, IMAGE_PART, text_part(QUESTION)])],
        "chosen": [assistant([text_part("A cat.")])],
        "rejected": [assistant([text_part("A dog.")])],
    }
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    (record,), skipped = read_records(path)
    assert skipped == []
    assert (record.prompt, record.responses) == (PROMPT, PAIRED)
    assert record.images[0].data == png()
    assert record.images[1].path == folder / "b.png"


@pytest.mark.parametrize(
    "prompt",
    [
        QUESTION,
        [user([IMAGE_PART, {"type": "video", "text": None}, text_part(QUESTION)])],
        "<image><video>What is this?",
    ],
)
@pytest.mark.parametrize(
    ("video", "fps"),
    [
        ({"videos": [["a.png", "b.png"]]}, None),
        ({"video": ["a.png", "b.png"]}, None),
        ({"videos": [{"frames": ["a.png", "b.png"], "fps": 2}]}, 2),
        ({"video": {"frames": ["a.png", "b.png"], "fps": None}}, None),
    ],
)
def test_videos(folder, prompt, video, fps):
    record = read_one(folder, PAIR | {"image": "a.png", "prompt": prompt} | video)
    assert record.prompt == PROMPT
    assert [image.name for image in record.images] == ["a.png"]
    (clip,) = record.videos
    assert [frame.path for frame in clip.frames] == [folder / "a.png", folder / "b.png"]
    assert clip.fps == fps


def test_videos_in_parquet(folder):
    frames = [{"bytes": png(), "path": None}, {"bytes": None, "path": "b.png"}]
    path = folder / "rows.parquet"
    row = PAIR | {"videos": [{"frames": frames, "fps": 0.5}]}
    pq.write_table(pa.Table.from_pylist([row]), path)
    (record,), skipped = read_records(path)
    assert skipped == []
    (clip,) = record.videos
    assert [frame.read() for frame in clip.frames] == [png(), png("blue")]
    assert clip.fps == 0.5


def test_check_frames(folder):
    (folder / "broken.png").write_bytes(png()[:40])
    Image.new("RGB", (3, 2)).save(folder / "wide.png")
    clips = [["a.png", "b.png"], ["a.png", "broken.png"], ["a.png", "wide.png"]]
    path = write_jsonl(folder / "rows.jsonl", [PAIR | {"video": clip} for clip in clips])
    records, skipped = read_records(path)
    assert skipped == []
    good, bad = check_images(records)
    assert [record.id for record in good] == ["row 1"]
    assert [(row.id, row.reason) for row in bad] == [
        ("row 2", "image_broken"),
        ("row 3", "bad_video_entry"),
    ]
    assert "frames of sizes [(2, 2), (2, 3)]" in bad[1].detail


def test_empty_file(folder):
    assert read_records(write_jsonl(folder / "rows.jsonl", [])) == ([], [])


def test_rows_are_read_one_by_one(folder):
    path = write_jsonl(folder / "rows.jsonl", [PAIR] * 3)
    iterator = iter_records(path)
    assert next(iterator).id == "row 1"


@pytest.mark.parametrize("inside", [[user("1"), assistant("2"), user()], [user()]])
def test_a_picture_that_only_the_prompt_names(folder, inside):
    """The dialogues are plain texts."""
    shown = user([{"type": "image", "image": "b.png"}, {"type": "text", "text": QUESTION}])
    sides = {side: [*inside, assistant(side)] for side in ("chosen", "rejected")}
    record = read_one(folder, {"prompt": [shown | {"name": "x"}], **sides})
    assert [image.path for image in record.images] == [folder / "b.png"]
    assert record.prompt[-1].keys == {"name": "x"}
    placed_last = (Medium.IMAGE, QUESTION) if len(inside) > 1 else QUESTION
    assert record.prompt[-1].content == placed_last
    assert len(record.prompt) == len(inside)


def test_another_number_of_pictures_than_the_prompt(folder):
    part, text = {"type": "image", "image": "b.png"}, {"type": "text", "text": QUESTION}
    sides = {s: [user([part, part, text]), assistant(s)] for s in ("chosen", "rejected")}
    skipped = skip_one(folder, {"prompt": [user([part, text])], **sides})
    assert skipped.reason == "prompt_differs"


def test_a_rejected_dialogue_that_shows_another_picture(folder):
    def shown(name, answer):
        return [user([{"type": "image", "image": name}, text_part(QUESTION)]), assistant(answer)]

    row = {"messages": shown("a.png", "a"), "rejected_messages": shown("b.png", "b")}
    chosen, rejected = read_one(folder, row).responses
    assert chosen.images is None
    assert rejected.prompt is not None
    assert [image.path for image in rejected.images] == [folder / "b.png"]


def test_a_format_that_nothing_adds(folder):
    path = write_jsonl(folder / "rows.jsonl", [PAIR])
    with pytest.raises(DataError, match=r"format unheard: not known here; known: auto, .*trl"):
        read_records(path, format="unheard")
    with pytest.raises(DataError, match="format unheard"):
        convert_data(str(path), str(folder / "out.jsonl"), format="unheard")


def test_the_format_of_the_picture_world_is_known_where_its_package_is_imported():
    """By the commands on data alone; of the library alone the error says what is missing."""
    code = """
from mmpo_jax.data.formats import FORMATS, format_called
try:
    format_called("picture_world")
except Exception as error:
    print(type(error).__name__)
import mmpo_jax.commands.data_check
print("picture_world" in FORMATS)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    assert done.stdout.split() == ["DataError", "True"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What?", "chosen": "A cat.", "rejected": ""},
        {"prompt": "What?", "completion": "A cat.", "label": "meh"},
        {"prompt": "What?", "responses": "A cat."},
    ],
    ids=["rejected", "label", "responses"],
)
def test_prompts_alone_whatever_is_wrong_with_responses(folder, row):
    path = write_jsonl(folder / "rows.jsonl", [row])
    (record,), skipped = read_records(path, prompts_only=True)
    assert not skipped and [turn.text for turn in record.prompt] == ["What?"]
    assert record.responses == ()


def test_a_prompt_that_is_wrong_is_told_of_the_whole_row(folder):
    row = {"prompt": "", "chosen": "A cat.", "rejected": ""}
    path = write_jsonl(folder / "rows.jsonl", [row])
    (_, (alone,)), (_, (whole,)) = read_records(path, prompts_only=True), read_records(path)
    assert str(alone) == str(whole)
