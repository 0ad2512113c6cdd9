"""What `mmpo score` and `mmpo generate` compute in, and numbers that it does not hold."""

import json
import shutil

import pytest
import safetensors.numpy
from helpers import tiny

from mmpo_jax import cli

PAIR = {"id": "a", "prompt": "is there a star ?", "chosen": "yes", "rejected": "a red star"}


@pytest.fixture
def run(tmp_path):
    """Runs a command on the pair; the rows it writes."""

    def run(command, model, *more):
        data, out = tmp_path / "pair.jsonl", tmp_path / "out.jsonl"
        data.write_text(json.dumps(PAIR))
        flags = ["--model", str(model), "--data", str(data), "--output", str(out), *more]
        assert cli.main([command, *flags]) == 0
        return [json.loads(line) for line in out.read_text().splitlines()]

    return run


@pytest.mark.slow
def test_float16_activations_that_pass_its_largest_number(run, tmp_path):
    """Generation and scoring hold them, as from the same weights in float32."""
    config = tiny.make_config(text={"max_position_embeddings": 512})
    folder = tiny.make_folder(tmp_path / "half", config, seed=3)
    file = folder / "model.safetensors"
    tensors = {
        key: (value * 40 if ".mlp." in key and "language_model" in key else value).astype("float16")
        for key, value in safetensors.numpy.load_file(file).items()
    }
    found = []
    for dtype in ("float16", "float32"):
        safetensors.numpy.save_file({k: v.astype(dtype) for k, v in tensors.items()}, file)
        more = "--temperature", "0", "--num-samples", "1", "--max-new-tokens", "8"
        (generated,) = run("generate", folder, *more)
        assert generated["responses"][0]
        found.append((generated["responses"], run("score", folder)[0]["logps"]))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("command", "what"), [("score", "log-probs of rows a"), ("generate", "logits of rows a")]
)
def test_what_is_not_finite(tiny_folder, tmp_path, capsys, command, what):
    """It is told by its rows, and no line is written."""
    folder = tmp_path / "large"
    shutil.copytree(tiny_folder, folder)
    file = folder / "model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors["language_model.lm_head.weight"] *= 1e38
    safetensors.numpy.save_file(tensors, file)
    (tmp_path / "rows.jsonl").write_text(json.dumps(PAIR))
    out = tmp_path / "out.jsonl"
    files = "--data", str(tmp_path / "rows.jsonl"), "--output", str(out)
    assert cli.main([command, "--model", str(folder), *files]) == 1
    told = capsys.readouterr().err
    assert f"the {what} are not finite in float32: the model's activations" in told
    assert told.rstrip().endswith("overflow; look at the weights")
    assert not out.exists()
