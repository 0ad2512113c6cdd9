"""Charts: values lie where their axes say, lines that part stay apart, and names are text."""

import json
import math
import re
from xml.etree import ElementTree

import pytest
from helpers.report_runs import EVIL, write_alignment, write_training
from hypothesis import given
from hypothesis import strategies as st

from mmpo_jax.reporting.charts import Chart, Line, Point, describe, draw, number, ticks
from mmpo_jax.reporting.curves import MOST_POINTS, training_charts
from mmpo_jax.reporting.measured import chart_benchmark, group_runs, measured
from mmpo_jax.reporting.runs import read_runs

FINITE = st.floats(-1e9, 1e9)


def drawn(chart):
    return ElementTree.fromstring(draw(chart))


@given(st.lists(st.tuples(FINITE, FINITE), min_size=1, max_size=40))
def test_every_point_is_inside(values):
    points = [Point(x, y, y - 1, y + 1) for x, y in sorted(values)]
    svg = drawn(Chart("title", "", [Line("a", points)], "update"))
    _, _, width, height = map(float, svg.get("viewBox").split())
    for line in svg.iter("polyline"):
        for place in line.get("points").split():
            x, y = map(float, place.split(","))
            assert -1 <= x <= width + 1 and -1 <= y <= height + 1
    told = json.loads(svg.get("data-chart"))
    assert [row[0] for row in told["lines"][0]["points"]] == pytest.approx(
        [point.x for point in points], rel=1e-4
    )


@given(FINITE, FINITE)
def test_ticks_are_few_and_between(one, other):
    low, high = sorted((one, other))
    found = ticks(low, high)
    assert 1 <= len(found) <= 6
    slack = 1e-6 * max(abs(low), abs(high), 1e-9)
    assert all(low - slack <= tick <= high + slack for tick in found)


def test_updates_are_whole():
    svg = drawn(Chart("t", "", [Line("a", [Point(1, 0.5), Point(2, 0.7)])], "update"))
    marks = [text.text for text in svg.iter("text") if text.get("text-anchor") == "middle"]
    assert marks == ["1", "2", "update"]


def test_ticks_stand_at_their_values():
    points = [Point(0, 10.0), Point(10, 20.0)]
    svg = drawn(Chart("t", "", [Line("a", points)], "update"))
    marks = {
        text.text: float(text.get("y"))
        for text in svg.iter("text")
        if text.get("text-anchor") == "end"
    }
    (line,) = svg.iter("polyline")
    ys = [float(place.split(",")[1]) for place in line.get("points").split()]
    a, b = (float(label) for label in list(marks)[:2])
    slope = (marks[str(number(b))] - marks[str(number(a))]) / (b - a)
    assert (ys[1] - ys[0]) / 10.0 == pytest.approx(slope, rel=0.02)


def test_numbers():
    told = {0: "0", 0.95: "0.95", 0.4837: "0.484", 12.08: "12.08", 14.4: "14.4", 1000: "1,000"}
    told |= {8123.4: "8,123", 5e-7: "5e-07", -0.02: "-0.02", 0.00075: "0.00075", 1 / 3: "0.333"}
    told |= {0.05234: "0.0523", 1.23456: "1.235", 2_000_000: "2e+06", 999.99: "1000"}
    assert {value: number(value) for value in told} == told


def test_names_are_text():
    chart = Chart(EVIL, "", [Line(EVIL, [Point(0, 1), Point(1, 2)])], "update", rules=[(0, EVIL)])
    assert "<img" not in draw(chart)
    svg = drawn(chart)
    assert json.loads(svg.get("data-chart"))["lines"][0]["name"] == EVIL
    assert describe(chart) == svg.get("aria-label")


def test_rounds_of_a_training_stay_apart(tmp_path):
    runs = read_runs([str(write_alignment(tmp_path / "run", prompts=2))])
    front, behind = training_charts(runs, group_runs(runs))
    titles = [chart.title for chart in front]
    assert titles[:4] == [
        "loss",
        "rewards/margins",
        "rewards/accuracies",
        "rewards of chosen and rejected",
    ]
    loss = front[0]
    assert [line.name for line in loss.lines] == ["eval_loss", "loss"]
    assert [point.x for point in loss.lines[1].points] == list(range(1, 41))
    assert [point.x for point in loss.lines[1].points if point.begins] == [1, 21]
    assert loss.rules == [(0.0, "round 1"), (20, "round 2")]
    assert len([*drawn(loss).iter("polyline")]) == 4
    assert not behind
    norms = next(chart for chart in front if chart.title == "grad_norm")
    assert 3 not in [point.x for point in norms.lines[0].points]  # null in the file


def test_many_updates_are_means_in_a_band(tmp_path):
    runs = read_runs([str(write_training(tmp_path / "run"))])
    loss = training_charts(runs, group_runs(runs))[0][0].lines[1]
    rows = [row["loss"] for row in runs[0].rounds[0].curves]
    assert len(rows) == 300 and len(loss.points) == MOST_POINTS
    assert min(point.low for point in loss.points) == min(rows)
    assert max(point.high for point in loss.points) == max(rows)
    weights = [
        len(rows) * (i + 1) // MOST_POINTS - len(rows) * i // MOST_POINTS
        for i in range(MOST_POINTS)
    ]
    mean = sum(w * point.y for w, point in zip(weights, loss.points, strict=True)) / len(rows)
    assert mean == pytest.approx(math.fsum(rows) / len(rows))


def test_seeds_are_a_line_in_a_band(tmp_path):
    runs = read_runs([str(write_alignment(tmp_path / f"s{seed}", 2, seed=seed)) for seed in (0, 1)])
    groups = group_runs(runs)
    (benchmark,) = measured(runs, groups)
    front, behind = chart_benchmark(benchmark, groups)
    assert [chart.title for chart in front] == ["CHAIR_s", "recall", "length"]
    assert [chart.title for chart in behind] == ["yes_no_accuracy", "error_colour"]
    chart = front[0]
    assert (chart.title, chart.note) == ("CHAIR_s", "lower is better")
    assert [line.name for line in chart.lines] == ["sampled", "greedy"]
    assert [(p.x, p.low, p.high) for p in chart.lines[0].points] == [
        (index, pytest.approx(0.48 / (index + 1)), pytest.approx(0.48 / (index + 1) + 0.01))
        for index in range(3)
    ]
    assert len(re.findall('class="band"', draw(chart))) == 2
