"""Preferences: every fault of a caption counts, and what corrects it is true."""

import dataclasses

import numpy as np
import pytest

from mmpo_jax.data.readers import read_records
from mmpo_jax.picture_world.claims import is_true, make_claim, question
from mmpo_jax.picture_world.language import hallucinated_caption, true_caption
from mmpo_jax.picture_world.preferences import (
    MAX_CORRECTIONS,
    MAX_RESPONSES,
    corrections,
    judge,
    preferences,
    write_preferences,
)
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.picture_world.world import KINDS, Kind, Scene, Thing, sample_scene

SCENE = Scene((Thing(0, 0, "star", "red"), Thing(1, 1, "star", "red"), Thing(2, 0, "ring", "blue")))
RIGHT = "there are two red stars and a blue ring ."
INVENTED = "there are two red stars , a blue ring and a green cross ."
SHORT = "there is a blue ring ."
MISCOUNTED = "there are three red stars and a blue ring ."
BROKEN = "there are two red stars , a blue ring and a ."
WORST = "there are three red stars , a blue cross and green ."


@pytest.fixture(scope="module")
def asked():
    return prompt_records("align", 0, 1, image_size=24)[0]


@pytest.mark.parametrize(
    ("caption", "faults"),
    [(RIGHT, 0), (INVENTED, 1), (SHORT, 1), (MISCOUNTED, 1), (BROKEN, 1), (WORST, 4), ("", 2)],
)
def test_what_is_said_wrong_and_what_is_left_out_are_faults(caption, faults):
    assert judge(caption, SCENE).faults == faults


def test_rankings_have_ties_and_scores(asked):
    found = preferences(asked, [SHORT, RIGHT, RIGHT, WORST, INVENTED], SCENE)
    ranking = found["rankings"].responses
    assert [r.text for r in ranking] == [SHORT, RIGHT, WORST, INVENTED]
    assert [r.rank for r in ranking] == [2, 1, 3, 2]
    assert [dict(r.scores) for r in ranking] == [{"score": -n} for n in (1, 0, 4, 1)]
    assert [(r.text, r.rank) for r in found["pairs"].responses] == [(RIGHT, 1), (WORST, 3)]
    verdicts = found["verdicts"].responses
    assert [r.desirable for r in verdicts] == [False, True, False, False]
    assert not found["verdicts"].ranked
    # Pairs of an objective that knows no verdicts must not be refused.
    assert all(r.desirable is None for r in ranking)


def test_only_so_many_and_none_where_all_are_as_good(asked):
    captions = [true_caption(SCENE, np.random.default_rng(0)), SHORT, WORST, "", BROKEN, INVENTED]
    assert len(preferences(asked, captions, SCENE)["rankings"].responses) == MAX_RESPONSES
    assert preferences(asked, [INVENTED, SHORT, INVENTED], SCENE) == {}
    assert preferences(asked, [], SCENE) == {}


def test_spans_are_what_is_wrong(asked):
    right, worst = preferences(asked, [RIGHT, WORST], SCENE)["pairs"].responses
    assert right.spans == ()
    assert [WORST[s.start : s.end] for s in worst.spans] == [
        "three red stars",
        "a blue cross",
        "green",
    ]
    assert [s.phrase for s in worst.spans] == [0, 1, 2]
    assert {s.weight for s in worst.spans} == {5.0}


def test_corrections_deny_what_is_false_and_affirm_what_is_true():
    turns = corrections(judge(MISCOUNTED, SCENE), SCENE)
    assert [(t.role, t.text) for t in turns] == [
        ("user", "are there three red stars in the picture ?"),
        ("assistant", "no"),
        ("user", "are there two red stars in the picture ?"),
        ("assistant", "yes"),
    ]
    left_out = corrections(judge(SHORT, SCENE), SCENE)
    assert [t.text for t in left_out] == ["is there a red star in the picture ?", "yes"]
    recoloured = corrections(judge("there is a red ring .", SCENE), SCENE)
    assert "is there a blue ring in the picture ?" in [t.text for t in recoloured]


def test_corrections_are_true_of_every_scene():
    claims = [make_claim(number, kind) for number in (1, 2, 3, 4) for kind in KINDS]
    claim_of = {question(claim): claim for claim in claims}
    answers = {"yes": True, "no": False}
    for index in range(100):
        scene, other = (sample_scene("align", seed, index) for seed in (0, 1))
        captions = [
            hallucinated_caption(scene, np.random.default_rng(index)),
            true_caption(other, np.random.default_rng(index)),
        ]
        for caption in captions:
            turns = corrections(judge(caption, scene), scene)
            assert len(turns) <= 2 * MAX_CORRECTIONS
            for asked, answer in zip(turns[::2], turns[1::2], strict=True):
                assert is_true(claim_of[asked.text], scene) == answers[answer.text]


def test_files_are_read_again(tmp_path, asked):
    second = dataclasses.replace(prompt_records("align", 0, 2, image_size=24)[1], id="second")
    said = [(asked, [RIGHT, WORST, SHORT], SCENE), (second, [RIGHT, RIGHT], SCENE)]
    files = write_preferences(str(tmp_path), said)
    assert files.keys() == {"rankings", "pairs", "verdicts", "corrections"}
    for kind, file in files.items():
        (record,), skipped = read_records(file)
        expected = preferences(asked, [RIGHT, WORST, SHORT], SCENE)[kind]
        assert not skipped
        assert record.responses == expected.responses
        assert record.prompt == asked.prompt
        assert record.images[0].read() == asked.images[0].read()


def test_a_kind_in_a_number_without_a_counterpart():
    turns = corrections(judge("there are two green crosses .", SCENE), SCENE)
    assert turns[0].text == "are there two green crosses in the picture ?"
    assert turns[2].text == "is there a red star in the picture ?"
    assert SCENE.counts()[Kind("red", "star")] == 2
