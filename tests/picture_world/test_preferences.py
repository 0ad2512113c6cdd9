"""Preferences: every fault of a caption counts, and what is wrong is marked."""

import dataclasses

import numpy as np
import pytest

from mmpo_jax.data.readers import read_records
from mmpo_jax.picture_world.language import true_caption
from mmpo_jax.picture_world.preferences import (
    MAX_RESPONSES,
    judge,
    preferences,
    write_preferences,
)
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.picture_world.world import Scene, Thing

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


def test_a_true_caption_against_the_worst(asked):
    right, worst = preferences(asked, [SHORT, WORST], SCENE)["true_pairs"].responses
    assert (right.text, right.rank, worst.text, worst.rank) == (RIGHT, 1, WORST, 2)
    assert judge(right.text, SCENE).faults == 0


def test_files_are_read_again(tmp_path, asked):
    second = dataclasses.replace(prompt_records("align", 0, 2, image_size=24)[1], id="second")
    said = [(asked, [RIGHT, WORST, SHORT], SCENE), (second, [RIGHT, RIGHT], SCENE)]
    files = write_preferences(str(tmp_path), said)
    assert files.keys() == {"rankings", "pairs", "verdicts", "true_pairs"}
    for kind, file in files.items():
        (record,), skipped = read_records(file)
        expected = preferences(asked, [RIGHT, WORST, SHORT], SCENE)[kind]
        assert not skipped
        assert record.responses == expected.responses
        assert record.prompt == asked.prompt
        assert Scene.from_dict(record.solution) == SCENE
        assert record.images[0].read() == asked.images[0].read()
