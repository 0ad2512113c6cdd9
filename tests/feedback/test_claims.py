"""Divide: captions of the picture world become claims with a question each."""

import pytest

from mmpo_jax.feedback.splitters import Claim, PictureWorldSplitter, SplitItem
from mmpo_jax.picture_world import claims as world_claims
from mmpo_jax.picture_world.language import VOCABULARY

SPLITTER = PictureWorldSplitter()


def divide(question, response):
    (division,) = SPLITTER.divide([SplitItem("a/0", question, response)])
    return division


def test_a_claim_for_each_group():
    division = divide("what is in the picture ?", "there are two blue stars and a red ring .")
    assert [claim.text for claim in division.claims] == [
        "there are two blue stars .",
        "there is a red ring .",
    ]
    assert division.unparsed == ()
    for claim in division.claims:
        assert isinstance(claim, Claim)
        (parsed,) = world_claims.split(claim.text)
        assert claim.question == world_claims.question(parsed)
        assert set(claim.question.split()) <= set(VOCABULARY)


def test_what_is_no_claim_is_set_apart():
    division = divide("describe the picture .", "no red circle , a blue star .")
    assert [claim.text for claim in division.claims] == ["there is a blue star ."]
    assert division.unparsed == ("no red circle",)


@pytest.mark.parametrize("response", ["", ".", "yes", "\N{SNOWMAN} ?!"])
def test_nothing_to_check(response):
    assert divide("what is in the picture ?", response).claims == ()


def test_the_question_does_not_matter():
    caption = "there is a red ring ."
    assert divide("", caption) == divide("describe the picture .", caption)
