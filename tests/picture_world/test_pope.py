"""POPE's settings over the picture world: labels are true, and what is not there gets harder."""

import json

import pytest
from PIL import Image

from mmpo_jax.picture_world.pope import questions, write_questions
from mmpo_jax.picture_world.records import scenes

SCENES = scenes("test", 0, 200)


@pytest.mark.parametrize("setting", ["random", "popular", "adversarial"])
def test_labels_are_true_and_balanced(setting):
    asked = questions(SCENES, setting, "test", 0)
    for scene, of_scene in zip(SCENES, asked, strict=True):
        assert all((kind in scene.counts()) == answer for kind, answer in of_scene)
        assert len({kind for kind, _ in of_scene}) == len(of_scene) >= 2
        assert sum(answer for _, answer in of_scene) * 2 == len(of_scene) <= 6


def test_settings_differ_in_what_is_not_there():
    """The absent kinds are the more frequent ones, or those that are seen together."""

    def mean(setting, of):
        absent = [
            of(kind, scene)
            for scene, asked in zip(SCENES, questions(SCENES, setting, "test", 0), strict=True)
            for kind, answer in asked
            if not answer
        ]
        return sum(absent) / len(absent)

    def often(kind, scene):
        return sum(kind in other.counts() for other in SCENES)

    def together(kind, scene):
        others = [other.counts() for other in SCENES if kind in other.counts()]
        return sum(here in other for other in others for here in scene.counts())

    assert mean("popular", often) > 1.3 * mean("random", often)
    assert mean("adversarial", together) > 2 * mean("random", together)


def test_files_are_those_of_pope(tmp_path):
    paths = write_questions(str(tmp_path), size=3, image_size=24)
    assert [path.rpartition("_")[2] for path in paths] == [
        "random.json",
        "popular.json",
        "adversarial.json",
    ]
    with open(paths[2]) as lines:
        rows = [json.loads(line) for line in lines]
    assert [row["question_id"] for row in rows] == [*range(1, len(rows) + 1)]
    assert rows[0].keys() == {"question_id", "image", "text", "label"}
    with Image.open(tmp_path / "images" / rows[0]["image"]) as image:
        assert image.size == (24, 24)
