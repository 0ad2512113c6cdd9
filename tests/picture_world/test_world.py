"""Scenes: deterministic, disjoint between splits, and with the promised statistics."""

import json

import numpy as np
import pytest

from mmpo_jax.picture_world.world import (
    FRIENDS,
    KINDS,
    SPLITS,
    Kind,
    Scene,
    Thing,
    generator,
    sample_scene,
)

SCENES = [sample_scene("train", 0, i) for i in range(2000)]


def test_sampling_is_deterministic_and_depends_on_every_argument():
    assert sample_scene("align", 3, 5) == sample_scene("align", 3, 5)
    others = [("train", 3, 5), ("align", 4, 5), ("align", 3, 6)]
    assert all(sample_scene(*other) != sample_scene("align", 3, 5) for other in others)


def test_sampling_is_the_same_on_every_machine():
    scene = sample_scene("train", 0, 0)
    assert [(t.row, t.column, t.colour, t.shape) for t in scene.things] == [
        (1, 0, "blue", "triangle"),
        (1, 1, "yellow", "cross"),
        (1, 2, "blue", "star"),
        (2, 0, "green", "square"),
    ]


def test_splits_share_no_arrangement_even_between_seeds():
    arrangements = {
        split: {sample_scene(split, seed, i).things for seed in (0, 1) for i in range(300)}
        for split in SPLITS
    }
    union = set().union(*arrangements.values())
    assert len(union) == sum(map(len, arrangements.values()))


def test_streams_of_one_example_differ():
    draws = [generator("test", 1, 2, stream).integers(2**40) for stream in range(3)]
    assert len(set(draws)) == 3


def test_scene_statistics():
    sizes = [len(scene.things) for scene in SCENES]
    assert set(sizes) == {2, 3, 4}
    assert np.mean([max(scene.counts().values()) > 1 for scene in SCENES]) == pytest.approx(
        0.25, abs=0.03
    )
    seen = [kind for scene in SCENES for kind in scene.counts()]
    frequency = [seen.count(kind) / len(seen) for kind in KINDS]
    assert min(frequency) > 0.5 / len(KINDS) and max(frequency) < 1.5 / len(KINDS)


def test_friends_are_mutual_and_co_occur_more_often_than_others():
    assert all(kind in FRIENDS[friend] for kind in KINDS for friend in FRIENDS[kind])
    assert all(
        friend.colour != kind.colour and friend.shape != kind.shape
        for kind in KINDS
        for friend in FRIENDS[kind]
    )
    pairs = [(a, b) for scene in SCENES for a in scene.counts() for b in scene.counts() if a != b]
    friendly = np.mean([b in FRIENDS[a] for a, b in pairs])
    # 3 of the 23 other kinds are friends; chance would give 0.13.
    assert friendly > 0.4


def test_scene_survives_json():
    for scene in SCENES[:50]:
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


@pytest.mark.parametrize("fields", [{}, {"things": [{"row": 0}], "jitter_seed": 0}])
def test_malformed_scene_is_refused(fields):
    with pytest.raises(ValueError, match="no scene of the picture world"):
        Scene.from_dict(fields)


def test_impossible_scenes_are_refused():
    with pytest.raises(ValueError, match="share a cell"):
        Scene((Thing(0, 0, "star", "red"), Thing(0, 0, "ring", "blue")))
    with pytest.raises(ValueError, match="1 to 4"):
        Scene(())
    with pytest.raises(ValueError, match="unknown kind"):
        Thing(0, 0, "hexagon", "red")
    with pytest.raises(ValueError, match="outside"):
        Thing(0, 3, "star", "red")


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="unknown split"):
        sample_scene("dev", 0, 0)
    # 2**32 + 5 would fill two seed words, and could coincide with another split's stream.
    with pytest.raises(ValueError, match="seed"):
        sample_scene("train", 2**32 + 5, 0)
    with pytest.raises(ValueError, match="index"):
        sample_scene("train", 0, -1)


def test_counts():
    things = (Thing(0, 0, "star", "red"), Thing(1, 1, "ring", "red"), Thing(2, 0, "star", "red"))
    assert Scene(things).counts() == {Kind("red", "star"): 2, Kind("red", "ring"): 1}
