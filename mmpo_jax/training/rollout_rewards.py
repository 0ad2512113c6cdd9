"""What sampled responses are worth: rewards of a rollout, what is known of them, and advantages."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.processes import is_first, on_one
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.objectives.advantages import STD_FLOOR, advantages
from mmpo_jax.objectives.sums import weighted
from mmpo_jax.recipes.rewards import RewardModelReward
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.rewards.registry import Question
from mmpo_jax.training.model_rewards import LoadedRewardModel

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rewarding:
    """The rewards of a rollout, with the models among them on the devices."""

    rollout: Rollout
    models: Sequence[LoadedRewardModel]
    seed: int
    """Of critiques."""

    @classmethod
    def load(cls, rollout: Rollout, mesh: Mesh, attention: str, seed: int) -> Rewarding:
        """Reads the weights of reward models.

        Raises:
          ModelError, MmpoError: see `LoadedRewardModel.load`.
        """
        models = [
            LoadedRewardModel.load(section, mesh, attention) for section in rollout.reward_models
        ]
        return cls(rollout, models, seed)

    def rewards(
        self, records: Sequence[TokenizedRecord], step: int
    ) -> list[Float[np.ndarray, "S K"]]:
        """What the samples of every prompt are worth, before weights; NaN for no verdict.

        Args:
          records: prompts with samples as their responses.
          step: of the training.
        """
        # Which may ask the world outside, or be another every time.
        rules = on_one(lambda: [self._by_rules(record) for record in records])
        models = [model.rewards(records, self.seed, step) for model in self.models]
        order = [isinstance(section, RewardModelReward) for section in self.rollout.rewards]
        found = []
        for number, of_rules in enumerate(rules):
            by_rule, by_model = iter(of_rules), iter([values[number] for values in models])
            columns = [next(by_model if is_model else by_rule) for is_model in order]
            shape = (len(columns), len(records[number].responses))  # also of no reward
            found.append(np.array(columns, np.float32).reshape(shape).T)
        return found

    def _by_rules(self, record: TokenizedRecord) -> list[list[float]]:
        """What the samples of a prompt are worth by every reward that is a function."""
        texts = [response.source.text for response in record.responses]
        tokens = [response.ids.tolist() for response in record.responses]
        shown = record.images, record.solution, record.videos
        question = Question(record.id, record.question, *shown)
        return [
            [value.score for value in section.values(question, texts, tokens)]
            for section in self.rollout.rules
        ]

    @property
    def weights(self) -> dict[str, float]:
        """Of the rewards, by name."""
        return {section.type: section.weight for section in self.rollout.rewards}

    def differing(self, rewards: Float[np.ndarray, "N S K"]) -> Bool[np.ndarray, " N"]:
        """bool[N]: whether the samples of a prompt are not all worth the same."""
        each = without_gaps(rewards)
        if self.rollout.aggregation == "sum_then_normalize":
            each = (each @ np.array(list(self.weights.values()), np.float32))[..., None]
        return (each.std(axis=1) >= STD_FLOOR).any(axis=-1)

    def advantages(
        self,
        rewards: Float[np.ndarray, "N S K"],
        penalty: Float[np.ndarray, "N S"] | None = None,
    ) -> Float[np.ndarray, "N S"]:
        """float32[N, S], see `objectives.advantages`."""
        found = advantages(
            jnp.asarray(without_gaps(rewards)),
            list(self.weights.values()),
            baseline=self.rollout.baseline,
            scale=self.rollout.scale,
            aggregation=self.rollout.aggregation,
            penalty=None if penalty is None else jnp.asarray(penalty),
        )
        return np.asarray(found)


def without_gaps(rewards: Float[np.ndarray, "*N S K"]) -> Float[np.ndarray, "*N S K"]:
    """Rewards of prompts' samples where no verdict (NaN) counts as the mean of the others' to the
    same prompt, which neither favours nor punishes; 0 where no sample has one."""
    known = ~np.isnan(rewards)
    total = np.where(known, rewards, 0).sum(axis=-2, keepdims=True)
    mean = total / np.maximum(known.sum(axis=-2, keepdims=True), 1)
    return np.where(known, rewards, mean).astype(np.float32)


def check_verdicts(
    rewards: Float[np.ndarray, "N S K"], ids: Sequence[str], rollout: Rollout, step: int
) -> None:
    """Says which rewards gave a rollout's samples no verdict.

    Args:
      rewards: float32[N, S, K], NaN for no verdict.
      ids: of the N prompts.
      rollout: the recipe's section.
      step: of the training.

    Raises:
      DataError: more samples than `max_failed` allows have no verdict of any reward.
    """
    missing = np.isnan(rewards)
    silent = missing.all(axis=-1)
    samples, without = silent.size, int(silent.sum())
    names = [section.type for section in rollout.rewards]
    if without:
        first = ids[int(silent.any(axis=1).argmax())]
        told = (
            f"rollout of step {step + 1}: {without} of {samples} samples have no verdict of any "
            f"reward ({', '.join(names)}), such as those to prompt {first!r}"
        )
        if without > rollout.max_failed * samples:
            raise DataError(f"{told}, and rollout.max_failed allows {rollout.max_failed:g} of them")
        _warn(f"{told}; each counts as the mean of its prompt's others")
    if without < samples:
        for name in np.array(names)[missing.all(axis=(0, 1))]:
            _warn(f"rollout of step {step + 1}: {name} gave none of {samples} samples a verdict")


def check_truncated(finished: Bool[np.ndarray, "N S"], rollout: Rollout, step: int) -> None:
    """Says that a rollout teaches nothing as the length limit cut all of its samples."""
    if rollout.mask_truncated and not finished.any():
        _warn(
            f"rollout of step {step + 1}: 100 % of {finished.size} samples were cut at "
            f"rollout.max_new_tokens {rollout.max_new_tokens}, so with mask_truncated nothing is "
            "learned from them; allow more tokens"
        )


def _warn(told: str) -> None:
    """Says in the first process what all of them know."""
    if is_first():
        log.warning("%s", told)


def reward_metrics(
    rewards: Float[np.ndarray, "N S K"], weights: Mapping[str, float]
) -> dict[str, Any]:
    """What is logged of a rollout's rewards, by TRL's names; nothing where there are none.

    `reward` and `reward_std` are the mean and the standard deviation, with n - 1 below, of the
    weighted sums of the rewards, over all samples to all prompts; `rewards/NAME/...` are those of
    one reward, before its weight, over the samples that have its verdict, and `missing_ratio` the
    share of those that have none. `frac_reward_zero_std` is the share of prompts whose samples are
    all worth the same, whatever the advantages are divided by.

    Args:
      rewards: float32[N, S, K], before weights; NaN for no verdict.
      weights: of the K rewards, by name.

    Returns:
      Numbers and `WeightedSum`s by name.
    """
    if not weights:
        return {}
    total = without_gaps(rewards) @ np.array(list(weights.values()), np.float32)
    values: dict[str, Any] = {
        "reward": float(total.mean()),
        "reward_std": _std(total),
        "frac_reward_zero_std": float(np.mean(total.std(axis=1) < STD_FLOOR)),
    }
    for place, name in enumerate(weights):
        each = rewards[..., place]
        known = ~np.isnan(each)
        counts = jnp.asarray(known, jnp.float32)
        values[f"rewards/{name}/mean"] = weighted(jnp.asarray(np.where(known, each, 0)), counts)
        std = jnp.asarray(_std(each[known]), jnp.float32)
        values[f"rewards/{name}/std"] = weighted(std, counts.max())
        values[f"rewards/{name}/missing_ratio"] = float(1 - known.mean())
    return values


def _std(values: np.ndarray) -> float:
    """Standard deviation of all values, divided by n - 1; 0 of a single value."""
    return float(values.std(ddof=1)) if values.size > 1 else 0.0
