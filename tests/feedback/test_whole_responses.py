"""Responses that are not divided: one claim each, and the labeler is asked about all of it."""

import dataclasses
import math

import pytest
from helpers import meshes
from helpers.judged import responses_of
from helpers.plain_answers import plain_answer
from pydantic import ValidationError

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.files import read_table
from mmpo_jax.data.records import Turn
from mmpo_jax.feedback.claims import ClaimsJudge
from mmpo_jax.feedback.judge import EMPTY
from mmpo_jax.feedback.judges import make_splitter
from mmpo_jax.feedback.labeler import CheckpointLabeler
from mmpo_jax.feedback.split_prompts import WHOLE_PROMPT
from mmpo_jax.feedback.splitters import (
    Claim,
    Division,
    PictureWorldSplitter,
    SplitItem,
    WholeSplitter,
)
from mmpo_jax.picture_world.language import VOCABULARY
from mmpo_jax.recipes.feedback import ClaimsFeedback, PictureWorldSplitting, WholeSplitting

QUESTION = "what is in the picture ?"
CAPTIONS = [
    "there is a red circle and two blue stars .",
    "there is a red circle .",
    "there are two blue stars , a green ring and a red star .",
]
ABOUT = [
    "is there a red circle and two blue stars in the picture ?",
    "is there a red circle in the picture ?",
    "are there two blue stars , a green ring and a red star in the picture ?",
]


def divide(splitter, *texts):
    return splitter.divide([SplitItem(f"p/{n}", QUESTION, text) for n, text in enumerate(texts)])


def test_one_claim_that_is_the_response():
    one, two = divide(WholeSplitter(), "A dog. {question}", "Two\ncats")
    assert one.claims[0].text == "A dog. {question}"
    assert f"Question: {QUESTION}\nAnswer: A dog. {{question}}\n" in one.claims[0].question
    assert two.claims[0].question == WHOLE_PROMPT.replace("{question}", QUESTION).replace(
        "{answer}", "Two\ncats"
    )


def test_a_prompt_of_the_users_is_part_of_the_key():
    splitter = WholeSplitter("{answer}! {question}")
    assert divide(splitter, "a bus")[0].claims == (Claim("a bus", f"a bus! {QUESTION}"),)
    assert splitter.key != WholeSplitter().key != PictureWorldSplitter(whole=True).key


def test_nobody_is_asked_about_nothing():
    assert divide(WholeSplitter(), " \n", "") == [Division((), failure=EMPTY)] * 2


def test_one_question_about_all_groups_of_a_caption():
    splitter = PictureWorldSplitter(whole=True)
    for caption, asked, division in zip(CAPTIONS, ABOUT, divide(splitter, *CAPTIONS), strict=True):
        assert division == Division((Claim(caption, asked),))
        assert set(asked.split()) <= set(VOCABULARY)
    # Of one group it is the question that is asked of it anyhow.
    assert divide(splitter, CAPTIONS[1]) == divide(PictureWorldSplitter(), CAPTIONS[1])
    nothing, piece = divide(splitter, "yes", "a red circle , no star .")
    assert nothing == Division((), ("yes",))
    assert (piece.claims[0].question, piece.unparsed) == (ABOUT[1], ("no star",))


def test_of_a_recipe():
    (whole, checks), (world, _), (groups, _) = (
        make_splitter(section, None)
        for section in (
            WholeSplitting(prompt="{answer} ?"),
            PictureWorldSplitting(whole=True),
            PictureWorldSplitting(),
        )
    )
    assert (whole.prompt, checks) == ("{answer} ?", [])
    assert (world.whole, groups.whole) == (True, False)
    assert groups.key == "picture_world-2"  # what earlier runs have
    with pytest.raises(ValidationError, match=r"prompt: it has no \{answer\}"):
        WholeSplitting(prompt="{question}")


def test_the_score_is_that_of_a_plain_forward_pass(tiny_model, tiny_processor, tmp_path):
    """log p(yes) - log p(no) of the one question, whatever siblings share its image."""
    model, params = tiny_model
    mesh = meshes.one_device()

    def labeler():
        return CheckpointLabeler(
            Checkpoint(model, tiny_processor, params), mesh, None, batch_size=4
        )

    options = ClaimsFeedback(suffix="", score="log_odds")
    judge = ClaimsJudge(options, PictureWorldSplitter(whole=True), labeler, "tiny")
    responses = responses_of(tmp_path, {"p": CAPTIONS, "q": CAPTIONS[:2]})
    turns = (Turn("user", QUESTION),)
    records = [dataclasses.replace(record, prompt=turns) for record in responses.records]
    judged = judge.judge(dataclasses.replace(responses, records=records)).table
    asked = [(records[0], text) for text in ABOUT] + [(records[1], text) for text in ABOUT[:2]]
    expected = []
    for record, text in asked:
        yes, no = plain_answer(model, params, tiny_processor, record.images[0], text)
        expected.append(math.log(yes) - math.log(no))
    assert judged["score"].to_pylist() == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert len({round(score, 4) for score in expected}) == len(expected)
    conquered = read_table(tmp_path / "conquer.parquet")
    assert conquered["question"].to_pylist() == [text for _, text in asked]
