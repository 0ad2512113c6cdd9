"""Damaged checkpoints: named, set aside and passed over for the one before."""

import json
import logging
import shutil

import pytest
from helpers import damage
from helpers.loop_runs import STEPS, files, same
from helpers.run_files import contents

from mmpo_jax.checkpoints import steps
from mmpo_jax.checkpoints.steps import CheckpointError, DamagedError, read_run, reading

NEWEST, BEFORE = str(STEPS), str(STEPS - 2)


def warned(caplog):
    """What we warn of, and not Orbax."""
    ours = (each for each in caplog.records if each.name.startswith("mmpo_jax"))
    return [each.getMessage() for each in ours if each.levelno == logging.WARNING]


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A finished run, to be damaged."""
    return shutil.copytree(undisturbed[0], tmp_path / "run")


@pytest.mark.parametrize("name", damage.DAMAGES)
def test_the_one_before_is_taken(run, undisturbed, copy, caplog, name):
    """And the steps since are done again, to the same end: weights, metrics and checkpoints."""
    whole, params = undisturbed
    how, newest = damage.DAMAGES[name], copy / "checkpoints" / NEWEST
    how.do(newest)
    caplog.set_level(logging.INFO)
    same(run(copy), params)
    assert f"continuing from step {NEWEST if how.is_whole else BEFORE}" in caplog.messages
    # Threads of other tests may warn of their own.
    told = [line for line in warned(caplog) if str(copy) in line]
    assert len(told) == (0 if how.is_whole else 1)
    assert all(line.startswith(f"{newest}") for line in told)
    aside = copy / "checkpoints" / f"{NEWEST}.damaged"
    assert aside.exists() == (not how.is_whole and not how.is_begun)
    assert contents(copy / "metrics.jsonl") == contents(whole / "metrics.jsonl")
    assert (
        read_run(str(newest))["digests"] == read_run(str(whole / "checkpoints" / NEWEST))["digests"]
    )
    before = files(copy / "checkpoints")
    same(run(copy), params)  # and nothing is wrong any more
    assert files(copy / "checkpoints") == before


def test_several_are_passed_over(run, undisturbed, copy, caplog):
    """Each with its reason."""
    damage.flip_in_array(copy / "checkpoints" / "8" / "params")
    damage.truncate(damage.largest(copy / "checkpoints" / "6" / "optimizer"))
    same(run(copy), undisturbed[1])
    told = warned(caplog)
    assert [line.partition(": ")[0] for line in told] == [
        str(copy / "checkpoints" / step) for step in ("8", "6")
    ]
    assert all("Passed over for step 4; it is kept as" in line for line in told)


def test_none_is_whole(run, copy):
    """Then nothing is touched, and each is named."""
    saved = sorted((copy / "checkpoints").iterdir())
    for step in saved:
        damage.truncate(damage.largest(step / "optimizer"))
    before = files(copy)
    with pytest.raises(CheckpointError, match="no checkpoint is whole: ") as told:
        run(copy)
    assert all(f"{step}: " in str(told.value) for step in saved)
    assert "move" in str(told.value) and "away to begin anew" in str(told.value)
    assert files(copy) == before


def test_what_may_pass_is_no_damage(run, copy, monkeypatch):
    """Such as memory or a network: the newest checkpoint is not given up for that."""

    def read_item(folder, item, target):
        with reading(folder):
            raise ValueError("UNAVAILABLE: the bucket does not answer")

    monkeypatch.setattr(steps, "read_item", read_item)
    before = files(copy)
    with pytest.raises(CheckpointError, match="8: cannot be read now: UNAVAILABLE") as told:
        run(copy)
    assert not isinstance(told.value, DamagedError)
    assert files(copy) == before


def test_a_checkpoint_of_before_there_were_digests(run, undisturbed, copy):
    for step in (copy / "checkpoints").iterdir():
        file = step / "run" / "metadata"
        known = json.loads(file.read_text())
        file.write_text(json.dumps({key: known[key] for key in ("identity", "position")}))
    shutil.rmtree(copy / "checkpoints" / NEWEST)
    same(run(copy), undisturbed[1])
