"""Rounds whose stages were done by a version with other rules."""

import dataclasses
import functools
import json

from helpers.small_rounds import make_recipe

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.benchmarks import benchmark
from mmpo_jax.benchmarks.benchmark import find_benchmark
from mmpo_jax.core.files import encode_table, fingerprint_file, fingerprint_json, read_table
from mmpo_jax.evaluation import measure

KEYED = "generate", "conquer", "judge", "pairs", "reference"


def as_before(folder, stage):
    """Leaves a stage as it was done when no rules were in its key, with the responses' columns of
    that time."""
    manifest = json.loads((folder / f"{stage}.json").read_text())
    table = folder / f"{stage}.parquet"
    if stage == "generate":
        table.write_bytes(encode_table(read_table(table).drop_columns(["token_ids"])))
    made_of = {k: v for k, v in manifest.items() if k not in ("made_of", "sha256")}
    made_of["settings"].pop("rules", None)
    keys = {"made_of": fingerprint_json(made_of), "sha256": fingerprint_file(table)}
    (folder / f"{stage}.json").write_text(json.dumps(made_of | keys))


def test_stages_of_other_rules_are_made_again(finished, copy, tiny_folder):
    for stage in KEYED:
        as_before(copy / "round-1", stage)
    (copy / "round-1" / "train.json").unlink()  # else nobody asks for the reference
    run_alignment(make_recipe(copy, tiny_folder))
    for stage in KEYED:
        for name in (f"round-1/{stage}.json", f"round-1/{stage}.parquet"):
            assert (copy / name).read_bytes() == (finished[0] / name).read_bytes()
        assert "rules" in json.loads((copy / f"round-1/{stage}.json").read_text())["settings"]


def test_metrics_of_other_rules_are_measured_again(copy, tiny_folder, monkeypatch):
    world = find_benchmark("picture_world")
    measured = []

    @functools.wraps(world.score)
    def score(*args, **options):
        measured.append(1)
        return world.score(*args, **options)

    counting = dataclasses.replace(world, score=score)
    monkeypatch.setitem(benchmark._BENCHMARKS, "picture_world", counting)
    run_alignment(make_recipe(copy, tiny_folder))
    assert not measured
    monkeypatch.setattr(measure, "SCORING_RULES", 0)
    run_alignment(make_recipe(copy, tiny_folder))
    assert len(measured) == 3
