"""Conquer, served: a chat server's model answers yes/no questions about images and videos."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
from collections.abc import Callable, Sequence

from mmpo_jax.chat.replies import NO_LOG_PROB, ChatFailure, ChatReply, Outcome, TokenLogProb
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.shared import AnyClient
from mmpo_jax.core import progress
from mmpo_jax.data.records import MediaRef
from mmpo_jax.feedback.labeler import Answer, QuestionSet
from mmpo_jax.recipes.feedback import ChatLabeling

log = logging.getLogger(__name__)

CHAT_LABEL_RULES = 3
"""Part of the key of verdicts: changes with how servers are asked and their replies read."""
TOP = 20
"""Tokens of the first position that are asked for, the most that servers give."""
PROBED = 8
"""Questions by which `auto` finds out whether a server tells log-probs at all."""
WORDS = {"yes": 0, "no": 1}
BLANKS = " \t\n\u2581\u0120\u010a"
"""What stands for blanks in tokens, also as tokenizers write them."""
SAMPLED_TOKENS = 8
"""Length of a sampled answer, of which the first word counts."""
NEITHER = "no_yes_or_no"
TIE = "yes_no_tie"
NO_LOGPROBS = "no_logprobs"


class ChatLabeler:
    """A served model: p(yes) and p(no) of the first token, or how often it says either.

    Spellings of yes and no are added up, whatever their case and the blanks around them. Where only
    one of both is among the tokens that the server tells, the other's probability is taken to be
    as large as it can be: that of the least likely token told, or what is left of 1.
    """

    def __init__(self, client: AnyClient, options: ChatLabeling):
        """
        Args:
          client: of the server.
          options: how it is read.
        """
        self.client, self.options = client, options
        self._told, self._lock = False, threading.Lock()
        """Whether the log says that samples are drawn in place of log-probs."""

    def answer(self, items: Sequence[QuestionSet]) -> list[list[Answer]]:
        """See `labeler.Labeler`; questions about one image go out one after another, as servers
        keep the image that they have just seen."""
        asked = [(media, question) for _, media, questions in items for question in questions]
        with progress.doing("asking the labeler", len(asked), "questions"):
            answers = iter(self._answer(asked))
        return [[next(answers) for _ in questions] for _, _, questions in items]

    def _answer(self, asked: Sequence[tuple[tuple[MediaRef, ...], str]]) -> list[Answer]:
        """Answers to (images and videos, question)."""
        requests = [
            ChatRequest((ChatMessage.user(question, media),), max_tokens=1)
            for media, question in asked
        ]
        if self.options.read == "samples":
            return self._sampled(requests)
        if self.options.read == "text":
            return self._ask_again(requests, _with_text, read_text)
        if self.options.read == "logprobs":
            return self._ask_again(requests, _with_logprobs, read_logprobs)
        return self._with_logprobs_or_sampled(requests)

    def _with_logprobs_or_sampled(self, requests: Sequence[ChatRequest]) -> list[Answer]:
        """Answers by log-probs, and by samples where there are none; a server that tells none of
        the first questions' is not asked for others'."""
        answers = self._ask_again(requests[:PROBED], _with_logprobs, read_logprobs)
        rest = requests[PROBED:]
        if all(answer.failure == NO_LOGPROBS for answer in answers):
            answers += [_no_answer(NO_LOGPROBS)] * len(rest)
        else:
            answers += self._ask_again(rest, _with_logprobs, read_logprobs)
        places = [place for place, answer in enumerate(answers) if answer.failure == NO_LOGPROBS]
        if places:
            self._tell_of_samples(len(places), len(requests))
        sampled = self._sampled([requests[place] for place in places])
        for place, answer in zip(places, sampled, strict=True):
            answers[place] = answer
        return answers

    def _tell_of_samples(self, count: int, of: int) -> None:
        """Warns once, as every such question takes several requests."""
        with self._lock:
            is_news, self._told = not self._told, True
        if is_news:
            log.warning(
                "%s, model %s: no log-probs of the answers to %d of %d questions; each such "
                "question is asked %d times instead (`samples: %d`), for the share of yes. "
                "`read: text` of the labeler asks once and takes the reply's word; `read: samples` "
                "does without the attempt at log-probs",
                self.client.server.url,
                self.client.server.model,
                count,
                of,
                self.options.samples,
                self.options.samples,
            )

    def _sampled(self, requests: Sequence[ChatRequest]) -> list[Answer]:
        """Shares of yes and no among several replies, see `_share`."""
        count = self.options.samples
        drawn = [
            dataclasses.replace(request, max_tokens=SAMPLED_TOKENS, temperature=1.0, seed=number)
            for request in requests
            for number in range(count)
        ]
        outcomes = self.client.ask(drawn)
        starts = range(0, len(outcomes), count)
        answers = [_share(outcomes[start : start + count]) for start in starts]
        for start, answer in zip(starts, answers, strict=True):
            if answer.failure is not None:
                self.client.reject(drawn[start : start + count])
        return answers

    def _ask_again(
        self,
        requests: Sequence[ChatRequest],
        change: Callable[[ChatRequest, int], ChatRequest],
        read: Callable[[ChatReply], Answer],
    ) -> list[Answer]:
        """Answers as they are read in replies, those that are neither yes nor no asked again.

        Args:
          requests: the questions.
          change: gives the request number n of a question.
          read: the answer in a reply.
        """
        answers = [_no_answer(NEITHER)] * len(requests)
        waiting = list(range(len(requests)))
        for attempt in range(self.options.attempts):
            asked = [change(requests[place], attempt) for place in waiting]
            outcomes = self.client.ask(asked)
            for place, outcome in zip(waiting, outcomes, strict=True):
                answers[place] = (
                    read(outcome) if isinstance(outcome, ChatReply) else _no_answer(outcome.reason)
                )
            failed = [
                request
                for place, request in zip(waiting, asked, strict=True)
                if answers[place].failure is not None
            ]
            self.client.reject(failed)
            waiting = [place for place in waiting if answers[place].failure == NEITHER]
        return answers


def _with_logprobs(request: ChatRequest, attempt: int) -> ChatRequest:
    return dataclasses.replace(request, top_logprobs=TOP, attempt=attempt)


def _with_text(request: ChatRequest, attempt: int) -> ChatRequest:
    return dataclasses.replace(request, max_tokens=SAMPLED_TOKENS, attempt=attempt)


def _no_answer(failure: str) -> Answer:
    return Answer(math.nan, math.nan, "", failure)


def read_logprobs(reply: ChatReply) -> Answer:
    """Probabilities of yes and no in the first token's alternatives; neither is a failure."""
    given = reply.first_top_logprobs[0]
    if given is None:
        return _no_answer(NO_LOGPROBS)
    top = [entry for entry in given if entry[1] != NO_LOG_PROB]
    found: list[float | None] = [None, None]
    for token, log_prob in top:
        word = WORDS.get(token.strip(BLANKS).casefold())
        if word is not None:
            found[word] = (found[word] or 0.0) + _probability(log_prob)
    if found == [None, None]:
        return _no_answer(NEITHER)
    rest = _largest_untold(top)
    p_yes, p_no = (rest if p is None else min(p, 1.0) for p in found)
    return Answer(p_yes, p_no, "logprobs")


def _largest_untold(top: Sequence[TokenLogProb]) -> float:
    """The largest probability that a token can have which is not told."""
    told = [_probability(log_prob) for _, log_prob in top]
    return max(0.0, min(min(told), 1.0 - sum(told)))


def _probability(log_prob: float) -> float:
    return math.exp(min(log_prob, 0.0))


def read_text(reply: ChatReply) -> Answer:
    """1 for the word that the reply begins with and 0 for the other; neither is a failure."""
    word = first_word(reply.texts[0])
    if word not in WORDS:
        return _no_answer(NEITHER)
    return Answer(float(word == "yes"), float(word == "no"), "text")


def _share(outcomes: Sequence[Outcome]) -> Answer:
    """Shares of yes and no among the replies. It is a failure where more than half of them are
    neither, as a model that does not answer has rejected nothing, or where yes and no tie."""
    words = [first_word(o.texts[0]) for o in outcomes if isinstance(o, ChatReply)]
    if not words:
        return _no_answer(next(o.reason for o in outcomes if isinstance(o, ChatFailure)))
    yes, no = (words.count(word) for word in WORDS)
    if 2 * (yes + no) < len(words):
        return _no_answer(NEITHER)
    if yes == no:
        return _no_answer(TIE)
    return Answer(yes / len(words), no / len(words), "samples")


def first_word(text: str) -> str:
    """The first word in small letters, without what is no letter around it."""
    words = text.split()
    return words[0].strip(".,;:!?\"'*`()[]").casefold() if words else ""
