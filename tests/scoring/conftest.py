"""What tests of `mmpo score` and `mmpo generate` share."""

import pytest
from helpers import meshes
from helpers.score_rows import read_rows

from mmpo_jax import cli
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    mesh = meshes.one_device()
    for module in ("score", "generate"):
        monkeypatch.setattr(f"mmpo_jax.commands.{module}.make_mesh", lambda **sizes: mesh)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number in range(2):
        (folder / f"{number}.png").write_bytes(png_bytes(sample_scene("test", 0, number)))
    return folder


@pytest.fixture
def mmpo(tmp_path, capsys):
    """Runs a command whose flags are given; the rows it writes."""

    def mmpo(command, model, data, *more):
        out = tmp_path / "out.jsonl"
        flags = ["--model", str(model), "--data", str(data), "--output", str(out), *more]
        status = cli.main([command, *flags])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        assert str(out) in captured.out
        assert not (tmp_path / "out.parts").exists()
        return read_rows(out)

    return mmpo


@pytest.fixture
def refused(tmp_path, capsys):
    """The message of a command that must fail."""

    def refused(*arguments):
        assert cli.main([str(argument) for argument in arguments]) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err
        return err

    return refused
