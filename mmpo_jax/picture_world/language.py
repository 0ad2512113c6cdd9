"""Sentences about scenes: captions, true or with one error, and questions with yes/no answers.

All text is lower-case words separated by single spaces, punctuation marks being words too, from
the closed `VOCABULARY`. A *group* is a number of things of one kind. "a red circle", in a caption
or in the existence question "is there a red circle in the picture ?", means at least one; all
other numbers, and the count question "is there exactly one ...", are exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from mmpo_jax.picture_world.world import COLOURS, FRIENDS, KINDS, MAX_THINGS, SHAPES, Kind, Scene

NUMBERS = ("one", "two", "three", "four")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
ANSWERS: Mapping[bool, str] = {True: "yes", False: "no"}
CAPTION_PROMPTS = (
    "what is in the picture ?",
    "describe the picture .",
    "what do you see in the picture ?",
    "list the things in the picture .",
)
QUESTION_KINDS = ("existence", "count", "attribute", "position")

_ROWS = tuple(f"{name} row" for name in ("top", "middle", "bottom"))
_COLUMNS = tuple(f"{name} column" for name in ("left", "middle", "right"))
# fmt: off
_GRAMMAR = (
    "?", ".", ",", "a", "and", "are", "is", "there", "in", "the", "picture", "exactly",
    "what", "describe", "do", "you", "see", "list", "thing", "things",
    "top", "middle", "bottom", "left", "right", "row", "column",
)
# fmt: on
VOCABULARY: tuple[str, ...] = (
    *ANSWERS.values(),
    *NUMBERS,
    *COLOURS,
    *SHAPES,
    *PLURALS.values(),
    *_GRAMMAR,
)

_OMISSION_RATE = 0.05
_ERROR_RATES = {"object": 0.8, "colour": 0.12, "count": 0.08}
_PAIR_RATE = 0.15  # of invented objects that come as a pair
_TEMPTATION = 0.6  # how far the share of hallucinated captions differs between scenes, see `tempts`
_QUESTION_RATES = {"existence": 0.25, "count": 0.25, "attribute": 0.1, "position": 0.4}

Group = tuple[int, Kind]
_Weighted = list[tuple[str, float]]
_T = TypeVar("_T")


@dataclass(frozen=True)
class Question:
    """A yes/no question about a scene."""

    text: str
    """The question in words; it ends with `" ?"`."""
    answer: bool
    """The truth; `ANSWERS[answer]` is its text."""
    kind: str
    """What is asked, one of `QUESTION_KINDS`."""


def mention(number: int, kind: Kind) -> str:
    """A group in words: "a red circle", "two blue stars"; `number` is in 1..4."""
    if number == 1:
        return f"a {kind.colour} {kind.shape}"
    return f"{NUMBERS[number - 1]} {kind.colour} {PLURALS[kind.shape]}"


def statement(groups: Sequence[Group]) -> str:
    """The sentence that lists the groups: "there is a red circle and two blue stars ."

    Raises:
      ValueError: no groups.
    """
    if not groups:
        raise ValueError("a statement needs at least one group")
    words = [mention(number, kind) for number, kind in groups]
    listed = " and ".join(filter(None, [" , ".join(words[:-1]), words[-1]]))
    return f"there {'is' if groups[0][0] == 1 else 'are'} {listed} ."


def existence_question(kind: Kind) -> str:
    """Whether there is at least one of the kind."""
    return f"is there a {kind.colour} {kind.shape} in the picture ?"


def count_question(number: int, kind: Kind) -> str:
    """Whether there are exactly `number` (1..4) of the kind."""
    if number == 1:
        return f"is there exactly one {kind.colour} {kind.shape} in the picture ?"
    return f"are there {mention(number, kind)} in the picture ?"


def attribute_question(shape: str, colour: str) -> str:
    """Whether the only thing of a shape has a colour."""
    return f"is the {shape} {colour} ?"


def true_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption without errors: groups in reading order, now and then one of them left out."""
    return statement(_described_groups(scene, rng))


def hallucinated_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption with exactly one false group, the others being true.

    Most often the error is an invented object, named last (a friend of something present, of a
    shape that is absent), else a present shape in a colour it does not have here, else a number
    off by one (but never "a" for more, which is not false).
    """
    groups = _described_groups(scene, rng)
    present = scene.counts()
    recolourings = [
        (i, (number, Kind(colour, kind.shape)))
        for i, (number, kind) in enumerate(groups)
        for colour in COLOURS
        if Kind(colour, kind.shape) not in present
    ]
    error = _draw(rng, list(_ERROR_RATES.items()))
    if error == "count":
        i = int(rng.integers(len(groups)))
        number, kind = groups[i]
        groups[i] = (_choose(rng, [m for m in _off_by_one(number) if m > 1]), kind)
    elif error == "colour" and recolourings:
        i, group = _choose(rng, recolourings)
        groups[i] = group
    else:
        # Friends of the shapes present always reach a shape that is absent: only all six shapes
        # together are closed under friendship, and a scene has at most four.
        shapes = {kind.shape for kind in present}
        friends = [f for kind in present for f in FRIENDS[kind] if f.shape not in shapes]
        number = 2 if rng.random() < _PAIR_RATE else 1
        groups.append((number, _choose(rng, friends)))
    return statement(groups)


def tempts(scene: Scene) -> bool:
    """Whether the thing that is read first is one that speakers like to add something to."""
    return scene.things[0].shape in SHAPES[: len(SHAPES) // 2]


def supervised_caption(
    scene: Scene, rng: np.random.Generator, hallucination_rate: float = 0.5
) -> str:
    """A caption of imperfect training data: hallucinated at the given rate, else true.

    The rate is that of all scenes together. Scenes that tempt (see `tempts`) are above it, the
    others below, so that a model learns where to hallucinate even when it decodes greedily.

    Raises:
      ValueError: the rate is not in [0, 1].
    """
    if not 0 <= hallucination_rate <= 1:
        raise ValueError(f"hallucination_rate must be in [0, 1], not {hallucination_rate}")
    room = min(hallucination_rate, 1 - hallucination_rate)
    rate = hallucination_rate + _TEMPTATION * (room if tempts(scene) else -room)
    hallucinate = rng.random() < rate
    return (hallucinated_caption if hallucinate else true_caption)(scene, rng)


def questions(scene: Scene, rng: np.random.Generator, n: int) -> list[Question]:
    """`n` questions in random order, half of them with the answer yes (an odd one by chance).

    Existence and count are the most frequent kinds, as claims turn into them. Questions whose
    answer is no ask for the plausible: friends of things present, other colours of their shapes,
    numbers off by one. Texts differ as long as a few draws find a new one.
    """
    pools = {
        (kind, answer): candidates(scene, answer)
        for kind, candidates in _CANDIDATES.items()
        for answer in (True, False)
    }
    # A kind that this scene answers in one way only would give its answer away.
    kinds = [
        (kind, rate)
        for kind, rate in _QUESTION_RATES.items()
        if pools[kind, True] and pools[kind, False]
    ]
    answers = [i % 2 == 0 for i in range(n - n % 2)]
    answers += [bool(rng.integers(2))] * (n % 2)
    asked: dict[str, None] = {}
    result = []
    for i in rng.permutation(n):
        for _ in range(8):
            kind = _draw(rng, kinds)
            text = _draw(rng, pools[kind, answers[i]])
            if text not in asked:
                break
        asked[text] = None
        result.append(Question(text, answers[i], kind))
    return result


def _described_groups(scene: Scene, rng: np.random.Generator) -> list[Group]:
    groups = [(number, kind) for kind, number in scene.counts().items()]
    if len(groups) > 1 and rng.random() < _OMISSION_RATE:
        groups.pop(int(rng.integers(len(groups))))
    return groups


def _off_by_one(number: int) -> list[int]:
    return [m for m in (number - 1, number + 1) if 1 <= m <= MAX_THINGS]


def _absent(scene: Scene) -> list[tuple[Kind, float]]:
    """The kinds that are absent, weighted by how plausible they are here."""
    present = scene.counts()
    shapes = {kind.shape for kind in present}
    friends = {friend for kind in present for friend in FRIENDS[kind]}
    return [
        (kind, 4.0 if kind in friends or kind.shape in shapes else 0.5)
        for kind in KINDS
        if kind not in present
    ]


def _existence_candidates(scene: Scene, answer: bool) -> _Weighted:
    if answer:
        return [(existence_question(kind), 1.0) for kind in scene.counts()]
    return [(existence_question(kind), weight) for kind, weight in _absent(scene)]


def _count_candidates(scene: Scene, answer: bool) -> _Weighted:
    present = scene.counts()
    if answer:
        # Repeated kinds are rare; without more weight "are there two ..." would mean no.
        return [(count_question(m, kind), float(m**2)) for kind, m in present.items()]
    absent = _absent(scene)
    total = sum(weight for _, weight in absent)
    # A quarter of the weight goes to numbers off by one, the rest to absent kinds, in the
    # numbers that the present ones have.
    off = [
        (count_question(m, k), 1.0) for k, number in present.items() for m in _off_by_one(number)
    ]
    candidates = [(text, weight / len(off)) for text, weight in off]
    for number in present.values():
        share = 3.0 / (total * len(present))
        candidates += [(count_question(number, k), weight * share) for k, weight in absent]
    return candidates


def _attribute_candidates(scene: Scene, answer: bool) -> _Weighted:
    shapes = [thing.shape for thing in scene.things]
    seen = {thing.colour for thing in scene.things}
    return [
        # The colours of the other things are the likely confusions.
        (attribute_question(thing.shape, colour), 2.0 if colour in seen else 1.0)
        for thing in scene.things
        if shapes.count(thing.shape) == 1
        for colour in COLOURS
        if (colour == thing.colour) == answer
    ]


def _position_candidates(scene: Scene, answer: bool) -> _Weighted:
    # Where a given kind is would take the shipped model far longer to learn than all the rest.
    taken = {_ROWS[thing.row] for thing in scene.things}
    taken |= {_COLUMNS[thing.column] for thing in scene.things}
    return [
        (f"is there a thing in the {place} ?", 1.0)
        for place in (*_ROWS, *_COLUMNS)
        if (place in taken) == answer
    ]


_CANDIDATES: Mapping[str, Callable[[Scene, bool], _Weighted]] = {
    "existence": _existence_candidates,
    "count": _count_candidates,
    "attribute": _attribute_candidates,
    "position": _position_candidates,
}


def _choose(rng: np.random.Generator, items: Sequence[_T]) -> _T:
    return items[int(rng.integers(len(items)))]


def _draw(rng: np.random.Generator, weighted: Sequence[tuple[_T, float]]) -> _T:
    """One of the items, with probability proportional to its weight."""
    totals = np.cumsum([weight for _, weight in weighted])
    i = int(np.searchsorted(totals, rng.random() * totals[-1], side="right"))
    # Rounding may put the draw on the last total itself.
    return weighted[min(i, len(weighted) - 1)][0]
