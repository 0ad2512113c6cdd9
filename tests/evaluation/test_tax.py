"""What a run gained and lost: intervals and tests against SciPy's, verdicts and warnings."""

import json
import math

import numpy as np
import pytest
from scipy import stats

from mmpo_jax.benchmarks.benchmark import Benchmark, Metric, Scores
from mmpo_jax.core.files import write_json
from mmpo_jax.evaluation.bootstrap import (
    SAMPLES,
    bootstrap_p,
    interval,
    mcnemar_p,
    resampled,
)
from mmpo_jax.evaluation.measure import Measured, Shown
from mmpo_jax.evaluation.tax import FILE, alignment_tax, read_tax, render_tax

METRICS = (
    Metric("accuracy", "more", guards="accuracy"),
    Metric("recall", "more", guards="recall"),
    Metric("length", form=".1f", guards="length"),
    Metric("hallucination", "less"),
    Metric("unread", "less", guards="reading"),
    Metric("others"),
)
BENCHMARK = Benchmark("test", Scores, "", "", METRICS)
SHOWN = [Shown("test", metric, metric.name) for metric in METRICS]


def parts(values, below=None):
    return np.stack([values, np.ones(len(values)) if below is None else below], axis=1)


def measured(rows):
    """Scores whose metrics are what their rows add up to."""
    sums = {name: np.zeros(2) for name in rows[0]}
    for row in rows:
        for name, pair in row.items():
            sums[name] += pair if isinstance(pair, list) else (pair, 1)
    metrics = {name: above / below for name, (above, below) in sums.items()} | {"others": 3.0}
    told = [{"id": str(number), "scores": row} for number, row in enumerate(rows)]
    return [Measured("test", BENCHMARK, Scores(metrics, {}, told))]


def rows(seed=0, right=0.9, recall=0.8, words=20, wrong=0.4, unread=0.01, count=400):
    rng = np.random.default_rng(seed)
    lengths = rng.poisson(words, count)
    return [
        {
            "accuracy": int(rng.random() < right),
            "recall": [int(rng.binomial(3, recall)), 3],
            "length": int(length),
            "hallucination": int(rng.random() < wrong),
            "unread": int(rng.random() < unread),
        }
        for length in lengths
    ]


def row_of(tax, metric):
    return next(row for row in tax["rows"] if row["metric"] == metric)


def test_intervals_are_those_of_scipy():
    rng = np.random.default_rng(1)
    below = rng.integers(1, 5, 300)
    above = rng.binomial(below, 0.3)
    low, high = interval(resampled([parts(above, below)])[0])
    expected = stats.bootstrap(
        (above, below),
        lambda a, b, axis=-1: a.sum(axis) / b.sum(axis),
        paired=True,
        method="percentile",
        n_resamples=5000,
        rng=2,
    ).confidence_interval
    assert low == pytest.approx(expected.low, abs=0.006)
    assert high == pytest.approx(expected.high, abs=0.006)
    assert low < above.sum() / below.sum() < high


def test_differences_are_of_the_same_records():
    values = np.random.default_rng(0).random(50)
    start, other = resampled([parts(values), parts(values + 0.25)])
    assert start.shape == (SAMPLES,) and start.std() > 0.01
    np.testing.assert_allclose(other - start, 0.25)
    assert bootstrap_p(other - start) == pytest.approx(2 / (SAMPLES + 1))
    assert bootstrap_p(start - start) == 1


def test_mcnemar_is_exact():
    start = parts(np.array([1] * 10 + [0] * 3 + [1] * 7 + [0] * 5, float))
    other = parts(np.array([0] * 10 + [1] * 3 + [1] * 7 + [0] * 5, float))
    tail = sum(math.comb(13, k) for k in range(4)) / 2**13
    assert mcnemar_p(start, other) == pytest.approx(2 * tail)
    assert mcnemar_p(start, start) == 1
    assert mcnemar_p(start * [100, 1], other * [100, 1]) == pytest.approx(2 * tail)  # in percent
    assert mcnemar_p(parts(np.array([0.5, 1, 0])), parts(np.array([1.0, 0, 0]))) is None
    assert mcnemar_p(start, other * [1, 2]) is None


def test_the_two_tests_agree_where_both_can_be_taken():
    rng = np.random.default_rng(3)
    start = parts((rng.random(500) < 0.6).astype(float))
    other = parts((rng.random(500) < 0.54).astype(float))
    samples = resampled([start, other])
    assert bootstrap_p(samples[1] - samples[0]) == pytest.approx(mcnemar_p(start, other), abs=0.02)


def test_nothing_below_a_fraction_is_no_number():
    samples = resampled([parts(np.zeros(4), np.zeros(4))])
    assert np.isnan(samples).all()
    assert math.isnan(bootstrap_p(samples[0])) and math.isnan(interval(samples[0])[0])


def test_the_table(tmp_path):
    models = {"start": measured(rows()), "round 1": measured(rows(1, wrong=0.1, right=0.895))}
    tax = alignment_tax(models, SHOWN, "round 1")
    assert tax["compared"] == ["start", "round 1"] and tax["result"] == "round 1"
    gained = row_of(tax, "hallucination")
    start, end = gained["cells"]
    assert start["low"] < start["value"] < start["high"]
    assert end["verdict"] == "better" and end["test"] == "mcnemar" and end["p"] < 1e-10
    assert end["difference"] == pytest.approx(end["value"] - start["value"])
    assert end["difference_low"] < end["difference"] < end["difference_high"] < 0
    assert gained["records"] == 400 and gained["better"] == "less"
    assert row_of(tax, "accuracy")["cells"][1]["verdict"] == "same"
    assert row_of(tax, "recall")["cells"][1]["test"] == "bootstrap"
    other = row_of(tax, "others")["cells"]  # of which rows say nothing
    assert other[1]["value"] == 3.0 and math.isnan(other[1]["p"]) and other[1]["verdict"] is None
    assert tax["warnings"] == []
    write_json(str(tmp_path / FILE), tax)
    read = read_tax(str(tmp_path))
    text = render_tax(read)
    assert text == render_tax(tax)
    assert text.splitlines()[0].split() == ["start", "round", "1"]
    assert "+ better  - worse" in text.splitlines()[-1]
    line = next(line for line in text.splitlines() if line.startswith("hallucination"))
    assert line.endswith("+")
    assert json.loads((tmp_path / FILE).read_text())["rows"][5]["cells"][0]["p"] is None


def test_the_same_table_whenever_it_is_made():
    models = {"start": measured(rows()), "round 1": measured(rows(1))}
    tables = [alignment_tax(models, SHOWN, "round 1") for _ in range(2)]
    assert render_tax(tables[0]) == render_tax(tables[1])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"recall": 0.6}, "round 1: recall fell by 0.2"),
        ({"right": 0.7}, "round 1: accuracy fell by 0.2"),
        ({"words": 15}, "round 1: answers are 2"),
        ({"unread": 0.2}, "round 1: 2"),
    ],
)
def test_warnings(changes, told):
    models = {"start": measured(rows()), "round 1": measured(rows(1, **changes))}
    (warning,) = alignment_tax(models, SHOWN, "round 1")["warnings"]
    assert warning.startswith(told) and "p = " in warning


def test_no_warning_of_what_may_be_chance_or_is_little():
    few = {"start": measured(rows(count=20)), "round 1": measured(rows(0, right=0.8, count=20))}
    assert alignment_tax(few, SHOWN, "round 1")["warnings"] == []
    shorter = measured(rows(0, words=19, count=2000))
    tax = alignment_tax({"start": measured(rows(count=2000)), "x": shorter}, SHOWN, "x")
    assert row_of(tax, "length")["cells"][1]["verdict"] == "less" and tax["warnings"] == []


def test_questions_about_one_picture_are_one():
    """Six questions whose answers are right together say as much as one."""
    alone = {"start": rows(count=60), "x": rows(1, right=0.7, count=60)}
    apart = {name: measured(of) for name, of in alone.items()}
    single = row_of(alignment_tax(apart, SHOWN, "x"), "accuracy")["cells"]
    together = {name: measured([row for row in of for _ in range(6)]) for name, of in alone.items()}
    for (one,) in together.values():
        for number, row in enumerate(one.scores.rows):
            row["picture"] = number // 6
    tax = alignment_tax(together, SHOWN, "x")
    assert row_of(tax, "accuracy")["records"] == 360
    start, other = row_of(tax, "accuracy")["cells"]
    for name in ("low", "high", "value"):
        assert start[name] == pytest.approx(single[0][name])
        assert other[name] == pytest.approx(single[1][name])
    assert other["test"] == "bootstrap"
    first, second = resampled([parts([row["accuracy"] for row in of]) for of in alone.values()])
    assert other["p"] == pytest.approx(bootstrap_p(second - first))


def test_records_that_not_all_answered_are_left_out():
    start = measured(rows())
    shorter = measured(rows()[:100])
    tax = alignment_tax({"start": start, "x": shorter}, SHOWN, "x")
    assert row_of(tax, "accuracy")["records"] == 100
    assert row_of(tax, "accuracy")["cells"][1]["p"] == 1
