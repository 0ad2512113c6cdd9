"""Every bad row is skipped for its reason; only a file that cannot be read stops reading."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.format_rows import (
    IMAGE_PART,
    PAIR,
    QUESTION,
    assistant,
    inner_folder,
    png,
    skip_one,
    text_part,
    user,
    write_jsonl,
)

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.media_check import check_images
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.skipped import SkippedRow, check_skipped, write_skipped


@pytest.fixture
def folder(tmp_path):
    return inner_folder(tmp_path)


MIXED = {"images": ["a.png"], "videos": [["a.png", "b.png"]]}
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
        ("bad_video_entry", PAIR | {"videos": ["clip.avi"]}),
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
    skipped = skip_one(folder, row)
    assert (skipped.reason, skipped.row) == (reason, 1)
    assert skipped.file == str(folder / "one.jsonl")
    assert skipped.detail


def test_link_out_of_the_folder(folder):
    (folder / "link.png").symlink_to(folder.parent / "outside.png")
    assert skip_one(folder, PAIR | {"image": "link.png"}).reason == "image_outside_folder"


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
    (folder / "broken.png").write_bytes(png()[:40])
    (folder / "empty.png").write_bytes(b"")
    names = ["a.png", "broken.png", "broken.png", "empty.png", "b.png"]
    path = write_jsonl(
        folder / "rows.jsonl", [PAIR | {"images": ["a.png", name]} for name in names]
    )
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


@pytest.mark.parametrize("spoil", [lambda data: data[:-30], lambda data: data[:12] + b"\xff" * 40])
def test_a_packed_file_that_is_broken(tmp_path, spoil):
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(spoil(gzip.compress(b'{"prompt": "a"}\n' * 999)))
    with pytest.raises(DataError, match=r"cannot read .*rows\.jsonl\.gz: "):
        read_records(path)
