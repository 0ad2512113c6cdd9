"""Every accepted form of a row gives the same record; every bad row is skipped for its reason."""

import dataclasses
import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mmpo_jax.data.readers import (
    SkippedRow,
    check_images,
    check_skipped,
    iter_records,
    read_records,
    write_skipped,
)
from mmpo_jax.data.records import Record, Response, Turn
from mmpo_jax.errors import DataError


def png(color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2), color).save(buffer, "png")
    return buffer.getvalue()


PNG = png()
QUESTION = "What is this?"
PROMPT = (Turn("user", QUESTION),)
GOOD, BAD = Response.of("A cat."), Response.of("A dog.")
PAIRED = (Response.of("A cat.", rank=1), Response.of("A dog.", rank=2))


def text_part(text):
    return {"type": "text", "text": text, "image": None}


IMAGE_PART = {"type": "image", "text": None}


def user(content=QUESTION):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(PNG)
    (tmp_path / "data" / "b.png").write_bytes(png("blue"))
    (tmp_path / "outside.png").write_bytes(PNG)
    return tmp_path / "data"


def write_jsonl(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_row(folder, row, **options) -> Record:
    records, skipped = read_records(write_jsonl(folder, row), **options)
    assert skipped == []
    (record,) = records
    return record


def skip_row(folder, row) -> SkippedRow:
    records, skipped = read_records(write_jsonl(folder, row))
    assert records == []
    (row,) = skipped
    return row


PAIR = {"prompt": QUESTION, "chosen": "A cat.", "rejected": "A dog."}


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
    record = read_row(folder, row | images | {"id": "x"})
    answers = tuple(dataclasses.replace(response, rank=None) for response in record.responses)
    assert (record.id, record.prompt, answers) == ("x", PROMPT, (GOOD, BAD))
    assert record.ranked == ("responses" not in row)
    (image,) = record.images
    assert image.name == "a.png"
    assert image.path == folder / "a.png"
    assert image.read() == PNG


def test_prompt_only(folder):
    assert read_row(folder, {"question": QUESTION}).responses == ()
    assert read_row(folder, {"question": QUESTION, "responses": []}).responses == ()


def test_system_turn_and_ranking(folder):
    prompt = [{"role": "system", "content": "Be brief."}, user()]
    record = read_row(folder, {"prompt": prompt, "responses": ["1", "2", "3"]})
    assert record.prompt == (Turn("system", "Be brief."), *PROMPT)
    assert [response.text for response in record.responses] == ["1", "2", "3"]


def test_text_is_kept_verbatim(folder):
    row = {"prompt": " What?\n", "chosen": " é\n", "rejected": "b "}
    record = read_row(folder, row)
    assert record.prompt[0].text == " What?\n"
    assert [response.text for response in record.responses] == [" é\n", "b "]


def test_messages(folder):
    dialogue = [user("1"), assistant("2"), user("3"), assistant("4")]
    turns = (Turn("user", "1"), Turn("assistant", "2"), Turn("user", "3"), Turn("assistant", "4"))
    last = read_row(folder, {"messages": dialogue})
    assert (last.prompt, last.responses) == (turns[:3], (Response(turns[3:]),))
    whole = read_row(folder, {"messages": dialogue}, messages_as="dialogue")
    assert (whole.prompt, whole.responses) == ((), (Response(turns),))
    assert whole.responses[0].text == "4"


def test_many_dialogues_about_one_image(folder):
    dialogues = [[user([IMAGE_PART, text_part(q)]), assistant("yes")] for q in ("1?", "2?")]
    record = read_row(folder, {"image": "a.png", "responses": dialogues})
    assert record.prompt == ()
    assert [response.turns[0].text for response in record.responses] == ["1?", "2?"]


def test_common_prompt_ends_with_a_user(folder):
    start = [user("1"), assistant("2")]
    row = {
        "chosen": [*start, user("3"), assistant("4")],
        "rejected": [*start, user("5"), assistant("6")],
    }
    record = read_row(folder, row)
    assert record.prompt == (Turn("user", "1"),)
    assert [len(response.turns) for response in record.responses] == [3, 3]


def test_ids(folder):
    rows = [{"id": "x"}, {"idx": 7}, {}, {"id": None, "idx": "y"}]
    path = write_jsonl(folder, *(row | PAIR for row in rows))
    assert [record.id for record in read_records(path)[0]] == ["x", "7", "row 3", "y"]


def test_image_root(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    path = write_jsonl(tmp_path / "elsewhere", PAIR | {"image": "a.png"})
    assert len(read_records(path, image_root=folder)[0]) == 1
    assert read_records(path)[1][0].reason == "image_missing"


def test_parquet_as_published(folder):
    """The columns of openbmb/RLAIF-V-Dataset, images as bytes, in several batches."""
    rows = [
        {
            "idx": str(number),
            "image": {"bytes": PNG, "path": "somewhere/a.png"},
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
    assert records[0].images[0].data == PNG
    assert records[0].images[0].name == "somewhere/a.png"
    assert (records[0].prompt, records[0].responses) == (PROMPT, PAIRED)


def test_parquet_in_trl_format(folder):
    """Arrow gives every content part the keys of all parts."""
    row = {
        "images": [{"bytes": PNG, "path": None}, {"bytes": None, "path": "b.png"}],
        "prompt": [user([IMAGE_PART, IMAGE_PART, text_part(QUESTION)])],
        "chosen": [assistant([text_part("A cat.")])],
        "rejected": [assistant([text_part("A dog.")])],
    }
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([row]), path)
    (record,), skipped = read_records(path)
    assert skipped == []
    assert (record.prompt, record.responses) == (PROMPT, PAIRED)
    assert record.images[0].data == PNG
    assert record.images[1].path == folder / "b.png"


MIXED = {"images": ["a.png"], "videos": [["a.png", "b.png"]]}


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
    record = read_row(folder, PAIR | {"image": "a.png", "prompt": prompt} | video)
    assert record.prompt == PROMPT
    assert [image.name for image in record.images] == ["a.png"]
    (clip,) = record.videos
    assert [frame.path for frame in clip.frames] == [folder / "a.png", folder / "b.png"]
    assert clip.fps == fps


def test_videos_in_parquet(folder):
    frames = [{"bytes": PNG, "path": None}, {"bytes": None, "path": "b.png"}]
    path = folder / "rows.parquet"
    row = PAIR | {"videos": [{"frames": frames, "fps": 0.5}]}
    pq.write_table(pa.Table.from_pylist([row]), path)
    (record,), skipped = read_records(path)
    assert skipped == []
    (clip,) = record.videos
    assert [frame.read() for frame in clip.frames] == [PNG, png("blue")]
    assert clip.fps == 0.5


def test_check_frames(folder):
    (folder / "broken.png").write_bytes(PNG[:40])
    Image.new("RGB", (3, 2)).save(folder / "wide.png")
    clips = [["a.png", "b.png"], ["a.png", "broken.png"], ["a.png", "wide.png"]]
    records, skipped = read_records(write_jsonl(folder, *(PAIR | {"video": c} for c in clips)))
    assert skipped == []
    good, bad = check_images(records)
    assert [record.id for record in good] == ["row 1"]
    assert [(row.id, row.reason) for row in bad] == [
        ("row 2", "image_broken"),
        ("row 3", "bad_video_entry"),
    ]
    assert "frames of sizes [(2, 2), (2, 3)]" in bad[1].detail


TWO_IMAGES = {"images": ["a.png", "b.png"]}


@pytest.mark.parametrize(
    ("reason", "row"),
    [
        ("bad_id", PAIR | {"id": True}),
        ("bad_id", PAIR | {"id": [1]}),
        ("bad_image_entry", PAIR | {"image": 3}),
        ("bad_image_entry", PAIR | {"image": ""}),
        ("bad_image_entry", PAIR | {"images": [None]}),
        ("bad_image_entry", PAIR | {"image": {"bytes": "text", "path": "a.png"}}),
        ("bad_json", [1]),
        ("bad_json", "text"),
        ("bad_message", PAIR | {"chosen": 3}),
        ("bad_message", {"prompt": "p", "responses": ["a", "b"], "finished": [True]}),
        ("bad_message", {"prompt": "p", "responses": ["a"], "finished": ["yes"]}),
        ("bad_message", PAIR | {"chosen": ["text"]}),
        ("bad_message", PAIR | {"chosen": [{"role": "narrator", "content": "x"}]}),
        ("bad_message", PAIR | {"chosen": [assistant(None)]}),
        ("bad_message", PAIR | {"chosen": [assistant([{"type": "audio"}])]}),
        ("bad_message", PAIR | {"chosen": [assistant([{"type": "text", "text": None}])]}),
        ("bad_message", {"prompt": QUESTION, "responses": "text"}),
        ("bad_text", PAIR | {"chosen": "\ud800"}),
        ("bad_video_entry", PAIR | {"videos": ["clip.mp4"]}),
        ("bad_video_entry", PAIR | {"video": []}),
        ("bad_video_entry", PAIR | {"video": {"fps": 2}}),
        ("bad_video_entry", PAIR | {"video": {"frames": ["a.png"], "fps": 0}}),
        ("bad_video_entry", PAIR | {"video": {"frames": ["a.png"], "fps": "2"}}),
        ("bad_image_entry", PAIR | {"video": [3]}),
        ("empty_prompt", PAIR | {"prompt": " "}),
        ("empty_response", PAIR | {"rejected": ""}),
        ("empty_response", PAIR | {"chosen": " \n"}),
        ("empty_response", PAIR | {"chosen": []}),
        ("empty_response", {"messages": [user()]}),
        ("empty_response", {"messages": []}),
        ("empty_response", {"messages": [user(), assistant(""), user(), assistant("x")]}),
        ("image_missing", PAIR | {"image": "gone.png"}),
        ("image_missing", PAIR | {"image": "."}),
        ("image_url", PAIR | {"image": "https://example.com/a.png"}),
        ("image_missing", PAIR | {"image": "x" * 5000}),
        ("image_missing", PAIR | {"video": ["a.png", "gone.png"]}),
        ("image_outside_folder", PAIR | {"image": "../outside.png"}),
        ("image_outside_folder", PAIR | {"videos": [["a.png", "../outside.png"]]}),
        ("image_outside_folder", PAIR | {"images": ["a.png", "/etc/hostname"]}),
        ("image_position", PAIR | {"video": ["a.png"], "chosen": [assistant([{"type": "video"}])]}),
        ("incomplete_pair", {"prompt": QUESTION, "chosen": "x"}),
        ("incomplete_pair", {"prompt": QUESTION, "rejected": "x"}),
        ("no_prompt", {"image": "a.png"}),
        ("no_prompt", {"chosen": "x", "rejected": "y"}),
        ("no_prompt", {"responses": ["x"]}),
        ("no_prompt", PAIR | {"prompt": []}),
        ("no_prompt", {"messages": [assistant("x")]}),
        ("placeholder_count", PAIR | {"image": "a.png", "prompt": "<image><image>\nx"}),
        ("placeholder_count", PAIR | MIXED | {"prompt": "<image>\nx"}),
        ("placeholder_count", PAIR | TWO_IMAGES | {"prompt": [user([IMAGE_PART, text_part("x")])]}),
        ("bad_message", PAIR | {"chosen": [user(), assistant("x")]}),
        ("turn_order", PAIR | {"prompt": [user(), {"role": "system", "content": "x"}]}),
    ],
)
def test_bad_rows_are_skipped_for_their_reason(folder, reason, row):
    skipped = skip_row(folder, row)
    assert (skipped.reason, skipped.row) == (reason, 1)
    assert skipped.file == str(folder / "rows.jsonl")
    assert skipped.detail


def test_link_out_of_the_folder(folder):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    assert skip_row(folder, PAIR | {"image": "link.png"}).reason == "image_outside_folder"


def test_empty_image_bytes(folder):
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR | {"image": {"bytes": b"", "path": "x.png"}}]), path)
    ((row,),) = [read_records(path)[1]]
    assert (row.reason, row.detail) == ("image_broken", "image x.png is empty (0 bytes)")


def test_broken_lines_do_not_stop_reading(folder):
    good = json.dumps(PAIR).encode()
    path = folder / "rows.jsonl"
    lines = [b"\xef\xbb\xbf" + good, b"", b"{", b"\xff\xff", b"[" * 100_000, good, b'{"id": "x']
    path.write_bytes(b"\n".join(lines))
    records, skipped = read_records(path)
    assert [record.id for record in records] == ["row 1", "row 6"]
    assert [row.row for row in skipped] == [3, 4, 5, 7]
    assert {row.reason for row in skipped} == {"bad_json"}


def test_empty_file(folder):
    assert read_records(write_jsonl(folder)) == ([], [])


def test_rows_are_read_one_by_one(folder):
    path = write_jsonl(folder, *[PAIR] * 3)
    iterator = iter_records(path)
    assert next(iterator).id == "row 1"


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.parquet"])
def test_missing_file(folder, name):
    with pytest.raises(DataError, match=f"{name}: No such file"):
        read_records(folder / name)


def test_folder_in_place_of_a_file(folder):
    (folder / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match=r"rows\.jsonl: Is a directory"):
        read_records(folder / "rows.jsonl")


def test_unknown_kind_of_file(folder):
    with pytest.raises(DataError, match=r"rows\.csv: data files end in \.jsonl"):
        read_records(folder / "rows.csv")


@pytest.mark.parametrize("content", [b"", b"text", None])
def test_unreadable_parquet(folder, content):
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR]), path)
    path.write_bytes(path.read_bytes()[:-9] if content is None else content)
    with pytest.raises(DataError, match=r"cannot read .*rows\.parquet"):
        read_records(path)


def test_check_images(folder):
    (folder / "broken.png").write_bytes(PNG[:40])
    (folder / "empty.png").write_bytes(b"")
    names = ["a.png", "broken.png", "broken.png", "empty.png", "b.png"]
    path = write_jsonl(folder, *(PAIR | {"images": ["a.png", name]} for name in names))
    records, skipped = read_records(path)
    assert skipped == []
    good, broken = check_images(records, str(path))
    assert [record.id for record in good] == ["row 1", "row 5"]
    assert [(row.id, row.reason, row.row) for row in broken] == [
        ("row 2", "image_broken", 2),
        ("row 3", "image_broken", 3),
        ("row 4", "image_broken", 4),
    ]
    assert "broken.png" in broken[0].detail
    assert broken[0].detail == broken[1].detail
    assert "empty.png is empty" in broken[2].detail


SKIPPED = [
    SkippedRow("f.jsonl", 3, "x", "image_missing", "there is no file 'é.png'"),
    SkippedRow("f.jsonl", None, "y", "image_broken", "\ud800"),
    SkippedRow("f.jsonl", 9, "", "image_missing", "gone"),
]


def test_check_skipped():
    check_skipped(SKIPPED, 300, 0.01)
    check_skipped([], 1, 0.0)
    with pytest.raises(DataError) as caught:
        check_skipped(SKIPPED, 299, 0.01)
    message = str(caught.value)
    assert "3 of 299 rows" in message
    assert "1.0%: image_missing 2, image_broken 1" in message
    assert "f.jsonl: row 3, id 'x': image_missing: there is no file" in message
    assert "f.jsonl: id 'y': image_broken" in message


def test_check_skipped_shows_a_few_rows():
    with pytest.raises(DataError) as caught:
        check_skipped(SKIPPED * 100, 300, 0.5)
    assert len(str(caught.value).splitlines()) == 6


def test_no_rows_at_all():
    with pytest.raises(DataError, match="no rows"):
        check_skipped([], 0, 1.0)


def test_write_skipped(tmp_path):
    write_skipped(tmp_path / "new" / "rejected_rows.jsonl", SKIPPED)
    lines = (tmp_path / "new" / "rejected_rows.jsonl").read_text().splitlines()
    assert [SkippedRow(**json.loads(line)) for line in lines] == SKIPPED
