"""`mmpo train` from records to a model, one run of each mechanism, stopped and gone on with."""

import dataclasses
import io
import shutil

import numpy as np
import pytest
from helpers import meshes
from PIL import Image

from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.checkpoints.steps import CheckpointError
from mmpo_jax.commands import train as run
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.records import ImageRef, Record, Response, Span, Turn
from mmpo_jax.data.sources import FileData, RecordSet
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.training.metrics import read_metrics

QUESTION = (Turn("user", "what is in the picture ?"),)
CORRECTIONS = (Turn("user", "is there a star ?"), Turn("assistant", "no"))


def image(shade):
    file = io.BytesIO()
    Image.new("RGB", (20, 16), (shade, 40, 80)).save(file, "PNG")
    return ImageRef(str(shade), file.getvalue())


def records():
    pair = (Response.of("a red circle and a ring", 1), Response.of("two blue stars and a ring", 2))
    return [Record(f"row-{number}", (image(20 * number),), QUESTION, pair) for number in range(8)]


def per_side(record, number):
    own = dataclasses.replace(record.responses[1], images=(image(20 * number + 10),))
    return dataclasses.replace(record, responses=(record.responses[0], own))


def with_spans(record, number):
    spans = ((Span(2, 5, phrase=number),), (Span(0, 8, phrase=number),))
    responses = tuple(
        dataclasses.replace(response, spans=own)
        for response, own in zip(record.responses, spans, strict=True)
    )
    return dataclasses.replace(record, responses=responses)


def with_corrections(record, number):
    best = record.responses[0]
    best = dataclasses.replace(best, turns=(*best.turns, *CORRECTIONS))
    return dataclasses.replace(record, responses=(best, *record.responses[1:]))


def plain(record, number):
    return record


MECHANISMS = {
    "mdpo": ({"type": "mdpo"}, "cached", plain),
    "per-side images": ({"type": "dpo"}, "cached", per_side),
    "tdpo": ({"type": "tdpo2"}, "online", plain),
    "ddpo": ({"type": "ddpo"}, "cached", with_spans),
    "nsft": ({"type": "nsft"}, "none", with_corrections),
}


@pytest.fixture
def train(tmp_path, tiny_folder, monkeypatch):
    """(objective, reference, how records are) -> (parameters, metrics) of two steps."""

    def train(objective, reference, change, output="out"):
        made = [change(record, number) for number, record in enumerate(records())]
        monkeypatch.setattr(FileData, "load", lambda *_, **__: RecordSet("rows", made, [], 0.0))
        monkeypatch.setattr(run, "can_be_stored", lambda data: False)  # there is no such file
        monkeypatch.setattr(run, "make_mesh", lambda **_: meshes.one_device())
        recipe = TrainRecipe.model_validate(
            {
                "output": str(tmp_path / output),
                "model": str(tiny_folder),
                "lengths": {"prompt": [24], "response": [24]},
                "data": {"source": "file", "path": "rows.jsonl"},
                "training": {
                    "objective": objective,
                    "reference": {"type": reference},
                    "optimizer": {"learning_rate": 1e-3},
                    "batch_size": 4,
                    "micro_batch_size": 4,
                    "log_every": 1,
                    "save_every": 1,
                },
            }
        )
        params = flatten(load_model(run_training(recipe))[1])
        return params, read_metrics(str(tmp_path / output / "metrics.jsonl"))

    return train


@pytest.mark.parametrize("name", MECHANISMS)
@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(train, tmp_path, name):
    params, metrics = train(*MECHANISMS[name])
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(np.isfinite(row["loss"]) and row["grad_norm"] > 1e-3 for row in metrics)
    if name in ("tdpo", "ddpo", "per-side images"):
        assert metrics[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    if name == "mdpo":
        assert metrics[0]["loss"] == pytest.approx(3 * np.log(2), abs=1e-6)
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "2")
    again, _ = train(*MECHANISMS[name])
    for path, leaf in params.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)


@pytest.mark.slow
def test_what_the_data_say_makes_it_another_run(train):
    """Tokens are the same; spans are not."""
    train(*MECHANISMS["ddpo"])
    objective, reference, _ = MECHANISMS["ddpo"]
    with pytest.raises(CheckpointError, match=r"recipe: data\.fields\.0; give"):
        train(objective, reference, plain)
