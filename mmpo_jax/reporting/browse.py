"""Prompts of runs as a page shows them: responses, claims with verdicts, pairs, and how they sort.

A prompt that was asked in several rounds or runs is one, seen several times.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from mmpo_jax.benchmarks.benchmark import PICTURE
from mmpo_jax.core.buckets import entries, is_file
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_bytes, read_bytes, read_json, read_table
from mmpo_jax.feedback.scores import VERDICTS, accepted
from mmpo_jax.reporting.prompts import STAGE
from mmpo_jax.reporting.runs import RunFiles

log = logging.getLogger(__name__)

_QUESTIONS = f"-{STAGE}.parquet"
RESPONSES = ("responses", "generate")
"""Stages with the responses of a round: of all sources, where there are several, or the
policy's."""


@dataclasses.dataclass(frozen=True)
class SeenResponse:
    """A response, and what its judge said."""

    sample: int
    source: str
    """Name of the source of candidates; empty where there is the policy alone."""
    text: str
    finished: bool
    """Whether it ended by itself."""
    score: float | None
    reason: str | None
    """Why there is no score, if it was judged and has none."""
    claims: Sequence[tuple[str, str | None, float | None, float | None]] = ()
    """Claim, question, p(yes), p(no)."""
    details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """What else the judge said."""

    @property
    def rejected(self) -> int:
        """Number of its claims that were rejected."""
        answered = ((yes, no) for *_, yes, no in self.claims if yes is not None and no is not None)
        return sum(not accepted(yes, no) for yes, no in answered)


@dataclasses.dataclass(frozen=True)
class SeenPair:
    """A preference, by the numbers of its responses among those of the prompt."""

    chosen: int
    rejected: int
    margin: float
    """Difference of their scores."""


@dataclasses.dataclass(frozen=True)
class Sighting:
    """A prompt in one round of one run."""

    run: int
    """Number of the run on the page."""
    round: int
    """Number of the round or, in a training, of the update."""
    responses: Sequence[SeenResponse]
    pairs: Sequence[SeenPair]


@dataclasses.dataclass(frozen=True)
class SeenPrompt:
    """A prompt with all that was said to it."""

    id: str
    question: str
    images: Sequence[str]
    """Names of its pictures."""
    thumbnails: Sequence[bytes | None]
    """Of the first ones."""
    seen: Sequence[Sighting]
    benchmark: str = ""
    """Name of the benchmark that asks; empty where a round did."""

    @property
    def rejected(self) -> int:
        """Rejected claims, of all responses."""
        return sum(one.rejected for each in self.seen for one in each.responses)

    @property
    def failed(self) -> int:
        """Responses that their judge could not give a score."""
        return sum(one.reason is not None for each in self.seen for one in each.responses)

    @property
    def margin(self) -> float | None:
        """The largest margin of its pairs."""
        return max((pair.margin for each in self.seen for pair in each.pairs), default=None)

    @property
    def change(self) -> float | None:
        """How far the words of the last round are from those of the first, the most of all runs:
        1 - cosine of their counts; None where no run saw it in two rounds."""
        changes = []
        for run in {each.run for each in self.seen}:
            of_run = [each for each in self.seen if each.run == run and each.responses]
            if len(of_run) > 1:
                changes.append(_distance(_words(of_run[0]), _words(of_run[-1])))
        return max(changes, default=None)


def _words(seen: Sighting) -> Counter[str]:
    return Counter(word for one in seen.responses for word in one.text.lower().split())


def _distance(one: Counter[str], other: Counter[str]) -> float:
    """1 - the cosine of counts; 0 of two empty ones."""
    if not one or not other:
        return float(bool(one) != bool(other))
    dot = sum(count * other[word] for word, count in one.items())
    norms = (math.sqrt(sum(n * n for n in counts.values())) for counts in (one, other))
    return max(0.0, 1.0 - dot / math.prod(norms))


def read_prompts(runs: Sequence[RunFiles], limit: int | None) -> tuple[list[SeenPrompt], int]:
    """Prompts of all rounds of all runs.

    Args:
      runs: of the page.
      limit: how many sightings of prompts are read, evenly from all rounds; None for all.

    Returns:
      (the prompts, in the order of the rounds, those of benchmarks last; how many there are).
    """
    places: list[tuple[int, int, _Asked | _Answers]] = []
    for number, run in enumerate(runs):
        for one in run.rounds:
            asked = _asked(one.folder)
            if asked is not None:
                places.append((number, one.index, asked))
    for number, run in enumerate(runs):
        for each in run.measurements:
            places += [(number, each.place, answers) for answers in _answers(each.folder)]
    counts = [len(source.prompt_ids) for *_, source in places]
    found: dict[Any, SeenPrompt] = {}
    for (number, index, source), many in zip(places, _shares(counts, limit), strict=True):
        for prompt in source.read(number, index, many):
            key = (prompt.benchmark, prompt.id, prompt.question, _digests(prompt.thumbnails))
            before = found.get(key)
            if before is not None:
                prompt = dataclasses.replace(before, seen=[*before.seen, *prompt.seen])
            found[key] = prompt
    return list(found.values()), sum(counts)


def _digests(thumbnails: Iterable[bytes | None]) -> tuple[str | None, ...]:
    return tuple(None if data is None else fingerprint_bytes(data) for data in thumbnails)


def _shares(counts: Sequence[int], limit: int | None) -> list[int]:
    """How many of each are taken, so that all have alike as far as they have as many."""
    if limit is None or sum(counts) <= limit:
        return list(counts)
    left, shares = limit, [0] * len(counts)
    order = sorted(range(len(counts)), key=lambda place: counts[place])
    for done, place in enumerate(order):
        shares[place] = min(counts[place], left // (len(order) - done))
        left -= shares[place]
    return shares


@dataclasses.dataclass(frozen=True)
class _Asked:
    """The prompts of a round that has responses. Its tables are read when they are needed, as those
    of all rounds may be large."""

    folder: str
    prompt_ids: Sequence[str]

    def read(self, run: int, index: int, many: int) -> list[SeenPrompt]:
        """So many of its prompts, the first ones: rounds have theirs in the order of the data, and
        rounds with the same prompts have the same ones."""
        ids = self.prompt_ids[:many]
        if not ids:
            return []
        rows = _of(_responses(self.folder), ids)
        judged, paired, prompts = (
            _of(_table(self.folder, n), ids) for n in ("judge", "pairs", STAGE)
        )
        said = {(row["prompt_id"], row["sample"]): row for row in judged.to_pylist()}
        responses: dict[str, list[SeenResponse]] = {name: [] for name in ids}
        columns = ("prompt_id", "sample", "text", "finished")
        alone = "source" not in rows.column_names
        sources = [""] * rows.num_rows if alone else rows["source"].to_pylist()
        for row, source in zip(rows.select(columns).to_pylist(), sources, strict=True):
            verdict = said.get((row["prompt_id"], row["sample"]))
            responses[row["prompt_id"]].append(_response(row, source, verdict))
        places = {
            name: {one.sample: place for place, one in enumerate(of_prompt)}
            for name, of_prompt in responses.items()
        }
        pairs: dict[str, list[SeenPair]] = {name: [] for name in ids}
        for row in paired.to_pylist():
            of_prompt = places[row["prompt_id"]]
            chosen, rejected = (of_prompt.get(row[f"{s}_sample"]) for s in ("chosen", "rejected"))
            if chosen is not None and rejected is not None:
                margin = row["chosen_score"] - row["rejected_score"]
                pairs[row["prompt_id"]].append(SeenPair(chosen, rejected, margin))
        shown = {row["prompt_id"]: row for row in prompts.to_pylist()}
        empty: dict[str, Any] = {"question": "", "images": [], "thumbnails": []}
        return [
            SeenPrompt(
                id=name,
                question=row["question"],
                images=row["images"],
                thumbnails=row["thumbnails"],
                seen=[Sighting(run, index, responses[name], pairs[name])],
            )
            for name in ids
            for row in [shown.get(name, empty)]
        ]


def _response(
    row: Mapping[str, Any], source: str, judged: Mapping[str, Any] | None
) -> SeenResponse:
    nothing = {"score": None, "reason": None, "details": "{}"}
    said: Mapping[str, Any] = nothing if judged is None else judged
    details = json.loads(said["details"])
    verdicts = details.pop(VERDICTS, [])
    score = said["score"]
    return SeenResponse(
        sample=row["sample"],
        source=source,
        text=row["text"],
        finished=row["finished"],
        score=None if score is None or math.isnan(score) else score,
        reason=said["reason"],
        claims=[
            (each["claim"], each.get("question"), each["p_yes"], each["p_no"]) for each in verdicts
        ],
        details=details,
    )


def _of(table: pa.Table | None, ids: Sequence[str]) -> pa.Table:
    """The rows about some prompts."""
    if table is None:
        return pa.table({"prompt_id": pa.array([], pa.string())})
    return table.filter(pc.is_in(table["prompt_id"], pa.array(ids, pa.string())))


def _asked(folder: str) -> _Asked | None:
    """The prompts of a round; None where nothing was generated yet, or it cannot be read."""
    generated = _responses(folder)
    if generated is None:
        return None
    return _Asked(folder, pc.unique(generated["prompt_id"]).to_pylist())


def _responses(folder: str) -> pa.Table | None:
    """All responses of a round."""
    return next((table for name in RESPONSES if (table := _table(folder, name)) is not None), None)


def _table(folder: str, name: str) -> pa.Table | None:
    path = os.path.join(folder, f"{name}.parquet")
    if not is_file(path):
        return None
    try:
        return read_table(path)
    except DataError as error:
        log.warning("left out: %s", error)
        return None


@dataclasses.dataclass(frozen=True)
class _Answers:
    """What a model answered to the questions of a benchmark that are kept for pages."""

    benchmark: str
    prompts: pa.Table
    answers: Mapping[str, Mapping[str, Any]]
    scores: Mapping[str, Mapping[str, Any]]
    """What the benchmark says of every answer."""

    @property
    def prompt_ids(self) -> list[str]:
        return [name for name in self.prompts["prompt_id"].to_pylist() if name in self.answers]

    def read(self, run: int, index: int, many: int) -> list[SeenPrompt]:
        """So many of its questions, the first ones."""
        rows = {row["prompt_id"]: row for row in _of(self.prompts, self.prompt_ids).to_pylist()}
        return [
            SeenPrompt(
                id=name,
                question=rows[name]["question"],
                images=rows[name]["images"],
                thumbnails=rows[name]["thumbnails"],
                seen=[Sighting(run, index, [self._response(name)], [])],
                benchmark=self.benchmark,
            )
            for name in self.prompt_ids[:many]
        ]

    def _response(self, name: str) -> SeenResponse:
        said, scored = dict(self.answers[name]), dict(self.scores.get(name, {}))
        text = said.pop("response")
        details = {**scored.pop("scores", {}), **said, **scored}
        hidden = ("id", PICTURE)
        known = {k: value for k, value in details.items() if k not in hidden and value is not None}
        return SeenResponse(0, "", text, True, None, None, details=known)


def _answers(folder: str) -> list[_Answers]:
    """The benchmarks of a folder whose answers and questions are there."""
    found = []
    for file in entries(folder):
        name = file.removesuffix(_QUESTIONS)
        path = os.path.join(folder, f"{name}.answers.jsonl")
        if name == file or not is_file(path):
            continue
        prompts = _table(folder, file.removesuffix(".parquet"))
        if prompts is not None:
            rows = [json.loads(line) for line in read_bytes(path).splitlines()]
            scores = read_json(os.path.join(folder, f"{name}.scores.json")).get("rows", [])
            by_id = [{row["id"]: row for row in each if "id" in row} for each in (rows, scores)]
            found.append(_Answers(name, prompts, *by_id))
    return found
