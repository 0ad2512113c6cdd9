"""A dialogue as a chat template renders it, cut where the assistant begins and ends.

What is rendered is what the template makes of the turns. A template may render earlier answers
otherwise than the last, as those of thinking models do: then every answer is rendered as it was
when it was the last one, and what stands between answers as it follows them. For Qwen3 that gives
the text of TRL's training template.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mmpo_jax.data.chat_template import PROBE, TemplateRefusal, common_start
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record, Response, Turn, placed


class Segment(NamedTuple):
    """A piece of a rendered dialogue."""

    start: str
    """The dialogue before it, from its beginning."""
    text: str
    answer: bool
    """Whether the assistant says it."""
    learned: bool
    """Whether it is to be learned."""


@dataclasses.dataclass(frozen=True)
class Dialogue:
    """Turns, and where the answers begin that belong to a response."""

    turns: tuple[Turn, ...]
    first: int
    """Answers before this turn belong to the prompt."""
    begun: str = ""
    """What of the first answer the prompt has already."""
    asks: bool = False
    """Whether that answer is still to be given."""
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    plain_text: bool = False


def dialogue_of(record: Record, response: Response | None) -> Dialogue:
    """The dialogue of a record's prompt and one of its responses."""
    turns = record.prompt + (() if response is None else response.turns)
    first, begun, after = len(record.prompt), "", turns[len(record.prompt) :]
    going_on = not after or after[0].role == "assistant"
    if going_on and record.prompt and record.prompt[-1].role == "assistant":
        first, begun = first - 1, record.prompt[-1].text
        if after:
            whole = dataclasses.replace(after[0], content=begun + after[0].text)
            turns = (*record.prompt[:-1], whole, *after[1:])
    turns = placed(turns, len(record.images), len(record.videos))
    asks = bool(begun) and not after
    return Dialogue(turns, first, begun, asks, record.template, record.plain_text)


def segments(dialogue: Dialogue, processor: Processor, finished: bool = True) -> list[Segment]:
    """The rendered dialogue: the prompt whole, then cut where the assistant begins and ends.

    The last answer ends with EOS, which is text here only where the template writes it, or without
    it if it is not finished.

    Raises:
      TemplateRefusal: the template does not take the dialogue, or its answers cannot be told from
        their prompts.
    """
    turns = dialogue.turns
    found: list[Segment] = []
    done, spoken = "", -1
    for place in range(dialogue.first, len(turns)):
        if turns[place].role != "assistant":
            continue
        before, after = _around(dialogue, place, processor)
        gap = _between(dialogue, done, before, spoken, place, processor)
        found.append(Segment(done, gap, False, False))
        done += gap
        if dialogue.asks:
            return found
        said = after[len(before) :]
        if place == len(turns) - 1:
            said = _ended(said, processor, finished)
        found.append(Segment(done, said, True, turns[place].learned))
        done, spoken = done + said, place
    if not turns or turns[-1].role != "assistant":
        rest = _render(dialogue, turns, True, processor)
        gap = _between(dialogue, done, rest, spoken, len(turns), processor)
        found.append(Segment(done, gap, False, False))
    return found


def _render(dialogue: Dialogue, turns: Sequence[Turn], answer: bool, processor: Processor) -> str:
    return processor.render(turns, answer, dialogue.arguments, dialogue.plain_text)


def _around(dialogue: Dialogue, place: int, processor: Processor) -> tuple[str, str]:
    """The dialogue rendered up to what is new of an answer, and with it."""
    turns = dialogue.turns
    after = _render(dialogue, turns[: place + 1], False, processor)
    before: str | None = None
    if dialogue.begun and place == dialogue.first:
        # As it stands with another end: a template may put something in front of an answer.
        before = _up_to(dialogue, place, dialogue.begun + PROBE, processor)
    else:
        with contextlib.suppress(TemplateRefusal):
            before = _render(dialogue, turns[:place], True, processor)
        opens = all(turn.role in ("system", "developer") for turn in turns[:place])
        if opens and (before is None or not after.startswith(before)):
            before = _opening(dialogue, place, after, processor)
    if before is None or not after.startswith(before):
        raise TemplateRefusal(_REWRITES.format(folder=processor.folder))
    return before, after


_REWRITES = "{folder}: the chat template rewrites what stands before an answer"


def _with_answer(dialogue: Dialogue, place: int, text: str) -> tuple[Turn, ...]:
    """The turns up to an answer, with another text for it and nothing else in its message."""
    return (*dialogue.turns[:place], Turn("assistant", text))


def _up_to(dialogue: Dialogue, place: int, text: str, processor: Processor) -> str:
    """The dialogue rendered up to the probe at the end of an answer."""
    turns = _with_answer(dialogue, place, text)
    before, found, _ = _render(dialogue, turns, False, processor).rpartition(PROBE)
    if not found:
        raise TemplateRefusal(_REWRITES.format(folder=processor.folder))
    return before


def _opening(dialogue: Dialogue, place: int, after: str, processor: Processor) -> str:
    """What stands before an answer that opens the dialogue: what it shares with another one."""
    text = dialogue.turns[place].text
    other = "b" if text.startswith("a") else "a"
    turns = _with_answer(dialogue, place, other)
    return common_start(after, _render(dialogue, turns, False, processor))


def _between(
    dialogue: Dialogue, done: str, before: str, spoken: int, place: int, processor: Processor
) -> str:
    """What a template writes behind what is `done`, up to the answer at `place`.

    Args:
      before: the dialogue rendered up to there.
      spoken: place of the last answer in `done`; -1 for none.
    """
    if before.startswith(done):
        return before[len(done) :]
    # The template writes that answer otherwise now. Behind it is what follows another answer too.
    other = "b" if dialogue.turns[spoken].text.endswith("a") else "a"
    turns = (*_with_answer(dialogue, spoken, other), *dialogue.turns[spoken + 1 : place])
    theirs = _render(dialogue, turns, True, processor)
    common = common_start(before[::-1], theirs[::-1])[::-1]
    ending = processor.answer_ending
    if not ending or not common.startswith(ending) or not done.endswith(ending):
        raise TemplateRefusal(_REWRITES.format(folder=processor.folder))
    return common[len(ending) :]


def _ended(said: str, processor: Processor, finished: bool) -> str:
    """An answer without what a template writes behind EOS, and without EOS if it is not finished.

    An EOS that somebody typed in the answer is part of it.
    """
    ending, eos = processor.answer_ending, processor.tokenizer.eos_token
    if ending is not None and said.endswith(ending):
        text = said[: len(said) - len(ending)]
        kept = ending[: ending.index(eos) + len(eos)] if eos in ending else ""
    else:  # the ending depends on the answer
        text, kept, behind = said.rpartition(eos)
        if not kept or behind.strip():
            text, kept = said, ""
    return text + kept if finished else text
