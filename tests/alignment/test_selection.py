"""The result of an alignment is chosen by prompts that no round is trained on."""

import json
import logging

import pytest
from helpers.small_rounds import SAMPLES, make_recipe

from mmpo_jax.alignment import findings
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.alignment.selection import best_round
from mmpo_jax.checkpoints.fingerprints import fingerprint_model
from mmpo_jax.core.files import read_table
from mmpo_jax.recipes.align_recipe import Selection
from mmpo_jax.training.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("stubs")

HELD = {
    0: {"held_out/rejected_share": 0.3, "held_out/score": -3.0, "held_out/words": 9.0},
    1: {"held_out/rejected_share": 0.1, "held_out/score": -2.0, "held_out/words": 8.0},
    2: {"held_out/rejected_share": 0.1, "held_out/score": -1.0, "held_out/words": 7.0},
    3: {"held_out/score": float("nan"), "held_out/words": 0.0},
}


def test_the_best_round():
    assert best_round(HELD, None) == 3
    assert best_round(HELD, Selection()) == 1  # of equal ones the first
    assert best_round(HELD, Selection(by="score")) == 2
    assert best_round({0: HELD[1], 1: HELD[0]}, Selection()) == 1  # never the start


@pytest.mark.slow
def test_rounds_chosen_by_held_out_prompts(tiny_folder, tmp_path, caplog, monkeypatch):
    """Round 1 is made the better one; its model is the result, and no benchmark is there."""
    values = {0: 0.5, 1: 0.2, 2: 0.4}
    judged = []

    def judge_held_out(held, checkpoint, judge, recipe, mesh, folder):
        found = original(held, checkpoint, judge, recipe, mesh, folder)
        judged.append(found["held_out/rejected_share"])
        return found | {"held_out/rejected_share": values[int(folder[-1])]}

    original = findings.judge_held_out
    monkeypatch.setattr(findings, "judge_held_out", judge_held_out)
    validation = {
        **{"share": 0.3, "every": 1, "metric": "eval_rewards/accuracies"},
        "greater_is_better": True,
    }
    changes = {"selection": {"share": 0.2, "num_samples": 2}, "validation": validation}
    recipe = make_recipe(tmp_path / "run", tiny_folder, evaluation=None, **changes)
    with caplog.at_level(logging.INFO):
        reports = run_alignment(recipe)
    output = tmp_path / "run"
    result = fingerprint_model(output / "model")
    assert result == fingerprint_model(output / "round-1" / "model")
    assert result != fingerprint_model(output / "round-2" / "model")
    assert "the result is the model of round 1: rejected_share of held-out prompts" in caplog.text
    assert "no benchmark was looked at to choose" in caplog.text
    trained, held = set(), set()
    for index in (0, 1, 2):
        folder = output / f"round-{index}"
        rows = read_table(folder / "held_out" / "generate.parquet").to_pylist()
        held |= {row["prompt_id"] for row in rows}
        assert len(rows) == 2 * len(held)
        if index:
            generated = read_table(folder / "generate.parquet")["prompt_id"].to_pylist()
            trained |= set(generated)
            assert len(generated) == SAMPLES * len(set(generated))
            lines = read_metrics(folder / "train" / "metrics.jsonl")
            assert len(lines) > 2 and all(validation["metric"] in line for line in lines)
    assert len(held) == 6 and not held & trained
    assert all(0 < share < 1 for share in judged) and len(judged) == 3
    rows = json.loads((output / "rounds.json").read_text())
    assert [row["metrics"]["held_out/rejected_share"] for row in rows] == [0.5, 0.2, 0.4]
    assert "held out" in (output / "rounds.txt").read_text()
    monkeypatch.setattr("mmpo_jax.generation.responses.generate_responses", None)
    assert run_alignment(recipe) == reports  # nothing is sampled again
