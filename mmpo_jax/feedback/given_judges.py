"""Judges that ask nobody: the order of the sources, and what the data say of their responses."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pyarrow as pa

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_items
from mmpo_jax.core.stages import StageOutput, run_told_stage
from mmpo_jax.data.records import SCORE, Record, Response
from mmpo_jax.feedback.judge import Judgement, Responses, judged_table
from mmpo_jax.recipes.feedback import ScoresFeedback, SourceFeedback

NO_SCORE = "no_score"
"""Reason of a response that the data give no score, or that is not of the data."""


class SourceJudge:
    """A response is worth the number of sources that come after its own."""

    def __init__(self, options: SourceFeedback):
        """
        Args:
          options: of the recipe, whose order names every source.
        """
        last = len(options.order) - 1
        self.scores = {name: float(last - place) for place, name in enumerate(options.order)}

    def check(self, records: Sequence[Record]) -> None:
        """See `judge.Judge`."""
        del records

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`."""

        def make_part(part: int) -> pa.Table:
            of_part = responses.part(part)
            return judged_table(
                of_part,
                [Judgement(self.scores[name], {"source": name}) for name in of_part.sources()],
            )

        inputs = {"responses": responses.generated.fingerprint}
        return run_told_stage(responses.stage("judge", inputs, {"sources": self.scores}), make_part)


class ScoresJudge:
    """A response is worth what the data say; those of other sources have no score."""

    def __init__(self, options: ScoresFeedback):
        """
        Args:
          options: of the recipe.
        """
        self.options = options

    def check(self, records: Sequence[Record]) -> None:
        """See `judge.Judge`; the data give no response such a score."""
        given = [response for record in records for response in record.responses]
        if any(not math.isnan(self._score(response)) for response in given):
            return
        known = sorted({name for response in given for name in response.scores})
        if self.options.by == "rank":
            told = "the data rank no response"
        else:
            told = f"the data give no response a score called {self._name()!r}"
        raise DataError(f"feedback: {told}; their scores: {', '.join(known) or 'none'}")

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`."""
        of_data = {
            record.id: [self._score(response) for response in record.responses]
            for record in responses.records
        }

        def make_part(part: int) -> pa.Table:
            of_part = responses.part(part)
            # Rows of the data are in the order of the record's responses.
            left = {record.id: iter(of_data[record.id]) for record in of_part.records}
            judgements = [
                Judgement(next(left[prompt_id]) if source == "data" else math.nan, reason=NO_SCORE)
                for prompt_id, source in zip(of_part.prompt_ids(), of_part.sources(), strict=True)
            ]
            return judged_table(of_part, judgements)

        inputs = {
            "responses": responses.generated.fingerprint,
            "scores": fingerprint_items(
                [name, [repr(score) for score in scores]] for name, scores in of_data.items()
            ),
        }
        return run_told_stage(responses.stage("judge", inputs, {"of": "data"}), make_part)

    def _name(self) -> str:
        return SCORE if self.options.name is None else self.options.name

    def _score(self, response: Response) -> float:
        """NaN where the data say nothing."""
        if self.options.by == "rank":
            return math.nan if response.rank is None else -float(response.rank)
        return response.scores.get(self._name(), math.nan)
