"""The example scripts run as they are, from the library's public names."""

import importlib.util
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import optax
import PIL.Image
import pytest
from helpers import meshes

import mmpo_jax as mm
from mmpo_jax import api
from mmpo_jax.objectives.registry import OBJECTIVES
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene


def picture(number):
    return png_bytes(sample_scene("test", 0, number), 24)


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    mesh = meshes.one_device()
    monkeypatch.setattr(api, "make_mesh", lambda: mesh)


@pytest.fixture
def example():
    """The module of a script."""

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    OBJECTIVES.pop("hinge_dpo", None)


def test_a_loss_that_is_no_number_for_every_pair_is_refused(example):
    """A mean of the user's own would be another loss, and nobody would notice."""
    own = example("own_objective")
    pair = [own.caption_pair(0)]

    def hinge_mean(chosen, rejected):
        return own.hinge_dpo(chosen, rejected).mean()

    mm.pairwise("reference")(hinge_mean)
    start, terms = mm.load("builtin:picture_world"), [mm.make_term("hinge_mean")]
    try:
        state, step = mm.start_training(start, terms, optax.sgd(0.1))
        (batch,) = mm.training_batches(start, pair, terms, batch_size=1)
        with pytest.raises(mm.MmpoError, match=r"hinge_mean: the loss has shape \(\), and it has"):
            step(state, batch)
    finally:
        OBJECTIVES.pop("hinge_mean")


@pytest.mark.slow
def test_own_objective_learns(example, tmp_path):
    """Step 0 is exact, the loss falls, and what is saved scores as what was trained."""
    folder = tmp_path / "out"
    losses = example("own_objective").main(
        ["--pairs", "32", "--batch-size", "8", "--output", str(folder)]
    )
    assert losses[0] == pytest.approx(1.0, abs=1e-5) and losses[-1] < 0.9
    assert mm.load(str(folder)).fingerprint != mm.load("builtin:picture_world").fingerprint


@pytest.mark.slow
def test_scores_and_samples(example, capsys):
    example("score_and_sample").main([])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(float(line.split()[0]) < 0 for line in lines[:2])


@pytest.mark.slow
def test_best_of_n_of_the_start_itself(example, tiny_folder, capsys):
    """Of a policy that is its reference, every reward is 0; of another, the best is the maximum."""
    name = str(tiny_folder)
    example("best_of_n").main(["--model", name, "--reference", name, "--samples", "3"])
    rewards = [float(line.split()[0]) for line in capsys.readouterr().out.splitlines()]
    assert rewards == pytest.approx([0.0] * len(rewards), abs=1e-6)
    best = example("best_of_n").main(["--reference", name, "--samples", "3"])
    told = capsys.readouterr().out.splitlines()
    rewards = [float(line.split()[0]) for line in told]
    assert rewards == sorted(rewards, reverse=True) and told[0].endswith(best)


def test_importing_is_light():
    """Nothing heavy before a name is used, and every public name is there."""
    code = (
        "import sys, mmpo_jax as mm\n"
        "heavy = [n for n in ('jax', 'numpy', 'transformers', 'pydantic') if n in sys.modules]\n"
        "assert not heavy, heavy\n"
        "assert sorted(mm.__all__) == mm.__all__ and set(mm.__all__) == set(mm._PUBLIC)\n"
        "assert all(getattr(mm, name) for name in mm.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_log_probs_and_batches_of_the_library(tiny_model, tiny_processor, example):
    """As the functions beneath have them; records without an id get one."""
    start = mm.Checkpoint(tiny_model[0], tiny_processor, tiny_model[1]).placed(api.make_mesh())
    shown = PIL.Image.open(io.BytesIO(picture(1)))
    made = [
        mm.record("a ring ?", images=[picture(0)], responses=["yes", "no"]),
        mm.record("a star ?", images=[shown], responses=["no", "yes"]),
    ]
    sums = mm.log_probs(start, made)
    tokens = mm.log_probs(start, made, per_token=True)
    for row, parts in zip(sums, tokens, strict=True):
        np.testing.assert_allclose(row, [sum(part) for part in parts], rtol=1e-5)
    terms = [mm.make_term("dpo", beta=0.1)]
    (batch,) = mm.training_batches(start, made, terms, batch_size=2)
    assert sorted(batch.reference["sums"][0, :, 0].tolist()) == pytest.approx(
        sorted(row[0] for row in sums)
    )


def test_what_cannot_be_used_is_named(tiny_model, tiny_processor):
    start = mm.Checkpoint(tiny_model[0], tiny_processor, tiny_model[1]).placed(api.make_mesh())
    with pytest.raises(mm.MmpoError, match=r"none\.png"):
        mm.log_probs(start, [mm.record("a ring ?", images=["none.png"], responses=["yes"])])
    with pytest.raises(mm.MmpoError, match="responses: give a list"):
        mm.record("a ring ?", responses="yes")
    with pytest.raises(mm.MmpoError, match="images: give a list"):
        mm.record("a ring ?", images="ring.png")
    with pytest.raises(mm.MmpoError, match="image 1 is a int"):
        mm.record("a ring ?", images=[3])
    with pytest.raises(mm.MmpoError, match="no objective 'dop'; did you mean dp"):
        mm.make_term("dop")
    with pytest.raises(mm.MmpoError, match=r"'rloo'; in a recipe write .*leave_one_out"):
        mm.make_term("rloo")
    with pytest.raises(mm.MmpoError, match=r"no option 'betta'; its options: .*beta"):
        mm.make_term("dpo", betta=1)
    assert mm.log_probs(start, []) == mm.generate(start, []) == []
    with pytest.raises(mm.MmpoError, match="no multiple"):
        many = meshes.mesh_of(8, 1, 1)
        wide = mm.Checkpoint(tiny_model[0], tiny_processor, tiny_model[1]).placed(many)
        mm.training_batches(wide, [], [mm.make_term("dpo")], batch_size=3)
