"""RLAIF-V's judge: divide responses into claims, conquer each by a question, score by verdicts.

Source of the rules: RLAIF-V (Yu et al. 2024, arXiv 2405.17220) and its repository.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from mmpo_jax.core.files import fingerprint_json, null_if_not_finite
from mmpo_jax.core.stages import StageOutput, run_told_stage
from mmpo_jax.data.records import Record, last_question
from mmpo_jax.feedback.judge import VERDICTS, Judgement, Responses, check_failed, judged_table
from mmpo_jax.feedback.labeler import Answer, Labeler
from mmpo_jax.feedback.rate import add_rate
from mmpo_jax.feedback.scores import SCORES, ClaimVerdicts
from mmpo_jax.feedback.splitters import Division, SplitItem, Splitter
from mmpo_jax.recipes.feedback import ClaimsFeedback

CONQUER_RULES = 3
"""Part of the key of verdicts: changes with how the labeler is asked."""
SCORE_RULES = 1
"""Part of the key of scores: changes with what they are made of."""
NO_CLAIMS = "no_claims"
DUPLICATE_CLAIMS = "duplicate_claims"


class ClaimsJudge:
    """Divide and conquer; its stages are `divide`, `conquer` and `judge`."""

    def __init__(
        self,
        options: ClaimsFeedback,
        splitter: Splitter,
        labeler: Callable[[], Labeler],
        labeler_key: str,
        checks: Sequence[Callable[[], None]] = (),
    ):
        """
        Args:
          options: of the recipe.
          splitter: divides responses into claims.
          labeler: makes the labeler, called only if there is something to label.
          labeler_key: fingerprint of all that its answers depend on.
          checks: of what splitter and labeler need.
        """
        self.options, self.splitter = options, splitter
        self.labeler, self.labeler_key, self.checks = labeler, labeler_key, checks

    def check(self, records: Sequence[Record]) -> None:
        """See `judge.Judge`."""
        del records
        for check in self.checks:
            check()

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`."""
        divided = self._divide(responses)
        conquered = self._conquer(responses, divided)
        return self._score(responses, divided, conquered)

    def _divide(self, responses: Responses) -> StageOutput:
        """Every response with its claims: claims, questions, unparsed, failure, raw."""
        asked = {record.id: last_question(record.prompt) for record in responses.records}

        def make_part(part: int) -> pa.Table:
            table = responses.part(part).generated.table
            ids, samples, texts = (
                table[name].to_pylist() for name in ("prompt_id", "sample", "text")
            )
            items = [
                SplitItem(f"{name}/{sample}", asked[name], text)
                for name, sample, text in zip(ids, samples, texts, strict=True)
            ]
            divisions = self.splitter.divide(items)
            failures = [division.failure for division in divisions]
            check_failed(failures, self.options.max_failed, "splitting into claims")
            return _divided_table(ids, samples, divisions)

        inputs = {
            "responses": responses.generated.fingerprint,
            "questions": fingerprint_json(asked),
        }
        settings = {"splitter": self.splitter.key}
        divided = run_told_stage(responses.stage("divide", inputs, settings), make_part)
        self.splitter.release()
        return divided

    def _conquer(self, responses: Responses, divided: StageOutput) -> StageOutput:
        """The labeler's answer to every question about every image, each asked once: prompt_id,
        question, p_yes, p_no, read, failure."""
        loaded = functools.cache(self.labeler)  # goes with this stage: training needs the memory
        questions: dict[str, dict[str, None]] = {record.id: {} for record in responses.records}
        for row in divided.table.select(["prompt_id", "questions"]).to_pylist():
            questions[row["prompt_id"]].update(dict.fromkeys(row["questions"]))

        def make_part(part: int) -> pa.Table:
            records = responses.part(part).records
            suffix = self.options.suffix
            items = [
                (record.id, record.images, tuple(text + suffix for text in questions[record.id]))
                for record in records
            ]
            names = [record.id for record in records]
            begun = time.perf_counter()
            given = dict(zip(names, loaded().answer(items), strict=True))
            asked = sum(len(texts) for _, _, texts in items)
            add_rate(responses.folder, asked, time.perf_counter() - begun)
            answers = {name: dict(zip(questions[name], given[name], strict=True)) for name in names}
            failures = [
                _failure(row["questions"], answers[row["prompt_id"]])
                for row in divided.table.select(["prompt_id", "questions"]).to_pylist()
                if row["prompt_id"] in answers and row["questions"]
            ]
            check_failed(failures, self.options.max_failed, "asking the labeler")
            return _answers_table(answers)

        inputs = {
            "claims": divided.fingerprint,
            "labeler": self.labeler_key,
            "images": responses.images(),
        }
        settings = {"rules": CONQUER_RULES, "suffix": self.options.suffix}
        return run_told_stage(responses.stage("conquer", inputs, settings), make_part)

    def _score(
        self, responses: Responses, divided: StageOutput, conquered: StageOutput
    ) -> StageOutput:
        """The score of every response by its verdicts."""
        answers: dict[str, dict[str, Answer]] = collections.defaultdict(dict)
        for row in conquered.table.to_pylist():
            answers[row["prompt_id"]][row["question"]] = Answer(
                _number(row["p_yes"]),
                _number(row["p_no"]),
                row["read"],
                row["failure"],
            )

        def make_part(_: int) -> pa.Table:
            judgements = [
                judgement_of(row, answers[row["prompt_id"]], self.options)
                for row in divided.table.to_pylist()
            ]
            return judged_table(responses, judgements)

        inputs = {"claims": divided.fingerprint, "verdicts": conquered.fingerprint}
        settings = {
            "rules": SCORE_RULES,
            "score": self.options.score,
            "duplicate_claims": self.options.duplicate_claims,
        }
        return run_told_stage(responses.stage("judge", inputs, settings, 1), make_part)


def judgement_of(
    row: dict[str, Any], answers: dict[str, Answer], options: ClaimsFeedback
) -> Judgement:
    """What the verdicts on its claims say of one response.

    A piece that the splitter could not read counts as a claim that was rejected: what nobody can
    check must not pay, or the model learns to end in fragments.

    Args:
      row: of the stage `divide`.
      answers: to the questions about the response's image.
      options: how claims become a score.
    """
    if row["failure"] is not None:
        return Judgement(math.nan, _told(row["raw"]), row["failure"])
    given = [answers[question] for question in row["questions"]]
    failure = _failure(row["questions"], answers)
    verdicts = ClaimVerdicts(
        claims=(*row["claims"], *row["unparsed"]),
        p_yes=(*(answer.p_yes for answer in given), *(0.0 for _ in row["unparsed"])),
        p_no=(*(answer.p_no for answer in given), *(1.0 for _ in row["unparsed"])),
    )
    details = {VERDICTS: list(_verdict_details(row["questions"], verdicts))}
    if failure is not None:
        return Judgement(math.nan, details, failure)
    verdicts.check()
    repeated = len(set(verdicts.claims)) < len(verdicts.claims)
    if not verdicts.claims:
        return Judgement(math.nan, details, NO_CLAIMS)
    if repeated and options.duplicate_claims == "drop_response":
        return Judgement(math.nan, details, DUPLICATE_CLAIMS)
    return Judgement(float(SCORES[options.score](verdicts)), details)


def _verdict_details(questions: Sequence[str], verdicts: ClaimVerdicts) -> Iterator[dict[str, Any]]:
    """Every claim with its question, None where there was none, and both probabilities."""
    asked = itertools.chain(questions, itertools.repeat(None))
    for claim, question, p_yes, p_no in zip(
        verdicts.claims, asked, verdicts.p_yes, verdicts.p_no, strict=False
    ):
        yield {
            "claim": claim,
            "question": question,
            "p_yes": null_if_not_finite(p_yes),
            "p_no": null_if_not_finite(p_no),
        }


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _told(raw: str | None) -> dict[str, Any]:
    return {} if raw is None else {"reply": raw}


def _failure(questions: Sequence[str], answers: dict[str, Answer]) -> str | None:
    """Why a response with these questions has no verdict; None where all were answered."""
    failures = (answers[question].failure for question in questions)
    return next((failure for failure in failures if failure is not None), None)


def _divided_table(
    ids: Sequence[str], samples: Sequence[int], divisions: Sequence[Division]
) -> pa.Table:
    columns: list[Sequence[Any]] = [
        ids,
        samples,
        [[claim.text for claim in division.claims] for division in divisions],
        [[claim.question for claim in division.claims] for division in divisions],
        [list(division.unparsed) for division in divisions],
        [division.failure for division in divisions],
        [division.raw for division in divisions],
    ]
    return pa.table(columns, schema=DIVIDED)


def _answers_table(answers: dict[str, dict[str, Answer]]) -> pa.Table:
    rows = [
        {
            "prompt_id": name,
            "question": question,
            "p_yes": null_if_not_finite(answer.p_yes),
            "p_no": null_if_not_finite(answer.p_no),
            "read": answer.read,
            "failure": answer.failure,
        }
        for name, by_question in answers.items()
        for question, answer in by_question.items()
    ]
    return pa.Table.from_pylist(rows, schema=CONQUERED)


DIVIDED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("claims", pa.list_(pa.string())),
        ("questions", pa.list_(pa.string())),
        ("unparsed", pa.list_(pa.string())),
        ("failure", pa.string()),
        ("raw", pa.string()),
    ]
)
CONQUERED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("question", pa.string()),
        ("p_yes", pa.float64()),
        ("p_no", pa.float64()),
        ("read", pa.string()),
        ("failure", pa.string()),
    ]
)
