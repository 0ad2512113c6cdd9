"""Reward models as rewards of sampled responses: on the devices beside the policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint, open_reward_model
from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.records import Record
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.usable import unsupported
from mmpo_jax.recipes.rewards import RewardModelReward
from mmpo_jax.reward_models.reading import Reading
from mmpo_jax.reward_models.scoring import score_responses


@dataclasses.dataclass(frozen=True)
class LoadedRewardModel:
    """A reward of a rollout with its model on the devices."""

    asked: RewardModelReward
    checkpoint: Checkpoint
    reading: Reading
    mesh: Mesh

    @classmethod
    def load(cls, asked: RewardModelReward, mesh: Mesh, attention: str) -> LoadedRewardModel:
        """Reads the model's weights.

        Raises:
          ModelError, MmpoError: it is not there, has no reward head, or writes no critiques.
        """
        opened = open_reward_model(asked.model, attention, asked.template)
        reading = Reading.of(asked, opened.model, asked.model)
        return cls(asked, opened.reloaded(mesh), reading, mesh)

    def rewards(
        self, records: Sequence[TokenizedRecord], seed: int, step: int
    ) -> list[list[float]]:
        """What the samples of every prompt are worth, before the weight; NaN for no verdict.

        Args:
          records: prompts with samples as their responses, as `PromptUse` makes them.
          seed: of critiques.
          step: of the training.

        Raises:
          DataError: the model does not take what a prompt shows.
        """
        prompts = [_answered(record) for record in records]
        for prompt in prompts:
            problem = unsupported(prompt, self.checkpoint.processor)
            if problem is not None:
                raise DataError(
                    f"rollout: prompt {prompt.id!r}: {self.asked.model}: {problem[1]}; reward by a "
                    "model that does, or leave such prompts out"
                )
        with progress.doing("scoring samples by the reward model", len(prompts), "prompts"):
            found = score_responses(
                self.checkpoint,
                prompts,
                self.reading,
                self.asked,
                None,
                self.mesh,
                folder=None,
                seed=seed,
                round_index=step,
            )
        return [rewarded.rewards.tolist() for rewarded in found]


def _answered(record: TokenizedRecord) -> Record:
    """The whole prompt with the texts of its samples, which another tokenizer may have to read."""
    assert record.asked is not None
    responses = tuple(response.source for response in record.responses)
    return dataclasses.replace(record.asked, id=record.id, responses=responses)
