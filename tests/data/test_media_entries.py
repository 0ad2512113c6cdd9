"""Images and videos in every spelling that rows have for them, in columns and in parts."""

import base64
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.format_rows import QUESTION, png, read_one, user, write_jsonl

from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.media_check import check_images
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import ImageRef, VideoRef
from mmpo_jax.data.rows import brief
from mmpo_jax.data.skipped import UnusableRow, write_skipped

PNG, BLUE = png(), png("blue")
TEXT = base64.b64encode(PNG).decode()
URL = f"data:image/png;base64,{TEXT}"
PAIR = {"prompt": QUESTION, "chosen": "A cat.", "rejected": "Two cats."}
# Long enough that every alphabet differs, and short for a picture.
NOISY = bytes(PNG) + bytes(range(256))


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(PNG)
    (tmp_path / "1.png").write_bytes(BLUE)
    (tmp_path / "clip").mkdir()
    for number in (1, 2):
        (tmp_path / "clip" / f"{number}.png").write_bytes(PNG)
    return tmp_path


ENCODED = [
    URL,
    TEXT,
    f"data:image/png;base64,{TEXT[:40]}\n{TEXT[40:]}",
    {"base64": TEXT},
    {"base64": URL, "path": "named.png"},
    {"base64": "\n".join(TEXT[i : i + 60] for i in range(0, len(TEXT), 60))},
    {"base64": TEXT.rstrip("=")},
    {"bytes": TEXT},
    {"bytes": None, "base64": TEXT},
    {"data": TEXT},
    {"url": URL},
    {"image_url": URL},
    {"type": "image_url", "image_url": {"url": URL, "detail": "auto"}},
    {"type": "input_image", "image_url": URL},
    {"type": "image", "image": TEXT},
    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": TEXT}},
]


@pytest.mark.parametrize("entry", ENCODED)
@pytest.mark.parametrize("column", ["image", "images", "nested"])
def test_encoded_images(folder, entry, column):
    row = {"images": [[entry, "1.png"]]} if column == "nested" else {column: [entry, "1.png"]}
    record = read_one(folder, PAIR | row)
    assert [image.read() for image in record.images] == [PNG, BLUE]


@pytest.mark.parametrize("data", [NOISY, NOISY + b"a", NOISY + b"ab"])
@pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode])
@pytest.mark.parametrize("padded", [True, False])
def test_both_alphabets_with_and_without_padding(folder, data, encode, padded):
    text = encode(data).decode()
    text = text if padded else text.rstrip("=")
    for entry in (text, {"base64": text}, f"data:image/png;base64,{text}"):
        assert MediaFolder(folder).image(entry).read() == data


@pytest.mark.parametrize(
    "entry",
    ["images/0.png", "images\\0.png", ".\\images\\0.png", {"path": "images/0.png"}, "file://{}"],
)
def test_paths(folder, entry):
    if entry == "file://{}":
        entry = (folder / "images" / "0.png").as_uri()
    assert MediaFolder(folder).image(entry).read() == PNG


def test_a_name_with_a_back_slash_is_a_name(folder):
    (folder / "images\\0.png").write_bytes(BLUE)
    assert MediaFolder(folder).image("images\\0.png").read() == BLUE


@pytest.mark.parametrize(
    ("reason", "entry"),
    [
        ("image_url", "http://example.com/x.png"),
        ("image_url", {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}),
        ("image_outside_folder", "file:///etc/hostname"),
        ("image_outside_folder", "file:///no/such/file.png"),
        ("bad_image_entry", {"base64": "!" * 5000}),
        ("bad_image_entry", "data:image/png;base64"),
        ("bad_image_entry", f"data:image/png;base64,{'!' * 5000}"),
        ("bad_image_entry", {"image": {"image": {"image": {"image": {"image": {"path": "x"}}}}}}),
        ("bad_image_entry", {"type": "input_image", "file_id": "file-1"}),
        ("image_missing", "gone" + "n" * 5000),
        ("image_missing", "/".join(["iVBORw0KGgo.png"] * 40)),
    ],
)
def test_what_is_refused_says_so_in_few_words(folder, reason, entry):
    with pytest.raises(UnusableRow) as caught:
        MediaFolder(folder).image(entry)
    assert caught.value.reason == reason
    assert len(caught.value.detail) < 300 + len(str(folder))
    if reason == "image_url":
        assert "is not downloaded; save the image and give the file's path" in caught.value.detail


def test_bytes_are_never_written_to_the_list_of_rejected_rows(folder):
    long = "A" * 9000
    bad = [URL[:-30] + "?" + long, f"data:image/png;base64,{long}", long, {"base64": long + "?"}]
    path = write_jsonl(folder / "rows.jsonl", [PAIR | {"image": entry} for entry in bad])
    records, skipped = read_records(path)
    skipped += check_images(records)[1]
    assert len(skipped) == len(bad)
    write_skipped(folder / "rejected.jsonl", skipped)
    for line in (folder / "rejected.jsonl").read_text().splitlines():
        assert len(json.loads(line)["detail"]) < 300 + len(str(folder))


def test_values_in_messages():
    assert brief("a.png") == "'a.png'"
    assert brief("x" * 100) == f"'{'x' * 40}'... (100 characters)"
    assert brief(URL) == f"'data:image/png;base64,'... ({len(URL)} characters)"
    assert brief(PNG) == f"{len(PNG)} bytes"
    assert brief({"bytes": PNG}) == "an object of bytes"
    assert brief([PNG, PNG]) == "a list of 2"


@pytest.mark.parametrize("images", [[], None])
def test_image_beside_empty_images(folder, images):
    row = PAIR | {"id": "1", "image": {"bytes": PNG, "path": None}, "images": images}
    schema = pa.schema(
        {name: pa.string() for name in ("id", *PAIR)}
        | {"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})}
        | {"images": pa.list_(pa.string())}
    )
    pq.write_table(pa.Table.from_pylist([row], schema), folder / "rows.parquet")
    (record,), _ = read_records(folder / "rows.parquet")
    assert [image.read() for image in record.images] == [PNG]
    assert record.extra == {}
    record = read_one(folder, row | {"image": "images/0.png"})
    assert [image.read() for image in record.images] == [PNG]


def test_several_images_in_image_are_all_read_and_images_wins(folder):
    assert len(read_one(folder, PAIR | {"image": ["images/0.png", "1.png"]}).images) == 2
    record = read_one(folder, PAIR | {"image": "images/0.png", "images": ["1.png"]})
    assert [image.read() for image in record.images] == [BLUE]


@pytest.mark.parametrize("entry", ["clip", {"frames": "clip", "fps": 2.0}])
@pytest.mark.parametrize("column", ["video", "videos"])
def test_a_folder_of_frames_is_a_video(folder, entry, column):
    (video,) = read_one(folder, PAIR | {column: entry if column == "video" else [entry]}).videos
    assert [frame.read() for frame in video.frames] == [PNG, PNG]
    assert video.fps == (None if entry == "clip" else 2.0)


def test_several_videos_in_video(folder):
    videos = read_one(folder, PAIR | {"video": [["1.png"], ["1.png", "1.png"]]}).videos
    assert [len(video.frames) for video in videos] == [1, 2]


@pytest.mark.parametrize("entry", [entry for entry in ENCODED if isinstance(entry, dict)])
def test_parts_with_images_of_their_own(folder, entry):
    part = {"type": "image", "text": None} | entry
    found = MediaFolder(folder).part(part)
    assert isinstance(found, ImageRef) and found.read() == PNG


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video", "video": "clip"},
        {"type": "video", "video": ["clip/1.png", "clip/2.png"]},
        {"type": "video", "frames": ["clip/1.png", URL]},
        {"type": "video", "video": {"frames": ["clip/1.png", "clip/2.png"], "fps": None}},
        {"type": "video", "path": "clip", "fps": 2},
        {"type": "video_url", "video_url": {"url": "clip"}},
    ],
)
def test_parts_with_videos_of_their_own(folder, part):
    found = MediaFolder(folder).part(part)
    assert isinstance(found, VideoRef) and len(found.frames) == 2
    assert found.fps == part.get("fps")


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image"},
        {"type": "image", "text": None, "image": None, "url": None},
        {"type": "video"},
        {"type": "text", "text": "image"},
    ],
)
def test_parts_that_mean_the_next_of_the_columns(folder, part):
    assert MediaFolder(folder).part(part) is None


@pytest.mark.parametrize(
    ("reason", "part"),
    [
        ("image_url", {"type": "image_url", "image_url": {"url": "https://example.com/x.png"}}),
        ("bad_video_entry", {"type": "video_url", "video_url": {"url": "https://example.com/x"}}),
        ("bad_video_entry", {"type": "video", "video": "clip.avi"}),
        ("image_missing", {"type": "video", "video": "clip.mp4"}),
        ("bad_image_entry", {"type": "input_image", "file_id": "file-1"}),
        ("image_missing", {"type": "image", "image": "gone.png"}),
    ],
)
def test_parts_that_are_refused(folder, reason, part):
    with pytest.raises(UnusableRow) as caught:
        MediaFolder(folder).part(part)
    assert caught.value.reason == reason


def test_placeholders_and_columns_go_on_as_they_were(folder):
    content = [{"type": "image", "text": None}, {"type": "text", "text": QUESTION}]
    record = read_one(folder, PAIR | {"prompt": [user(content)], "image": URL})
    assert [image.read() for image in record.images] == [PNG]
