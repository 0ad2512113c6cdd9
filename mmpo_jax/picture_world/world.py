"""Scenes of coloured shapes on a 3x3 grid, sampled deterministically.

A scene plays the part of a photograph whose contents are known exactly, so that every claim about
it is true or false beyond dispute. Kinds of things co-occur unevenly: each kind has three
*friends* that it is seen with more often than chance. A model that has learned this prior invents
friends that are not there, which is how real vision-language models hallucinate.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow")
GRID = 3
MAX_THINGS = 4
SPLITS = ("train", "align", "validation", "test")

_THINGS_PER_SCENE = {2: 0.3, 3: 0.4, 4: 0.3}
_REPEAT_RATE = 0.25
_REPEATS = {2: 0.75, 3: 0.2, 4: 0.05}
_FRIEND_RATE = 0.7
# numpy zero-pads the words that seed a generator; larger seeds would spill into the next word
# and two streams could coincide.
_SEED_LIMIT = 2**32


class Kind(NamedTuple):
    """What a thing is: one of the 24 combinations of a colour and a shape."""

    colour: str
    shape: str


KINDS = tuple(Kind(colour, shape) for shape in SHAPES for colour in COLOURS)


def _friends(kind: Kind) -> tuple[Kind, ...]:
    c, s = COLOURS.index(kind.colour), SHAPES.index(kind.shape)
    # The steps make friendship mutual, and let a friend differ in both colour and shape, so that
    # an invented friend cannot be mistaken for a thing named with the wrong colour.
    steps = ((1, 1), (-1, -1), (2, 3))
    return tuple(
        Kind(COLOURS[(c + dc) % len(COLOURS)], SHAPES[(s + ds) % len(SHAPES)]) for dc, ds in steps
    )


FRIENDS: Mapping[Kind, tuple[Kind, ...]] = {kind: _friends(kind) for kind in KINDS}


@dataclass(frozen=True, order=True)
class Thing:
    """One thing in a cell of the grid; row 0 is the top row, column 0 the left column."""

    row: int
    column: int
    shape: str
    colour: str

    def __post_init__(self) -> None:
        if self.shape not in SHAPES or self.colour not in COLOURS:
            raise ValueError(f"unknown kind of thing: {self.colour!r} {self.shape!r}")
        if not (0 <= self.row < GRID and 0 <= self.column < GRID):
            raise ValueError(f"cell ({self.row}, {self.column}) is outside the {GRID}x{GRID} grid")

    @property
    def kind(self) -> Kind:
        return Kind(self.colour, self.shape)


@dataclass(frozen=True)
class Scene:
    """One to four things in distinct cells.

    Raises:
      ValueError: no things, more than `MAX_THINGS`, or two in one cell.
    """

    things: tuple[Thing, ...]
    """Things, in the order of the cells (top left to bottom right) when sampled."""
    jitter_seed: int = 0
    """Seed of the small shifts, sizes and background of the drawing; without effect on what is
    true of the scene."""

    def __post_init__(self) -> None:
        if not 1 <= len(self.things) <= MAX_THINGS:
            raise ValueError(f"a scene has 1 to {MAX_THINGS} things, not {len(self.things)}")
        if len({(thing.row, thing.column) for thing in self.things}) != len(self.things):
            raise ValueError("two things share a cell")

    def counts(self) -> dict[Kind, int]:
        """How many things there are of each kind that is present, in the order of `things`."""
        return dict(Counter(thing.kind for thing in self.things))

    def to_dict(self) -> dict[str, Any]:
        """The scene as plain lists, strings and integers, ready for `json.dumps`."""
        return {
            "things": [asdict(thing) for thing in self.things],
            "jitter_seed": self.jitter_seed,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Scene:
        """The inverse of `to_dict`.

        Raises:
          ValueError: a field is missing, unknown or out of range.
        """
        try:
            things = tuple(Thing(**thing) for thing in fields["things"])
            return cls(things, int(fields["jitter_seed"]))
        except (KeyError, TypeError) as error:
            raise ValueError("no scene of the picture world, as its data sets have it") from error


def generator(split: str, seed: int, index: int, stream: int = 0) -> np.random.Generator:
    """The random generator of example `index` of a split.

    Args:
      split: one of `SPLITS`.
      seed: of the whole data set, in [0, 2**32).
      index: of the example, in [0, 2**32).
      stream: 0 draws the scene; take any other number for text about it, in [0, 2**32).

    Raises:
      ValueError: unknown split, or a number out of range.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; the splits are {', '.join(SPLITS)}")
    for name, value in (("seed", seed), ("index", index), ("stream", stream)):
        if not 0 <= value < _SEED_LIMIT:
            raise ValueError(f"{name} must be in [0, 2**32), not {value}")
    return np.random.default_rng([seed, SPLITS.index(split), index, stream])


def sample_scene(split: str, seed: int, index: int) -> Scene:
    """Scene `index` of a split: 2 to 4 things, about a quarter of scenes with a repeated kind.

    The same arguments give the same scene on any machine. Splits share no arrangement, whatever
    their seeds: every arrangement of things belongs to one split, and a scene is redrawn until
    it falls into its own (four draws on average).

    Raises:
      ValueError: see `generator`.
    """
    rng = generator(split, seed, index)
    while True:
        things = _sample_things(rng)
        if _home_split(things) == split:
            return Scene(things, int(rng.integers(_SEED_LIMIT)))


def _sample_things(rng: np.random.Generator) -> tuple[Thing, ...]:
    n = _draw(rng, _THINGS_PER_SCENE)
    kinds = [KINDS[rng.integers(len(KINDS))]]
    if rng.random() < _REPEAT_RATE:
        kinds *= min(_draw(rng, _REPEATS), n)
    while len(kinds) < n:
        candidates = [friend for kind in kinds for friend in FRIENDS[kind]]
        if rng.random() >= _FRIEND_RATE:
            candidates = list(KINDS)
        candidates = [kind for kind in candidates if kind not in kinds]
        # All the friends may be here already; then anything else comes in.
        candidates = candidates or [kind for kind in KINDS if kind not in kinds]
        kinds.append(candidates[rng.integers(len(candidates))])
    cells = rng.choice(GRID * GRID, size=n, replace=False)
    return tuple(
        sorted(
            Thing(int(cell) // GRID, int(cell) % GRID, kind.shape, kind.colour)
            for cell, kind in zip(cells, kinds, strict=True)
        )
    )


def _home_split(things: tuple[Thing, ...]) -> str:
    text = ";".join(f"{t.row}{t.column}{t.colour}{t.shape}" for t in things)
    # Python's own hash differs between processes.
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return SPLITS[int.from_bytes(digest, "little") % len(SPLITS)]


def _draw(rng: np.random.Generator, probabilities: Mapping[int, float]) -> int:
    return int(rng.choice(list(probabilities), p=list(probabilities.values())))
