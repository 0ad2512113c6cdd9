"""Claims: agreement with the truth on generated captions, and rules for ill-formed ones."""

import numpy as np
import pytest

from mmpo_jax.picture_world.claims import Claim, is_true, make_claim, parse, question, split
from mmpo_jax.picture_world.language import hallucinated_caption, questions, statement, true_caption
from mmpo_jax.picture_world.world import KINDS, Kind, Scene, Thing, sample_scene

SCENES = [sample_scene("align", 0, i) for i in range(500)]


def texts(caption):
    return [claim.text for claim in split(caption)]


def test_split_agrees_with_the_truth():
    for i, scene in enumerate(SCENES):
        rng = np.random.default_rng(i)
        true, hallucinated = true_caption(scene, rng), hallucinated_caption(scene, rng)
        assert all(is_true(claim, scene) for claim in split(true))
        assert sum(not is_true(claim, scene) for claim in split(hallucinated)) == 1
        for caption in (true, hallucinated):
            parsed = parse(caption)
            assert not parsed.unparsed
            assert statement([(c.number, c.kind) for c in parsed.claims]) == caption


def test_questions_of_claims_are_asked_in_training_with_the_claims_truth():
    claims = [make_claim(n, kind) for n in (1, 2) for kind in KINDS]
    claim_of = {question(claim): claim for claim in claims}
    assert len(claim_of) == len(claims)
    met = 0
    for i, scene in enumerate(SCENES):
        for asked in questions(scene, np.random.default_rng(i), 8):
            if asked.text in claim_of:
                met += 1
                assert is_true(claim_of[asked.text], scene) == asked.answer
    assert met > len(SCENES)


def test_split_fields():
    assert split("there is a red circle and two green crosses .") == [
        Claim("there is a red circle .", 1, "red", "circle"),
        Claim("there are two green crosses .", 2, "green", "cross"),
    ]


def test_question_wording():
    one, two = split("there is a red circle , two blue stars .")
    assert question(one) == "is there a red circle in the picture ?"
    assert question(two) == "are there two blue stars in the picture ?"


def test_one_is_at_least_one_and_other_numbers_are_exact():
    pair = Scene((Thing(0, 0, "star", "red"), Thing(1, 1, "star", "red")))
    kind = Kind("red", "star")
    assert [is_true(make_claim(n, kind), pair) for n in (1, 2, 3)] == [True, True, False]
    assert not is_true(make_claim(1, Kind("red", "ring")), pair)


@pytest.mark.parametrize("number", [0, 5])
def test_numbers_without_a_word_are_refused(number):
    with pytest.raises(ValueError, match="1 to 4"):
        make_claim(number, KINDS[0])


RED_CIRCLE = "there is a red circle ."
TWO_STARS = "there are two blue stars ."


@pytest.mark.parametrize(
    ("caption", "claims", "unparsed"),
    [
        ("", [], []),
        (" , . and", [], []),
        ("there is", [], []),
        ("red circle", [RED_CIRCLE], []),
        ("one red circle", [RED_CIRCLE], []),
        ("A red circle, two blue stars.", [RED_CIRCLE, TWO_STARS], []),
        ("there is a red red circle in the picture .", [RED_CIRCLE], []),
        ("there is a red circle two blue stars", [RED_CIRCLE, TWO_STARS], []),
        ("a red circle and a red circle .", [RED_CIRCLE], []),
        ("a red star , two red stars", ["there is a red star .", "there are two red stars ."], []),
        ("two blue star", [TWO_STARS], []),
        ("a red circles", [RED_CIRCLE], []),
        ("there are blue stars .", [], ["blue stars"]),
        ("there is no red circle .", [], ["no red circle"]),
        ("a red blue circle , two blue stars", [TWO_STARS], ["a red blue circle"]),
        ("big a red circle", [RED_CIRCLE], ["big"]),
        ("a red circle in the top row", [RED_CIRCLE], ["in the top row"]),
        ("a dog , a red", [], ["a dog", "a red"]),
        ("a", [], ["a"]),
        ("<unk> 7 </s>", [], ["< unk > 7 < / s >"]),
    ],
)
def test_ill_formed_captions(caption, claims, unparsed):
    parsed = parse(caption)
    assert [claim.text for claim in parsed.claims] == claims
    assert list(parsed.unparsed) == unparsed


def test_any_sequence_of_words_parses():
    words = ["a", "two", "red", "blue", "star", "rings", "and", ",", ".", "there", "is", "the"]
    rng = np.random.default_rng(0)
    for _ in range(500):
        caption = " ".join(rng.choice(words, size=12))
        parsed = parse(caption)
        assert texts(" ".join(c.text for c in parsed.claims)) == [c.text for c in parsed.claims]
