"""DPO's own reward as a judge: how much more one checkpoint likes a response than another one."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence

import pyarrow as pa

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.stages import StageOutput, run_told_stage
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import UNLIMITED, TokenizedRecord
from mmpo_jax.feedback.implicit import (
    ImplicitRewards,
    have_same_tokenizer,
    open_both,
    reward_stage,
    tokenizer_for_both,
)
from mmpo_jax.feedback.judge import Judgement, Responses, judged_table
from mmpo_jax.feedback.models import Models
from mmpo_jax.recipes.feedback import ImplicitFeedback
from mmpo_jax.scoring.log_probs import chosen_dtype

RULES = 1
"""Part of the key of scores: changes with what they are made of."""
FOLDER = "implicit"
"""Folder of the judge's own stages in that of the round."""


class ImplicitJudge:
    """beta * log(policy / reference) of every response, summed or per token."""

    def __init__(self, options: ImplicitFeedback, models: Models):
        """
        Args:
          options: of the recipe.
          models: what runs, and the generator of the responses.
        """
        self.options, self.models = options, models
        self.policy, self.reference = open_both(
            options.policy, options.reference, models.attention, models.template
        )

    def check(self, records: Sequence[Record]) -> None:
        """Nothing: that the two can be compared was seen when they were opened."""
        del records

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`."""

        def make_part(_: int) -> pa.Table:
            records, refused = self._tokenized(responses)
            rewards = self._rewards(responses.folder, records) if records else []
            given = iter([one for of_record in rewards for one in self._judgements(of_record)])
            return judged_table(responses, [one or next(given) for one in refused])

        inputs = {
            "responses": responses.generated.fingerprint,
            "images": responses.media(),
            **{f"policy {name}": key for name, key in self._key(self.policy).items()},
            **{f"reference {name}": key for name, key in self._key(self.reference).items()},
        }
        settings = self.options.model_dump(mode="json", include={"beta", "per_token"}) | {
            "rules": RULES,
            "compute_dtype": self.options.compute_dtype,
            "same_tokens": self._generator_has_these_tokens(),
        }
        return run_told_stage(responses.stage("judge", inputs, settings, 1), make_part)

    def _key(self, checkpoint: Checkpoint) -> dict[str, str]:
        """Fingerprints of the weights, and of how prompts become tokens."""
        return {"model": checkpoint.fingerprint, **checkpoint.processor.fingerprints()}

    def _tokenized(
        self, responses: Responses
    ) -> tuple[list[TokenizedRecord], list[Judgement | None]]:
        """(prompts with those of their responses that both models take, of every response None or
        why they do not)."""
        sampled = self._generator_has_these_tokens()
        records: list[TokenizedRecord] = []
        refused: list[Judgement | None] = []
        for record in responses.with_responses(sampled_tokens=sampled):
            problems = [
                self._problem(dataclasses.replace(record, responses=(response,)))
                for response in record.responses
            ]
            taken = [
                response
                for response, problem in zip(record.responses, problems, strict=True)
                if problem is None
            ]
            if taken:
                records.append(self._both(dataclasses.replace(record, responses=tuple(taken))))
            refused += problems
        return records, refused

    def _both(self, record: Record) -> TokenizedRecord:
        both = tokenizer_for_both(self.reference.processor)
        return both(record, self.policy.processor, UNLIMITED, UNLIMITED)

    def _problem(self, record: Record) -> Judgement | None:
        """Why a response cannot be given to both models."""
        try:
            self._both(record)
        except UnusableRow as error:
            return Judgement(math.nan, {"problem": str(error)}, error.reason)
        return None

    def _rewards(self, folder: str, records: list[TokenizedRecord]) -> list[ImplicitRewards]:
        mesh = self.models.mesh
        self.models.make_room()
        policy = self.policy.reloaded(mesh)
        return reward_stage(
            policy,
            self.reference,
            records,
            None,
            mesh,
            beta=self.options.beta,
            folder=os.path.join(folder, FOLDER),
            batch_size=self.options.batch_size,
            compute_dtype=chosen_dtype(self.options.compute_dtype, policy),
        )

    def _generator_has_these_tokens(self) -> bool:
        """Whether the sampled ids mean the same to the policy as to what sampled them."""
        generator = self.models.held
        if generator is None:
            return False
        return have_same_tokenizer(generator.processor, self.policy.processor)

    def _judgements(self, rewards: ImplicitRewards) -> list[Judgement]:
        scores = rewards.per_token if self.options.per_token else rewards.summed
        return [
            Judgement(float(score), {"summed": float(summed), "num_tokens": int(tokens)})
            for score, summed, tokens in zip(
                scores, rewards.summed, rewards.num_tokens, strict=True
            )
        ]
