"""Divide: a response becomes claims, each with a yes/no question that checks it."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from mmpo_jax.picture_world import claims as world_claims


@dataclasses.dataclass(frozen=True)
class Claim:
    """One thing a response says about the image."""

    text: str
    question: str
    """Answered with yes where the claim is true."""


@dataclasses.dataclass(frozen=True)
class Division:
    """The claims of a response, and the parts of it that could not be read as claims."""

    claims: tuple[Claim, ...]
    unparsed: tuple[str, ...] = ()


class Splitter(Protocol):
    """Divides responses; an implementation may be a rule or a language model."""

    name: str
    """Part of the key of what it made: change it with the behaviour."""

    def divide(self, question: str, response: str) -> Division:
        """The claims of one response to one question."""
        ...


class PictureWorldSplitter:
    """The rule for captions of the picture world: one claim per group that is mentioned."""

    name = "picture_world-2"

    def divide(self, question: str, response: str) -> Division:
        del question  # captions of the picture world say all there is
        parsed = world_claims.parse(response)
        claims = tuple(Claim(claim.text, world_claims.question(claim)) for claim in parsed.claims)
        return Division(claims, parsed.unparsed)


def make_splitter(name: str) -> Splitter:
    """The splitter a recipe names."""
    return {"picture_world": PictureWorldSplitter}[name]()
