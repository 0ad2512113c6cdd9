"""Corrected records: balanced, in an order that gives nothing away, and read again as they were."""

import dataclasses

import pytest

from mmpo_jax.correction.corrections import (
    Error,
    case_of,
    corrected,
    exchanges_of,
    kept,
)
from mmpo_jax.data.files import write_rows
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import IMAGE, ImageRef, Record, Response, Span, Turn
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene

ERRORS = tuple(Error("object", f"wrong {n}", f"is it {n} ?", f"is it not {n} ?") for n in range(3))
ANSWERS = ("yes", "no")
PICTURE = ImageRef("scene", png_bytes(sample_scene("test", 0, 0), 24))
PROMPT = (Turn("system", "be brief"), Turn("user", "what is it ?"))
RECORD = Record(
    "a",
    (PICTURE,),
    PROMPT,
    (
        Response.of("a star", 1, scores={"score": 2.0}, spans=(Span(0, 1, 5.0),), log_prob=-3.0),
        Response.of("a bus", 2, scores={"score": 0.0}),
        Response.of("a car", 3),
    ),
    extra={"answer": "a star"},
)


def said(turns):
    return [(turn.role, turn.text) for turn in turns]


def read_again(record, folder, **options):
    writer = Writer(root=str(folder), copies=str(folder / "images"))
    write_rows(folder / "rows.jsonl", [FORMATS["record"].write(record, writer)])
    (found,), skipped = read_records(folder / "rows.jsonl", messages_as="dialogue", **options)
    assert not skipped
    return found


def test_a_case_is_the_best_against_the_worst():
    case = case_of(RECORD, "dialogue")
    assert (case.id, case.question, case.chosen, case.rejected) == (
        *("a", "what is it ?"),
        *("a star", "a car"),
    )
    assert (case.images, case.solution) == (RECORD.images, "a star")


@pytest.mark.parametrize(
    ("changes", "layout", "reason"),
    [
        ({"responses": RECORD.responses[:1]}, "dialogue", "incomplete_pair"),
        ({"responses": (Response.of("a", 1), Response.of("b", 1))}, "dialogue", "incomplete_pair"),
        ({"responses": (Response.of("a"), Response.of("b"))}, "dialogue", "incomplete_pair"),
        ({"prompt": ()}, "dialogue", "no_prompt"),
        (
            {"responses": (Response.of("a", 1, finished=False), Response.of("b", 2))},
            *("dialogue", "unfinished"),
        ),
        (
            {"responses": (Response.of("a", 1), Response.of("b", 2, images=(PICTURE,)))},
            *("dialogue", "own_images"),
        ),
        (
            {"responses": (Response.of("a", 1, prompt=PROMPT), Response.of("b", 2))},
            *("dialogue", "own_prompt"),
        ),
        ({"prompt": (*PROMPT, Turn("assistant", "It is"))}, "apart", "turn_order"),
    ],
)
def test_records_that_are_no_pair(changes, layout, reason):
    with pytest.raises(UnusableRow) as caught:
        case_of(dataclasses.replace(RECORD, **changes), layout)
    assert caught.value.reason == reason


def test_the_beginning_of_an_answer_goes_on():
    begun = dataclasses.replace(RECORD, prompt=(*PROMPT, Turn("assistant", "It is")))
    assert "It is" in case_of(begun, "dialogue").question


def test_no_question_is_asked_twice():
    again = Error("count", "x", "Is it  0 ?", "is it five ?")
    swapped = Error("count", "x", "is it not 1 ?", "is it six ?")
    assert kept([ERRORS[0], again, ERRORS[1], swapped, ERRORS[2]], 5) == ERRORS
    assert kept(ERRORS, 2) == ERRORS[:2]
    assert kept([], 2) == ()


def test_as_many_yes_as_no_each_behind_its_question():
    answers = {error.yes: "yes" for error in ERRORS} | {error.no: "no" for error in ERRORS}
    exchanges = exchanges_of(ERRORS, ANSWERS, 0, "a")
    assert {asked.text: given.text for asked, given in exchanges} == answers
    assert {(asked.role, given.role) for asked, given in exchanges} == {("user", "assistant")}


def test_the_place_of_an_answer_does_not_give_it_away():
    first = [exchanges_of(ERRORS, ANSWERS, 0, str(n))[0][1].text for n in range(400)]
    assert 160 < first.count("yes") < 240  # four standard deviations
    assert exchanges_of(ERRORS, ANSWERS, 0, "a") == exchanges_of(ERRORS, ANSWERS, 0, "a")
    orders = {tuple(exchanges_of(ERRORS, ANSWERS, seed, "a")) for seed in range(8)}
    assert len(orders) > 4


def test_a_dialogue_goes_on_behind_the_chosen_response(tmp_path):
    made = corrected(RECORD, ERRORS[:1], ANSWERS, 0, "dialogue")
    chosen, rejected = made.responses
    assert said(chosen.turns)[0] == ("assistant", "a star")
    assert sorted(said(chosen.turns)[1::2]) == [
        ("user", "is it 0 ?"),
        ("user", "is it not 0 ?"),
    ]
    assert (chosen.rank, rejected.rank, rejected.text) == (1, 3, "a car")
    # What was said of the chosen text alone is no longer true.
    assert (chosen.spans, chosen.log_prob, chosen.scores) == ((), None, {"score": 2.0})
    assert made.extra["errors"] == [dataclasses.asdict(ERRORS[0])]
    found = read_again(made, tmp_path)
    assert (found.id, found.prompt, found.responses) == ("a", made.prompt, made.responses)
    assert found.images[0].read() == PICTURE.read()
    assert found.solution == "a star"


def test_questions_apart_are_dialogues_of_their_own(tmp_path):
    made = corrected(RECORD, ERRORS, ANSWERS, 0, "apart")
    assert made.prompt == () and not made.ranked
    first, *others = made.responses
    assert said(first.turns) == [*said(PROMPT), ("assistant", "a star")]
    assert len(others) == 6
    for response in others:
        system, asked, given = response.turns
        assert system == PROMPT[0]
        error = next(error for error in ERRORS if asked.text in (error.yes, error.no))
        assert given.text == ("yes" if asked.text == error.yes else "no")
    found = read_again(made, tmp_path)
    assert (found.prompt, found.responses) == ((), made.responses)


def test_earlier_answers_are_not_learned_apart():
    before = (*PROMPT, Turn("assistant", "yes"), Turn("user", "and ?"))
    made = corrected(dataclasses.replace(RECORD, prompt=before), ERRORS, ANSWERS, 0, "apart")
    learned = [turn.learned for turn in made.responses[0].turns if turn.role == "assistant"]
    assert learned == [False, True]


@pytest.mark.parametrize("layout", ["dialogue", "apart"])
def test_images_with_places_come_back(tmp_path, layout):
    placed = dataclasses.replace(RECORD, prompt=(Turn("user", ("see ", IMAGE, " and say")),))
    made = corrected(placed, ERRORS[:2], ANSWERS, 0, layout)
    found = read_again(made, tmp_path)
    assert found.responses == made.responses and found.prompt == made.prompt
    assert len(found.images) == 1
