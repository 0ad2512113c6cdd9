"""The judge that divide and conquer is held against: one long prompt that asks for a number."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.prompts import fill
from mmpo_jax.core.stages import StageOutput
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
from mmpo_jax.recipes.feedback import ChatAsked, SelfRewardFeedback

SELF_REWARD_RULES = 2
"""Part of the key of scores: changes with how numbers are asked for and read."""

PROMPT = """\
Look at the image and judge how well the answer to the question describes it. Compare every \
statement of the answer with the image: objects that are not there, wrong attributes, numbers, \
places and actions make it worse, and so does what matters and is missing. Say shortly what you \
find, and end with a line of this form, with a number from {low} to {high}, {high} being the best:
Score: {high}

Question: {question}
Answer: {answer}"""

_VALUE = r"(-?(?:\d+(?:\.\d+)?|\.\d+))(?![\d.,]*\d|\s*[-–]\s*\d)"
_SCORE = re.compile(rf"\bscore\b[\s*_\"]*:[\s*_\"]*{_VALUE}", re.IGNORECASE)
_NUMBER = re.compile(rf"[\s*_]*{_VALUE}(?:\s*/\s*\d+)?[\s*_.]*")


SOLUTION = "{solution}"
"""Place in a prompt for what the data have as the row's `answer` or `solution`, as SIMA's critic
sees it (Wang et al. 2024, arXiv 2405.15973)."""


class SelfRewardJudge:
    """A labeler that gives every response a number in a reply of its own."""

    def __init__(
        self,
        options: SelfRewardFeedback,
        model: TextModel,
        key: Any,
        checks: Sequence[Callable[[], None]] = (),
    ):
        """
        Args:
          options: of the recipe.
          model: the labeler.
          key: all that its replies depend on, as JSON.
          checks: of what it needs.
        """
        self.options, self.model, self.checks = options, model, checks
        self.prompt = options.prompt or PROMPT
        self.tells_solution = SOLUTION in self.prompt
        limits = [options.low, options.high]
        self.asks_ahead = isinstance(options.labeler, ChatAsked)
        self.key = [SELF_REWARD_RULES, key, speaking_key(options), self.prompt, limits]

    def check(self, records: Sequence[Record]) -> None:
        """See `judge.Judge`; a row has no text as its solution, and the prompt tells it."""
        for check in self.checks:
            check()
        for record in records:
            if self.tells_solution and not isinstance(record.solution, str):
                raise DataError(
                    f"feedback.prompt tells the {SOLUTION} of the data, and prompt {record.id!r} "
                    "has no text as its answer or solution"
                )

    def judge(self, responses: Responses) -> StageOutput:
        """See `judge.Judge`."""
        judged = judge_stage(responses, self._judge, self._content, {"self_reward": self.key})
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
        places, asks, judgements = [], [], list[Judgement]()
        for record, texts in responses.by_prompt():
            for number, text in enumerate(texts):
                if text.strip():
                    places.append(len(judgements))
                    asks.append(self._ask(record, number, text))
                judgements.append(Judgement(math.nan, {}, EMPTY))
        found = ask_until_read(self.model, asks, self._read, self.options.attempts)
        for place, judgement in zip(places, found, strict=True):
            judgements[place] = (
                judgement
                if isinstance(judgement, Judgement)
                else Judgement(math.nan, _told(judgement), judgement.reason)
            )
        failures = [judgement.reason for judgement in judgements]
        check_failed(failures, self.options.max_failed, "asking for a score")
        return judgements

    def _ask(self, record: Record, number: int, text: str) -> Ask:
        prompt = fill(
            self.prompt,
            question=question_with_beginning(record.prompt),
            answer=text,
            low=f"{self.options.low:g}",
            high=f"{self.options.high:g}",
            **({"solution": record.solution} if self.tells_solution else {}),
        )
        room = self.options.max_new_tokens
        name = f"{record.id}/{number}"
        return Ask(name, prompt, record.images, record.videos, max_new_tokens=room)

    def _read(self, _: int, reply: str) -> Judgement:
        score = read_number(reply)
        if not self.options.low <= score <= self.options.high:
            raise UnreadableReply("no_number", f"{score:g} is not in the range")
        return Judgement(score, {"reply": reply})

    def _content(self, record: Record) -> list[str]:
        """Fingerprints of what the labeler is shown of a prompt."""
        told = [record.solution] if self.tells_solution else []
        said = fingerprint_json([record.id, question_with_beginning(record.prompt), *told])
        return [said, *(media.fingerprint() for media in record.media)]


def read_number(reply: str) -> float:
    """The number behind the last `Score:`, or the reply where it is nothing but a number.

    Raises:
      UnreadableReply: there is none.
    """
    alone = _NUMBER.fullmatch(reply)
    named = _SCORE.findall(reply)
    if alone or named:
        return float(alone[1] if alone else named[-1])
    raise UnreadableReply("no_number", "there is no line `Score: NUMBER`")


def _told(unread: Unread) -> dict[str, Any]:
    return {"reply": unread.raw if unread.raw is not None else unread.detail}
