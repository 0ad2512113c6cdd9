"""Splits captions into claims, and turns claims into questions, by rules.

This is the "divide" step of RLAIF-V for the picture world, where grammar makes a language model
superfluous. A claim is one mentioned group. As in ordinary English, "a red circle" claims that
there is one at least, and is true of a scene with two, while "two red circles" claims exactly two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mmpo_jax.picture_world.language import (
    NUMBERS,
    PLURALS,
    count_question,
    existence_question,
    statement,
)
from mmpo_jax.picture_world.world import COLOURS, SHAPES, Kind, Scene

_NUMBER_OF_WORD = {"a": 1, **{word: i + 1 for i, word in enumerate(NUMBERS)}}
_SHAPE_OF_WORD = {shape: shape for shape in SHAPES} | {p: shape for shape, p in PLURALS.items()}
_SEPARATORS = {",", ".", "?", "and"}
# Phrases that claim nothing, wherever they stand.
_SCAFFOLDING = (["there", "is"], ["there", "are"], ["in", "the", "picture"])


@dataclass(frozen=True)
class Claim:
    """A claim that there are `number` things of one kind: at least one, or exactly 2, 3 or 4."""

    text: str
    """The claim as a sentence, such as `there are two blue stars .`"""
    number: int
    """Number of things, 1 to 4."""
    colour: str
    """Colour, one of `world.COLOURS`."""
    shape: str
    """Shape, one of `world.SHAPES`."""

    @property
    def kind(self) -> Kind:
        return Kind(self.colour, self.shape)


@dataclass(frozen=True)
class ParsedCaption:
    """What a caption says."""

    claims: tuple[Claim, ...]
    """Claims in the order of the caption, without repetitions."""
    unparsed: tuple[str, ...]
    """The pieces that say nothing clear, each as its words joined by spaces."""


def make_claim(number: int, kind: Kind) -> Claim:
    """The claim that a group of `number` (1..4) things of the kind is mentioned in.

    Raises:
      ValueError: the number has no word.
    """
    if not 1 <= number <= len(NUMBERS):
        raise ValueError(f"a claim's number is 1 to {len(NUMBERS)}, not {number}")
    return Claim(statement([(number, kind)]), number, kind.colour, kind.shape)


def parse(caption: str) -> ParsedCaption:
    """Reads any text as a caption; never raises.

    A mention is `[number] colour shape`. The rules for text that a model got wrong:

    - A word repeated at once counts once ("a red red circle" is a red circle).
    - The number's word decides, not the form of the noun ("two red circle" is two). Without a
      number a singular is one; a plural ("blue stars") is unparsed.
    - Commas may be missing ("a red circle two blue stars"), and so may the full stop.
    - All other words are unparsed, up to the next separator or number that starts a mention; so
      "no red circle" and "a red blue circle" claim nothing.
    - A claim made twice in the same words is kept once. Claims on the same kind that differ in
      number are both kept; at most one of them is true.
    """
    words = re.findall(r"[a-z0-9]+|[^\sa-z0-9]", caption.lower())
    words = [word for i, word in enumerate(words) if i == 0 or word != words[i - 1]]
    claims: dict[str, Claim] = {}
    unparsed: list[list[str]] = [[]]
    i = 0
    while i < len(words):
        skipped = _scaffolding(words, i)
        read = None if skipped else _mention(words, i, allow_bare=not unparsed[-1])
        if skipped or read:
            unparsed.append([])
        else:
            unparsed[-1].append(words[i])
        if read:
            claim = make_claim(*read[0])
            claims.setdefault(claim.text, claim)
        i += skipped or (read[1] if read else 1)
    return ParsedCaption(tuple(claims.values()), tuple(" ".join(p) for p in unparsed if p))


def split(caption: str) -> list[Claim]:
    """The claims of a caption, one for each mentioned group; see `parse`."""
    return list(parse(caption).claims)


def question(claim: Claim) -> str:
    """The yes/no question whose answer is yes exactly when the claim is true.

    Its wording is that of the existence or count questions of `language.questions`.
    """
    if claim.number == 1:
        return existence_question(claim.kind)
    return count_question(claim.number, claim.kind)


def question_about_all(claims: Sequence[Claim]) -> str:
    """The one yes/no question whose answer is yes exactly when all claims are true.

    Its wording is that of `question` with all groups in the place of one. Where there are several,
    `language.questions` has none like it, and a model trained on those was never asked one.

    Raises:
      ValueError: there are no claims.
    """
    if len(claims) == 1:
        return question(claims[0])
    verb, groups = statement([(claim.number, claim.kind) for claim in claims]).split(" ", 2)[1:]
    return f"{verb} there {groups.removesuffix(' .')} in the picture ?"


def is_true(claim: Claim, scene: Scene) -> bool:
    """Whether the scene has what is claimed: one at least, or exactly so many."""
    there = scene.counts().get(claim.kind, 0)
    return there >= 1 if claim.number == 1 else there == claim.number


def _scaffolding(words: list[str], i: int) -> int:
    """How many words at `i` claim nothing: a separator, a phrase, or 0."""
    if words[i] in _SEPARATORS:
        return 1
    return next((len(p) for p in _SCAFFOLDING if words[i : i + len(p)] == p), 0)


def _mention(words: list[str], i: int, allow_bare: bool) -> tuple[tuple[int, Kind], int] | None:
    """The group mentioned at `i` and how many words that takes, if there is one."""
    number = _NUMBER_OF_WORD.get(words[i])
    start = i + (number is not None)
    colour, noun = [*words[start : start + 2], "", ""][:2]
    if colour not in COLOURS or noun not in _SHAPE_OF_WORD:
        return None
    if number is None:
        if not allow_bare or noun not in SHAPES:
            return None
        number = 1
    return (number, Kind(colour, _SHAPE_OF_WORD[noun])), start + 2 - i
