"""GRPO by a reward model: what rollouts are worth is what it says of their texts."""

import jax
import numpy as np
import pytest
from helpers.loop_runs import make_start
from helpers.reward_heads import save_headed
from jax.sharding import AxisType

from mmpo_jax.checkpoints.checkpoint import open_reward_model
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.data.records import Record, Response, Turn
from mmpo_jax.data.tokenization import RowRejected, tokenize_records
from mmpo_jax.parallel.mesh import AXES
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.recipes.training import Rollout, Training
from mmpo_jax.reward_models.scoring import Reading, score_responses
from mmpo_jax.training.on_policy import Prompts, Rollouts
from mmpo_jax.training.row_use import PromptUse

LENGTHS = Lengths(prompt=(24,), response=(8,))
CONFIG = Training(
    objective={"type": "grpo"}, reference={"type": "none"}, batch_size=4, micro_batch_size=4
)


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1,) * 3, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1])


@pytest.fixture
def rollout(tiny_folder, tiny_model, tmp_path):
    folder = save_headed(tmp_path / "critic", tiny_folder, *tiny_model, critique_prompt="is it ?")
    model = {"type": "reward_model", "model": str(folder), "max_new_tokens": 5, "weight": 0.5}
    rewards = [{"type": "think_format"}, model]
    return Rollout(rewards=rewards, num_samples=3, max_new_tokens=6)


class State:
    """What rollouts read of a train state."""

    def __init__(self, params):
        from mmpo_jax.core.trees import flatten

        self.params, self.frozen, self.step = flatten(params), {}, np.int32(0)


@pytest.mark.slow
def test_samples_are_worth_what_the_model_says(tiny_model, tiny_processor, rollout, mesh):
    records, _ = tokenize_records(prompt_records("align", 0, 4, 24), tiny_processor, LENGTHS)
    start = make_start(tiny_model, tiny_processor)
    rollouts = Rollouts(
        start, Prompts(records, [MixtureEntry(4)], 3), CONFIG, rollout, LENGTHS, mesh, 4
    )
    seen = {}
    sample = rollouts._sample

    def noting(*arguments):
        seen["found"] = sample(*arguments)
        return seen["found"]

    rollouts._sample = noting
    host = rollouts.draw(State(tiny_model[1]))
    (asked,) = rollout.reward_models
    opened = open_reward_model(asked.model)
    checkpoint = opened.reloaded(mesh)
    for one in seen["found"]:
        record = Record(
            one.record.id,
            one.record.images,
            (Turn("user", one.record.question),),
            tuple(Response.of(r.source.text) for r in one.record.responses),
        )
        reading = Reading.of(asked, opened.model, "critic")
        (wanted,) = score_responses(
            checkpoint, [record], reading, asked, None, mesh, folder=None, seed=3
        )
        assert one.rewards.shape == (3, 2)
        np.testing.assert_allclose(one.rewards[:, 1], wanted.rewards, rtol=0, atol=2e-5)
        np.testing.assert_array_equal(one.rewards[:, 0], 0)
    mean = np.mean([0.5 * one.rewards[:, 1] for one in seen["found"]])
    assert host.metrics["reward"] == pytest.approx(mean, abs=1e-5)
    assert "rewards/reward_model/mean" in host.metrics


def test_prompts_of_several_turns_are_left_out(rollout, tiny_processor):
    (record,) = prompt_records("align", 0, 1, 24)
    use = PromptUse.of(rollout)
    assert use.unfit(use.tokenize(record, tiny_processor, 64, 64)) is None
    more = (*record.prompt, Turn("assistant", "yes"), Turn("user", "a star ?"))
    several = Record(record.id, record.images, more, ())
    with pytest.raises(RowRejected, match="a reward model is told one question") as error:
        use.tokenize(several, tiny_processor, 64, 64)
    assert error.value.reason == "several_turns"
