"""Rows converted to records and back: every field is kept, and files are where rows say."""

import base64
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.format_rows import (
    PROMPT,
    RLAIF_V,
    RLHF_V,
    ROWS,
    TRL,
    assistant,
    png,
    read_jsonl,
    read_one,
    user,
    write_jsonl,
)

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import ImageRef, Record, Response, Span, Turn, VideoRef


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


def test_a_refused_conversion_leaves_what_it_says(folder):
    """Not the images that it had copied."""
    shown = "data:image/png;base64," + base64.b64encode(png()).decode()
    row = {"prompt": "What?", "image": shown, "chosen": "A.", "rejected": "B."}
    rows = [row, row | {"chosen": ""}]
    source, target = write_jsonl(folder / "rows.jsonl", rows), folder / "out.jsonl"
    with pytest.raises(
        DataError, match=r"empty_response 1\n(.*\n)*.*out\.rejected_rows\.jsonl has"
    ):
        convert_data(str(source), str(target))
    assert {path.name for path in folder.glob("out*")} == {"out.rejected_rows.jsonl"}
    convert_data(str(source), str(target), max_skipped=0.5)
    assert (folder / "out.images").is_dir()
