"""What a judge who sees the scene writes about a caption, by rule."""

from __future__ import annotations

from mmpo_jax.picture_world.claims import is_true, parse, question
from mmpo_jax.picture_world.language import ANSWERS, NUMBERS, statement
from mmpo_jax.picture_world.world import Kind, Scene

MAX_SENTENCES = 5
"""Sentences before the verdict, at most: a caption that rambles is not gone through to its end."""

PROMPT = "are the things in the picture ?"
"""What asks for a critique, in words of the picture world."""


def critique(caption: str, scene: Scene, missing: tuple[Kind, ...], faults: int) -> str:
    """A critique: every claim as a question with its answer, what is missing, and how many faults
    there are: "is there a red star in the picture ? no . there is a blue ring . two things ."

    Args:
      caption: of the scene.
      scene: what there is.
      missing: kinds that are there and not mentioned.
      faults: of the caption, as `preferences.judge` counts them.
    """
    said = [f"{question(c)} {ANSWERS[is_true(c, scene)]} ." for c in parse(caption).claims]
    said += [statement([(1, kind)]) for kind in missing]
    return " ".join([*said[:MAX_SENTENCES], verdict(faults)])


def verdict(faults: int) -> str:
    """The shortest critique, with which every other ends: how many faults there are."""
    count = ANSWERS[False] if not faults else NUMBERS[min(faults, len(NUMBERS)) - 1]
    return f"{count} {'thing' if faults == 1 else 'things'} ."
