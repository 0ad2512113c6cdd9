"""Rounds whose judge is a reward model: pairs follow its rewards, and a finished run is read."""

import pyarrow.parquet as pq
import pytest
from helpers.reward_heads import save_headed
from helpers.small_rounds import PROMPTS, SAMPLES, make_recipe

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.core.errors import MmpoError

SIDES = ("chosen", "rejected")


@pytest.mark.slow
def test_pairs_follow_the_rewards(stubs, tiny_folder, tiny_model, tmp_path):
    critic = save_headed(tmp_path / "critic", tiny_folder, *tiny_model, critique_prompt="is it ?")
    feedback = {"type": "reward_model", "model": str(critic), "max_new_tokens": 5}
    changes = {"feedback": feedback, "rounds": 1, "evaluation": None}
    recipe = make_recipe(tmp_path / "run", tiny_folder, **changes)
    reports = run_alignment(recipe)
    folder = tmp_path / "run" / "round-1"
    judged = pq.read_table(folder / "judge.parquet").to_pylist()
    assert len(judged) == PROMPTS * SAMPLES
    scores = {(row["prompt_id"], row["sample"]): row["score"] for row in judged}
    assert len(set(scores.values())) > PROMPTS
    pairs = pq.read_table(folder / "pairs.parquet").to_pylist()
    assert pairs
    for pair in pairs:
        chosen, rejected = (scores[pair["prompt_id"], pair[f"{side}_sample"]] for side in SIDES)
        assert chosen - rejected >= recipe.pairing.min_difference
    assert run_alignment(recipe) == reports


def test_a_reward_model_is_no_start(stubs, tiny_folder, tiny_model, tmp_path):
    critic = save_headed(tmp_path / "critic", tiny_folder, *tiny_model)
    with pytest.raises(MmpoError, match="is a reward model, which scores responses"):
        run_alignment(make_recipe(tmp_path / "run", critic))
