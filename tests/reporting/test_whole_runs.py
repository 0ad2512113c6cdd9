"""Pages of runs that were really run, in a real browser: three seeds of a small alignment of the
picture world, and the runs in the folders that MMPO_RUNS names, such as that of `make align`."""

import os
from pathlib import Path

import pytest
from helpers.browser import NoBrowser, look_at

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.files import load_recipe
from mmpo_jax.reporting.page import write_report

ROOT = Path(__file__).parent.parent.parent
SMALL = {
    "prompts_per_round": 16,
    "data.size": 32,
    "sampling.num_samples": 4,
    "sampling.batch_size": 8,
    "feedback.labeler.batch_size": 8,
    "training.batch_size": 8,
    "training.max_steps": 3,
    "training.log_every": 1,
    "training.save_every": 3,
    "evaluation.size": 8,
    "evaluation.batch_size": 8,
}


def looked_at(file):
    try:
        return look_at(file)
    except NoBrowser as missing:
        pytest.skip(str(missing))


@pytest.mark.slow
def test_three_seeds(tmp_path):
    folders = []
    for seed in range(3):
        folders.append(str(tmp_path / f"run-seed{seed}"))
        given = {**SMALL, "seed": seed, "output": folders[-1]}
        overrides = [f"{name}={value}" for name, value in given.items()]
        path = str(ROOT / "configs" / "picture_world_align.yaml")
        run_alignment(load_recipe(AlignRecipe, path, overrides))
        assert (tmp_path / f"run-seed{seed}" / "report.html").exists()
    write_report(folders, str(tmp_path / "report.html"))
    seen = looked_at(tmp_path / "report.html")
    assert "run (3 seeds)" in seen.text
    assert seen.text.count("finished: 2 rounds") == 3
    # The seed moves prompts, too, so they are not the same.
    assert seen.prompts >= 32 and seen.pictures > 0


@pytest.mark.skipif("MMPO_RUNS" not in os.environ, reason="MMPO_RUNS names no folders of runs")
def test_given_runs(tmp_path):
    folders = os.environ["MMPO_RUNS"].split(os.pathsep)
    write_report(folders, str(tmp_path / "report.html"))
    seen = looked_at(tmp_path / "report.html")
    assert seen.prompts > 0 and seen.pictures > 0 and seen.charts > 0
