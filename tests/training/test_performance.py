"""What is measured of steps, by a clock and devices of the tests' own."""

import dataclasses
import logging
import re
import types
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from helpers.loop_runs import CONFIG

from mmpo_jax.core.trees import flatten
from mmpo_jax.data.amounts import Amounts
from mmpo_jax.models.flops import ModelFlops, model_flops
from mmpo_jax.models.lora import Lora, add_adapters, is_adapter
from mmpo_jax.models.model import Model, read_config
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.recipes.training import Training
from mmpo_jax.training import goodput, performance, times
from mmpo_jax.training.goodput import Goodput
from mmpo_jax.training.metrics import MEASURED
from mmpo_jax.training.performance import (
    Performance,
    StepFlops,
    device_memory,
    training_flops,
)
from mmpo_jax.training.times import Times

GIB = 2**30
DPO = [make_term("dpo")]
AMOUNTS = Amounts(
    rows=4, responses=8, pairs=4, tokens=1000, computed=1250, targets=300, seen=50_000, slots=(1, 2)
)
FLOPS = ModelFlops(
    token=1e9, target=2e9, pair=1e6, slot=1e11, score=1e3, scores=lambda slots: 1e6 * slots**2
)
COUNT = 1000 * 1e9 + 300 * 2e9 + 50_000 * 1e6 + 3 * 1e11 + 1e3 * 1e6 * (1 + 4)


class Running:
    """The output of a step that has ended."""

    def is_ready(self):
        return True

    def block_until_ready(self):
        pass


class Device:
    def __init__(self, used, peak):
        self.stats = {"bytes_in_use": used * GIB, "peak_bytes_in_use": peak * GIB}

    def memory_stats(self):
        return self.stats


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the beginning."""
    clock = types.SimpleNamespace(now=0.0)
    seconds = types.SimpleNamespace(perf_counter=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(times, "time", seconds)
    monkeypatch.setattr(goodput, "time", seconds)
    return clock


@pytest.fixture
def measured(clock):
    devices = [Device(10, 20), Device(12, 15)]
    return Performance(Times(), Goodput(0.0, []), StepFlops(FLOPS), 1e12, devices)


def steps(measured, clock, count, wait=0.0, compute=1.0, rollout=0.0, amounts=AMOUNTS):
    """So many steps, each of which waits, or samples, and computes for a while."""
    seconds = {"rollouts": 0.0}

    def fetch():
        clock.now += wait + rollout
        seconds["rollouts"] += rollout

    for _ in range(count):
        measured.times.fetch(fetch, lambda: seconds["rollouts"])
        measured.times.start(lambda *_: (None, {"loss": Running()}), None, np.zeros(1))
        clock.now += compute
        measured.add(amounts)


def test_a_report(measured, clock):
    """Two steps of 1 s that wait for 0.25 s each, behind a checkpoint of 1.5 s."""
    with measured.times.spending("checkpoint"):
        clock.now += 1.5
    steps(measured, clock, 2, wait=0.25)
    row = measured.close()
    assert all(name.startswith(MEASURED) for name in row)
    assert {name.removeprefix(MEASURED): value for name, value in row.items()} == pytest.approx(
        {
            "step_time": 2.0,
            "compute": 1.0,
            "data_wait": 0.25,
            "checkpoint": 0.75,
            "compile": 0.0,
            "validation": 0.0,
            "rollout": 0.0,
            "tokens_per_second": 2000 / 2.5,
            "computed_tokens_per_second": 2500 / 2.5,
            "rows_per_second": 8 / 2.5,
            "responses_per_second": 16 / 2.5,
            "pairs_per_second": 8 / 2.5,
            "mfu": 2 * COUNT / 2.5 / 1e12,
            "memory_gib": 12.0,
            "peak_memory_gib": 20.0,
            "goodput": 2.0 / 4.0,
        }
    )


def test_the_documentation_has_all_names(measured, clock):
    steps(measured, clock, 1)
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    table = page.partition("| `perf/...` |")[2].partition("\n\n")[0]
    told = {
        f"perf/{name}"
        for row in table.splitlines()[2:]
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    }
    assert told == measured.close().keys()


def test_every_report_is_of_its_own_steps(measured, clock):
    steps(measured, clock, 2)
    first = measured.close()
    steps(measured, clock, 4, compute=2.0)
    second = measured.close()
    assert first["perf/step_time"] == 1.0 and second["perf/step_time"] == 2.0
    assert first["perf/rows_per_second"] == 4.0 and second["perf/rows_per_second"] == 2.0
    assert second["perf/mfu"] == pytest.approx(first["perf/mfu"] / 2)


def test_rollouts_count_for_rates_and_not_for_utilisation(measured, clock):
    steps(measured, clock, 2, rollout=3.0)
    row = measured.close()
    assert row["perf/rollout"] == 3.0
    assert row["perf/responses_per_second"] == 2.0
    assert row["perf/mfu"] == pytest.approx(COUNT / 1e12)
    assert row["perf/goodput"] == 1.0


def test_nothing_is_made_up(clock):
    """No peak, no memory, no pairs: no such names."""
    cpu = types.SimpleNamespace(memory_stats=lambda: None)
    measured = Performance(Times(), Goodput(0.0, []), StepFlops(FLOPS), None, [cpu])
    steps(measured, clock, 1, amounts=dataclasses.replace(AMOUNTS, pairs=0))
    names = {name.removeprefix(MEASURED) for name in measured.close()}
    assert not names & {"mfu", "memory_gib", "peak_memory_gib", "pairs_per_second"}
    assert "tokens_per_second" in names


def test_memory_of_the_fullest_device():
    assert device_memory([Device(1, 7), Device(2, 3)]) == {
        "memory_gib": 2.0,
        "peak_memory_gib": 7.0,
    }


def test_the_last_word(measured, clock, caplog):
    caplog.set_level(logging.INFO)
    measured.log_summary()
    assert caplog.messages == []
    steps(measured, clock, 3)
    measured.close()
    clock.now += 1.0
    measured.log_summary()
    assert caplog.messages[-1] == "goodput 75.0 % of 4 s since the first start"


def state_of(trained, frozen=None, reference=None):
    return types.SimpleNamespace(params=trained, frozen=frozen or {}, reference=reference or {})


def test_flops_of_a_training(tiny_model):
    """What is frozen is told by the state."""
    model, params = tiny_model
    flat = flatten(params)
    trained = {path: leaf for path, leaf in flat.items() if path.startswith("language_model/")}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    expected = model_flops(model, flat, trained)
    assert training_flops(model, state_of(trained, frozen), DPO) == StepFlops(expected)
    assert expected.token == pytest.approx(3 * model_flops(model, flat).token)


def test_a_reference_in_the_step_runs_forward(tiny_model):
    """With adapters it is the base, which has none."""
    model, params = tiny_model
    flat = flatten(add_adapters(params, model, Lora(rank=2), (), 0))
    trained = {path: leaf for path, leaf in flat.items() if is_adapter(path)}
    frozen = {path: leaf for path, leaf in flat.items() if path not in trained}
    alone = training_flops(model, state_of(trained, frozen), DPO)
    both = training_flops(model, state_of(trained, frozen, reference=trained), DPO)
    assert both.policy.token - alone.policy.token == model_flops(model, flatten(params)).token


TAUGHT = [make_term("distillation")]


def test_a_teacher_runs_forward_over_what_it_is_shown(tiny_model, measured, clock):
    """Another model over its own tokens; the reference over these alone, where nothing else
    compares with it."""
    model, params = tiny_model
    larger = Model.create(read_config(tiny.make_config(text={"hidden_size": 40})))
    flat = flatten(params)
    other = types.SimpleNamespace(model=larger, params=larger.abstract_params())
    flops = training_flops(model, state_of(flat), TAUGHT, other)
    assert flops.policy == model_flops(model, flat, flat)
    assert flops.teacher == model_flops(larger, flatten(larger.abstract_params()))
    own = types.SimpleNamespace(model=None, params=None)
    itself = training_flops(model, state_of(flat, reference=flat), TAUGHT, own)
    assert itself == StepFlops(flops.policy, model_flops(model, flat))

    measured.flops = StepFlops(FLOPS, dataclasses.replace(FLOPS, token=5e9))
    shown = dataclasses.replace(AMOUNTS, tokens=700)
    measured.times.start(lambda *_: (None, {"loss": Running()}), None, np.zeros(1))
    clock.now += 1.0
    measured.add(AMOUNTS, shown)
    row = measured.close()
    both = 2 * COUNT + 700 * 5e9 - 1000 * 1e9
    assert row["perf/mfu"] == pytest.approx(both / 1e12)
    assert row["perf/tokens_per_second"] == 1000


def test_where_only_rewards_are_read_no_token_is_predicted(tiny_model):
    model, params = tiny_model
    rewards = [make_term("bradley_terry")]
    flops = training_flops(model, state_of(flatten(params)), rewards).policy
    speaking = training_flops(model, state_of(flatten(params)), DPO).policy
    assert flops.target == 0 < speaking.target
    assert flops == dataclasses.replace(speaking, target=0.0)


def test_a_tower_that_nobody_counts(tiny_model, monkeypatch):
    monkeypatch.setattr(performance, "tower_of", lambda config: None)
    model, params = tiny_model
    assert training_flops(model, state_of(flatten(params)), DPO) is None


def test_it_is_no_part_of_what_makes_a_run_another():
    tracked = Training(**CONFIG.model_dump() | {"wandb": {"project": "p"}})
    assert tracked.identity() == CONFIG.identity()
