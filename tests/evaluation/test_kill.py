"""`mmpo evaluate` of the shipped checkpoint, killed at five moments, ends as if undisturbed."""

import pytest
from alignment import kill_and_resume

from mmpo_jax.picture_world.pope import write_questions

MOMENTS = (
    "pope_random: 0 of",
    "pope_random: 256 of",
    "pope_adversarial: 256 of",
    "picture_world-greedy: 0 of",
    "picture_world-questions: 0 of",
)


@pytest.mark.slow
def test_killed_at_five_moments(tmp_path):
    kill_and_resume.freeze_code(tmp_path)
    data = tmp_path / "data"
    write_questions(str(data), size=120)
    asked = [
        f"{{type: pope, name: pope_{setting}, data: {data}/picture_world_pope_{setting}.json, "
        f"images: {data}/images, max_new_tokens: 4, batch_size: 64}}"
        for setting in ("random", "adversarial")
    ]
    world = "{type: picture_world, size: 40, max_new_tokens: 32, batch_size: 64}"
    overrides = (f"evaluation=[{', '.join([*asked, world])}]",)
    model = "builtin:picture_world"
    options = {"mmpo": ("evaluate", "configs/picture_world_pope.yaml")}
    kill_and_resume.run(tmp_path / "undisturbed", model, overrides, **options)
    for moment in MOMENTS:
        met, _ = kill_and_resume.run(tmp_path / "killed", model, overrides, (moment,), **options)
        assert met == moment
    kill_and_resume.run(tmp_path / "killed", model, overrides, **options)
    expected, found = (files(tmp_path / name) for name in ("undisturbed", "killed"))
    assert {"pope_random.parquet", "pope_random.scores.json", "evaluation.json"} <= expected.keys()
    assert kill_and_resume.compare(expected, found) == []


def files(folder):
    """What must not depend on the kills: everything but how long it took."""
    return {
        path.name: path.read_bytes()
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != "timings.json" and path.name[0] != "."
    }
