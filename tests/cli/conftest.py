"""What tests of the command line share."""

import pytest
import yaml
from helpers import meshes
from helpers.cli_recipes import recipe

from mmpo_jax import cli

MESH_USERS = (
    "alignment.align",
    "commands.evaluate",
    "commands.generate",
    "commands.score",
    "commands.train",
)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """One device, which is faster; and `start_jax` would move the tests' compilation cache."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    mesh = meshes.one_device()
    for module in MESH_USERS:
        monkeypatch.setattr(f"mmpo_jax.{module}.make_mesh", lambda **sizes: mesh)


@pytest.fixture
def mmpo(tmp_path, capsys):
    """Runs a subcommand on a recipe given as a dict; returns (status, stdout, stderr)."""

    def mmpo(command, recipe, *overrides):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        status = cli.main([command, str(path), *overrides])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return mmpo


@pytest.fixture
def refused(mmpo):
    """The one message of a command that must fail."""

    def refused(command, recipe, *overrides):
        status, _, err = mmpo(command, recipe, *overrides)
        assert status == 1
        assert "Traceback" not in err
        assert err.count(f"mmpo {command}: ") == 1
        return err[err.index(f"mmpo {command}: ") :]

    return refused


@pytest.fixture
def generation(tmp_path, tiny_folder):
    return recipe(
        tmp_path,
        tiny_folder,
        sampling={"num_samples": 2, "max_new_tokens": 4, "batch_size": 8},
    )
