"""Answers that are whole dialogues, which say the row's prompt once more."""

import dataclasses

from mmpo_jax.data.formats.entries import same_part
from mmpo_jax.data.formats.turns import (
    MediaPart,
    Message,
    Turns,
    split_common_prompt,
    split_last_answer,
)
from mmpo_jax.data.skipped import UnusableRow


def split_pair(prompt: Turns, chosen: Turns, rejected: Turns) -> tuple[Turns, Turns, Turns]:
    """(prompt, chosen, rejected) of a pair whose responses may be whole dialogues: what these begin
    with in common is the prompt then.

    Args:
      prompt: of the row's other columns, which the dialogues repeat; empty for none.

    Raises:
      UnusableRow: only one is a whole dialogue, or the prompt is not what they begin with.
    """
    whole = [_is_whole(prompt, turns) for turns in (chosen, rejected)]
    if not any(whole):
        return prompt, chosen, rejected
    if not all(whole):
        raise UnusableRow("bad_message", "one of chosen and rejected is a whole dialogue")
    common, chosen, rejected = split_common_prompt(chosen, rejected)
    return _said_once(prompt, common), chosen, rejected


def split_answer(prompt: Turns, answer: Turns) -> tuple[Turns, Turns]:
    """(prompt, answer) where the answer may be a whole dialogue that repeats the prompt: at its
    beginning, or as what was asked last.

    Raises:
      UnusableRow: the dialogue does not repeat the prompt.
    """
    if not prompt or not _is_whole(prompt, answer):
        return prompt, answer
    asked = [turn for turn in prompt if turn.role != "system"]
    opened = sum(turn.role == "system" for turn in answer[:1])
    cut = opened + len(asked)
    if not asked or not _same(answer[opened:cut], asked) or cut == len(answer):
        cut = len(split_last_answer(answer)[0])
    return _said_once(prompt, answer[:cut]), answer[cut:]


def _is_whole(prompt: Turns, answer: Turns) -> bool:
    """Whether an answer is a dialogue from its beginning on, and none that a prompt goes on with,
    which ends with the assistant and begins otherwise."""
    if not answer or answer[0].role == "assistant":
        return False
    if not prompt or prompt[-1].role != "assistant":
        return True
    first = [turn for turn in prompt if turn.role != "system"][:1]
    return answer[0].role == "system" or _same(answer[:1], first)


def _same(turns: Turns, asked: list[Message] | Turns) -> bool:
    said = ([(turn.role, turn.text.strip()) for turn in some] for some in (turns, asked))
    return next(said) == next(said)


def _said_once(prompt: Turns, common: Turns) -> Turns:
    """What a dialogue begins with, and what only the row's prompt shows of it or says beside it.

    Args:
      prompt: of a longer dialogue it may be what was asked last, or first.
      common: of the dialogue, or of two.

    Raises:
      UnusableRow: the prompt is not what the dialogue begins with.
    """
    asked = tuple(turn for turn in prompt if turn.role != "system")
    places = [place for place, turn in enumerate(common) if turn.role != "system"]
    for meant in (places[: len(asked)], places[-len(asked) :]):
        if _same(tuple(common[place] for place in meant), asked):
            break
    else:
        detail = "the prompt is not what a whole dialogue behind it begins with"
        raise UnusableRow("prompt_differs", detail)
    turns = list(common)
    for place, ours in zip(meant, asked, strict=True):
        turns[place] = _with_parts(ours, common[place])
    if not prompt or prompt[0].role != "system":
        return tuple(turns)
    if not turns or turns[0].role != "system":
        return (prompt[0], *turns)
    if not _same((prompt[0],), (turns[0],)):
        raise UnusableRow("prompt_differs", "a whole dialogue has another system prompt")
    return tuple(turns)


def _with_parts(ours: Message, theirs: Message) -> Message:
    """A turn of a dialogue, with the pictures that only the prompt names in it.

    Raises:
      UnusableRow: both show something there, and not the same.
    """
    if not theirs.parts:
        content = ours.content if ours.parts else theirs.content
        return dataclasses.replace(theirs, content=content, keys={**ours.keys, **theirs.keys})
    if ours.parts and [p.medium for p in ours.parts] != [p.medium for p in theirs.parts]:
        detail = "the prompt shows another number of pictures than the dialogues"
        raise UnusableRow("prompt_differs", detail)
    named = iter(ours.parts or theirs.parts)
    pieces = (one if isinstance(one, str) else _one_of(next(named), one) for one in theirs.pieces)
    return dataclasses.replace(theirs, content=tuple(pieces), keys={**ours.keys, **theirs.keys})


def _one_of(ours: MediaPart, theirs: MediaPart) -> MediaPart:
    """What two parts show, of which one may name nothing."""
    if ours.part is None or theirs.part is None:
        return ours if theirs.part is None else theirs
    if not same_part(ours.part, theirs.part):
        raise UnusableRow("prompt_differs", "the prompt shows other pictures than the dialogues")
    return theirs
