"""The same rows from every kind of file, folder and TFDS data set."""

import io
import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from helpers.format_rows import png
from PIL import Image

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.builders import MmRlhf, RlaifV
from mmpo_jax.data.files import file_rows
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import Response, Turn
from mmpo_jax.picture_world.records import supervised_records
from mmpo_jax.picture_world.tfds_builder import PictureWorld, PictureWorldConfig

ROWS = [
    {"id": str(n), "prompt": f"{n}?", "chosen": "a", "rejected": "b", "score": n / 2}
    for n in range(150)
]


def write_array_record(path, lines):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for line in lines:
        writer.write(line)
    writer.close()


def write_arrow(path, rows, rows_per_batch):
    """As `datasets` does on `save_to_disk`."""
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_per_batch)


def make_jsonl(folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def make_json(folder):
    path = folder / "rows.json"
    path.write_text(json.dumps(ROWS, indent=2))
    return path


def make_parquet(folder):
    path = folder / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    return path


def make_array_record(folder):
    path = folder / "rows.array_record"
    write_array_record(path, [json.dumps(row).encode() for row in ROWS])
    return path


def make_shards(folder):
    for start in (100, 0):
        rows = pa.Table.from_pylist(ROWS[start : start + 100])
        pq.write_table(rows, folder / f"train-{start:05d}.parquet")
    (folder / "README.md").write_text("")
    return folder


def make_saved_to_disk(folder):
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, rows in zip(names, (ROWS[:110], ROWS[110:]), strict=True):
        write_arrow(folder / name, rows, 40)
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


MAKERS = [
    make_jsonl,
    make_json,
    make_parquet,
    make_array_record,
    make_shards,
    make_saved_to_disk,
]


@pytest.mark.parametrize("make", MAKERS)
def test_every_kind_of_file_has_the_same_rows(tmp_path, make):
    assert list(file_rows(make(tmp_path))) == list(enumerate(ROWS, start=1))


@pytest.mark.parity
def test_what_datasets_saves(tmp_path):
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.filter(lambda row: row["id"] != "7").save_to_disk(tmp_path / "rows", num_shards=2)
    found = [row for _, row in file_rows(tmp_path / "rows")]
    assert found == [row for row in ROWS if row["id"] != "7"]
    images = datasets.Dataset.from_dict(
        {"image": [Image.new("RGB", (3, 2))], "prompt": ["?"]},
        features=datasets.Features({"image": datasets.Image(), "prompt": datasets.Value("string")}),
    )
    datasets.DatasetDict({"train": images, "test": images}).save_to_disk(tmp_path / "both")
    (record,), skipped = read_records(tmp_path / "both" / "test")
    assert skipped == []
    assert Image.open(io.BytesIO(record.images[0].read())).size == (3, 2)
    assert len(read_records(tmp_path / "both")[0]) == 1  # of train
    with pytest.raises(DataError, match="has the splits test, train; there is no dev"):
        read_records(f"{tmp_path}/both#dev")


def test_bad_lines_of_array_records(tmp_path):
    path = tmp_path / "rows.array_record"
    write_array_record(path, [b"{", json.dumps(ROWS[0]).encode(), b"[1]"])
    records, skipped = read_records(path)
    assert [record.row for record in records] == [2]
    assert [(row.row, row.reason) for row in skipped] == [(1, "bad_json"), (3, "bad_json")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.array_record", b"no such file", "cannot read"),
        ("rows.json", b'{\n"a": 1}', "a dict and not a list"),
        ("rows.json", b"[1", "cannot read"),
        ("rows.csv", b"", r"data files end in \.jsonl"),
    ],
)
def test_unreadable_files(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_records(tmp_path / name)


def test_folders_of_nothing_and_of_everything(tmp_path):
    with pytest.raises(DataError, match="of one kind are wanted, found: none"):
        read_records(tmp_path)
    make_jsonl(tmp_path)
    make_parquet(tmp_path)
    with pytest.raises(DataError, match=r"found: \.jsonl, \.parquet"):
        read_records(tmp_path)
    with pytest.raises(DataError, match=r"gone\.array_record: No such file"):
        read_records(tmp_path / "gone.array_record")


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "array_record"])
def test_any_kind_is_written(tmp_path, ending):
    out = tmp_path / f"out.{ending}"
    convert_data(str(make_jsonl(tmp_path)), str(out))
    records, skipped = read_records(out)
    assert (records, skipped) == read_records(tmp_path / "rows.jsonl")
    with pytest.raises(DataError, match=r"written are \.jsonl"):
        convert_data(str(out), str(tmp_path / "out.csv"))


class TestTfds:
    @pytest.fixture(scope="class")
    def prepared(self, tmp_path_factory):
        """A data folder with the three data sets, from files as they are published."""
        folder = tmp_path_factory.mktemp("tfds")
        PictureWorld(
            data_dir=folder,
            config=PictureWorldConfig(name="few", train=3, align=0, validation=0, test=2),
        ).download_and_prepare()
        manual = folder / "manual_rlaif_v"
        manual.mkdir()
        for shard in range(2):
            rows = [RLAIF_V | {"idx": str(10 * shard + n)} for n in range(4 if shard else 9)]
            pq.write_table(pa.Table.from_pylist(rows), manual / f"RLAIF-V-Dataset_{shard}.parquet")
        prepare(RlaifV(data_dir=folder), manual)
        manual = folder / "manual_mm_rlhf"
        for name in ("short/a.png", "video/clip/2.png", "video/clip/10.png"):
            (manual / "top" / name).parent.mkdir(parents=True, exist_ok=True)
            (manual / "top" / name).write_bytes(png("blue" if "10" in name else "red"))
        for name, rows in (("data.jsonl", RANKINGS), ("dpo_pairs.jsonl", PAIRS)):
            (manual / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        for config in ("rankings", "pairs"):
            prepare(MmRlhf(data_dir=folder, config=config), manual)
        return folder

    @pytest.mark.parametrize("messages_as", ["last_turn", "dialogue"])
    def test_shapes(self, prepared, messages_as):
        path = f"tfds:{prepared}/picture_world/few/1.3.0"
        records, skipped = read_records(path, messages_as=messages_as)
        assert (len(records), skipped) == (3, [])
        world = supervised_records("train", 0, 3, 48, 8, 0.5)
        said = {image_and_turns(record) for record in world}
        for record in records:
            image, turns = image_and_turns(record)
            if messages_as == "dialogue":  # where the world puts two questions together
                assert (image, turns) in said
            else:
                assert (image, turns) in {(image, turns[:2]) for image, turns in said}
                assert record.prompt == turns[:1]
        assert len(read_records(f"{path}#test")[0]) == 2

    def test_rlaif_v(self, prepared):
        records, skipped = read_records("tfds:rlaif_v", prepared)
        assert (len(records), skipped) == (13, [])
        assert {record.id for record in records} == {*map(str, range(9)), *map(str, range(10, 14))}
        (record,) = [record for record in records if record.id == "3"]
        assert (record.prompt, record.source) == ((Turn("user", "What?"),), "RLAIF-V")
        assert record.responses == (Response.of("a", rank=1), Response.of("b", rank=2))
        assert record.images[0].read() == png()

    def test_mm_rlhf(self, prepared):
        records, skipped = read_records("tfds:mm_rlhf/rankings", prepared)
        assert (len(records), skipped) == (2, [])
        scored, clip = sorted(records, key=lambda record: record.id)
        assert [response.rank for response in scored.responses] == [1, 2, 2]
        assert scored.responses[0].scores == {"ethical": 0.5}
        assert scored.responses[1].scores == {}
        assert [response.critique for response in scored.responses] == ["good", None, "bad"]
        assert [frame.read() for frame in clip.videos[0].frames] == [png(), png("blue")]
        assert not clip.ranked
        assert [response.critique for response in clip.responses] == [None, None]

    def test_mm_rlhf_pairs(self, prepared):
        records, skipped = read_records("tfds:mm_rlhf/pairs", prepared)
        assert skipped == []
        assert {record.id for record in records} == {"p", "p (row 2)"}
        assert {record.responses[1].text for record in records} == {"b", "c"}
        assert {record.responses[0].critique for record in records} == {"good", None}
        assert records[0].images[0].read() == png()

    def test_examples_have_arrays(self, prepared):
        source = tfds.data_source("rlaif_v", split="train", data_dir=prepared)
        assert source[0]["image"].dtype == np.uint8
        assert source[0]["image"].shape == (2, 2, 3)

    def test_too_many_bad_rows(self, tmp_path):
        rows = [{**RANKINGS[0], "final_ranking": [1]}, RANKINGS[0]]  # without media
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=r"2 of 2 rows.*rank_count 1, image_missing 1"):
            prepare(MmRlhf(data_dir=tmp_path, config="rankings"), tmp_path)

    def test_unknown_names(self, prepared):
        with pytest.raises(DataError, match="cannot read tfds:rlaif_w: "):
            read_records("tfds:rlaif_w", prepared)
        with pytest.raises(DataError, match="cannot read tfds:rlaif_v: "):
            read_records("tfds:rlaif_v#validation", prepared)

    @pytest.mark.slow
    def test_without_tensorflow(self, prepared):
        script = (
            "import sys; from mmpo_jax.data.readers import read_records; "
            f"assert len(read_records('tfds:rlaif_v', {str(prepared)!r})[0]) == 13; "
            "assert not any(name.split('.')[0] == 'tensorflow' for name in sys.modules)"
        )
        subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def image_and_turns(record):
    responses = [turn for response in record.responses for turn in response.turns]
    return record.images[0].read(), (*record.prompt, *responses)


RLAIF_V = {
    "ds_name": "RLAIF-V",
    "image": {"bytes": png(), "path": "1.jpg"},
    "question": "What?",
    "chosen": "a",
    "rejected": "b",
    "origin_dataset": "COCO",
    "origin_split": "{}",
    "image_path": "1.jpg",
}
RANKINGS = [
    {
        "id": "a",
        "image": "short/a.png",
        "question": "What?",
        "answer": "gold",
        "models_output": ["a", "b", "c"],
        "ethical": [0.5, None, 3],
        "final_ranking": [1, 2, 2],
        "score_reasons": ["good", None, "bad"],
        "ranking_reason": "so",
    },
    {"id": "b", "video": "video/clip", "question": "What?", "models_output": ["a", "b"]},
]
PAIRS = [
    {
        "id": "p",
        "image": "short/a.png",
        "prompt": "What?",
        "chosen": "a",
        "rejected": rejected,
        "chosen_reason": reason,
        "rejected_reason": "bad",
    }
    for rejected, reason in (("b", "good"), ("c", None))
]


def prepare(builder, manual):
    config = tfds.download.DownloadConfig(manual_dir=manual)
    builder.download_and_prepare(download_config=config)
