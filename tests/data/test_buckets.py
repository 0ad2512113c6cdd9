"""Data in buckets: as the same files on this machine, in every kind of file."""

import dataclasses
import io
import json
import os

import pytest
from helpers.buckets import empty_bucket
from PIL import Image

from mmpo_jax.commands.data_convert import convert_data
from mmpo_jax.core import known_files
from mmpo_jax.core.errors import DataError
from mmpo_jax.data import row_parts
from mmpo_jax.data.media_check import check_images
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.row_stage import tokenized_rows
from mmpo_jax.data.sources import LearnedFile
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.recipes.training import CachedReference
from mmpo_jax.training.row_use import LearnedUse

FOLDER = "gs://bucket/data"


def picture(grey) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (5, 3), (grey, 0, 0)).save(file, "PNG")
    return file.getvalue()


ROWS = [
    {"id": str(i), "images": [f"images/{i}.png"], "prompt": "What?", "chosen": "a", "rejected": "b"}
    for i in range(3)
]


@pytest.fixture
def bucket(monkeypatch):
    system = empty_bucket(monkeypatch)
    for i in range(len(ROWS)):
        system.pipe_file(f"{FOLDER}/images/{i}.png", picture(i))
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    system.pipe_file(f"{FOLDER}/rows.jsonl", lines.encode())
    return system


def contents(records) -> list:
    """Records without the names of their images, which depend on the place."""
    return [
        (dataclasses.replace(record, images=()), [image.fingerprint() for image in record.images])
        for record in records
    ]


def test_rows_and_images(bucket):
    records, skipped = read_records(f"{FOLDER}/rows.jsonl")
    assert not skipped
    assert [record.images[0].read() for record in records] == [picture(i) for i in range(3)]
    good, skipped = check_images(records)
    assert len(good) == 3
    assert not skipped


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "array_record"])
def test_every_kind_of_file_there_and_back(bucket, kind, tmp_path):
    there, here = f"{FOLDER}/made.{kind}", tmp_path / f"made.{kind}"
    convert_data(f"{FOLDER}/rows.jsonl", there, format="trl")
    convert_data(there, os.fspath(here), format="trl")
    expected = contents(read_records(f"{FOLDER}/rows.jsonl")[0])
    assert contents(read_records(there)[0]) == expected
    assert contents(read_records(here)[0]) == expected


def test_what_is_missing_is_named(bucket):
    bucket.rm(f"{FOLDER}/images/1.png")
    records, skipped = read_records(f"{FOLDER}/rows.jsonl")
    assert [record.id for record in records] == ["0", "2"]
    assert skipped[0].reason == "image_missing"
    assert FOLDER in skipped[0].detail
    assert "images/1.png" in skipped[0].detail
    with pytest.raises(DataError, match=f"cannot read {FOLDER}/nothing.jsonl"):
        read_records(f"{FOLDER}/nothing.jsonl")


def test_a_folder_of_files(bucket):
    for part, row in enumerate(ROWS):
        row = row | {"images": [f"../images/{part}.png"]}
        bucket.pipe_file(f"{FOLDER}/parts/{part}.jsonl", json.dumps(row).encode())
    records, skipped = read_records(f"{FOLDER}/parts", image_root=FOLDER)
    assert len(skipped) == 3  # "../" leaves the root
    assert not records
    for part, row in enumerate(ROWS):
        bucket.pipe_file(f"{FOLDER}/parts/{part}.jsonl", json.dumps(row).encode())
    assert contents(read_records(f"{FOLDER}/parts", image_root=FOLDER)[0]) == contents(
        read_records(f"{FOLDER}/rows.jsonl")[0]
    )


def test_rows_are_kept_and_images_asked_after(bucket, tiny_processor, tmp_path, monkeypatch):
    """Of files in a bucket size and time count; an output there has its parts on this machine."""
    monkeypatch.setenv("MMPO_CACHE", os.fspath(tmp_path))
    use = LearnedUse.of([make_term("dpo")], CachedReference())
    made = []
    make_bytes = row_parts._part_bytes
    monkeypatch.setattr(row_parts, "_part_bytes", lambda *a: made.append(1) or make_bytes(*a))
    for count, shown in ((1, 0), (1, 0), (2, 1)):
        if shown:
            bucket.pipe_file(f"{FOLDER}/images/0.png", picture(shown))
        monkeypatch.setattr(known_files, "_recent", type(known_files._recent)())
        rows = tokenized_rows(
            LearnedFile(path=f"{FOLDER}/rows.jsonl"),
            use,
            tiny_processor,
            None,
            folder=f"{FOLDER}/out/data",
            name="rows",
            skipped_file=f"{FOLDER}/out/skipped.jsonl",
            workers=1,
        )
        assert len(made) == count
        assert [row.images[0].read() for row in rows] == [picture(shown), picture(1), picture(2)]
