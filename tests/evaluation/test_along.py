"""A training that is measured by benchmarks at its steps, and goes on after a kill."""

import json

import pytest
import yaml

from mmpo_jax import cli
from mmpo_jax.core.files import read_json
from mmpo_jax.evaluation import along
from mmpo_jax.training.metrics import read_metrics, reproducible

QUESTION = "is there a red star ?"
WORLD = {"type": "picture_world", "size": 4, "questions": 2, "image_size": 24, "max_new_tokens": 4}


@pytest.fixture
def train(tiny_folder, tmp_path, monkeypatch):
    """`mmpo train` on pairs, measured every two of four steps; gives the exit status."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    rows = [{"prompt": QUESTION, "chosen": "yes .", "rejected": f"{n} rings ."} for n in range(16)]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train(output, **changes):
        recipe = {
            "model": str(tiny_folder),
            "output": str(tmp_path / output),
            "data": {"source": "file", "path": str(data)},
            "lengths": {"prompt": [16], "response": [16]},
            "training": {
                "batch_size": 8,
                "max_steps": 4,
                "epochs": 2,
                "log_every": 1,
                "save_every": 1,
                "optimizer": {"learning_rate": 1e-2},
            },
            "evaluation": WORLD | {"batch_size": 8},
            "evaluate_every": 2,
            **changes,
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return cli.main(["train", str(tmp_path / "recipe.yaml")])

    return train


@pytest.mark.slow
def test_a_training_is_measured_and_goes_on(train, tmp_path, monkeypatch, capsys):
    assert train("whole") == 0
    rows = read_metrics(tmp_path / "whole" / "metrics.jsonl")
    key = "picture_world/sampled/recall"
    assert [row["step"] for row in rows if key in row] == [0, 2, 4]
    tax = read_json(tmp_path / "whole" / "tax.json")
    assert tax["compared"] == ["start", "step 2", "step 4"] and tax["result"] == "step 4"
    values = [row[key] for row in rows if key in row]
    (told,) = [row for row in tax["rows"] if row["metric"] == "sampled/recall"]
    assert [cell["value"] for cell in told["cells"]] == pytest.approx(values)
    assert "step 4" in capsys.readouterr().out

    class Killed(BaseException):
        pass

    def stop(sections, at):
        if at.folder.endswith("step-000002"):
            raise Killed
        return original(sections, at)

    original = along.measure
    with monkeypatch.context() as patch:
        patch.setattr(along, "measure", stop)
        with pytest.raises(Killed):
            train("killed")
    assert train("killed") == 0
    again = read_metrics(tmp_path / "killed" / "metrics.jsonl")
    assert [*map(reproducible, again)] == [*map(reproducible, rows)]
    for name in ("tax.json", "evaluation/step-000002/picture_world.answers.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_adapters_are_measured_with_what_they_change(train, tmp_path):
    """Their base alone would say the same at every step."""
    lora = {"target": "language_model/layers/.*", "rank": 4, "alpha": 400}
    training = {"batch_size": 8, "max_steps": 4, "log_every": 1, "lora": lora}
    training |= {"epochs": 4, "optimizer": {"learning_rate": 1e-1}}
    assert train("adapters", training=training, evaluate_every=None) == 0
    folder = tmp_path / "adapters" / "evaluation"
    assert {path.name for path in folder.iterdir()} == {"step-000000", "step-000004"}
    before, after = (
        (folder / step / "picture_world.answers.jsonl").read_text().splitlines()
        for step in ("step-000000", "step-000004")
    )
    assert [json.loads(a)["id"] for a in before] == [json.loads(b)["id"] for b in after]
    assert before != after
