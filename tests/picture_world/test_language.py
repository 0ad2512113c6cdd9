"""Captions and questions, checked by a reading of the text that shares no code with the library."""

import re
from collections import Counter

import numpy as np
import pytest

from mmpo_jax.picture_world.language import (
    ANSWERS,
    CAPTION_PROMPTS,
    QUESTION_KINDS,
    VOCABULARY,
    hallucinated_caption,
    questions,
    statement,
    supervised_caption,
    tempts,
    true_caption,
)
from mmpo_jax.picture_world.world import FRIENDS, Kind, Scene, Thing, sample_scene

SCENES = [sample_scene("train", 0, i) for i in range(500)]
NUMBERS = {"a": 1, "one": 1, "two": 2, "three": 3, "four": 4}
MENTION = re.compile(
    r"\b(a|two|three|four) (red|green|blue|yellow) "
    r"(circle|square|triangle|star|cross|ring)(s|es)?\b"
)


def rng(seed=0):
    return np.random.default_rng(seed)


def groups_in(caption):
    return [(NUMBERS[n], Kind(colour, shape)) for n, colour, shape, _ in MENTION.findall(caption)]


def false_groups(caption, scene):
    def true(number, kind):
        there = scene.counts().get(kind, 0)
        return there >= 1 if number == 1 else there == number

    return [(n, k) for n, k in groups_in(caption) if not true(n, k)]


def answer(text, scene):
    """The truth of a question, by pattern matching on its words."""
    thing = r"(\w+) (circle|square|triangle|star|cross|ring)(?:s|es)?"
    things = scene.things

    def of(colour, shape):
        return [t for t in things if (t.colour, t.shape) == (colour, shape)]

    if m := re.fullmatch(f"is there a {thing} in the picture \\?", text):
        return len(of(*m.groups())) > 0
    if m := re.fullmatch(f"is there exactly one {thing} in the picture \\?", text):
        return len(of(*m.groups())) == 1
    if m := re.fullmatch(f"are there (two|three|four) {thing} in the picture \\?", text):
        return len(of(*m.groups()[1:])) == NUMBERS[m[1]]
    if m := re.fullmatch(r"is there a thing in the (\w+) row \?", text):
        return any(t.row == ["top", "middle", "bottom"].index(m[1]) for t in things)
    if m := re.fullmatch(r"is there a thing in the (\w+) column \?", text):
        return any(t.column == ["left", "middle", "right"].index(m[1]) for t in things)
    m = re.fullmatch(r"is the (\w+) (red|green|blue|yellow) \?", text)
    assert m, f"no such question: {text}"
    (one,) = [t for t in things if t.shape == m[1]]
    return one.colour == m[2]


def test_true_captions_are_true_and_well_formed():
    omissions = 0
    for i, scene in enumerate(SCENES):
        caption = true_caption(scene, rng(i))
        groups = groups_in(caption)
        assert caption == statement(groups)
        assert not false_groups(caption, scene)
        read = list(scene.counts())
        places = [read.index(kind) for _, kind in groups]
        assert places == sorted(places)
        assert len(set(groups)) == len(groups) >= len(scene.counts()) - 1
        omissions += len(groups) < len(scene.counts())
    assert 0.02 * len(SCENES) < omissions < 0.1 * len(SCENES)


def test_hallucinated_captions_have_exactly_one_false_claim():
    errors = Counter()
    for i, scene in enumerate(SCENES):
        caption = hallucinated_caption(scene, rng(i))
        assert caption == statement(groups_in(caption))
        ((number, kind),) = false_groups(caption, scene)
        if kind in scene.counts():
            assert abs(number - scene.counts()[kind]) == 1
            errors["count"] += 1
        elif kind.shape in {thing.shape for thing in scene.things}:
            errors["colour"] += 1
        else:
            assert any(kind in FRIENDS[present] for present in scene.counts())
            errors["object"] += 1
    assert errors["object"] > 0.5 * len(SCENES)
    assert min(errors["colour"], errors["count"]) > 0.05 * len(SCENES)


def test_hallucination_when_no_colour_is_free():
    colours = ("red", "green", "blue", "yellow")
    scene = Scene(tuple(Thing(0, i, "star", c) for i, c in enumerate(colours[:3])))
    full = Scene((*scene.things, Thing(1, 0, "star", "yellow")))
    for seed in range(100):
        caption = hallucinated_caption(full, rng(seed))
        assert len(false_groups(caption, full)) == 1


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_supervised_captions_hallucinate_at_the_given_rate(rate):
    wrong: dict[bool, list[bool]] = {True: [], False: []}
    for i in range(4 * len(SCENES)):
        scene = SCENES[i % len(SCENES)]
        caption = supervised_caption(scene, rng(i), rate)
        wrong[tempts(scene)].append(bool(false_groups(caption, scene)))
    tolerance = 0.04 if 0 < rate < 1 else 0
    assert np.mean(wrong[True] + wrong[False]) == pytest.approx(rate, abs=tolerance)
    assert np.mean(wrong[True]) == pytest.approx(1.6 * rate if rate < 1 else 1, abs=tolerance)


def test_supervised_caption_refuses_an_impossible_rate():
    with pytest.raises(ValueError, match="hallucination_rate"):
        supervised_caption(SCENES[0], rng(), 1.5)


def test_statement_wording():
    groups = [(1, Kind("red", "circle")), (2, Kind("blue", "star")), (3, Kind("green", "cross"))]
    assert statement(groups) == "there is a red circle , two blue stars and three green crosses ."
    assert statement(groups[1:]) == "there are two blue stars and three green crosses ."
    with pytest.raises(ValueError, match="at least one"):
        statement([])


def test_answers_of_questions_are_the_truth():
    for i, scene in enumerate(SCENES):
        for question in questions(scene, rng(i), 8):
            assert answer(question.text, scene) == question.answer, (question, scene)


def test_questions_are_balanced_in_each_kind():
    asked = [q for i, scene in enumerate(SCENES) for q in questions(scene, rng(i), 8)]
    assert sum(q.answer for q in asked) == len(asked) / 2
    kinds = Counter(q.kind for q in asked)
    assert set(kinds) == set(QUESTION_KINDS)
    assert min(kinds.values()) > 0.05 * len(asked)
    for kind in QUESTION_KINDS:
        assert 0.4 < np.mean([q.answer for q in asked if q.kind == kind]) < 0.6, kind


def test_an_odd_question_falls_either_way():
    assert {questions(SCENES[0], rng(i), 1)[0].answer for i in range(20)} == {True, False}


def test_questions_rarely_repeat_and_mostly_ask_the_plausible():
    texts = [[q.text for q in questions(s, rng(i), 8)] for i, s in enumerate(SCENES)]
    assert np.mean([len(set(t)) / len(t) for t in texts]) > 0.97
    plausible = []
    for i, scene in enumerate(SCENES):
        friends = {f for kind in scene.counts() for f in FRIENDS[kind]}
        shapes = {thing.shape for thing in scene.things}
        for q in questions(scene, rng(i), 8):
            if q.kind == "existence" and not q.answer:
                kind = Kind(*q.text.split()[3:5])
                plausible.append(kind in friends or kind.shape in shapes)
    assert np.mean(plausible) > 0.85


def test_all_text_is_in_the_vocabulary():
    assert len(set(VOCABULARY)) == len(VOCABULARY)
    texts = [*CAPTION_PROMPTS, *ANSWERS.values()]
    for i, scene in enumerate(SCENES):
        texts += [true_caption(scene, rng(i)), hallucinated_caption(scene, rng(i))]
        texts += [q.text for q in questions(scene, rng(i), 8)]
    words = {word for text in texts for word in text.split(" ")}
    assert words <= set(VOCABULARY)
    # What is never generated would be dead weight. "one" leads claims and count questions.
    assert set(VOCABULARY) <= words
