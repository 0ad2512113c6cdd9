"""The table with a line per round, and warnings of silence."""

import dataclasses
import json
import math

import pyarrow as pa
import pytest

from mmpo_jax.alignment.report import (
    RoundReport,
    read_report,
    render_sources,
    render_stages,
    render_table,
    warnings,
    write_report,
)
from mmpo_jax.alignment.round import tell_failed
from mmpo_jax.benchmarks.benchmark import find_benchmark
from mmpo_jax.core.files import read_table, write_table
from mmpo_jax.core.timings import add_time
from mmpo_jax.evaluation.measure import Shown
from mmpo_jax.feedback.rate import add_rate

SHOWN = [Shown("world", m, m.heading or m.name) for m in find_benchmark("picture_world").metrics]


def metrics(recall=0.8):
    values = {
        "sampled/chair_i": 0.25,
        "sampled/chair_s": 0.5,
        "sampled/recall": recall,
        "sampled/mean_length": 20.0,
        "sampled/unparsed": 0.01,
        "greedy/chair_i": 0.2,
        "greedy/chair_s": 0.4,
        "greedy/recall": 0.8,
        "greedy/mean_length": 19.0,
        "yes_no_accuracy": 0.9,
    }
    return {f"world/{name}": value for name, value in values.items()}


def report(index, accuracy=0.75, pairs=30, margin=0.1234, updates=10, **changes):
    return RoundReport(
        index=index,
        metrics=metrics(**changes),
        prompts=12,
        responses=36,
        claims=100,
        rejected_claims=7,
        pairs=pairs,
        dpo_accuracy=accuracy,
        dpo_margin=margin,
        dpo_updates=updates,
    )


START = RoundReport(0, metrics())


def test_table():
    lines = render_table([START, report(1)], SHOWN).splitlines()
    measured = ["0.250", "0.500", "0.800", "20.0", "0.400", "0.800", "0.900"]
    assert [line.split() for line in lines[1:]] == [
        ["0", *measured],
        ["1", "12", "36", "100", "7", "30", "0.75", "0.12", *measured],
    ]
    assert lines[0].split()[:6] == ["round", "prompts", "responses", "claims", "rejected", "pairs"]
    assert len({len(line) for line in lines}) == 1


def test_columns_without_a_value_are_left_out():
    text = render_table([RoundReport(0, {}), dataclasses.replace(report(1), metrics={})], SHOWN)
    assert "CHAIR" not in text
    assert "yes/no" not in text
    assert "pairs" in text


def test_trained_pairs_are_told_where_they_are_not_all():
    assert "trained" not in render_table([START, dataclasses.replace(report(1), trained=30)])
    reports = [START, dataclasses.replace(report(1, pairs=22), trained=19), report(2)]
    lines = [line.split() for line in render_table(reports).splitlines()]
    place = lines[0].index("trained")
    assert lines[0][place - 1] == "pairs"
    assert lines[2][place - 1 : place + 1] == ["22", "19"]


def test_no_warning_where_all_is_well():
    assert warnings([START, report(1)]) == warnings([START]) == []
    assert warnings([RoundReport(0, {}), dataclasses.replace(report(1), metrics={})]) == []


def test_warnings():
    told = warnings([START, report(1, accuracy=0.4, margin=-0.02)], {"warnings": ["round 1: a"]})
    assert told == ["round 1: a", "round 1: DPO prefers the rejected responses; it did not learn"]


@pytest.mark.parametrize(
    "changes",
    [
        {"accuracy": 0.47, "margin": 0.04},
        {"accuracy": 0.0, "margin": -3e-8},
        {"accuracy": 0.4, "margin": -0.02, "updates": 9},
        {"accuracy": 0.6, "margin": -0.02},
    ],
)
def test_no_warning_of_what_says_little(changes):
    assert warnings([START, report(1, **changes)]) == []


def test_files(tmp_path):
    reports = [START, report(1, recall=math.nan)]
    tax = {"compared": ["start", "round 1"], "rows": [], "warnings": ["round 1: it fell"]}
    write_report(str(tmp_path), reports, SHOWN, tax)
    rows = json.loads((tmp_path / "rounds.json").read_text())
    assert RoundReport(**rows[0]) == START and rows[1]["metrics"]["world/sampled/recall"] is None
    assert json.loads((tmp_path / "tax.json").read_text()) == tax
    text = (tmp_path / "rounds.txt").read_text()
    assert text.startswith(render_table(reports, SHOWN))
    assert "\n\nround 1: it fell\n" in text


def test_nothing_measured(tmp_path):
    reports = [RoundReport(0, {}), dataclasses.replace(report(1), metrics={})]
    write_report(str(tmp_path), reports)
    assert {path.name for path in tmp_path.iterdir()} == {"rounds.json", "rounds.txt"}


@pytest.fixture
def round_files(tmp_path):
    """What a round leaves: four responses, four claims about two images."""
    details = [
        {"verdicts": [{"p_yes": 0.9, "p_no": 0.1}, {"p_yes": 0.2, "p_no": 0.8}]},
        {"verdicts": [{"p_yes": 0.9, "p_no": 0.1}]},
        {"verdicts": [{"p_yes": 0.4, "p_no": 0.4}]},  # a tie is a rejection
        {"reply": "what nobody can read"},
    ]
    judged = pa.table(
        {
            "prompt_id": ["a", "a", "b", "b"],
            "sample": [0, 1, 0, 1],
            "score": [-1.0, 0.0, -1.0, math.nan],
            "reason": [None, None, None, "no_json"],
            "details": list(map(json.dumps, details)),
        }
    )
    pairs = pa.table({"prompt_id": ["a"], "chosen": ["one two"], "rejected": ["one"]})
    pairs = pairs.replace_schema_metadata({"counts": '{"pairs": 1}'})
    pairs = pairs.append_column("chosen_sample", [[1]]).append_column("rejected_sample", [[0]])
    generated = pa.table({"text": ["one", "one two", "three", "a b c d"]})
    for name, table in (("judge", judged), ("pairs", pairs), ("generate", generated)):
        write_table(tmp_path / f"{name}.parquet", table)
    for seconds in (0.5, 1.5):  # two runs
        add_rate(str(tmp_path), 4, seconds)
    (tmp_path / "train").mkdir()
    return tmp_path


def test_a_round_is_read_from_its_files(round_files):
    accuracies = (0.1, 0.2, 0.6, 0.8)  # the later half counts
    lines = [{"step": i, "rewards/accuracies": value} for i, value in enumerate(accuracies, 1)]
    (round_files / "train" / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    read = read_report(1, str(round_files), {"sampled/recall": 0.5}, "generate")
    assert read == RoundReport(
        index=1,
        metrics={"sampled/recall": 0.5},
        prompts=2,
        responses=4,
        failed=1,
        claims=4,
        rejected_claims=2,
        pairs=1,
        chosen_words=2.0,
        rejected_words=1.0,
        dpo_accuracy=0.7,
        dpo_margin=None,
        dpo_updates=2,
        counts={"pairs": 1},
    )


def test_the_pairs_that_were_trained(round_files):
    (round_files / "train.json").write_text('{"trained": 19}')
    assert read_report(1, str(round_files), {}, "generate").trained == 19


def test_what_each_source_gave(round_files):
    generated = read_table(round_files / "generate.parquet")
    sources = [["policy", "other", "policy", "other"]]
    write_table(round_files / "responses.parquet", generated.append_column("source", sources))
    read = read_report(1, str(round_files), {}, "responses")
    assert read.sources == {
        "policy": {
            **{"responses": 2, "failed": 0, "mean_score": -1.0, "mean_words": 1.0},
            **{"chosen": 0, "rejected": 1},
        },
        "other": {
            **{"responses": 2, "failed": 1, "mean_score": 0.0, "mean_words": 3.0},
            **{"chosen": 1, "rejected": 0},
        },
    }
    assert [line.split() for line in render_sources([START, read]).splitlines()] == [
        ["round", "source", "responses", "failed", "score", "words", "chosen", "rejected"],
        ["1", "policy", "2", "0", "-1", "1.0", "0", "1"],
        ["1", "other", "2", "1", "0", "3.0", "1", "0"],
    ]
    write_report(str(round_files), [read])
    assert render_sources([read]) in (round_files / "rounds.txt").read_text()
    (row,) = json.loads((round_files / "rounds.json").read_text())
    assert row["sources"] == read.sources


def test_what_each_stage_took(round_files):
    """Those of a round of sentences lie in folders of their own."""
    add_time(round_files, "generate", "a", {"seconds": 2.0, "rows": 8, "tokens": 100})
    add_time(round_files, "train", "b", {"seconds": 5.0})
    add_time(round_files / "sentence-1", "judge", "c", {"seconds": 0.5, "rows": 4})
    read = read_report(1, str(round_files), {}, "generate")
    assert [line.split() for line in render_stages([START, read]).splitlines()] == [
        ["round", "stage", "seconds", "rows", "rows/s", "tokens/s"],
        ["1", "generate", "2.0", "8", "4", "50"],
        ["1", "train", "5.0"],
        ["1", "sentence-1/judge", "0.5", "4", "8"],
    ]
    write_report(str(round_files), [read])
    assert render_stages([read]) in (round_files / "rounds.txt").read_text()
    (row,) = json.loads((round_files / "rounds.json").read_text())
    assert row["stages"]["generate"]["tokens_per_second"] == 50.0


def test_no_table_of_one_source():
    assert render_sources([START, report(1)]) == ""


def test_the_rate_of_the_labeler_is_that_of_all_runs(round_files):
    assert read_report(1, str(round_files), {}, "generate").questions_per_second == 4.0


def test_the_rate_of_a_round_of_sentences_is_that_of_all(round_files):
    for number in (1, 2):
        (round_files / f"sentence-{number}").mkdir()
        add_rate(str(round_files / f"sentence-{number}"), 10, 1.0)
    assert read_report(1, str(round_files), {}, "generate").questions_per_second == 7.0


def test_details_of_a_users_own_are_no_claims(round_files):
    path = round_files / "judge.parquet"
    judged = read_table(path)
    details = pa.array(['{"p_yes": 0.7}'] * len(judged))
    place = judged.column_names.index("details")
    write_table(path, judged.set_column(place, "details", details))
    report = read_report(1, str(round_files), {}, "generate")
    assert report.claims is None and report.rejected_claims is None


def test_a_round_whose_training_folder_was_removed(round_files):
    """Its checkpoints take most of the space; the model is what counts."""
    assert read_report(1, str(round_files), {}, "generate").dpo_accuracy is None


def test_the_log_says_why_responses_failed(caplog):
    """Such as those about clips that a labeler cannot take."""
    tell_failed(1, pa.table({"reason": pa.array([None, None], pa.string())}))
    assert not caplog.records
    tell_failed(2, pa.table({"reason": ["video_length", None, "too_long", "video_length"]}))
    assert "round 2: responses that failed: video_length 2, too_long 1" in caplog.text
