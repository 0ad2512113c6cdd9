"""`mmpo align`, killed twice and started again, ends as if nothing had been."""

import pytest
from alignment import kill_and_resume

SMALL = (
    *kill_and_resume.OVERRIDES,
    "rounds=1",
    "prompts_per_round=24",
    "sampling.num_samples=6",  # for pairs enough for ten steps
    "training.max_steps=10",
    "training.save_every=5",
    "evaluation=",
)


@pytest.mark.slow
def test_killed_while_it_trains_and_while_it_saves(tmp_path, monkeypatch):
    monkeypatch.setattr(kill_and_resume, "MOMENTS", ("step 5/", "round 1/1, reference"))
    killed, expected, different = kill_and_resume.kill_and_resume(
        tmp_path, 2, 0, "builtin:picture_world", SMALL
    )
    assert len(killed) == 2
    assert {"round-1/reference.parquet", "round-1/model/model.safetensors"} <= expected.keys()
    assert "round-1/train/metrics.jsonl" in expected
    assert not different


def test_differences_are_noticed():
    ours = {"a.parquet": b"1", "b.parquet": b"2", "metrics.jsonl": b"3"}
    theirs = {"b.parquet": b"2", "metrics.jsonl": b"4", "c.parquet": b"5"}
    assert kill_and_resume.compare(ours, ours) == []
    assert kill_and_resume.compare(ours, theirs) == [
        "only undisturbed: a.parquet",
        "only killed: c.parquet",
        "differs: metrics.jsonl",
    ]


def test_the_moments_come_in_the_order_of_the_run():
    order = kill_and_resume.in_order_of_the_run(kill_and_resume.MOMENTS)
    assert order[0] == "round 0/2, evaluate"
    assert order[1:6] == [
        f"round 1/2, {stage}"
        for stage in ("generate: 1 of 2", "divide", "conquer: 1 of 2", "pairs", "reference")
    ]
    assert order[6:10] == ["round 1/2, train", "step 10/", "step 30/", "round 1/2, evaluate"]
    assert order[-1] == "round 2/2, evaluate"
