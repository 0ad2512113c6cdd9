"""The TFDS data set, written and read in a process that cannot see TensorFlow."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mmpo_jax.picture_world
from mmpo_jax.picture_world.metrics import caption_metrics
from mmpo_jax.picture_world.render import png_bytes, render
from mmpo_jax.picture_world.tfds_builder import PictureWorld, PictureWorldConfig, make_example
from mmpo_jax.picture_world.world import Scene, sample_scene

ROOT = Path(mmpo_jax.__file__).parents[1]

# Hides TensorFlow from the import system, as where it is not installed.
WITHOUT_TENSORFLOW = """
import sys
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_all_but_tensorflow(name, path=None, target=None):
    return None if name.split(".")[0] == "tensorflow" else find(name, path, target)

PathFinder.find_spec = find_all_but_tensorflow
try:
    import tensorflow
except ImportError:
    pass
else:
    raise AssertionError("TensorFlow is not hidden")
"""
WRITE_AND_READ = """
import json
import grain
import numpy as np
import tensorflow_datasets as tfds
from mmpo_jax.picture_world.render import render
from mmpo_jax.picture_world.tfds_builder import PictureWorld
from mmpo_jax.picture_world.world import Scene

folder = sys.argv[1]
PictureWorld(data_dir=folder, config="tiny").download_and_prepare()
source = tfds.data_source("picture_world/tiny", split="train", data_dir=folder)
dataset = grain.MapDataset.source(source)
assert len(dataset) == 32
for example in dataset:
    scene = Scene.from_dict(json.loads(example["scene"]))
    assert example["image"].dtype == np.uint8
    assert np.array_equal(example["image"], np.asarray(render(scene)))
    assert len(example["questions"]) == len(example["answers"]) == 8
assert len({example["id"] for example in dataset}) == 32
assert not any(name.split(".")[0] == "tensorflow" for name in sys.modules)
print("fine")
"""


def test_works_without_tensorflow(tmp_path):
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW + WRITE_AND_READ, str(tmp_path)]
    process = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.stdout.strip().endswith("fine"), process.stderr[-3000:]


def test_splits_have_the_configured_sizes(tmp_path):
    config = PictureWorldConfig(name="sizes", train=3, align=2, validation=0, test=1, image_size=32)
    builder = PictureWorld(data_dir=tmp_path, config=config)
    builder.download_and_prepare()
    sizes = {name: split.num_examples for name, split in builder.info.splits.items()}
    assert sizes == {"train": 3, "align": 2, "test": 1}
    example = builder.as_data_source(split="test")[0]
    assert example["image"].shape == (32, 32, 3)
    scene = Scene.from_dict(json.loads(example["scene"]))
    assert scene == sample_scene("test", 0, 0)
    assert np.array_equal(example["image"], np.asarray(render(scene, 32)))


def test_example_fields():
    config = PictureWorldConfig(name="fields", questions_per_scene=6, seed=5)
    example = make_example("align", 7, config)
    assert example == make_example("align", 7, config)
    scene = sample_scene("align", 5, 7)
    assert example["id"] == "align-5-7"
    assert example["image"] == png_bytes(scene, 48)
    assert example["answers"].count("yes") == example["answers"].count("no") == 3


@pytest.mark.parametrize(("split", "rate"), [("train", 1.0), ("test", 0.0)])
def test_only_training_captions_hallucinate(split, rate):
    config = PictureWorldConfig(name="rate", hallucination_rate=1.0)
    examples = [make_example(split, i, config) for i in range(20)]
    scenes = [Scene.from_dict(json.loads(example["scene"])) for example in examples]
    metrics = caption_metrics([example["caption"] for example in examples], scenes)
    assert metrics["chair_s"] == rate
