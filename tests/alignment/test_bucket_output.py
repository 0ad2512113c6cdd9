"""Whole small runs whose output is in a bucket: the files of a local run, also after a kill."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import buckets
from helpers.run_files import contents
from helpers.small_rounds import make_recipe
from PIL import Image

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.commands.convert import convert
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten
from mmpo_jax.recipes.train_recipe import TrainRecipe

pytestmark = pytest.mark.usefixtures("stubs")

SAME = ("*.parquet", "*.safetensors", "metrics.jsonl", "*config.json", "README.md")


class Killed(BaseException):
    """What ends a run at once."""


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """The folder of what is written to gs://bucket; no file may appear at ./gs:."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "cache"))
    buckets.file_bucket(monkeypatch, tmp_path / "buckets")
    write_data(tmp_path / "buckets" / "data")
    yield tmp_path / "buckets" / "bucket"
    assert os.listdir(tmp_path / "here") == []


def die_after(patch, step):
    """Kills a run, as far as it can tell, when it has saved a step."""

    def save(self, number, *args):
        original(self, number, *args)
        if number == step:
            self.manager.wait_until_finished()
            raise Killed

    original = Checkpoints.save
    patch.setattr(Checkpoints, "save", save)


def files_of(folder: Path) -> set[str]:
    """All files but those of Orbax and TensorBoard, whose names hold times, and tokenised rows,
    which are mapped into memory from the cache."""
    found = [str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()]
    return {
        file for file in found if not {"checkpoints", "tensorboard", "data"} & {*Path(file).parts}
    }


def assert_same(there: Path, here: Path):
    assert files_of(there) == files_of(here)
    compared = [file for pattern in SAME for file in here.rglob(pattern)]
    assert len(compared) > 5
    for file in compared:
        name = file.relative_to(here)
        assert contents(there / name) == contents(file), name


def write_data(folder: Path):
    """Pairs about one picture."""
    folder.mkdir(parents=True)
    Image.new("RGB", (20, 16), (120, 40, 80)).save(folder / "a.png")
    rows = [
        {"id": str(i), "images": ["a.png"], "prompt": "what is there ?"}
        | {"chosen": f"{i} red circles", "rejected": f"{i} blue stars"}
        for i in range(24)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train_recipe(output, model):
    return TrainRecipe.model_validate(
        {
            "output": str(output),
            "model": str(model),
            "data": {"source": "file", "path": "gs://data/rows.jsonl", "format": "trl"},
            "lengths": {"prompt": [16], "response": [24]},
            "training": {
                "objective": {"type": "dpo"},
                "lora": {"rank": 2},
                "batch_size": 8,
                "max_steps": 3,
                "log_every": 1,
                "save_every": 1,
            },
        }
    )


def test_training(bucket, tmp_path, tiny_folder, monkeypatch):
    """Killed once; what comes out can be named as a model, and converted."""
    run_training(train_recipe(tmp_path / "local", tiny_folder))
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_after(patch, 2)
        run_training(train_recipe("gs://bucket/run", tiny_folder))
    folder = run_training(train_recipe("gs://bucket/run", tiny_folder))
    assert folder == "gs://bucket/run/model"
    assert_same(bucket / "run", tmp_path / "local")
    assert (bucket / "run" / "checkpoints" / "3" / "commit_success.txt").exists()
    assert list((bucket / "run" / "tensorboard").iterdir())
    of_run = flatten(load_start("gs://bucket/run").params)
    for path, leaf in flatten(load_start(folder).params).items():
        np.testing.assert_array_equal(leaf, of_run[path], path)
    convert("gs://bucket/run", str(tmp_path / "converted"))
    for name in ("model.safetensors", "README.md"):
        ours, theirs = (tmp_path / where / name for where in ("converted", "local/model"))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.slow
def test_alignment(bucket, finished, tiny_folder, monkeypatch):
    """Killed while the second round trains."""
    recipe = make_recipe("gs://bucket/run", tiny_folder)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        die_after(patch, 2)
        run_alignment(recipe)
    run_alignment(recipe)
    assert_same(bucket / "run", finished[0])


def test_what_orbax_does_not_write_to_is_refused(bucket, tiny_folder):
    with pytest.raises(MmpoError, match=r"s3://b/run.*gs:// alone"):
        run_training(train_recipe("s3://b/run", tiny_folder))


def test_a_missing_package_is_named(bucket, tiny_folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(MmpoError, match="google-cloud-storage, which is not installed"):
        run_training(train_recipe("gs://bucket/run", tiny_folder))
