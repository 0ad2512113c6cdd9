"""A reward model as a judge: what its head says of every response, behind critiques of its own."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from mmpo_jax.checkpoints.checkpoint import open_reward_model
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.stages import StageOutput, run_told_stage
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import UNLIMITED
from mmpo_jax.data.usable import unsupported
from mmpo_jax.feedback.judge import Judgement, Responses, judged_table
from mmpo_jax.feedback.models import Models
from mmpo_jax.recipes.feedback import RewardModelFeedback
from mmpo_jax.reward_models.reading import Reading
from mmpo_jax.reward_models.scoring import Rewarded, score_responses

RULES = 1
"""Part of the key of scores: changes with what they are made of."""
FOLDER = "reward_model"
"""Folder of the judge's own stages in that of the round."""


class RewardModelJudge:
    """Every response is worth the mean reward over critiques of it."""

    def __init__(self, options: RewardModelFeedback, models: Models):
        """
        Args:
          options: of the recipe.
          models: what runs.

        Raises:
          ModelError, MmpoError: the model has no reward head, or writes no critiques.
        """
        self.options, self.models = options, models
        self.checkpoint = open_reward_model(options.model, models.attention, options.template)
        self.reading = Reading.of(options, self.checkpoint.model, options.model)

    def check(self, records: Sequence[Record]) -> None:
        """See `judge.Judge`: that the model takes what the prompts show."""
        for record in records:
            problem = unsupported(record, self.checkpoint.processor)
            if problem is not None:
                raise DataError(
                    f"feedback: prompt {record.id!r}: {self.options.model}: {problem[1]}; judge by "
                    "a reward model that does, or leave such prompts out"
                )

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`."""

        def make_part(_: int) -> pa.Table:
            asked, refused = self._usable(responses)
            given = self._judgements(responses.folder, asked) if asked else iter(())
            return judged_table(responses, [one or next(given) for one in refused])

        inputs = {
            "responses": responses.generated.fingerprint,
            "images": responses.media(),
            "model": self.checkpoint.fingerprint,
            **self.checkpoint.processor.fingerprints(),
        }
        options = self.options.model_dump(mode="json", exclude={"type", "model", "batch_size"})
        settings = {"rules": RULES, "seed": self.models.seed, **options}
        return run_told_stage(responses.stage("judge", inputs, settings, 1), make_part)

    def _usable(self, responses: Responses) -> tuple[list[Record], list[Judgement | None]]:
        """(prompts with those of their responses that the model takes, of every response None or
        why it does not)."""
        records: list[Record] = []
        refused: list[Judgement | None] = []
        for record in responses.with_responses(sampled_tokens=False):
            problems = [
                self._problem(dataclasses.replace(record, responses=(response,)))
                for response in record.responses
            ]
            pairs = zip(record.responses, problems, strict=True)
            taken = tuple(response for response, problem in pairs if problem is None)
            if taken:
                records.append(dataclasses.replace(record, responses=taken))
            refused += problems
        return records, refused

    def _problem(self, record: Record) -> Judgement | None:
        """Why a response cannot be scored."""
        try:
            self.reading.tokenize(record, self.checkpoint.processor, UNLIMITED, UNLIMITED)
        except UnusableRow as error:
            return Judgement(math.nan, {"problem": str(error)}, error.reason)
        return None

    def _judgements(self, folder: str, records: Sequence[Record]) -> Iterator[Judgement]:
        self.models.make_room()
        found = score_responses(
            self.checkpoint.reloaded(self.models.mesh),
            records,
            self.reading,
            self.options,
            None,
            self.models.mesh,
            folder=os.path.join(folder, FOLDER),
            seed=self.models.seed,
        )
        for rewarded in found:
            yield from _of_record(rewarded)


def _of_record(rewarded: Rewarded) -> Iterator[Judgement]:
    for reward, std, critiques, problem in zip(
        rewarded.rewards, rewarded.std, rewarded.critiques, rewarded.problems, strict=True
    ):
        details: dict[str, Any] = {}
        if problem is not None:
            details["problem"] = problem[1]
        elif critiques:
            details = {"critiques": critiques, "std": float(std)}
        yield Judgement(float(reward), details, None if problem is None else problem[0])
