"""Caption metrics against cases worked out by hand."""

import numpy as np
import pytest

from mmpo_jax.picture_world.claims import split
from mmpo_jax.picture_world.language import hallucinated_caption, true_caption
from mmpo_jax.picture_world.metrics import caption_metrics, error_type
from mmpo_jax.picture_world.world import Scene, Thing, sample_scene

# Two red stars and a blue ring.
PAIR = Scene((Thing(0, 0, "star", "red"), Thing(1, 1, "star", "red"), Thing(2, 2, "ring", "blue")))
# A green cross and a red circle.
CROSS = Scene((Thing(0, 0, "cross", "green"), Thing(1, 1, "circle", "red")))


def test_hand_computed_case():
    captions = [
        # true, count error, colour error: 3 mentions, 2 wrong; finds both kinds
        "there is a blue ring , three red stars and a green ring .",
        # true, object error: 2 mentions, 1 wrong; finds 1 of 2 kinds; "big" is unparsed
        "there is a green cross and two yellow squares big .",
    ]
    assert caption_metrics(captions, [PAIR, CROSS]) == pytest.approx(
        {
            "chair_i": 3 / 5,
            "chair_s": 1.0,
            "error_object": 1 / 5,
            "error_colour": 1 / 5,
            "error_count": 1 / 5,
            "recall": 3 / 4,
            "mean_length": (12 + 10) / 2,
            "unparsed": 1 / 2,
        }
    )


def test_perfect_captions():
    captions = ["there are two red stars and a blue ring .", "a red circle , a green cross ."]
    metrics = caption_metrics(captions, [PAIR, CROSS])
    assert metrics["chair_i"] == metrics["chair_s"] == metrics["unparsed"] == 0
    assert metrics["recall"] == 1


def test_silence_is_no_hallucination_but_has_no_recall():
    metrics = caption_metrics([""], [PAIR])
    assert set(metrics.values()) == {0.0}


def test_every_repetition_in_other_words_counts_but_recall_counts_kinds_once():
    metrics = caption_metrics(["three red stars , two red stars , three red stars"], [PAIR])
    assert metrics["chair_i"] == 1 / 2
    assert metrics["recall"] == 1 / 2


@pytest.mark.parametrize(
    ("caption", "error"),
    [
        ("two red stars", None),
        ("a red star", None),
        ("three red stars", "count"),
        ("a green star", "colour"),
        ("a blue star", "colour"),
        ("a red circle", "object"),
    ],
)
def test_error_type(caption, error):
    (claim,) = split(caption)
    assert error_type(claim, PAIR) == error


def test_generated_captions_have_the_errors_they_should():
    scenes = [sample_scene("validation", 0, i) for i in range(200)]
    rng = np.random.default_rng(0)
    clean = caption_metrics([true_caption(s, rng) for s in scenes], scenes)
    dirty = caption_metrics([hallucinated_caption(s, rng) for s in scenes], scenes)
    assert clean["chair_s"] == 0 and dirty["chair_s"] == 1
    parts = [dirty[f"error_{name}"] for name in ("object", "colour", "count")]
    assert sum(parts) == pytest.approx(dirty["chair_i"])
    assert parts[0] > parts[1] > 0 and parts[2] > 0


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="no captions"):
        caption_metrics([], [])
    with pytest.raises(ValueError, match="2 captions but 1 scenes"):
        caption_metrics(["", ""], [PAIR])
