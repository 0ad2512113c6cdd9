"""A run that is killed goes on to the same weights, bit for bit, with every optimizer."""

import pytest
from helpers.loop_runs import CONFIG, Killed, interrupted, same
from helpers.run_files import contents

from mmpo_jax.recipes.optimizers import Adafactor, AdamW, Lion, Muon, WarmupStableDecay
from mmpo_jax.training import moments

RATE = 1e-2
OPTIMIZERS = {
    "adamw-int8": AdamW(learning_rate=RATE, moments="int8"),
    "adamw-bfloat16": AdamW(learning_rate=RATE, moments="bfloat16"),
    "adafactor": Adafactor(learning_rate=RATE, min_dim_size_to_factor=4),
    "lion": Lion(learning_rate=RATE / 5),
    "muon": Muon(learning_rate=RATE),
}


PARAMS = {"lion": "bfloat16"}
"""Dtypes of the trained weights; float32 for the others."""


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resume_is_exact(run, tmp_path, monkeypatch, name):
    """Killed before update 4, of which 1 and 2 are saved."""
    monkeypatch.setattr(moments, "SMALL", 64)  # the model is tiny
    config = CONFIG.model_copy(
        update={
            "optimizer": OPTIMIZERS[name],
            "schedule": WarmupStableDecay(decay_ratio=0.5),
            "max_steps": 6,
            "param_dtype": PARAMS.get(name, "float32"),
        }
    )
    whole = run(tmp_path / "whole", config=config)
    with interrupted(4), pytest.raises(Killed):
        run(tmp_path / "killed", config=config)
    same(run(tmp_path / "killed", config=config), whole)
    assert {str(leaf.dtype) for leaf in whole.values()} == {config.param_dtype}
    metrics = [contents(tmp_path / name / "metrics.jsonl") for name in ("whole", "killed")]
    assert metrics[0] == metrics[1]
