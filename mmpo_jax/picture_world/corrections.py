"""What is wrong with a caption of the picture world, and two questions about it, by rules.

nSFT's codebook of errors (Zhu et al. 2024, arXiv 2411.14797) where truth is known: the kinds are
`object`, `attribute` and `count`. Captions say nothing of places.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator

from mmpo_jax.picture_world.claims import Claim, is_true, parse, question
from mmpo_jax.picture_world.language import (
    attribute_question,
    count_question,
    existence_question,
    mention,
)
from mmpo_jax.picture_world.metrics import error_type
from mmpo_jax.picture_world.world import FRIENDS, KINDS, Kind, Scene

OBJECT, ATTRIBUTE, COUNT = "object", "attribute", "count"
_KINDS = {"object": OBJECT, "colour": ATTRIBUTE, "count": COUNT}
"""Types of errors of `metrics.error_type`, as codebooks name them."""


@dataclasses.dataclass(frozen=True)
class WorldError:
    """Something wrong in a caption."""

    kind: str
    """`object`, `attribute` or `count`."""
    wrong: str
    """What the caption says; of a kind of things that it leaves out, empty."""
    yes: str
    """Question whose true answer is yes."""
    no: str
    """Question whose true answer is no."""


def caption_errors(caption: str, scene: Scene) -> list[WorldError]:
    """The errors of a caption: its false claims in order, then the kinds of things it leaves out.

    A false claim is asked about beside what is true in its place; what is left out beside something
    alike that is not there. No question is asked twice as long as there is another. Pieces that say
    nothing clear are no errors that could be asked about.
    """
    claims = parse(caption).claims
    mentioned = {claim.kind for claim in claims}
    asked: set[str] = set()
    errors = []
    for claim in claims:
        if not is_true(claim, scene):
            errors.append(_of_claim(claim, scene, asked))
            asked |= {errors[-1].yes, errors[-1].no}
    for kind in scene.counts():
        yes = existence_question(kind)
        if kind in mentioned or {yes, attribute_question(kind.shape, kind.colour)} & asked:
            continue
        absent = [other for other in KINDS if other not in scene.counts()]
        errors.append(WorldError(OBJECT, "", yes, _new(_alike(kind, absent), asked)))
        asked |= {errors[-1].yes, errors[-1].no}
    return errors


def _of_claim(claim: Claim, scene: Scene, asked: Collection[str]) -> WorldError:
    """The error of a false claim."""
    kind = _KINDS[error_type(claim, scene) or ""]
    wrong, present = mention(claim.number, claim.kind), scene.counts()
    if kind == COUNT:
        yes = count_question(present[claim.kind], claim.kind)
        return WorldError(kind, wrong, yes, question(claim))
    colours = [thing.colour for thing in scene.things if thing.shape == claim.shape]
    if kind == ATTRIBUTE and len(colours) == 1:
        yes, no = (attribute_question(claim.shape, colour) for colour in (*colours, claim.colour))
        return WorldError(kind, wrong, yes, no)
    # Also of "two crosses": were they asked about by their number, nearly every question for two of
    # something would be answered with no, and its wording would give the answer away.
    no = existence_question(claim.kind)
    return WorldError(kind, wrong, _new(_alike(claim.kind, present), asked), no)


def _alike(kind: Kind, among: Collection[Kind]) -> Iterator[Kind]:
    """Kinds, the most alike first: in another colour, those often seen with it, all others."""
    yield from (other for other in among if other.shape == kind.shape)
    yield from (other for other in FRIENDS[kind] if other in among)
    yield from among


def _new(kinds: Iterator[Kind], asked: Collection[str]) -> str:
    """The question about the first of some kinds that is not asked yet, else about the first."""
    questions = [existence_question(kind) for kind in kinds]
    return next((text for text in questions if text not in asked), questions[0])
