"""Real weights, and the commands on one device."""

import json

import pytest
from helpers import meshes, smollm2

from mmpo_jax import cli

SHORT = 6
"""Layers where speed matters."""


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Eight simulated devices would compute every row eight times as slowly."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    mesh = meshes.one_device()
    for module in ("score", "generate", "train"):
        monkeypatch.setattr(f"mmpo_jax.commands.{module}.make_mesh", lambda **sizes: mesh)


@pytest.fixture(scope="session")
def short_folder():
    """SmolLM2 cut to its first layers."""
    return smollm2.make_folder(SHORT)


@pytest.fixture(scope="session")
def short_theirs(short_folder):
    """It in transformers, for tests that change nothing of it."""
    return smollm2.load_theirs(short_folder)


@pytest.fixture
def mmpo(tmp_path, capsys):
    """Runs `score` or `generate` on rows; the rows it writes."""

    def mmpo(command, model, rows, *more):
        data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = ["--model", str(model), "--data", str(data), "--output", str(out), *more]
        status = cli.main([command, *flags])
        assert status == 0, capsys.readouterr().err
        return [json.loads(line) for line in out.read_text().splitlines()]

    return mmpo


@pytest.fixture(scope="session")
def kind_case(tmp_path_factory):
    """name of a kind -> (the kind, a `checks.Case` of it, its tokenizer), made once."""
    pytest.importorskip("trl")
    import transformers
    from helpers.kinds import KINDS, make_checkpoint

    made = {}

    def kind_case(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("kinds") / name
            case = make_checkpoint(folder, KINDS[name])
            made[name] = KINDS[name], case, transformers.AutoTokenizer.from_pretrained(folder)
        return made[name]

    return kind_case


@pytest.fixture(scope="session")
def picture_folder(tmp_path_factory):
    """A folder with the pictures 0.png and 1.png."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("rows")
    for number, size in enumerate([(40, 30), (25, 60)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder
