"""RLAIF-V's judge: divide responses into claims, conquer each by a question, score by verdicts.

Source of the rules: RLAIF-V (Yu et al. 2024, arXiv 2405.17220) and its repository.
"""

from __future__ import annotations

import collections
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from mmpo_jax.core.files import fingerprint_json, null_if_not_finite
from mmpo_jax.core.stages import StageOutput, run_told_stage
from mmpo_jax.data.records import Record, question_with_beginning
from mmpo_jax.feedback.ahead import asking_ahead
from mmpo_jax.feedback.judge import (
    Judgement,
    Responses,
    check_failed,
    judged_table,
    rows_in_parts,
)
from mmpo_jax.feedback.labeler import Answer, Labeler
from mmpo_jax.feedback.rate import BusyTime, add_rate
from mmpo_jax.feedback.scores import SCORES, VERDICTS, ClaimVerdicts
from mmpo_jax.feedback.splitters import Division, SplitItem, Splitter
from mmpo_jax.recipes.feedback import (
    ChatLabeling,
    ChatSplitting,
    CheckpointSplitting,
    ClaimsFeedback,
)

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
        self.labels_ahead = isinstance(options.labeler, ChatLabeling)
        served = isinstance(options.splitter, ChatSplitting)
        on_devices = isinstance(options.splitter, CheckpointSplitting)
        self.asks_ahead = served or (self.labels_ahead and not on_devices)
        self._labeling = BusyTime()

    def check(self, records: Sequence[Record]) -> None:
        """See `judge.Judge`."""
        del records
        for check in self.checks:
            check()

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`."""
        with asking_ahead(self._label_ahead if self.labels_ahead else None) as label_ahead:

            def finished(rows: pa.Table) -> None:
                for divided_part in rows_in_parts(responses.folder, responses.records, rows):
                    label_ahead(divided_part)

            divided = self._divide(responses, finished)
            conquered = self._conquer(responses, divided)
        return self._score(responses, divided, conquered)

    def ask_ahead(self, responses: Responses) -> None:
        """See `judge.AskingAhead`."""
        divided = self._split(responses)
        if self.labels_ahead:
            (part,) = rows_in_parts(responses.folder, responses.records, divided)
            self._label_ahead(part)

    def _label_ahead(self, divided: Responses) -> None:
        """Asks the labeler about responses with their claims; the answers are counted in their
        turn."""
        table = divided.generated.table
        with self._labeling:
            self._label(divided.records, _questions(table), table, self.labeler())
        add_rate(divided.folder, 0, self._labeling.take())

    def _divide(self, responses: Responses, finished: Callable[[pa.Table], None]) -> StageOutput:
        """Every response with its claims: claims, questions, unparsed, failure, raw."""

        def make_part(part: int) -> pa.Table:
            return self._split(responses.part(part))

        asked = {record.id: question_with_beginning(record.prompt) for record in responses.records}
        inputs = {
            "responses": responses.generated.fingerprint,
            "questions": fingerprint_json(asked),
        }
        settings = {"splitter": self.splitter.key}
        stage = responses.stage("divide", inputs, settings)
        divided = run_told_stage(stage, make_part, finished)
        self.splitter.release()
        return divided

    def _split(self, responses: Responses) -> pa.Table:
        """The claims of the responses of a part.

        Raises:
          TooManyFailed: see `check_failed`.
        """
        asked = {record.id: question_with_beginning(record.prompt) for record in responses.records}
        table = responses.generated.table
        ids, samples, texts = (table[name].to_pylist() for name in ("prompt_id", "sample", "text"))
        items = [
            SplitItem(f"{name}/{sample}", asked[name], text)
            for name, sample, text in zip(ids, samples, texts, strict=True)
        ]
        divisions = self.splitter.divide(items)
        failures = [division.failure for division in divisions]
        check_failed(failures, self.options.max_failed, "splitting into claims")
        return _divided_table(ids, samples, divisions)

    def _conquer(self, responses: Responses, divided: StageOutput) -> StageOutput:
        """The labeler's answer to every question about what a prompt shows, each asked once:
        prompt_id, question, p_yes, p_no, read, failure."""
        loaded = functools.cache(self.labeler)  # goes with this stage: training needs the memory
        questions = _questions(divided.table)

        def make_part(part: int) -> pa.Table:
            records = responses.part(part).records
            with self._labeling:
                answers = self._label(records, questions, divided.table, loaded())
            asked = sum(map(len, answers.values()))
            add_rate(responses.folder, asked, self._labeling.take())
            return _answers_table(answers)

        inputs = {
            "claims": divided.fingerprint,
            "labeler": self.labeler_key,
            "images": responses.media(),
        }
        settings = {"rules": CONQUER_RULES, "suffix": self.options.suffix}
        return run_told_stage(responses.stage("conquer", inputs, settings), make_part)

    def _label(
        self,
        records: Iterable[Record],
        questions: Mapping[str, Sequence[str]],
        divided: pa.Table,
        labeler: Labeler,
    ) -> dict[str, dict[str, Answer]]:
        """The answers about some prompts, by prompt and question.

        Args:
          records: the prompts.
          questions: of all prompts, each once.
          divided: responses with their claims, of these prompts and maybe others.
          labeler: that is asked.

        Raises:
          TooManyFailed: see `check_failed`.
        """
        suffix = self.options.suffix
        items = [
            (record.id, record.media, tuple(text + suffix for text in questions[record.id]))
            for record in records
        ]
        answers = {
            name: dict(zip(questions[name], given, strict=True))
            for (name, _, _), given in zip(items, labeler.answer(items), strict=True)
        }
        failures = [
            _failure(row["questions"], answers[row["prompt_id"]])
            for row in divided.select(["prompt_id", "questions"]).to_pylist()
            if row["prompt_id"] in answers and row["questions"]
        ]
        check_failed(failures, self.options.max_failed, "asking the labeler")
        return answers

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


def _questions(divided: pa.Table) -> dict[str, list[str]]:
    """The questions about every prompt's responses, each once."""
    questions: dict[str, dict[str, None]] = collections.defaultdict(dict)
    for row in divided.select(["prompt_id", "questions"]).to_pylist():
        questions[row["prompt_id"]].update(dict.fromkeys(row["questions"]))
    return {name: list(asked) for name, asked in questions.items()}


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
