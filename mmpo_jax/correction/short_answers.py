"""The rule for answers of a few words, as of VQA and OCR-VQA: the question again, with an answer
given, is answered with yes where that is the chosen one and with no where it is the rejected one.
"""

from __future__ import annotations

import re
import string

from mmpo_jax.core.prompts import fill
from mmpo_jax.correction.codebook import Codebook
from mmpo_jax.correction.corrections import Case, Error, Found, drawn_order

SHORT_ANSWER = "answer"
"""Kind of an error that no codebook names: a short answer is another."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBERS)}}
_ARTICLES = {"a", "an", "the"}
_PUNCTUATION = re.compile(f"[{re.escape(string.punctuation)}]+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
INSTRUCTION = re.compile(r"\s*Answer the question using a single word or phrase\.\s*$")
"""What LLaVA's data write behind questions of short answers; not asked again."""


def short_answer_error(case: Case, codebook: Codebook, max_words: int, seed: int) -> Found:
    """The error of a short answer, in one wording of the codebook for both questions.

    The rule asks nothing where it could be wrong: about answers that are the same but for case,
    articles, punctuation and the spelling of numbers, or of which one says all that the other does.
    """
    chosen, rejected = words_of(case.chosen), words_of(case.rejected)
    for name, said, words in (
        ("chosen", case.chosen, chosen),
        ("rejected", case.rejected, rejected),
    ):
        if not words:
            return Found(reason="empty_response", detail=f"the {name} answer has no words")
        if len(said.split()) > max_words:
            detail = f"the {name} answer has {len(said.split())} words, a short one {max_words}"
            return Found(reason="long_answer", detail=detail)
    if chosen == rejected:
        return Found(reason="same_responses", detail="the two answers are the same words")
    if set(chosen) <= set(rejected) or set(rejected) <= set(chosen):
        return Found(reason="alike_answers", detail="one answer says all that the other does")
    if not codebook.short_answers:
        return Found(reason="no_error", detail="the codebook words no questions of short answers")
    wording = codebook.short_answers[drawn_order(len(codebook.short_answers), seed, case.id)[0]]
    question = INSTRUCTION.sub("", case.question).strip()
    yes, no = (
        fill(wording, question=question, answer=answer.strip())
        for answer in (case.chosen, case.rejected)
    )
    return Found((Error(SHORT_ANSWER, case.rejected.strip(), yes, no),))


def words_of(answer: str) -> list[str]:
    """The words of an answer as VQA's evaluation compares them: in small letters, without articles
    and punctuation, numbers up to ten as digits. Where nothing else is said, as in a choice between
    A and B, an article is a word."""
    text = _THOUSANDS.sub("", answer.replace("'", "").casefold())
    words = _PUNCTUATION.sub(" ", text).split()
    return [_DIGITS.get(word, word) for word in words if word not in _ARTICLES] or words
