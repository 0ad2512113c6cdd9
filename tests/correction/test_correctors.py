"""Correctors: rules for scenes and short answers, and language models that may fail."""

import json

import pytest
from helpers.judged import Scripted, prompt

from mmpo_jax.correction import stage
from mmpo_jax.correction.codebook import load_codebook
from mmpo_jax.correction.corrections import Case, Error
from mmpo_jax.correction.correctors import (
    ModelCorrector,
    RuleCorrector,
    make_corrector,
    scene_of,
)
from mmpo_jax.correction.stage import find_errors
from mmpo_jax.data.records import Record, Turn, VideoRef
from mmpo_jax.feedback.judge import TooManyFailed
from mmpo_jax.feedback.models import Models
from mmpo_jax.feedback.served import Servers
from mmpo_jax.feedback.text_model import UNFINISHED, Reply
from mmpo_jax.picture_world.world import Scene, Thing
from mmpo_jax.recipes.command_recipes import CorrectRecipe
from mmpo_jax.recipes.correction import ChatCorrecting, RuleCorrecting

BOOK = load_codebook(None)
SCENE = Scene((Thing(0, 0, "star", "red"), Thing(1, 1, "ring", "blue")))
SERVER = {"url": "http://localhost:1/v1", "model": "m"}


def case(rejected, name="a", **fields):
    return Case(name, "what is it ?", "a red star", rejected, **fields)


def rule(codebook=BOOK, max_errors=3, **options):
    return RuleCorrector(RuleCorrecting(**options), codebook, max_errors, 0)


class TestRules:
    def test_a_row_with_a_scene_is_of_the_picture_world(self):
        caption = "there is a red star and a green ring ."
        (found,) = rule().find([case(caption, solution=SCENE.to_dict())])
        assert found.errors[0] == Error(
            "attribute", "a green ring", "is the ring blue ?", "is the ring green ?"
        )
        assert rule().answers(case("", solution=SCENE.to_dict())) == ("yes", "no")

    def test_others_are_short_answers(self):
        (found,) = rule().find([case("bus", solution="a red star")])
        assert found.errors[0].kind == "answer"
        assert rule().answers(case("bus")) == ("Yes", "No")
        assert rule(max_words=2).find([case("bus")])[0].reason == "long_answer"

    def test_kinds_that_the_codebook_lacks_are_not_asked_about(self):
        objects = BOOK.model_copy(update={"errors": BOOK.errors[:1]})
        caption = "there is a red star , a green ring and a yellow cross ."
        (found,) = rule(objects).find([case(caption, solution=SCENE.to_dict())])
        assert {error.kind for error in found.errors} == {"object"}
        assert found.errors[0].wrong == "a yellow cross"

    def test_no_more_than_so_many(self):
        wrong = case("there is a green cross .", solution=SCENE.to_dict())
        assert [len(rule(max_errors=n).find([wrong])[0].errors) for n in (1, 2, 9)] == [1, 2, 2]

    def test_a_caption_without_errors(self):
        right = case("there is a red star and a blue ring .", solution=SCENE.to_dict())
        assert rule().find([right])[0].reason == "no_error"

    def test_what_is_no_scene(self):
        assert scene_of(SCENE.to_dict()) == SCENE
        for solution in (None, "a", 3, {}, {"things": []}, {"things": 3, "jitter_seed": 0}):
            assert scene_of(solution) is None


def reply(wrong, kind="object"):
    error = {"kind": kind, "wrong": wrong, "yes": f"not {wrong}?", "no": f"{wrong}?"}
    return json.dumps({"errors": [error]})


def rejected_of(text):
    return text.rpartition("Second answer: ")[2]


def of_model(says, max_errors=3, **options):
    model = Scripted(says)
    section = ChatCorrecting(**SERVER, **options)
    nothing = lambda *_: None  # noqa: E731
    return ModelCorrector(model, section, BOOK, max_errors, "key", nothing, nothing), model


class TestModels:
    CASES = tuple(case(text, name) for name, text in (("a", "bus"), ("b", "car"), ("c", "sea")))

    def test_in_order_with_all_that_it_needs(self):
        corrector, model = of_model(lambda text, attempt: reply(rejected_of(text)))
        found = corrector.find(self.CASES)
        assert [one.errors[0].wrong for one in found] == ["bus", "car", "sea"]
        asked = model.rounds[0][0]
        assert asked.id == "a" and not asked.images
        for part in (
            BOOK.listing(),
            "what is it ?",
            "First answer: a red star",
            "at most 3 errors",
        ):
            assert part in asked.text
        assert model.schemas[0]["required"] == ["errors"]
        assert corrector.answers(self.CASES[0]) == ("Yes", "No")

    def test_only_what_cannot_be_read_is_asked_again(self):
        def says(text, attempt):
            wrong = rejected_of(text)
            return "hm" if wrong == "car" and attempt < 2 else reply(wrong)

        corrector, model = of_model(says)
        assert all(one.errors for one in corrector.find(self.CASES))
        assert [[ask.id for ask in asked] for asked in model.rounds] == [
            ["a", "b", "c"],
            ["b"],
            ["b"],
        ]
        assert model.rejected == [("b", 0), ("b", 1)]

    def test_what_nobody_can_read_keeps_the_reply(self):
        def says(text, attempt):
            wrong = rejected_of(text)
            return reply("a bird") if wrong == "car" else reply(wrong)

        corrector, model = of_model(says, attempts=2)
        found = corrector.find(self.CASES)[1]
        assert (found.reason, found.failure, found.raw) == (
            "not_corrected",
            "not_quoted",
            reply("a bird"),
        )
        assert "a bird" in found.detail and not found.errors
        assert len(model.rounds) == 2

    def test_a_reply_that_was_cut_gets_more_room(self):
        def says(text, attempt):
            return reply("bus") if attempt else Reply('{"errors"', UNFINISHED)

        corrector, model = of_model(says, max_new_tokens=50)
        assert corrector.find(self.CASES[:1])[0].errors
        assert [asked[0].max_new_tokens for asked in model.rounds] == [50, 100]

    def test_too_many_failures_stop(self):
        corrector, _ = of_model(lambda text, attempt: "hm", max_failed=0.5)
        with pytest.raises(TooManyFailed, match=r"no_json 3.*corrector\.max_failed"):
            corrector.find(self.CASES)

    def test_no_error_is_no_failure(self):
        corrector, _ = of_model(lambda text, attempt: '{"errors": []}', max_failed=0)
        assert {one.reason for one in corrector.find(self.CASES)} == {"no_error"}

    def test_a_model_that_sees(self):
        shown = case("bus", images=prompt("p").images)
        corrector, model = of_model(lambda text, attempt: reply("bus"), show_image=True)
        assert corrector.find([shown])[0].errors
        assert model.rounds[0][0].images == shown.images

    def test_a_prompt_of_ones_own(self):
        own = "{codebook} {max_errors} {question} {chosen} Second answer: {rejected}"
        corrector, model = of_model(lambda text, attempt: reply("bus"), prompt=own, max_errors=2)
        corrector.find(self.CASES[:1])
        assert model.rounds[0][0].text.startswith(BOOK.listing() + " 2 what")

    def test_no_more_than_so_many(self):
        def says(text, attempt):
            errors = [json.loads(reply(letter))["errors"][0] for letter in "bus"]
            return json.dumps({"errors": errors})

        corrector, _ = of_model(says, max_errors=2)
        assert len(corrector.find(self.CASES[:1])[0].errors) == 2


def test_the_stage_keeps_all_that_was_found(tmp_path, monkeypatch):
    """In parts, with failures and replies; a second run finds it."""
    monkeypatch.setattr(stage, "CASES_PER_PART", 2)

    def says(text, attempt):
        wrong = rejected_of(text)
        return "hm" if wrong == "car" else reply(wrong)

    corrector, model = of_model(says)
    cases = [*TestModels.CASES, case("sun", "d"), case("ice", "e")]
    found = find_errors(cases, corrector, str(tmp_path))
    assert [len(asked) for asked in model.rounds] == [1, 2, 1, 1, 2]
    assert [one.failure for one in found] == [None, "no_json", None, None, None]
    assert found == corrector.find(cases)
    asked = len(model.rounds)
    assert find_errors(cases, corrector, str(tmp_path)) == found
    assert len(model.rounds) == asked


def test_the_stage_knows_what_it_was_made_of(tmp_path):
    """Another codebook, and images where they are shown, make it anew."""
    first, model = of_model(lambda text, attempt: reply(rejected_of(text)))
    find_errors(TestModels.CASES, first, str(tmp_path))
    other = ModelCorrector(
        model,
        first.options,
        BOOK.model_copy(update={"errors": BOOK.errors[:1]}),
        3,
        "key",
        lambda: None,
        lambda record: None,
    )
    find_errors(TestModels.CASES, other, str(tmp_path))
    assert len(model.rounds) == 2
    seeing, shown = of_model(lambda text, attempt: reply("bus"), show_image=True)
    for number in (0, 1):
        find_errors([case("bus", images=prompt("p", number).images)], seeing, str(tmp_path))
    assert len(shown.rounds) == 2
    for number in (0, 1):
        frames = prompt("p", number).images * 2
        find_errors([case("bus", videos=(VideoRef("v", frames),))], seeing, str(tmp_path))
    assert [len(asks[0].videos) for asks in shown.rounds] == [0, 0, 1, 1]


def test_videos_are_shown_or_rows_left_out(tiny_folder, tmp_path):
    """To a checkpoint as it takes them, to a server as frames; where texts are compared they do not
    count."""
    video = Record("p", (), (Turn("user", "?"),), (), (VideoRef("v", prompt("p").images),))
    models = Models(None, "auto", Servers(str(tmp_path)), "", "auto", 0)

    def told(record, **corrector):
        data = {"path": "a.jsonl"}
        recipe = CorrectRecipe(output="o.jsonl", data=data, corrector=corrector)
        return make_corrector(recipe, BOOK, models).unfit(record)

    checkpoint = {"type": "checkpoint", "model": str(tiny_folder)}
    assert told(video, **checkpoint) is None
    reason, detail = told(video, **checkpoint, show_image=True)
    assert (reason, detail) == ("unsupported_video", "this model takes no videos")
    assert told(prompt("p"), **checkpoint, show_image=True) is None
    served = {"type": "chat", **SERVER, "show_image": True}
    assert told(video, **served) is None
    assert told(prompt("p"), **served) is None and told(video, type="rule") is None
