"""Rollouts: batches of on-policy training, sampled from the policy and rewarded as it learns."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core import progress
from mmpo_jax.core.trees import unflatten
from mmpo_jax.data.examples import Examples
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry, batch_order, num_batches
from mmpo_jax.data.records import Response, Turn
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse
from mmpo_jax.data.tokenized_rows import known
from mmpo_jax.data.train_batch import HostBatch
from mmpo_jax.generation.responses import read_response, sample_tokens
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Params
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.losses import contexts_of
from mmpo_jax.training.rollout_batches import BatchSizes, RolloutBatches
from mmpo_jax.training.rollout_rewards import (
    Rewarding,
    check_truncated,
    check_verdicts,
    reward_metrics,
)
from mmpo_jax.training.row_use import best
from mmpo_jax.training.step import whole_params
from mmpo_jax.training.teacher import LoadedTeacher


@dataclasses.dataclass(frozen=True)
class Sampled:
    """A prompt's samples."""

    record: TokenizedRecord
    """The prompt's record, with the samples as its responses."""
    rewards: Float[np.ndarray, "S K"]
    """float32[S, K], before weights; NaN for no verdict."""


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
        teacher: LoadedTeacher | None = None,
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
          teacher: who is shown the samples too, if anybody.
        """
        self.start = dataclasses.replace(start, params={})
        self.records, self.seed = prompts.records, prompts.seed
        self.config, self.rollout, self.lengths, self.mesh = config, rollout, lengths, mesh
        self.count = config.batch_size * rollout.minibatches
        """Prompts of a rollout."""
        epochs = config.epochs
        if rollout.dynamic_sampling is not None:  # which may need more than the epochs have
            rows = sum(part.per_epoch for part in prompts.entries)
            batches = num_batches(rows, epochs, self.count) * rollout.dynamic_sampling
            epochs = -(-batches * self.count // rows)
        order = batch_order(prompts.entries, prompts.seed, epochs, self.count)
        self.order = iter(order.to_iter_dataset(grain.ReadOptions(num_threads=0)))
        self.rewarding = Rewarding.load(rollout, mesh, start.model.attention, prompts.seed)
        sizes = BatchSizes(config.batch_size, micro_batch_size, lengths)
        self.batches = RolloutBatches(self.start, config, rollout, sizes, mesh, teacher, self.seed)
        self.steps = rollout.steps
        """Updates that learn from a rollout."""
        self.drawn: list[HostBatch] = []
        """The minibatches of the rollout in use; none before it is made."""
        self.before: dict[str, Any] = self.order.get_state()
        """Where the order stood before it."""
        self.uses = 0
        """Updates that were given a batch of it."""
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
        self.drawn, self.uses = [], state["uses"]

    def can_resume(self) -> bool:
        """Whether the position lies between rollouts. Whoever goes on from one within has the same
        prompts sampled again, by what the policy is by then."""
        return self.uses in (0, self.steps)

    def draw_again(self, position: dict[str, Any], state: TrainState) -> HostBatch | None:
        """What was drawn at a position, with the parameters of then; None within a rollout, as what
        sampled it is no more."""
        if position["uses"]:
            return None
        self.set_state(position)
        return self.draw(state)

    def draw(self, state: TrainState) -> HostBatch:
        """The batch of the next step: of a new rollout, or another of the last one's, which comes
        again after all of them."""
        if self.uses == self.steps:
            self.drawn, self.uses = [], 0
        if not self.drawn:
            self.before = self.order.get_state()
            self.drawn = self._roll_out(state)
        self.uses += 1
        return self.drawn[(self.uses - 1) % self.rollout.minibatches]

    def _roll_out(self, state: TrainState) -> list[HostBatch]:
        step = int(state.step)  # which waits for the step that runs
        begun = time.perf_counter()
        params = cast_params(whole_params(state), self.config.compute_dtype)
        given = self._is_given(step)
        if given:
            kept = [Sampled(best(record), np.zeros((0, 0))) for record in self._next()]
            metrics: dict[str, Any] = {}
        else:
            kept, metrics = self._sampled(params, step)
        parts = self._parts(kept)
        drawn = [self.batches.make([each.record for each in part], step) for part in parts]
        if self.rollout.mask_truncated:
            cut = [np.array([_cut(each.record) for each in part]) for part in parts]
            drawn = self._with_field(drawn, "truncated", cut)
        if self.rollout.rewards and not given:
            drawn = self._with_advantages(drawn, parts, params, state)
        self.seconds += time.perf_counter() - begun
        return [dataclasses.replace(host, metrics={**host.metrics, **metrics}) for host in drawn]

    def _is_given(self, step: int) -> bool:
        """Whether this rollout has the responses of the data."""
        share = self.rollout.on_policy
        return share < 1 and np.random.default_rng([self.seed, step]).random() >= share

    def _next(self) -> list[TokenizedRecord]:
        return [self.records[int(index)] for index in next(self.order)]

    def _sampled(self, params: Params, step: int) -> tuple[list[Sampled], dict[str, Any]]:
        """(the prompts to learn from, what is to be reported of all that were sampled)."""
        draws = self.rollout.dynamic_sampling or 1
        sampled: list[Sampled] = []
        kept: list[Sampled] = []
        for draw in range(draws):
            # A number of its own for every draw, as samples depend on it.
            of_draw = self._sample(params, self._next(), step * draws + draw)
            sampled += of_draw
            kept += self._teaching(of_draw)
            if len(kept) >= self.count:
                break
        # Of those that teach nothing some are taken where there are not enough for a batch each.
        least = self.rollout.minibatches
        if len(kept) < least:
            kept += [each for each in sampled if all(each is not one for one in kept)]
            kept = kept[:least]
        rewards = np.stack([each.rewards for each in sampled])
        if self.rollout.rewards:
            check_verdicts(rewards, [each.record.id for each in sampled], self.rollout, step)
        finished = 1 - np.array([_cut(each.record) for each in sampled])
        check_truncated(finished > 0, self.rollout, step)
        metrics = {
            **reward_metrics(rewards, self.rewarding.weights),
            "completions/clipped_ratio": float(1 - np.mean(finished)),
        }
        return kept[: self.count], metrics

    def _teaching(self, sampled: Sequence[Sampled]) -> list[Sampled]:
        """Those whose samples are not all worth the same, where others are to be left out."""
        if self.rollout.dynamic_sampling is None:
            return list(sampled)
        differ = self.rewarding.differing(np.stack([each.rewards for each in sampled]))
        return [each for each, teaches in zip(sampled, differ, strict=True) if teaches]

    def _parts(self, sampled: Sequence[Sampled]) -> list[list[Sampled]]:
        """The prompts of every minibatch; evenly many where they do not fill all. The last prompts
        of the data may be fewer than there are minibatches, and then come in several."""
        least = self.rollout.minibatches
        some = [sampled[number % len(sampled)] for number in range(max(len(sampled), least))]
        places = np.array_split(np.arange(len(some)), least)
        return [[some[int(place)] for place in part] for part in places]

    def _with_advantages(
        self,
        drawn: Sequence[HostBatch],
        parts: Sequence[Sequence[Sampled]],
        params: Params,
        state: TrainState,
    ) -> list[HostBatch]:
        """The batches with what policy gradients weigh tokens by."""
        rewards = np.stack([each.rewards for part in parts for each in part])
        ends = np.cumsum([len(part) for part in parts])[:-1]
        asked = drawn if self.rollout.needs_old else []
        old = [self.batches.log_probs(params, host) for host in asked]
        penalty = None
        if self.rollout.reward_kl:
            apart = self._log_ratios(old, drawn, state)
            of_prompts = [each[: len(part)] for each, part in zip(apart, parts, strict=True)]
            penalty = self.rollout.reward_kl * np.concatenate(of_prompts)
        better = self.rewarding.advantages(rewards, penalty)
        drawn = self._with_field(drawn, "advantages", np.split(better, ends))
        return self._with_field(drawn, "old_log_probs", old) if self.steps > 1 else drawn

    def _log_ratios(
        self, old: Sequence[np.ndarray], drawn: Sequence[HostBatch], state: TrainState
    ) -> list[Float[np.ndarray, "N S"]]:
        """float32[N, S] of every batch: how much likelier what sampled it has a response than the
        reference has, in log-probs."""
        reference = cast_params(
            unflatten({**state.reference, **state.frozen}), self.config.compute_dtype
        )
        return [
            (ours - self.batches.log_probs(reference, host)).sum(axis=-1)
            for ours, host in zip(old, drawn, strict=True)
        ]

    def _with_field(
        self, drawn: Sequence[HostBatch], name: str, values: Sequence[np.ndarray]
    ) -> list[HostBatch]:
        """The batches with a further field, of whose values each has its own."""
        pairs = zip(drawn, values, strict=True)
        return [self.batches.with_field(host, name, of_batch) for host, of_batch in pairs]

    def _sample(
        self, params: Params, records: Sequence[TokenizedRecord], number: int
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
                round_index=number,
            )
        read = [self._read(*pair) for pair in zip(records, tokens, strict=True)]
        rewards = self.rewarding.rewards(read, number)
        return [Sampled(*pair) for pair in zip(read, rewards, strict=True)]

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


def _cut(record: TokenizedRecord) -> list[float]:
    """1 for every sample that the length limit cut."""
    return [float(not response.source.finished) for response in record.responses]


def prompt_examples(records: Sequence[TokenizedRecord], config: Training) -> Examples:
    """Examples without responses."""
    return Examples(known(records), contexts_of(config))


def with_token_limit(config: Training, rollout: Rollout) -> Training:
    """The training section with the rollout's limit where an objective divides by one."""
    objectives = tuple(section.limited(rollout.max_new_tokens) for section in config.objective)
    return config.model_copy(update={"objective": objectives})
