"""A judge in words that compares answers two by two, each pair in both orders."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.stages import StageOutput
from mmpo_jax.data.pair_questions import PAIR_PROMPT, Verdict, ask_which, read_verdict
from mmpo_jax.data.records import Record, question_with_beginning
from mmpo_jax.feedback.judge import EMPTY, Judgement, Responses, check_failed, judge_stage
from mmpo_jax.feedback.text_model import (
    Ask,
    TextModel,
    Unread,
    UnreadableReply,
    ask_until_read,
    speaking_key,
)
from mmpo_jax.recipes.feedback import ChatAsked, PairFeedback

log = logging.getLogger(__name__)

PAIR_RULES = 1
"""Part of the key of scores: changes with how pairs are asked about and verdicts are read."""
NOBODY = "nothing_to_compare"
"""Reason of the only text of a prompt."""


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two different texts of a prompt, by their places among its texts, with the verdicts."""

    prompt: int
    first: int
    second: int
    verdicts: tuple[Verdict | Unread, Verdict | Unread] = (
        Unread("not_asked", "", None),
        Unread("not_asked", "", None),
    )
    """With the first text in front, and behind."""

    @property
    def failure(self) -> str | None:
        """Why it says nothing: no order got a verdict that can be read."""
        read = [verdict for verdict in self.verdicts if not isinstance(verdict, Unread)]
        unread = [verdict for verdict in self.verdicts if isinstance(verdict, Unread)]
        return None if read else unread[0].reason

    @property
    def gain(self) -> float:
        """What the first text gets of the one point between them: the mean over the orders that
        were read, so a judge that goes by places gives both a half."""
        front, behind = self.verdicts
        gains = []
        if not isinstance(front, Unread):
            gains.append({"1": 1.0, "2": 0.0, "tie": 0.5}[front])
        if not isinstance(behind, Unread):
            gains.append({"1": 0.0, "2": 1.0, "tie": 0.5}[behind])
        return sum(gains) / len(gains)


class PairJudge:
    """A language model that says which of two answers is better."""

    def __init__(
        self,
        options: PairFeedback,
        model: TextModel,
        key: Any,
        checks: Sequence[Callable[[], None]] = (),
    ):
        """
        Args:
          options: of the recipe.
          model: that is asked.
          key: all that its replies depend on, as JSON.
          checks: of what it needs.
        """
        self.options, self.model, self.checks = options, model, checks
        self.prompt = options.prompt or PAIR_PROMPT
        self.asks_ahead = isinstance(options.labeler, ChatAsked)
        self.key = [PAIR_RULES, key, speaking_key(options), self.prompt, options.opponents]

    def check(self, records: Sequence[Record]) -> None:
        """See `judge.Judge`."""
        for check in self.checks:
            check()

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`: the score of a response is its mean gain, from 0 to 1."""
        judged = judge_stage(responses, self._judge, _content, {"pairs": self.key})
        self.model.release()
        return judged

    def ask_ahead(self, responses: Responses) -> None:
        """See `judge.AskingAhead`."""
        self._judge(responses)

    def _judge(self, responses: Responses) -> list[Judgement]:
        """Judgements of the responses of a part.

        Raises:
          TooManyFailed: see `check_failed`.
        """
        prompts = list(responses.by_prompt())
        different = [list(dict.fromkeys(filter(str.strip, texts))) for _, texts in prompts]
        planned = [
            Comparison(prompt, first, second)
            for prompt, texts in enumerate(different)
            for first, second in meetings(len(texts), self.options.opponents)
        ]
        asks = [
            ask
            for comparison in planned
            for ask in self._asks(prompts[comparison.prompt][0], different, comparison)
        ]
        read = ask_until_read(self.model, asks, _read, self.options.attempts)
        compared = [
            dataclasses.replace(comparison, verdicts=(read[2 * place], read[2 * place + 1]))
            for place, comparison in enumerate(planned)
        ]
        _tell_preference(compared)
        of_texts: list[dict[str, list[Judged]]] = [{} for _ in prompts]
        for comparison in compared:
            texts = different[comparison.prompt]
            first, second = texts[comparison.first], texts[comparison.second]
            for text, other, wins in ((first, second, True), (second, first, False)):
                met = of_texts[comparison.prompt].setdefault(text, [])
                met.append(Judged(comparison, other, wins))
        judgements = [
            _judgement(text, of_texts[place].get(text, []))
            for place, (_, texts) in enumerate(prompts)
            for text in texts
        ]
        reasons = [None if one.reason == NOBODY else one.reason for one in judgements]
        check_failed(reasons, self.options.max_failed, "comparing responses")
        return judgements

    def _asks(
        self, record: Record, different: Sequence[Sequence[str]], comparison: Comparison
    ) -> Iterator[Ask]:
        """Both orders of a comparison."""
        texts = different[comparison.prompt]
        question, room = question_with_beginning(record.prompt), self.options.max_new_tokens
        for first, second in (
            (comparison.first, comparison.second),
            (comparison.second, comparison.first),
        ):
            text = ask_which(question, texts[first], texts[second], self.prompt)
            name = f"{record.id}/{first}-{second}"
            yield Ask(name, text, record.images, record.videos, max_new_tokens=room)


@dataclasses.dataclass(frozen=True)
class Judged:
    """A comparison from the side of one of its texts."""

    comparison: Comparison
    other: str
    """The text it was held against."""
    is_first: bool

    @property
    def gain(self) -> float:
        """Of this text."""
        gain = self.comparison.gain
        return gain if self.is_first else 1 - gain


def meetings(count: int, opponents: int | None) -> list[tuple[int, int]]:
    """Which of `count` texts are compared: all with all, or each with the next ones in a ring, so
    that all meet as many.

    Args:
      count: of the texts.
      opponents: of each text; an odd number counts as the next even one, as a ring has two sides.
        None for all.
    """
    every = [(one, other) for one in range(count) for other in range(one + 1, count)]
    if opponents is None or opponents >= count - 1:
        return every
    steps = -(-opponents // 2)
    ring = {
        tuple(sorted((one, (one + step) % count)))
        for one in range(count)
        for step in range(1, steps + 1)
    }
    return [pair for pair in every if pair in ring]


def _read(_: int, reply: str) -> Verdict:
    verdict = read_verdict(reply)
    if verdict is None:
        raise UnreadableReply(
            "no_verdict", "there is no <answer> 1 </answer> or <answer> 2 </answer>"
        )
    return verdict


def _judgement(text: str, met: Sequence[Judged]) -> Judgement:
    if not text.strip():
        return Judgement(math.nan, {}, EMPTY)
    details = {"comparisons": [_told(one) for one in met]}
    read = [one for one in met if one.comparison.failure is None]
    if not read:
        reason = met[0].comparison.failure if met else NOBODY
        return Judgement(math.nan, details, reason)
    return Judgement(sum(one.gain for one in read) / len(read), details)


def _told(judged: Judged) -> dict[str, Any]:
    """A comparison as a person reads it: what it was held against, and the verdicts by place."""
    verdicts = judged.comparison.verdicts
    front, behind = verdicts if judged.is_first else reversed(verdicts)
    return {"other": judged.other, "in_front": _word(front), "behind": _word(behind)}


def _word(verdict: Verdict | Unread) -> str:
    """A verdict, or the reply that nobody can read."""
    if not isinstance(verdict, Unread):
        return verdict
    return f"{verdict.reason}: {verdict.detail if verdict.raw is None else verdict.raw}"


def _tell_preference(compared: Sequence[Comparison]) -> None:
    """Says how often the judge takes the first place, and how often its two verdicts agree."""
    verdicts = [verdict for one in compared for verdict in one.verdicts if verdict in ("1", "2")]
    both = [one for one in compared if all(verdict in ("1", "2") for verdict in one.verdicts)]
    if both:
        log.info(
            "the first of two answers is preferred in %.0f %% of the verdicts; the two orders "
            "agree on %.0f %% of %d pairs",
            100 * verdicts.count("1") / len(verdicts),
            100 * sum(one.verdicts[0] != one.verdicts[1] for one in both) / len(both),
            len(both),
        )


def _content(record: Record) -> list[str]:
    """Fingerprints of what the judge is shown of a prompt."""
    said = fingerprint_json([record.id, question_with_beginning(record.prompt)])
    return [said, *(media.fingerprint() for media in record.media)]
