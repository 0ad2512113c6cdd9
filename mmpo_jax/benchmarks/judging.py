"""Judges of benchmarks: how one is asked, and what is kept of every reply.

A benchmark says how its judge is asked (`JudgePrompt`) and what (`Question`), and reads the
replies. Who replies is the user's choice: a model (`judge_models.py`), or a file of judgements that
were made before, in the layout of the benchmark's authors or in ours.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, Protocol

from etils import epath

from mmpo_jax.benchmarks.tables import Row, read_table, said
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_json, write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.data.records import ImageRef

log = logging.getLogger(__name__)

FILE = "judgements.jsonl"
"""File of a judge's folder that has every reply, a row each; `--judgements` reads it."""
FEW = 2
"""Questions whose replies may all be unreadable: of so few that says nothing of the judge."""
HOW = "--judge url=http://HOST:PORT/v1 --judge model=NAME asks one"
"""What messages say of judges."""
SHOWN = 300
"""Characters of a reply that messages show."""


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """How a benchmark asks its judge: what its numbers depend on beside the judge's name."""

    name: str
    """Of the words, with a version that changes with any of them, such as `mmhal-1`."""
    official: str
    """Model that the benchmark's authors ask."""
    max_new_tokens: int
    """Of a reply, as its script has it."""
    temperature: float = 0.0
    top_p: float = 1.0
    system: str = ""
    """What the judge is told before the question; empty for nothing."""
    attempts: int = 1
    """How often a reply that cannot be read is asked for."""
    order: str = ""
    """In which order answers stand that are compared."""


@dataclasses.dataclass(frozen=True)
class Question:
    """What a judge is asked about one answer."""

    id: str
    text: str
    images: tuple[ImageRef, ...] = ()
    run: int = 0
    """Number of this asking of the same, where a benchmark takes several replies."""


@dataclasses.dataclass(frozen=True)
class Judgement:
    """What came of a question."""

    id: str
    text: str | None
    """The reply; None where there is none."""
    readable: bool = False
    """Whether the benchmark can read it."""
    reason: str | None = None
    """Why there is no reply: a word that is counted."""
    model: str | None = None
    """Who replied, as it calls itself."""


@dataclasses.dataclass(frozen=True)
class Said:
    """A model's reply, or why there is none."""

    text: str | None
    reason: str | None = None
    detail: str = ""
    final: bool = True
    """Whether a later run would get the same."""
    model: str | None = None


class JudgeModel(Protocol):
    """The model behind a judge."""

    name: str
    """As the user calls it."""
    part: int | None
    """Questions that are asked before their replies are kept; None for all, where the model keeps
    them itself."""
    max_failed: float
    """Share of the questions that may have no reply."""

    def settings(self, prompt: JudgePrompt) -> Mapping[str, Any]:
        """How it is asked: `temperature`, `top_p`, `max_new_tokens`, `attempts`."""

    def key(self, prompt: JudgePrompt) -> Any:
        """All that its replies depend on beside the question, as JSON."""

    def say(self, prompt: JudgePrompt, questions: Sequence[Question], attempt: int) -> list[Said]:
        """Its replies, in order."""

    def forget(self, prompt: JudgePrompt, questions: Sequence[Question], attempt: int) -> None:
        """Notes that its replies were of no use: a later run asks anew."""

    def failed(self, reasons: Sequence[str | None]) -> None:
        """Stops where too many have no reply.

        Args:
          reasons: of every question, why it has none, or None.

        Raises:
          TooManyFailed: with the reasons and their counts.
        """

    def stop(self, told: str) -> NoReturn:
        """Stops over replies of no use, which are asked for anew.

        Raises:
          TooManyFailed: what is told.
        """


class Judge:
    """Answers a benchmark's questions, each once: what was replied before is not asked again."""

    def __init__(
        self,
        model: JudgeModel | None = None,
        folder: str | None = None,
        given: str | None = None,
    ):
        """
        Args:
          model: that is asked; None for none.
          folder: where replies are kept, if a model is asked.
          given: file of judgements that are there.

        Raises:
          MmpoError: the file cannot be read or has no rows.
        """
        self.model = model
        self.told: dict[str, dict[str, Any]] = {}
        """Prompt -> who was asked and how, for reports."""
        self.given = given
        """File of judgements that are there."""
        self._path = None if folder is None or model is None else os.path.join(folder, FILE)
        self._rows: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        """Key -> its replies, in the order of the attempts."""
        self._before: dict[str, list[dict[str, Any]]] = collections.defaultdict(list)
        """Digest of what was asked -> the replies of a file that was given."""
        self.published: list[Row] | None = None
        """Judgements of a file in another layout than ours, which a benchmark reads itself."""
        if given is not None:
            self._read_given(given)
        path = self._path
        if path is not None and on_one(lambda: epath.Path(path).exists()):
            for row in on_one(lambda: read_table(epath.Path(path))):
                self._rows[row.text("key")].append(dict(row.values))

    @property
    def is_there(self) -> bool:
        """Whether there are a model or judgements."""
        return self.model is not None or self.given is not None

    def check(self) -> None:
        """
        Raises:
          MmpoError: nobody judges.
        """
        if not self.is_there:
            raise MmpoError(
                f"this benchmark needs a judge: {HOW}, --judgements FILE has judgements"
            )

    def ask(
        self,
        prompt: JudgePrompt,
        questions: Sequence[Question],
        readable: Callable[[str], bool] = bool,
    ) -> list[Judgement]:
        """The judgement of every question, in order; what nobody replied before is asked now.

        A reply that the benchmark cannot read is asked for again as often as the prompt says; the
        last one is the judgement then.

        Args:
          prompt: how to ask.
          questions: what.
          readable: whether the benchmark can read a reply.

        Raises:
          MmpoError: there is no judge and the given file lacks a judgement.
          TooManyFailed: more questions than allowed have no reply, or no reply can be read.
        """
        self.check()
        asked = [_asked(prompt, question) for question in questions]
        keys = asked
        if self.model is not None:
            of_model = self.model.key(prompt)
            keys = [fingerprint_json([digest, of_model]) for digest in asked]
        for question, digest, key in zip(questions, asked, keys, strict=True):
            before = self._before.get(digest, [])
            if before and (self.model is None or before[0]["key"] == key):
                self._rows.setdefault(key, before)
            if self.model is None and key not in self._rows:
                raise MmpoError(self._lacking(question))
        if self.model is not None:
            self._ask(self.model, prompt, dict(zip(keys, questions, strict=True)), asked, readable)
        found = [
            _judgement(question.id, self._rows[key], readable)
            for question, key in zip(questions, keys, strict=True)
        ]
        self._tell(prompt, found)
        if self.model is not None:
            self.model.failed([one.reason for one in found])
        return found

    def tell(self, prompt: JudgePrompt, models: Sequence[str | None]) -> None:
        """Notes who made judgements that were published, in words of their own: a name for each."""
        self.told[f"{prompt.name.rpartition('-')[0]}-published"] = {
            "judge": None,
            "judgements": self.given,
            "models": _counted(models),
            "official_judge": prompt.official,
            "order": prompt.order,
        }

    def _tell(self, prompt: JudgePrompt, found: Sequence[Judgement]) -> None:
        self.told[prompt.name] = {
            "judge": None if self.model is None else self.model.name,
            "judgements": self._path or self.given,
            "models": _counted([one.model for one in found]),
            "official_judge": prompt.official,
            "order": prompt.order,
            **({} if self.model is None else self.model.settings(prompt)),
        }

    def _ask(
        self,
        model: JudgeModel,
        prompt: JudgePrompt,
        questions: Mapping[str, Question],
        asked: Sequence[str],
        readable: Callable[[str], bool],
    ) -> None:
        """Asks what has no readable reply yet, and keeps the replies."""
        digests = dict(zip(questions, dict.fromkeys(asked), strict=True))
        attempts = model.settings(prompt)["attempts"]
        fresh: dict[str, int] = {}
        for attempt in range(attempts):
            waiting = [key for key in questions if self._waits(key, attempt, readable)]
            size = model.part or max(1, len(waiting))
            for start in range(0, len(waiting), size):
                part = waiting[start : start + size]
                said = model.say(prompt, [questions[key] for key in part], attempt)
                for key, one in zip(part, said, strict=True):
                    row = {
                        "id": questions[key].id,
                        "prompt": prompt.name,
                        "asked": digests[key],
                        "key": key,
                        "attempt": attempt,
                        "judge": model.name,
                        **model.settings(prompt),
                        **dataclasses.asdict(one),
                    }
                    self._rows[key].append(row)
                    fresh[key] = attempt
                self._keep()
        self._check_read(model, prompt, questions, fresh, readable)

    def _waits(self, key: str, attempt: int, readable: Callable[[str], bool]) -> bool:
        """Whether a question is asked (again): its replies so far cannot be read."""
        rows = self._rows[key]
        texts = [row["text"] for row in rows]
        return len(rows) == attempt and all(
            text is not None and not readable(text) for text in texts
        )

    def _check_read(
        self,
        model: JudgeModel,
        prompt: JudgePrompt,
        questions: Mapping[str, Question],
        fresh: Mapping[str, int],
        readable: Callable[[str], bool],
    ) -> None:
        """Stops where no reply at all can be read, of more than a few, and forgets the new ones.

        Raises:
          TooManyFailed: with one of the replies.
        """
        texts = [row["text"] for key in questions for row in self._rows[key] if row["text"]]
        if len(questions) <= FEW or not (fresh and texts) or any(map(readable, texts)):
            return
        for key, last in fresh.items():
            for attempt in range(last + 1):
                model.forget(prompt, [questions[key]], attempt)
            del self._rows[key]
        self._keep()
        model.stop(
            f"judge {model.name}: none of its {len(texts)} replies to {prompt.name} can be read; "
            f"the first: {texts[0][:SHOWN]!r}"
        )

    def _keep(self) -> None:
        """Writes the replies that a later run would get too."""
        path = self._path
        if path is None:
            return
        rows = [row for of_key in self._rows.values() for row in of_key if row["final"]]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        on_one(lambda: write_atomic(path, text.encode(errors="replace")))

    def _read_given(self, path: str) -> None:
        rows = on_one(lambda: read_table(epath.Path(path)))
        if not rows:
            raise MmpoError(f"{path}: has no rows")
        if not all("asked" in row.values and "key" in row.values for row in rows):
            self.published = rows
            return
        for row in rows:
            of_question = self._before[row.text("asked")]
            if of_question and of_question[0]["key"] != row.text("key"):
                raise MmpoError(
                    f"{row.name}: {row.get('id')!r} was judged twice, by {of_question[0]['judge']} "
                    f"and by {row.get('judge')}, or with other options; keep one of them"
                )
            of_question.append(dict(row.values))

    def _lacking(self, question: Question) -> str:
        return (
            f"{self.given}: has no judgement of the answer to {question.id!r}, which was judged "
            f"with other words or not at all; {HOW}"
        )


REVIEWS = ("review", "judgement", "content", "reply", "text", "response")
"""Names under which rows of judgements may have the judge's words, where the authors have none."""


def review_of(row: Row, *keys: str) -> str | None:
    """The judge's words in a row of judgements, under one of the keys or of `REVIEWS`; None where
    the row says that there are none.

    Raises:
      MmpoError: the row has none of the keys.
    """
    names = (*keys, *REVIEWS)
    is_empty = row.get(*names) is None and any(name in row.values for name in names)
    return None if is_empty else said(row, *names)


def _asked(prompt: JudgePrompt, question: Question) -> str:
    """Digest of all that a judge sees, and of which asking it is."""
    images = [image.fingerprint() for image in question.images]
    return fingerprint_json([prompt.system, question.text, images, question.run])


def _judgement(
    name: str, rows: Sequence[Mapping[str, Any]], readable: Callable[[str], bool]
) -> Judgement:
    """The first reply that can be read, else the last."""
    texts = [row["text"] for row in rows]
    place = next((n for n, text in enumerate(texts) if text is not None and readable(text)), -1)
    row = rows[place]
    reason = None if row["text"] is not None else row["reason"] or "empty_reply"
    return Judgement(name, row["text"], place >= 0, reason, row["model"] or row["judge"])


def _counted(names: Sequence[str | None]) -> dict[str, int]:
    """Name -> how many judgements are its; those of nobody are left out."""
    return dict(collections.Counter(str(name) for name in names if name is not None))
