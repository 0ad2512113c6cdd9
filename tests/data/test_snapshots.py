"""Files as they come: JSON under any ending, snapshots of the hub, splits by their names."""

import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.files import file_rows
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.snapshots import split_of

ROWS = [{"id": str(n), "prompt": f"{n}?", "chosen": "a", "rejected": "b"} for n in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
LIST = json.dumps(ROWS)


def ids(path):
    return [row["id"] for _, row in file_rows(path)]


def write(folder, *names, rows=ROWS):
    """Files whose rows say which of them they are from."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        named = [row | {"id": name} for row in rows[:1]]
        if name.endswith(".parquet"):
            pq.write_table(pa.Table.from_pylist(named), path)
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in named))


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.ndjson", "ROWS.JSON"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "text",
    [LINES, LIST, f"\n \n{LIST}\n", json.dumps(ROWS, indent=2), "\ufeff" + LINES, "\ufeff" + LIST],
)
def test_lines_and_lists_by_what_they_begin_with(tmp_path, name, packed, text):
    path = tmp_path / (name + ".gz" if packed else name)
    path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
    assert ids(path) == ["0", "1", "2"]


@pytest.mark.parametrize("bad", ["[1]", "[", "1", "{", '{"prompt": "a",', '"b"}', '[{"a": 1}'])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_bad_first_line_is_one_row(tmp_path, name, bad):
    (tmp_path / name).write_text(f"{bad}\n{LINES}")
    records, skipped = read_records(tmp_path / name)
    assert (len(records), [row.row for row in skipped]) == (3, [1])


@pytest.mark.parametrize("text", [json.dumps({"data": ROWS}, indent=1), LIST[:-1], "[\n1\n]"])
def test_what_is_neither_lines_nor_a_list_of_rows(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    if text.endswith("]"):
        _, skipped = read_records(tmp_path / "rows.json")
        assert [row.reason for row in skipped] == ["bad_json"]
    else:
        with pytest.raises(DataError, match=r"cannot read .*rows\.json"):
            read_records(tmp_path / "rows.json")


def test_rows_of_a_list_between_lines_with_commas(tmp_path):
    text = "[\n" + "\n,\n".join(json.dumps(ROWS[n % 3]) for n in range(30)) + "\n]\n"
    (tmp_path / "rows.json").write_text(text)
    assert len(ids(tmp_path / "rows.json")) == 30


def test_a_snapshot_of_the_hub(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path, *(f"data/train-0000{n}-of-00002.parquet" for n in (1, 0)))
    write(tmp_path, "data/test-00000-of-00001.parquet", ".cache/train.parquet", "data/.x.parquet")
    (tmp_path / "README.md").write_text("A data set")
    (tmp_path / ".gitattributes").write_text("")
    (tmp_path / "dataset_infos.json").write_text("{}")
    assert ids(tmp_path) == [f"data/train-0000{n}-of-00002.parquet" for n in (0, 1)]
    assert "reading the split train and not test" in caplog.text
    assert ids(f"{tmp_path}#test") == ["data/test-00000-of-00001.parquet"]
    with pytest.raises(DataError, match="the splits test, train; there is no dev; give one as"):
        ids(f"{tmp_path}#dev")


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["train.jsonl", "test.jsonl"], ["train.jsonl"]),
        (["train.json", "validation.jsonl"], ["train.json"]),
        (["train/0.jsonl", "train/1.jsonl", "val/0.jsonl"], ["train/0.jsonl", "train/1.jsonl"]),
        (["a/x.jsonl", "b/y.jsonl", "z.jsonl"], ["a/x.jsonl", "b/y.jsonl", "z.jsonl"]),
        (["test.jsonl"], ["test.jsonl"]),
        (["train.jsonl", "more.jsonl", "test.jsonl"], ["more.jsonl", "train.jsonl"]),
        (["pairs.jsonl", "val/0.jsonl"], ["pairs.jsonl"]),
        (["pairs.jsonl", "train.jsonl"], ["pairs.jsonl", "train.jsonl"]),
        (["train_0.jsonl", "train_1.jsonl", "dev.jsonl"], ["train_0.jsonl", "train_1.jsonl"]),
        (
            ["data/train_prefs-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet"],
            ["data/train_prefs-00000-of-00001.parquet"],
        ),
    ],
)
def test_splits(tmp_path, names, read):
    write(tmp_path, *names)
    assert ids(tmp_path) == read


def test_a_split_that_cannot_be_chosen(tmp_path):
    write(tmp_path, *(f"{s}-00000-of-00001.parquet" for s in ("train_sft", "train_prefs", "test")))
    with pytest.raises(DataError, match=r"test, train_prefs, train_sft; give one as .*#test"):
        ids(tmp_path)
    assert ids(f"{tmp_path}#train_sft") == ["train_sft-00000-of-00001.parquet"]
    write(tmp_path / "plain", "a.jsonl")


def test_files_that_all_say_no_split_are_train(tmp_path):
    write(tmp_path, "data.jsonl")
    for split in ("", "#train", "#training"):
        assert ids(f"{tmp_path}{split}") == ["data.jsonl"]
    with pytest.raises(DataError, match="files without splits; leave the split test out"):
        ids(f"{tmp_path}#test")


def test_images_of_a_split_are_relative_to_its_folder(tmp_path):
    write(tmp_path / "set", "train.jsonl", "test.jsonl", rows=[ROWS[0] | {"image": "a.png"}])
    (tmp_path / "set" / "a.png").write_bytes(b"not decoded")
    (record,), _ = read_records(f"{tmp_path}/set#test")
    assert record.images[0].path == tmp_path / "set" / "a.png"


def test_a_name_with_a_number_sign(tmp_path):
    write(tmp_path / "my#set", "rows.jsonl")
    assert ids(tmp_path / "my#set") == ["rows.jsonl"]
    assert ids(tmp_path / "my#set" / "rows.jsonl") == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("data/train-00000-of-00012.parquet", "train"),
        ("en/dev.jsonl", "validation"),
        ("validation/x.jsonl", "validation"),
        ("training_set.jsonl", "train"),
        ("trainer.jsonl", None),
        ("pairs.jsonl", None),
    ],
)
def test_names_that_say_a_split(name, split):
    assert split_of(name) == split


def test_files_that_say_no_split_beside_others(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path, "pairs.jsonl", "test.jsonl")
    assert ids(tmp_path) == ["pairs.jsonl"]
    assert "1 files that say no split count as train" in caplog.text
    assert "reading the split train and not test" in caplog.text
    assert ids(f"{tmp_path}#test") == ["test.jsonl"]


def test_a_split_of_one_file(tmp_path):
    write(tmp_path, "rows.jsonl")
    with pytest.raises(DataError, match=r"rows\.jsonl is one file and has no splits; leave #test"):
        ids(f"{tmp_path}/rows.jsonl#test")
