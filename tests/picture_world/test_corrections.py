"""Errors of captions: what is asked is true of every scene, and of as many yes as no."""

import numpy as np
import pytest

from mmpo_jax.picture_world.claims import is_true, make_claim, question
from mmpo_jax.picture_world.corrections import WorldError, caption_errors
from mmpo_jax.picture_world.language import (
    attribute_question,
    count_question,
    hallucinated_caption,
    true_caption,
)
from mmpo_jax.picture_world.world import COLOURS, KINDS, SHAPES, Kind, Scene, Thing, sample_scene

SCENE = Scene((Thing(0, 0, "star", "red"), Thing(1, 1, "star", "red"), Thing(2, 0, "ring", "blue")))


@pytest.mark.parametrize(
    ("caption", "errors"),
    [
        ("there are two red stars and a blue ring .", []),
        ("there is a red star and a blue ring .", []),  # one at least
        (
            "there are three red stars and a blue ring .",
            [
                WorldError(
                    "count",
                    "three red stars",
                    "are there two red stars in the picture ?",
                    "are there three red stars in the picture ?",
                )
            ],
        ),
        (
            "there are two blue rings and a red star .",
            [
                WorldError(
                    "count",
                    "two blue rings",
                    "is there exactly one blue ring in the picture ?",
                    "are there two blue rings in the picture ?",
                )
            ],
        ),
        (
            "there is a red star , a blue ring and a green cross .",
            [
                WorldError(
                    "object",
                    "a green cross",
                    "is there a blue ring in the picture ?",
                    "is there a green cross in the picture ?",
                )
            ],
        ),
        (
            "there is a red star , a blue ring and two green crosses .",
            [
                WorldError(
                    "object",
                    "two green crosses",
                    "is there a blue ring in the picture ?",
                    "is there a green cross in the picture ?",
                )
            ],
        ),
        # Of two things of a shape nobody knows which is meant.
        (
            "there are two red stars , a yellow star and a blue ring .",
            [
                WorldError(
                    "attribute",
                    "a yellow star",
                    "is there a red star in the picture ?",
                    "is there a yellow star in the picture ?",
                )
            ],
        ),
    ],
)
def test_errors_by_kind(caption, errors):
    assert caption_errors(caption, SCENE) == errors


def test_a_wrong_colour_and_what_is_left_out():
    colour, missing = caption_errors("there is a red ring .", SCENE)
    assert colour == WorldError(
        "attribute", "a red ring", "is the ring blue ?", "is the ring red ?"
    )
    assert (missing.kind, missing.wrong) == ("object", "")
    assert missing.yes == "is there a red star in the picture ?"


def test_what_nobody_can_read_is_no_error():
    assert caption_errors("there are two red stars , a blue ring and a .", SCENE) == []


def truths():
    """Question -> scene -> its answer, of all questions that are asked."""
    claims = [make_claim(number, kind) for number in (1, 2, 3, 4) for kind in KINDS]
    known = {question(c): lambda scene, c=c: is_true(c, scene) for c in claims}
    for kind in KINDS:
        known[count_question(1, kind)] = lambda scene, k=kind: scene.counts().get(k, 0) == 1
    for shape in SHAPES:
        for colour in COLOURS:

            def has(scene, shape=shape, colour=colour):
                (seen,) = (thing.colour for thing in scene.things if thing.shape == shape)
                return seen == colour

            known[attribute_question(shape, colour)] = has
    return known


def test_both_answers_are_true_of_every_scene():
    known = truths()
    kinds = set()
    for index in range(150):
        scene, other = (sample_scene("align", seed, index) for seed in (0, 1))
        rng = np.random.default_rng(index)
        for caption in (hallucinated_caption(scene, rng), true_caption(other, rng), ""):
            for error in caption_errors(caption, scene):
                assert known[error.yes](scene) and not known[error.no](scene), (caption, scene)
                kinds.add(error.kind)
    assert kinds == {"object", "attribute", "count"}


def test_no_question_is_asked_twice_where_there_is_another():
    """The ring is affirmed beside the cross, and the star beside the square, so nothing is left."""
    errors = caption_errors("there is a green cross and a red square .", SCENE)
    asked = [text for error in errors for text in (error.yes, error.no)]
    assert len({*asked}) == len(asked) == 4
    assert {error.yes for error in errors} == {
        "is there a blue ring in the picture ?",
        "is there a red star in the picture ?",
    }


def test_what_is_left_out_is_asked_about_beside_something_plausible():
    (error,) = caption_errors("there are two red stars .", SCENE)
    assert error.yes == "is there a blue ring in the picture ?"
    absent = next(kind for kind in KINDS if f"a {kind.colour} {kind.shape} " in error.no)
    assert absent not in SCENE.counts() and absent != Kind("blue", "ring")
