"""GRPO above a quantised base: what is sampled, how a killed run ends, what is saved."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers import meshes
from helpers.loop_runs import Killed, interrupted, same
from helpers.rollouts import State, easy_rewards, tokenized_prompts
from helpers.run_files import reproducible_rows

from mmpo_jax.checkpoints.checkpoint import load_start
from mmpo_jax.checkpoints.huggingface import load_params
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.models.log_probs import response_log_probs
from mmpo_jax.models.lora import B, add_adapters, merge_adapters
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.training.on_policy import Prompts, Rollouts
from mmpo_jax.training.rollout_batches import RolloutBatches

STEPS = 6


def make_recipe(folder, output, kind, **training):
    """Eight prompts, four at a time, each rollout learned from twice."""
    return TrainRecipe.model_validate(
        {
            "output": str(output),
            "model": str(folder),
            "lengths": {"prompt": [24], "response": [8]},
            "data": {"source": "picture_world", "split": "align", "size": 8, "image_size": 24},
            "rollout": {
                "num_samples": 4,
                "max_new_tokens": 6,
                "num_iterations": 2,
                "rewards": [{"type": "picture_world_caption"}],
            },
            "training": {
                "objective": {"type": "grpo", "beta": 0.1},
                "reference": {"type": "online"},
                "batch_size": 4,
                "micro_batch_size": 2,
                "epochs": 2,
                "max_steps": STEPS,
                "log_every": 1,
                "save_every": 2,
                "optimizer": {"learning_rate": 3e-2},
                "schedule": {"warmup_ratio": 0},
                "lora": {
                    **{"target": "language_model/layers/.*/[qv]_proj", "rank": 2, "dora": True},
                    "quantize_base": kind,
                },
                **training,
            },
        }
    )


@pytest.fixture(autouse=True)
def rewards():
    with easy_rewards():
        yield


@pytest.fixture
def rollouts(monkeypatch):
    """Of every rollout that is made: (parameters, batch, log-probs under them)."""
    seen = []
    log_probs = RolloutBatches.log_probs

    def kept(self, params, host):
        found = log_probs(self, params, host)
        seen.append((jax.tree.map(np.asarray, params), host, found))
        return found

    monkeypatch.setattr(RolloutBatches, "log_probs", kept)
    return seen


def of_samples(model, params, host):
    """The log-probs of a batch's responses under some parameters."""
    prompts = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), host.arrays.prompts)
    return response_log_probs(model, params, prompts) * prompts.loss_mask


def test_a_rollout_is_of_the_merged_model(tiny_folder, tiny_processor):
    """Samples and their log-probs are those of the dequantised base with the adapters merged."""
    recipe = make_recipe(tiny_folder, "unused", "int4")
    start = load_start(str(tiny_folder), quantization="int4")
    records = tokenized_prompts(tiny_processor, recipe.lengths)[:4]
    rng = np.random.default_rng(0)
    adapted = flatten(add_adapters(start.params, start.model, recipe.training.lora, (), 0))
    for path in (path for path in adapted if path.endswith(B)):
        adapted[path] = np.float32(0.1 * rng.standard_normal(adapted[path].shape))

    def drawn(params):
        prompts = Prompts(records, [MixtureEntry(len(records))], seed=3)
        rollouts = Rollouts(
            *(dataclasses.replace(start, params={}), prompts, recipe.training, recipe.rollout),
            *(recipe.lengths, meshes.one_device()),
            micro_batch_size=2,
        )
        return rollouts.draw(State(params))

    adapted = unflatten(adapted)
    ours, theirs = drawn(adapted), drawn(merge_adapters(adapted))
    ids = [host.arrays.prompts.response_ids for host in (ours, theirs)]
    np.testing.assert_array_equal(*ids)
    old = [host.arrays.fields["old_log_probs"] for host in (ours, theirs)]
    np.testing.assert_allclose(*old, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.slow
def test_what_samples_is_what_is_trained_and_saved(
    kind, tiny_folder, tiny_model, rollouts, tmp_path
):
    """Log-probs of the samples are those of the merged weights; the first rollout is the quantised
    base's, and the reference is the same base."""
    model = tiny_model[0]
    run_training(make_recipe(tiny_folder, tmp_path / "run", kind))
    start = load_start(str(tiny_folder), quantization=kind)
    assert len(rollouts) == STEPS // 2
    for params, host, found in rollouts:
        wanted = of_samples(model, merge_adapters(params), host)
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    _, host, found = rollouts[0]
    for params, is_near in ((start.params, True), (tiny_model[1], False)):
        wanted = of_samples(model, params, host)
        assert np.allclose(found, wanted, rtol=1e-5, atol=1e-5) == is_near

    rows = reproducible_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["clip_ratio/region_mean"] == 0
    assert rows[-1]["kl"] > 0
    saved = flatten(load_params(tmp_path / "run" / "model", model))
    for path, leaf in flatten(load_start(str(tmp_path / "run")).params).items():
        np.testing.assert_allclose(saved[path], leaf, rtol=0, atol=1e-6, err_msg=path)


@pytest.mark.slow
def test_a_killed_run_ends_as_an_undisturbed_one(tiny_folder, tmp_path):
    whole, again = (
        make_recipe(tiny_folder, tmp_path / name, "int8") for name in ("whole", "again")
    )
    run_training(whole)
    with pytest.raises(Killed), interrupted(4):  # in the midst of a rollout
        run_training(again)
    run_training(again)
    same(*(flatten(load_start(str(tmp_path / n)).params) for n in ("again", "whole")))
    rows = [reproducible_rows(tmp_path / n / "metrics.jsonl") for n in ("again", "whole")]
    assert rows[0] == rows[1]
