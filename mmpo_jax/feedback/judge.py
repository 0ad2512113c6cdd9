"""The one seam through which texts get a value: what a judge is asked, and what it gives.

A round samples responses, a judge gives each a score, and pairs are made of scores whoever gave
them. `claims.py`, `self_reward.py`, `pair_judge.py`, `implicit_judge.py`, `reward_judge.py` and
`given_judges.py` have judges; `judges.py` makes the one that a recipe names.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import pyarrow as pa

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_items, null_if_not_finite
from mmpo_jax.core.stages import Stage, StageOutput, run_told_stage
from mmpo_jax.data.records import Record, Response
from mmpo_jax.feedback.pairing import ScoredResponse
from mmpo_jax.generation.responses import PROMPTS_PER_PART
from mmpo_jax.recipes.candidates import POLICY

JUDGED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("score", pa.float64()),
        ("reason", pa.string()),
        ("details", pa.string()),
    ]
)
"""Columns of the stage `judge`; `details` is JSON."""

NO_VERDICT = "no_verdict"
"""Reason of a response without a score where its judge gives none."""

EMPTY = "empty_response"
"""Reason of a response that says nothing, about which nobody is asked."""


FEW = 2
"""Responses that may fail however few there are, unless none may: of a handful of sentences a share
would allow none."""


class TooManyFailed(DataError):
    """More responses failed than a recipe allows; what they failed by is asked for anew."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What a judge says of one response."""

    score: float
    """More is better; NaN for no verdict."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What a person may want to see of it, as JSON: claims with their probabilities, a critique, a
    raw reply."""
    reason: str | None = None
    """Why there is no score: a word that is counted."""


@dataclasses.dataclass(frozen=True)
class Responses:
    """The responses of a round, as judges are asked about them."""

    folder: str
    """Folder of the round, where judges keep their stages."""
    records: Sequence[Record]
    """The prompts."""
    generated: StageOutput
    """The responses, a row each (`generation.responses.GENERATED`; with a `source` where they come
    from several), those of a prompt together and in the order of the prompts."""

    @property
    def num_parts(self) -> int:
        """Parts that judges make their stages in."""
        return max(1, -(-len(self.records) // PROMPTS_PER_PART))

    def part(self, number: int) -> Responses:
        """The prompts of one part with their responses. Parts are equal to one prompt: of a few
        responses left over, one that fails would be more than may."""
        start, end = (len(self.records) * at // self.num_parts for at in (number, number + 1))
        records = self.records[start:end]
        asked = {record.id for record in records}
        rows = [place for place, name in enumerate(self.prompt_ids()) if name in asked]
        first, count = (rows[0], rows[-1] + 1 - rows[0]) if rows else (0, 0)
        table = self.generated.table.slice(first, count)
        return dataclasses.replace(
            self, records=records, generated=dataclasses.replace(self.generated, table=table)
        )

    def prompt_ids(self) -> list[str]:
        """The id of every response's prompt."""
        return self.generated.table["prompt_id"].to_pylist()

    def media(self) -> str:
        """Fingerprint of all prompts' images and videos, in order."""
        return fingerprint_items(
            [media.fingerprint() for media in record.media] for record in self.records
        )

    def sources(self) -> list[str]:
        """The source of every response, by its name among the recipe's `candidates`."""
        return sources_of(self.generated.table)

    def by_prompt(self) -> Iterator[tuple[Record, list[str]]]:
        """Every prompt with the texts of its responses."""
        texts: dict[str, list[str]] = {record.id: [] for record in self.records}
        for prompt_id, text in zip(
            self.prompt_ids(), self.generated.table["text"].to_pylist(), strict=True
        ):
            texts[prompt_id].append(text)
        for record in self.records:
            yield record, texts[record.id]

    def with_responses(self, *, sampled_tokens: bool) -> Iterator[Record]:
        """Every prompt as a record with its responses.

        Args:
          sampled_tokens: whether with the ids that were sampled, or as texts.
        """
        rows = self.generated.table.select(["prompt_id", "text", "finished", "token_ids"])
        responses: dict[str, list[Response]] = {record.id: [] for record in self.records}
        for row in rows.to_pylist():
            ids = row["token_ids"] if sampled_tokens else None
            ids = None if ids is None else tuple(ids)
            response = Response.of(row["text"], finished=row["finished"], token_ids=ids)
            responses[row["prompt_id"]].append(response)
        for record in self.records:
            yield dataclasses.replace(record, responses=tuple(responses[record.id]))

    def stage(
        self,
        name: str,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        num_parts: int | None = None,
    ) -> Stage:
        """A stage in the round's folder.

        Args:
          name: of its files.
          inputs: fingerprints of what it is made of.
          settings: what else changes it.
          num_parts: of the stage; those of the prompts by default.
        """
        return Stage(self.folder, name, inputs, settings, num_parts or self.num_parts)


class Judge(Protocol):
    """Gives responses a score."""

    def check(self, records: Sequence[Record]) -> None:
        """Finds what can be known to be wrong before anything heavy starts.

        Args:
          records: all prompts that it will be asked about.

        Raises:
          MmpoError: what the user can mend.
        """

    def judge(self, responses: Responses) -> StageOutput:
        """The stage `judge` of a round: a row for every response, in their order (`JUDGED`).

        It is made in parts, as are the stages that come before it, and a manifest has the key of
        all that the verdicts depend on; so a finished one is read, and a kill loses a part.

        Raises:
          TooManyFailed: more responses than allowed have no verdict.
        """
        ...


@runtime_checkable
class AskingAhead(Protocol):
    """What a judge has besides whose models may be served."""

    asks_ahead: bool
    """Whether it asks servers before it needs the devices."""

    def ask_ahead(self, responses: Responses) -> None:
        """Asks servers about some of the responses that `judge` is going to be asked about, which
        then finds the replies in their journals. Other threads may compute, and ask, meanwhile.

        Args:
          responses: as many as a part has, at most.

        Raises:
          MmpoError: as `judge`.
        """
        ...


def rows_in_parts(folder: str, records: Iterable[Record], rows: pa.Table) -> Iterator[Responses]:
    """Rows about some prompts, such as a stage has finished, as many at a time as a part has.

    Args:
      folder: of the round.
      records: these prompts, and maybe others.
      rows: with a `prompt_id` each, those of a prompt together.
    """
    known = {record.id: record for record in records}
    asked = [known[name] for name in dict.fromkeys(rows["prompt_id"].to_pylist())]
    found = Responses(folder, asked, StageOutput(rows, fingerprint=""))
    yield from map(found.part, range(found.num_parts))


def judged_table(responses: Responses, judgements: Sequence[Judgement]) -> pa.Table:
    """The table of judgements, one for each response in order.

    Raises:
      DataError: a score is infinite, details are no JSON, or the number of judgements is another.
    """
    ids, samples = (responses.generated.table[name].to_pylist() for name in ("prompt_id", "sample"))
    if len(ids) != len(judgements):
        raise DataError(f"a judge gave {len(judgements)} scores for {len(ids)} responses")
    for prompt_id, sample, judgement in zip(ids, samples, judgements, strict=True):
        if math.isinf(judgement.score):
            raise DataError(
                f"response {sample} to prompt {prompt_id!r}: a score is a number, or NaN where "
                f"there is no verdict, not {judgement.score}"
            )
    return pa.table(
        [
            ids,
            samples,
            [float(judgement.score) for judgement in judgements],
            [_reason(judgement) for judgement in judgements],
            [
                _details(f"response {sample} to prompt {prompt_id!r}", judgement.details)
                for prompt_id, sample, judgement in zip(ids, samples, judgements, strict=True)
            ],
        ],
        schema=JUDGED,
    )


def _details(name: str, details: Mapping[str, Any]) -> str:
    """Details as JSON, in which numbers of NumPy are numbers and NaN is null."""
    try:
        plain = json.loads(json.dumps(dict(details), default=lambda value: value.tolist()))
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{name}: what a judge says of it is no JSON: {details!r:.200}") from error
    text = json.dumps(null_if_not_finite(plain), ensure_ascii=False)
    return text.encode(errors="replace").decode()


def _reason(judgement: Judgement) -> str | None:
    return (judgement.reason or NO_VERDICT) if math.isnan(judgement.score) else None


def judge_stage(
    responses: Responses,
    judge: Callable[[Responses], Sequence[Judgement]],
    shown: Callable[[Record], Any],
    settings: Mapping[str, Any],
) -> StageOutput:
    """The stage `judge` of a judge that looks at some prompts at a time, see `Judge.judge`.

    Args:
      responses: of the round.
      judge: gives a judgement for every response of a part, in order.
      shown: all that it looks at of a prompt, as JSON.
      settings: what else its judgements depend on.
    """

    def make_part(part: int) -> pa.Table:
        of_part = responses.part(part)
        return judged_table(of_part, judge(of_part))

    inputs = {
        "responses": responses.generated.fingerprint,
        "questions": fingerprint_items(map(shown, responses.records)),
    }
    return run_told_stage(responses.stage("judge", inputs, settings), make_part)


def sources_of(generated: pa.Table) -> list[str]:
    """The source of every response; a table that does not say has the policy's alone."""
    if "source" not in generated.column_names:
        return [POLICY] * generated.num_rows
    return generated["source"].to_pylist()


def scored_responses(generated: pa.Table, judged: pa.Table) -> list[ScoredResponse]:
    """Responses with their scores, as pairs are made of them."""
    texts = generated["text"].to_pylist()
    rows = judged.select(["prompt_id", "sample", "score", "reason"]).to_pylist()
    return [
        ScoredResponse(row["prompt_id"], row["sample"], text, row["score"], row["reason"], source)
        for row, text, source in zip(rows, texts, sources_of(generated), strict=True)
    ]


def check_failed(
    judgements: Iterable[str | None],
    max_failed: float,
    what: str,
    option: str = "feedback.max_failed",
) -> None:
    """Stops where too many responses failed, of those that say anything.

    Args:
      judgements: of every response, the reason that it failed for, or None.
      max_failed: the share that may; `FEW` may in any case, unless it is 0.
      what: was done to them, for the message.
      option: name of `max_failed`, likewise.

    Raises:
      TooManyFailed: with the reasons and their counts.
    """
    reasons = [reason for reason in judgements if reason != EMPTY]
    failed = [reason for reason in reasons if reason is not None]
    allowed = max(max_failed * len(reasons), FEW) if max_failed else 0
    if len(failed) <= allowed:
        return
    counts = {reason: failed.count(reason) for reason in dict.fromkeys(failed)}
    told = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    raise TooManyFailed(
        f"{what}: {len(failed)} of {len(reasons)} responses failed ({told}), and "
        f"{option} allows {max_failed:g} of them"
    )
