"""Held-out rows: what is measured, which step is kept, when training stops, and going on."""

import dataclasses
import functools
import itertools
import json
import logging
import shutil
import types

import jax
import numpy as np
import pytest
import yaml
from helpers import damage, meshes, tiny
from helpers.run_files import reproducible_rows

from mmpo_jax import cli
from mmpo_jax.checkpoints.best_steps import BestSteps
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.checkpoints.run_checkpoints import Checkpoints
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import held_out_batches
from mmpo_jax.data.records import Record, Response, Turn
from mmpo_jax.data.tokenization import TokenizedRecord, tokenize_records
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.recipes.train_recipe import Validation
from mmpo_jax.recipes.training import Training
from mmpo_jax.training import loop, times
from mmpo_jax.training.losses import make_loss
from mmpo_jax.training.saving import MODEL
from mmpo_jax.training.times import Times
from mmpo_jax.training.validation import Validator, best_row, hold_out

QUESTION = "is there a red star ?"
ROWS = [
    {"id": str(n), "prompt": QUESTION, "chosen": "yes a red star .", "rejected": "two rings ."}
    for n in range(8)
]


class Killed(Exception):
    """What nothing expects."""


@pytest.fixture
def train(tiny_folder, tmp_path, monkeypatch):
    """`mmpo train` on eight equal pairs, one step an epoch; gives the lines of `metrics.jsonl`."""
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    other = tmp_path / "other.jsonl"
    swapped = [{**r, "chosen": r["rejected"], "rejected": r["chosen"]} for r in ROWS[:3]]
    other.write_text("".join(json.dumps(row) + "\n" for row in swapped))

    def train(name="run", expect=0, validation=None, rate=1e-3, **training):
        recipe = {
            "model": str(tiny_folder),
            "output": str(tmp_path / name),
            "data": {"source": "file", "path": str(data)},
            "lengths": {"prompt": [16], "response": [8]},
            "training": {
                "objective": {"type": "dpo"},
                "optimizer": {"learning_rate": rate},
                "schedule": {"warmup_ratio": 0},
                "batch_size": 8,
                "epochs": 6,
                "log_every": 1,
                "save_every": 1,
                **training,
            },
            "validation": {"data": {"source": "file", "path": str(other)}, "every": 1}
            | (validation or {}),
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe))
        assert cli.main(["train", str(path)]) == expect
        return reproducible_rows(tmp_path / name / "metrics.jsonl")

    return train


@pytest.mark.slow
def test_the_model_of_the_best_step_is_kept(train, tmp_path, tiny_model):
    """What is held out is the other way round, so every step makes it worse."""
    rows = train()
    assert [row["step"] for row in rows] == list(range(7))
    losses = [row["eval_loss"] for row in rows]
    assert losses[0] == pytest.approx(np.log(2), abs=1e-6)
    assert all(after > before for before, after in itertools.pairwise(losses))
    assert rows[1]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    for row in rows[1:]:
        assert row["eval_rewards/margins"] < 0 < row["eval_loss"]
    for path, leaf in flatten(load_model(tmp_path / "run" / MODEL)[1]).items():
        np.testing.assert_array_equal(leaf, flatten(tiny_model[1])[path])
    card = (tmp_path / "run" / MODEL / "README.md").read_text()
    assert f"| eval_loss | {losses[0]:.6g} |" in card


@pytest.mark.slow
def test_measuring_and_saving_are_no_time_of_training(train, monkeypatch):
    """By a clock that only they move."""
    clock, reported = types.SimpleNamespace(now=0.0), []
    monkeypatch.setattr(times, "time", types.SimpleNamespace(perf_counter=lambda: clock.now))
    for owner, name in ((Validator, "measure"), (Checkpoints, "save"), (BestSteps, "save")):
        original = getattr(owner, name)

        def slow(*args, original=original):
            clock.now += 100.0
            return original(*args)

        monkeypatch.setattr(owner, name, slow)
    report = Times.log_summary
    monkeypatch.setattr(Times, "log_summary", lambda self: (reported.append(self), report(self)))
    train(epochs=2)
    (measured,) = reported
    assert clock.now == 600  # three measurements, of which the first is best, and two checkpoints
    assert measured.total["validation"] == 300 and measured.total["checkpoint"] == 300


@pytest.mark.slow
def test_greater_may_be_better(train, tmp_path, tiny_model):
    rows = train(validation={"greater_is_better": True})
    assert max(rows, key=lambda row: row["eval_loss"])["step"] == 6
    kernel = "language_model/lm_head/kernel"
    trained = flatten(load_model(tmp_path / "run" / MODEL)[1])[kernel]
    assert np.abs(trained - flatten(tiny_model[1])[kernel]).max() > 1e-4


@pytest.mark.slow
def test_patience_ends_a_run_for_good(train, caplog):
    with caplog.at_level(logging.INFO):
        rows = train(validation={"patience": 2})
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        assert f"step {row['step']}  eval_loss {row['eval_loss']:.4g}" in caplog.messages
    told = f"the result is the model of step 0: eval_loss {rows[0]['eval_loss']:.4g}"
    assert told in caplog.messages
    assert sum("2 measurements without a better one" in line for line in caplog.messages) == 1
    assert train(validation={"patience": 2}) == rows


@pytest.mark.slow
def test_a_killed_run_measures_the_same(train, tmp_path, monkeypatch):
    expected = train("whole", validation={"greater_is_better": True})
    update, taken = loop.put_batch, iter(range(100))

    def fragile(*args, **options):
        if next(taken) == 3:
            raise Killed
        return update(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", fragile)
        with pytest.raises(Killed):
            train("killed", validation={"greater_is_better": True})
    assert train("killed", validation={"greater_is_better": True}) == expected
    ours, theirs = (
        (tmp_path / name / MODEL / "model.safetensors").read_bytes() for name in ("killed", "whole")
    )
    assert ours == theirs


def test_an_unknown_metric(train, capsys):
    train(validation={"metric": "eval_los"}, expect=1)
    message = capsys.readouterr().err
    assert "validation.metric: 'eval_los' is none of" in message
    assert "eval_rewards/accuracies" in message


def test_a_share_of_the_training_data():
    """Rows of one prompt fall on one side, the same one whatever the order of the rows."""
    with_prompts = [
        TokenizedRecord(str(n), np.int32([1, n // 2, 5]), (), (), ()) for n in range(2000)
    ]
    [(kept, held)] = hold_out([with_prompts], 0.25)
    assert len(kept) + len(held) == 2000
    assert 0.2 < len(held) / 2000 < 0.3
    assert not {int(r.prompt_ids[1]) for r in kept} & {int(r.prompt_ids[1]) for r in held}
    assert hold_out([with_prompts[::-1]], 0.25)[0][1].ids == held.ids[::-1]


def rows_of_prompts(sizes):
    """Records without responses, so many of every prompt."""
    return [
        TokenizedRecord(f"{prompt}-{n}", np.int32([1, prompt, 5]), (), (), ())
        for prompt, size in enumerate(sizes)
        for n in range(size)
    ]


@pytest.mark.parametrize("share", [1e-6, 0.05, 0.2, 0.25, 0.5, 0.9, 1 - 1e-6])
@pytest.mark.parametrize("sizes", [[1] * 12, [2] * 6, [1, 11], [5, 1, 3, 1, 2], [4, 4]], ids=str)
def test_a_share_is_met_within_one_prompt(sizes, share, caplog):
    caplog.set_level(logging.INFO)
    records = rows_of_prompts(sizes)
    [(kept, held)] = hold_out([records], share)
    assert kept and held
    assert len(held) + len(kept) == len(records)
    assert abs(len(held) - share * len(records)) <= max(sizes)
    if sizes == [1] * 12:
        assert len(held) == min(max(round(share * 12), 1), 11)
    prompts = {int(record.prompt_ids[1]) for record in held}
    assert not prompts & {int(record.prompt_ids[1]) for record in kept}
    (told,) = caplog.messages
    assert told.startswith(
        f"held out: {len(held)} of {len(records)} rows, which is {len(prompts)} "
    )


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5])
def test_no_prompt_is_on_both_sides_of_a_mixture(share):
    """Sets that share prompts, of other sizes, and one that has a single prompt."""
    sets = [rows_of_prompts([1] * 40), rows_of_prompts([3] * 15), rows_of_prompts([2])]
    sides = hold_out(sets, share)
    kept, held = (
        {int(record.prompt_ids[1]) for side in sides for record in side[place]} for place in (0, 1)
    )
    assert kept and held and not kept & held
    assert [len(kept) + len(held) for kept, held in sides] == [40, 45, 2]
    assert abs(sum(len(held) for _, held in sides) - share * 87) <= 6
    swapped = hold_out([rows[::-1] for rows in sets[::-1]], share)
    assert [(k.ids[::-1], h.ids[::-1]) for k, h in swapped[::-1]] == [
        (k.ids, h.ids) for k, h in sides
    ]


def test_one_prompt_has_no_share():
    with pytest.raises(MmpoError, match="all 3 rows have one prompt"):
        hold_out([rows_of_prompts([1]), rows_of_prompts([2])], 0.5)


def test_the_first_of_several_best_rows():
    rows = [{"step": 0, "eval_loss": 2.0}, {"step": 1}, {"step": 2, "eval_loss": 1.0}]
    rows += [{"step": 3, "eval_loss": 1.0}, {"step": 4, "eval_loss": float("nan")}]
    config = Validation(share=0.5)
    assert best_row(rows, config)["step"] == 2
    assert best_row(rows, config.model_copy(update={"greater_is_better": True}))["step"] == 0
    assert best_row([], config) == {}


@pytest.mark.parametrize("names", [("dpo", "sft"), ("aot",), ("bco",)])
def test_batches_of_any_size_measure_the_same(tiny_model, tiny_processor, names):
    """Held-out metrics are those of all rows together, also where rows depend on each other."""
    lengths = Lengths(prompt=(16,), response=(4, 8))
    texts = [("yes", "no"), ("a red star", "two"), ("no no no", "yes"), ("a", "a ring and a star")]
    records = [
        Record(
            str(n),
            (),
            (Turn("user", QUESTION),),
            tuple(Response.of(text, rank) for rank, text in enumerate(texts[n % 4], start=1)),
        )
        for n in range(7)
    ]
    records, _ = tokenize_records(records, tiny_processor, lengths)
    examples = [tiny.example(r, [-3.0 - n, -2.0 * n]) for n, r in enumerate(records)]
    examples = [
        dataclasses.replace(e, fields={**e.fields, "desirable": np.float32([1, 0])})
        for e in examples
    ]
    model, params = tiny_model
    terms = [make_term(name, weight) for name, weight in zip(names, (1.0, 0.5), strict=False)]
    loss = make_loss(model, terms)
    state = TrainState(np.int32(0), flatten(params), {}, (), objective_state=loss.state)
    mesh = meshes.one_device()
    measured = []
    with jax.set_mesh(mesh):
        for size in (1, 3, 7):
            make = functools.partial(held_out_batches, examples, tiny_processor, lengths, size)
            assert {batch.prompts.loss_mask.shape[-1] for batch in make()} == {8}
            validator = Validator(Validation(share=0.5), make, loss, Training(), mesh, [])
            measured.append(validator.measure(0, state))
    for other in measured[:2]:
        assert other == pytest.approx(measured[2], rel=1e-5)
    margin = measured[0]["eval_rewards/chosen"] - measured[0]["eval_rewards/rejected"]
    assert measured[0]["eval_rewards/margins"] == pytest.approx(margin, rel=1e-4)
    if len(names) > 1:
        parts = measured[0]["eval_loss/dpo"] + 0.5 * measured[0]["eval_loss/sft"]
        assert measured[0]["eval_loss"] == pytest.approx(parts, rel=1e-6)


@pytest.mark.slow
def test_what_was_best_in_an_attempt_without_checkpoints_is_forgotten(train, tmp_path, tiny_model):
    """Another start may follow in the same folder before anything was saved."""
    train("run")
    other = tmp_path / "run"
    for name in ("checkpoints", "metrics.jsonl", "model"):
        path = other / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (step,) = (other / "best").iterdir()
    assert step.name == "0"
    written = step.stat().st_mtime_ns
    train("run")
    (step,) = (other / "best").iterdir()
    assert step.name == "0"
    assert step.stat().st_mtime_ns > written


@pytest.mark.slow
def test_a_damaged_best_step_is_passed_over(train, tmp_path, caplog):
    """Told of when the run goes on, and the next best is the result: the card says which."""
    best = tmp_path / "run" / "best"
    options = {"save_every": 2, "keep_best": 2}
    stopped, save = 4, Checkpoints.save

    def stop(self, step, *rest):
        save(self, step, *rest)
        if step == stopped:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", stop)
        with pytest.raises(Killed):
            train(**options)
    assert {step.name for step in best.iterdir() if step.name.isdigit()} == {"0", "1"}
    damage.truncate(damage.largest(best / "0" / "params" / "d"))
    rows = train(**options)
    told = [each.getMessage() for each in caplog.records if "Passed over" in each.getMessage()]
    assert len(told) == 1 and "best/0: not a whole" in told[0] and "for step 1;" in told[0]
    assert {step.name for step in best.iterdir()} == {"0.damaged", "1", "5"}
    card = (tmp_path / "run" / MODEL / "README.md").read_text()
    assert f"| eval_loss | {rows[1]['eval_loss']:.6g} |" in card
