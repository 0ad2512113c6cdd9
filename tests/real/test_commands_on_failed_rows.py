"""Rows that once went wrong, through `mmpo data check`, `train` and `generate`."""

from __future__ import annotations

import base64
import json
import re
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")
import failed_rows
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import row_cases as rows
import safetensors.torch
import smollm2
import torch
import yaml
from kinds import KINDS
from their_rows import ids_of, is_learned, their_cuts

from mmpo_jax import cli
from mmpo_jax.data.check import check_data

pytestmark = pytest.mark.parity

LENGTHS = {"prompt": [64], "response": [64]}
SFT, DPO = {"type": "sft"}, {"type": "dpo"}


@pytest.fixture
def write(tmp_path):
    """Writes rows; the file."""

    def write(*rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


@pytest.fixture
def train(tmp_path, write):
    """A step on rows with `mmpo train`; (its metrics, the rows that it left out)."""

    def train(model, objective, *rows, **data):
        path = data.pop("path", None) or write(*rows)
        recipe = {
            "output": str(tmp_path / "run"),
            "model": str(model),
            "data": {"source": "file", "path": str(path), **data},
            "lengths": LENGTHS,
            "training": {"objective": objective, "batch_size": 4, "max_steps": 1},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 0
        (step,) = lines(tmp_path / "run" / "metrics.jsonl")
        return step, lines(tmp_path / "run" / "rejected_rows.jsonl")

    return train


@pytest.fixture(scope="module")
def with_template(kind_case, tmp_path_factory):
    """The checkpoint of the text family with another chat template."""

    def with_template(template):
        folder = tmp_path_factory.mktemp("template") / "model"
        shutil.copytree(kind_case(failed_rows.TEXT)[1].folder, folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return with_template


@pytest.fixture(scope="module")
def chatml(with_template):
    """The text family with SmolLM2's own template, which writes all answers alike."""
    return with_template((smollm2.make_folder(6) / "chat_template.jinja").read_text())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("folder", list(failed_rows.FOLDERS))
def test_check_takes_them_all(folder, write, picture_folder):
    """Also in one file, whatever they are for."""
    cases = failed_rows.FOLDERS[folder]
    path = write(*({"id": name} | case.row for name, (_, case) in cases.items()))
    report = check_data(str(path), image_root=str(picture_folder))
    assert f"{len(cases)} rows, {len(cases)} can be used" in report
    shown = [json.dumps(case.prompt).count(json.dumps(rows.IMAGE)) for _, case in cases.values()]
    assert (f"images: {sum(shown)} of" if any(shown) else "images: none") in report
    assert f"without an image or video: {shown.count(0)}\n" in report or all(shown)


@pytest.mark.parametrize(
    "column",
    [
        pa.array([b"0.png"]),
        pa.array([[b"0.png"]]),
        pa.array([{"bytes": b"0.png", "path": None}]),
        pa.array([{"bytes": None, "path": "0.png"}]),
        pa.array(["0.png"]),
    ],
)
@pytest.mark.parametrize("kind", [pa.binary(), pa.string(), pa.struct({"bytes": pa.binary()})])
def test_an_image_beside_empty_images_in_parquet(column, kind, picture_folder, tmp_path):
    encoded = (picture_folder / "0.png").read_bytes()
    image = json.loads(json.dumps(column.to_pylist(), default=bytes.decode))
    image = pa.array(
        [
            encoded if entry == "0.png" and pa.types.is_binary(column.type) else entry
            for entry in column.to_pylist()
        ]
    )
    del image
    table = pa.table(
        {
            **{name: pa.array([name]) for name in ("prompt", "chosen", "rejected")},
            "image": column,
            "images": pa.array([[]], pa.list_(kind)),
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    report = check_data(str(tmp_path / "rows.parquet"), image_root=str(picture_folder))
    assert "images: 1 of 1 sizes, 40 x 30" in report
