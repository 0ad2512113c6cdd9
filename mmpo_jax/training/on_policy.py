"""Rollouts: batches of on-policy training, sampled from the policy and rewarded as it learns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core import progress
from mmpo_jax.core.processes import on_one
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import (
    Example,
    Examples,
    HostBatch,
    MixtureEntry,
    TrainBatch,
    batch_maker,
    batch_order,
)
from mmpo_jax.data.records import Response, Turn
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse
from mmpo_jax.data.tokenized_rows import known
from mmpo_jax.generation.responses import read_response, sample_tokens
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Params
from mmpo_jax.objectives.on_policy import STD_FLOOR, advantages
from mmpo_jax.parallel.mesh import batch_share, gathered, put_batch
from mmpo_jax.recipes.rewards import RewardModelReward
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.recipes.training import Rollout, Training
from mmpo_jax.rewards.registry import Question
from mmpo_jax.scoring.log_probs import score_batch
from mmpo_jax.training.model_rewards import LoadedRewardModel
from mmpo_jax.training.step import whole_params


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A prompt's samples."""

    record: TokenizedRecord
    """The prompt's record, with the samples as its responses."""
    rewards: Float[np.ndarray, "S K"]
    """float32[S, K], before weights."""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What is sampled after, and in which order."""

    records: Sequence[TokenizedRecord]
    """The prompts, with the solutions that rewards compare with."""
    entries: Sequence[MixtureEntry]
    """The data sets that stand one after another in `records`."""
    seed: int
    """Seed of the order and of the samples."""


class Rollouts:
    """An endless source of batches for the train loop, like `data.pipeline.training_batches`.

    What is sampled depends on the seed, the parameters, the step, the prompt's id and how often it
    has come in the batch only, so a resumed run samples what the run that was stopped would have.
    """

    def __init__(
        self,
        start: Checkpoint,
        prompts: Prompts,
        config: Training,
        rollout: Rollout,
        lengths: Lengths,
        mesh: Mesh,
        micro_batch_size: int,
    ):
        """
        Args:
          start: the architecture and what belongs to it; its parameters are not read.
          prompts: what is sampled after.
          config: the recipe's training section.
          rollout: how samples are drawn and rewarded.
          lengths: bucket sizes.
          mesh: the devices.
          micro_batch_size: prompts at a time in an update.
        """
        self.start = dataclasses.replace(start, params={})
        self.records, self.seed = prompts.records, prompts.seed
        self.config, self.rollout, self.lengths, self.mesh = config, rollout, lengths, mesh
        self.micro_batch_size = micro_batch_size
        order = batch_order(prompts.entries, prompts.seed, config.epochs, config.batch_size)
        self.order = iter(order.to_iter_dataset(grain.ReadOptions(num_threads=0)))
        self.reward_models = [
            LoadedRewardModel.load(section, mesh, start.model.attention)
            for section in rollout.reward_models
        ]
        self.batch: HostBatch | None = None
        self.before: dict[str, Any] = self.order.get_state()
        """Where the order stood before the rollout in use."""
        self.uses = 0
        """Updates that were given it."""
        self.seconds = 0.0
        """Time that rollouts took, from the end of the step before them."""

    def get_state(self) -> dict[str, Any]:
        """The position. Samples are not saved: within a rollout it says where this was drawn, and
        how many updates had it."""
        if self.can_resume():
            return {"order": self.order.get_state(), "uses": 0}
        return {"order": self.before, "uses": self.uses}

    def set_state(self, state: dict[str, Any]) -> None:
        self.order.set_state(state["order"])
        self.batch, self.uses = None, state["uses"]

    def can_resume(self) -> bool:
        """Whether the position lies between rollouts. Whoever goes on from one within has the same
        prompts sampled again, by what the policy is by then."""
        return self.uses in (0, self.rollout.updates_per_rollout)

    def draw_again(self, position: dict[str, Any], state: TrainState) -> HostBatch | None:
        """What was drawn at a position, with the parameters of then; None within a rollout, as what
        sampled it is no more."""
        if position["uses"]:
            return None
        self.set_state(position)
        return self.draw(state)

    def draw(self, state: TrainState) -> HostBatch:
        """The batch of the next step: of a new rollout, or the last one's again."""
        if self.uses == self.rollout.updates_per_rollout:
            self.batch, self.uses = None, 0
        if self.batch is None:
            self.before = self.order.get_state()
            self.batch = self._roll_out(state)
        self.uses += 1
        return self.batch

    def _roll_out(self, state: TrainState) -> HostBatch:
        step = int(state.step)  # which waits for the step that runs
        begun = time.perf_counter()
        chosen = [self.records[int(index)] for index in next(self.order)]
        params = cast_params(whole_params(state), self.config.compute_dtype)
        sampled = self._sample(params, chosen, step)
        rewards = np.stack([each.rewards for each in sampled])
        weights = [section.weight for section in self.rollout.rewards]
        better = advantages(
            jnp.asarray(rewards),
            weights,
            scale=self.rollout.scale,
            aggregation=self.rollout.aggregation,
        )
        examples = [
            Example((each.record,), {"advantages": row})
            for each, row in zip(sampled, np.asarray(better), strict=True)
        ]
        make = batch_maker(
            examples,
            self.start.processor,
            self.lengths,
            self.config.batch_size,
            self.micro_batch_size,
            share=batch_share(self.mesh),
        )
        host = make(list(range(len(examples))))
        arrays = host.arrays
        if self.rollout.updates_per_rollout > 1:
            fields = {**arrays.fields, "old_log_probs": self._old_log_probs(params, arrays)}
            arrays = dataclasses.replace(arrays, fields=fields)
        self.seconds += time.perf_counter() - begun
        metrics = {**host.metrics, **self._metrics(sampled, rewards)}
        return dataclasses.replace(host, arrays=arrays, metrics=metrics)

    def _sample(
        self, params: Params, records: Sequence[TokenizedRecord], step: int
    ) -> list[Sampled]:
        """Samples and rewards them; of the ids that were sampled, not of their text."""
        options = self.rollout.model_dump(include=set(Decoding.model_fields))
        with progress.doing("sampling", len(records), "prompts"):
            tokens = sample_tokens(
                dataclasses.replace(self.start, params=params),
                records,
                Decoding(**options),
                self.lengths,
                self.mesh,
                batch_size=self.config.batch_size,
                seed=self.seed,
                round_index=step,
            )
        read = [self._read(*pair) for pair in zip(records, tokens, strict=True)]
        return [Sampled(*pair) for pair in zip(read, self._rewards(read, step), strict=True)]

    def _read(self, record: TokenizedRecord, samples: Int[np.ndarray, "S T"]) -> TokenizedRecord:
        """The record with the samples as its responses."""
        responses = []
        for row in samples:
            text, length, finished = read_response(self.start.processor, row)
            source = Response((Turn("assistant", text),), finished)
            responses.append(
                TokenizedResponse(row[:length].astype(np.int32), np.ones(length, bool), 0, source)
            )
        return dataclasses.replace(record, responses=tuple(responses))

    def _rewards(
        self, records: Sequence[TokenizedRecord], step: int
    ) -> list[Float[np.ndarray, "S K"]]:
        """What the samples of every prompt are worth, before weights."""
        # Which may ask the world outside, or be another every time.
        rules = on_one(lambda: [self._by_rules(record) for record in records])
        models = [model.rewards(records, self.seed, step) for model in self.reward_models]
        order = [isinstance(section, RewardModelReward) for section in self.rollout.rewards]
        found = []
        for number, of_rules in enumerate(rules):
            by_rule, by_model = iter(of_rules), iter([values[number] for values in models])
            columns = [next(by_model if is_model else by_rule) for is_model in order]
            found.append(without_gaps(np.array(columns, np.float32).T))
        return found

    def _by_rules(self, record: TokenizedRecord) -> list[list[float]]:
        """What the samples of a prompt are worth by every reward that is a function of texts."""
        texts = [response.source.text for response in record.responses]
        shown = record.images, record.solution, record.videos
        question = Question(record.id, record.question, *shown)
        return [
            [value.score for value in section.values(question, texts)]
            for section in self.rollout.rules
        ]

    def _old_log_probs(self, params: Params, arrays: TrainBatch) -> Any:
        """float32[M, B, S, T] of M micro-batches, under the policy that sampled; this process's
        own rows."""
        share, found = batch_share(self.mesh), []
        for i in range(len(arrays.prompts.weights)):
            prompts = jax.tree.map(lambda leaf, i=i: leaf[i], arrays.prompts)
            with jax.set_mesh(self.mesh):
                placed = put_batch(prompts, self.mesh)
                log_probs = score_batch(
                    self.start.model,
                    params,
                    placed,
                    self.config.compute_dtype,
                    per_token=True,
                    temperature=self.rollout.temperature,
                )
                found.append(gathered(log_probs, self.mesh))
        return np.stack([np.stack(share.of([*np.asarray(each)])) for each in found])

    def _metrics(
        self, sampled: Sequence[Sampled], rewards: Float[np.ndarray, "N S K"]
    ) -> dict[str, float]:
        """Means of rewards and lengths, under TRL's names."""
        weights = {section.type: section.weight for section in self.rollout.rewards}
        finished = [r.source.finished for each in sampled for r in each.record.responses]
        return {
            **reward_metrics(rewards, weights),
            "completions/clipped_ratio": float(1 - np.mean(finished)),
        }


def without_gaps(rewards: Float[np.ndarray, "S K"]) -> Float[np.ndarray, "S K"]:
    """Rewards of a prompt's samples where no verdict (NaN) counts as the mean of the others', which
    neither favours nor punishes; 0 where no sample has one."""
    known = ~np.isnan(rewards)
    total = np.where(known, rewards, 0).sum(axis=0)
    mean = total / np.maximum(known.sum(axis=0), 1)
    return np.where(known, rewards, mean).astype(np.float32)


def reward_metrics(
    rewards: Float[np.ndarray, "N S K"], weights: Mapping[str, float]
) -> dict[str, float]:
    """What is logged of a rollout's rewards, by TRL's names.

    `reward` and `reward_std` are the mean and the standard deviation, with n - 1 below, of the
    weighted sums of the rewards, over all samples to all prompts; `rewards/NAME/...` are those of
    one reward, before its weight. `frac_reward_zero_std` is the share of prompts whose samples are
    all worth the same, whatever the advantages are divided by.

    Args:
      rewards: float32[N, S, K], before weights.
      weights: of the K rewards, by name.
    """
    total = rewards @ np.array(list(weights.values()), np.float32)
    values = {
        "reward": total.mean(),
        "reward_std": _std(total),
        "frac_reward_zero_std": np.mean(total.std(axis=1) < STD_FLOOR),
    }
    for place, name in enumerate(weights):
        values[f"rewards/{name}/mean"] = rewards[..., place].mean()
        values[f"rewards/{name}/std"] = _std(rewards[..., place])
    return {name: float(value) for name, value in values.items()}


def _std(values: np.ndarray) -> float:
    """Standard deviation of all values, divided by n - 1; 0 of a single value."""
    return float(values.std(ddof=1)) if values.size > 1 else 0.0


def prompt_examples(records: Sequence[TokenizedRecord]) -> Examples:
    """Examples without responses."""
    return Examples(known(records))


def with_token_limit(config: Training, rollout: Rollout) -> Training:
    """The training section with the rollout's limit where an objective divides by one."""
    objectives = tuple(section.limited(rollout.max_new_tokens) for section in config.objective)
    return config.model_copy(update={"objective": objectives})
