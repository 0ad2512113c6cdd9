"""Prompts of runs: what a page says of them is what the stages have."""

import json
import math
from collections import Counter

import pytest
from helpers.report_runs import write_alignment

from mmpo_jax.core.files import read_table
from mmpo_jax.reporting.browse import read_prompts
from mmpo_jax.reporting.runs import read_runs


def prompts_of(folders, limit=None):
    return read_prompts(read_runs([str(folder) for folder in folders]), limit)


def test_prompts_are_what_the_stages_have(tmp_path):
    run = write_alignment(tmp_path / "run", prompts=12, same_prompts=True)
    prompts, total = prompts_of([run])
    assert (len(prompts), total) == (12, 24)
    generated, judged, pairs = (
        {
            index: read_table(run / f"round-{index}" / f"{name}.parquet").to_pylist()
            for index in (1, 2)
        }
        for name in ("generate", "judge", "pairs")
    )
    for prompt in prompts:
        assert prompt.question == f"What is in picture {prompt.id}?"
        assert [seen.round for seen in prompt.seen] == [1, 2]
        rejected = failed = 0
        margins, texts = [], []
        for seen in prompt.seen:
            rows = [row for row in generated[seen.round] if row["prompt_id"] == prompt.id]
            assert [one.text for one in seen.responses] == [row["text"] for row in rows]
            texts.append(" ".join(row["text"] for row in rows).lower().split())
            for row in (row for row in judged[seen.round] if row["prompt_id"] == prompt.id):
                verdicts = json.loads(row["details"])["verdicts"]
                rejected += sum(each["p_yes"] <= each["p_no"] for each in verdicts)
                failed += math.isnan(row["score"])
            for row in (row for row in pairs[seen.round] if row["prompt_id"] == prompt.id):
                margins.append(row["chosen_score"] - row["rejected_score"])
        assert (prompt.rejected, prompt.failed) == (rejected, failed)
        assert prompt.margin == max(margins, default=None)
        first, last = map(Counter, texts)
        dot = sum(first[word] * last[word] for word in {*first, *last})
        norms = [math.sqrt(sum(n * n for n in counts.values())) for counts in (first, last)]
        assert prompt.change == pytest.approx(1 - dot / norms[0] / norms[1])


def test_limit_is_shared_by_the_rounds(tmp_path):
    run = write_alignment(tmp_path / "run", prompts=10)
    prompts, total = prompts_of([run], 9)
    assert total == 20
    assert Counter(prompt.seen[0].round for prompt in prompts) == {1: 4, 2: 5}
    assert all(prompt.change is None for prompt in prompts)
    assert prompts_of([run], 0)[0] == []


def test_a_round_under_way(tmp_path):
    run = write_alignment(tmp_path / "run", prompts=4)
    for name in ("judge", "pairs", "prompts"):
        (run / "round-2" / f"{name}.parquet").unlink()
    (run / "round-1" / "pairs.parquet").write_bytes(b"damaged")
    prompts, total = prompts_of([run])
    assert total == 8
    assert [(len(p.thumbnails), p.rejected > 0) for p in prompts[4:]] == [(0, False)] * 4
    assert all(prompt.margin is None for prompt in prompts)
    assert all(one.score is None for p in prompts[4:] for one in p.seen[0].responses)


def test_answers_to_benchmarks(tmp_path):
    run = write_alignment(tmp_path / "run", prompts=2, questions=4)
    prompts, total = prompts_of([run])
    assert (len(prompts), total) == (4 + 3, 4 + 3 * 3)
    asked = [prompt for prompt in prompts if prompt.benchmark == "picture_world"]
    assert [prompt.id for prompt in asked] == ["q0", "q1", "q2"]
    assert [seen.round for seen in asked[1].seen] == [0, 1, 2]
    texts = [one.text for seen in asked[1].seen for one in seen.responses]
    assert texts == ["yes , 1 circles"] * 2 + ["yes , 1 circles and a star"]
    assert asked[0].seen[0].responses[0].details == {"sampled/chair_s": 1, "read": "yes"}
    assert asked[0].change > 0 and asked[0].margin is None
