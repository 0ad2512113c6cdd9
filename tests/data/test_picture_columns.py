"""Nothing trains blind without a word: pictures under other names are read, or named in the log."""

import base64
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.format_rows import QUESTION, png, skip_one, user, write_jsonl

from mmpo_jax.commands.data_check import check_data
from mmpo_jax.data.formats.columns import PICTURE_COLUMNS, with_pictures
from mmpo_jax.data.notes import Notes
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.sources import FileData
from mmpo_jax.data.usable import usable_records

PNG = png()
PAIR = {"prompt": QUESTION, "chosen": "A cat.", "rejected": "Two cats."}
URL = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "0.png").write_bytes(PNG)
    return tmp_path


def read(folder, *rows):
    notes = Notes()
    records, skipped = read_records(write_jsonl(folder / "rows.jsonl", rows), notes=notes)
    assert skipped == []
    return records, notes


COLUMNS = [*PICTURE_COLUMNS[2:], "Image", "IMG_PATH"]  # without image and images
VALUES = [[URL], {"path": "0.png"}, {"bytes": None, "base64": URL}]


@pytest.mark.parametrize(
    ("column", "value"), [*((c, "0.png") for c in COLUMNS), *(("picture", v) for v in VALUES)]
)
def test_pictures_under_common_names_are_read(folder, column, value):
    (record,), notes = read(folder, PAIR | {column: value, "images": [], "other": 1})
    assert [image.read() for image in record.images] == [PNG]
    assert notes.ignored == {"other": 1}
    assert notes.pictures_in == {column: 1}
    (line, _) = notes.lines()
    assert line == f"pictures are read from columns of other names: {column} 1"
    assert not list(notes.warnings())


def test_bytes_in_parquet(folder):
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([PAIR | {"jpg": PNG}]), path)
    (record,), _ = read_records(path)
    assert record.images[0].data == PNG


@pytest.mark.parametrize(
    "row",
    [
        {"image_id": 17},
        {"image_id": "000000017"},
        {"pixel_values": [[0.5, 0.25]]},
        {"image_url": "https://example.com/0.png"},
        {"img_path": "pictures/17"},
        {"thumbnail": "0.png"},
        {"scan": URL},
    ],
)
def test_what_is_not_read_is_warned_of(folder, row):
    (name,) = row
    (record,), notes = read(folder, PAIR | row)
    assert record.images == ()
    (warning,) = notes.warnings()
    assert f"NOT read, in rows that show nothing: {name} 1; give the pictures as files" in warning


def test_columns_beside_pictures_are_no_mistake(folder):
    row = PAIR | {"image": "0.png", "image_path": "gone.png", "image_id": 3}
    (record,), notes = read(folder, row)
    assert len(record.images) == 1
    assert notes.ignored == {"image_path": 1, "image_id": 1}
    assert not list(notes.warnings())


def test_a_picture_that_a_message_names_is_enough():
    content = [{"type": "image", "image": "0.png"}, {"type": "text", "text": QUESTION}]
    for column in ("prompt", "messages", "chosen"):
        row = {column: [user(content)], "img_path": "gone.png"}
        assert with_pictures(row) == (row, None)
    row = {"prompt": [user([{"type": "image"}])], "img_path": "0.png"}
    assert with_pictures(row) == ({"prompt": row["prompt"], "images": "0.png"}, "img_path")


def test_a_picture_that_is_not_there_is_missing_under_any_name(folder):
    skipped = skip_one(folder, PAIR | {"img_path": "gone.png"})
    assert skipped.reason == "image_missing"


def test_first_of_several_and_never_an_address(folder):
    row = PAIR | {"image_url": "https://example.com/0.png", "file_name": "gone.png", "jpg": URL}
    (record,), notes = read(folder, row)
    assert len(record.images) == 1
    assert notes.pictures_in == {"jpg": 1}
    assert notes.ignored == {"image_url": 1, "file_name": 1}


def test_answers_and_ids_mean_something(folder):
    _, notes = read(folder, *[PAIR | {"id": 1, "answer": "7", "solution": "7"}] * 2)
    assert notes.ignored == {}
    assert notes.repeated_ids == 1


@pytest.mark.parametrize("supervised", [True, False])
def test_every_command_says_it(folder, supervised, caplog, tiny_processor):
    rows = [
        {"prompt": "a ring ?", "chosen": "yes", "rejected": "no", "Chosen": 1} | more
        for more in ({"img_path": "0.png"}, {"image_id": 3}, {})
    ]
    path = write_jsonl(folder / "rows.jsonl", rows)
    caplog.set_level(logging.INFO)
    source = FileData(path=str(path), max_skipped=1.0).load(supervised=supervised)
    usable_records(source, tiny_processor, None, str(folder / "skipped.jsonl"))
    said = [record.getMessage().removeprefix(f"{path}: ") for record in caplog.records]
    assert "pictures are read from columns of other names: img_path 1" in said
    assert "columns that mean nothing here: Chosen 3, image_id 1" in said
    assert any("NOT read, in rows that show nothing: image_id 1" in line for line in said)
    assert "2 of 3 rows have no image or video" in said
    report = check_data(str(path))
    for line in said[:2]:
        assert line in report
    assert "usable rows without an image or video: 2" in report


@pytest.mark.parametrize("opening", ["[", '{"image": '])
def test_a_column_that_is_nested_deep_ends_nothing(folder, opening):
    nested = 3
    for _ in range(900):
        nested = [nested] if opening == "[" else {"image": nested}
    (record,), notes = read(folder, PAIR | {"more": nested})
    assert record.images == ()
    assert notes.ignored == {"more": 1}
    assert skip_one(folder, PAIR | {"prompt": nested}).reason == "bad_message"


@pytest.mark.parametrize(
    ("name", "warned"), [("topic", 0), ("topics", 0), ("my_pics", 1), ("pic", 1)]
)
def test_a_topic_is_no_picture(folder, name, warned):
    _, notes = read(folder, PAIR | {name: "x"})
    assert sum(notes.unread_pictures.values()) == warned
