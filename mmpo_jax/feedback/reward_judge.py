"""A reward as a judge: rules, the picture world's truth, or a function of the user's."""

from __future__ import annotations

from collections.abc import Sequence

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.processes import on_one
from mmpo_jax.core.stages import StageOutput
from mmpo_jax.data.records import Record, last_question
from mmpo_jax.feedback.judge import Judgement, Responses, judge_stage
from mmpo_jax.feedback.scores import VERDICTS
from mmpo_jax.recipes.rewards import RewardSection
from mmpo_jax.rewards.registry import Question

RULES = 1
"""Part of the key of scores: changes with what a reward is told."""


class RewardJudge:
    """Every response is worth what a reward says."""

    def __init__(self, options: RewardSection):
        """
        Args:
          options: the reward of the recipe.

        Raises:
          MmpoError: a function of the user's cannot be loaded.
        """
        self.options, self.key = options, options.key()

    def check(self, records: Sequence[Record]) -> None:
        """See `judge.Judge`."""
        for record in records:
            try:
                self.options.check(record.solution)
            except DataError as error:
                raise DataError(f"feedback: prompt {record.id!r}: {error}") from error

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`."""
        settings = {"rules": RULES, "reward": self.key, "weight": self.options.weight}
        # A function of the user's may ask the world outside, or say something else every time.
        return judge_stage(
            responses, lambda part: on_one(lambda: self._judge(part)), _content, settings
        )

    def _judge(self, responses: Responses) -> list[Judgement]:
        judgements = []
        for record, texts in responses.by_prompt():
            for value in self.options.values(question_of(record), texts):
                if VERDICTS in value.details:  # what reports take for claims
                    raise DataError(f"feedback: details have another name than {VERDICTS!r}")
                score = value.score * self.options.weight
                judgements.append(Judgement(score, value.details))
        return judgements


def question_of(record: Record) -> Question:
    """The prompt of a record, as rewards see it."""
    asked, solution = last_question(record.prompt), record.solution
    return Question(record.id, asked, record.images, solution, record.videos)


def _content(record: Record) -> list[str]:
    """Fingerprints of what a reward may look at."""
    said = fingerprint_json([record.id, last_question(record.prompt), repr(record.solution)])
    return [said, *(media.fingerprint() for media in record.media)]
