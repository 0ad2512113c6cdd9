"""Verifiable rewards: figures worked out by hand, and texts that are no answer at all."""

import itertools
import json

import numpy as np
import pytest

from mmpo_jax import cli
from mmpo_jax.core.errors import DataError
from mmpo_jax.picture_world.metrics import caption_metrics
from mmpo_jax.picture_world.world import Scene, Thing
from mmpo_jax.rewards import REWARDS
from mmpo_jax.rewards.boxes import ious, match, read_predictions, true_boxes
from mmpo_jax.rewards.registry import MAX_LENGTH

BOXES = ("iou", "confidence", "box_format", "box_recall", "box_precision")
SCENE = Scene((Thing(0, 0, "star", "red"), Thing(1, 1, "ring", "blue"), Thing(2, 2, "star", "red")))
ANSWERS = {name: [[0, 0, 10, 10]] for name in BOXES} | {
    "exact_match": "cat",
    "think_format": None,
    "pair_verdict": "2",
    "picture_world_caption": SCENE.to_dict(),
}
OF_ONE_TEXT = [name for name, reward in REWARDS.items() if reward.reads == "text"]
BROKEN = [
    "",
    "nothing at all",
    "[",
    "[[[[",
    "{}",
    "[]",
    "null",
    "[1, 2, 3]",
    "[NaN, 0, 10, 10]",
    "[[Infinity, 0, 10, 10]]",
    "[10, 10, 0, 0]",
    "[0, 0, 0, 10]",
    "[0, 0, 1e400, 10]",
    f"[0, 0, {10**400}, 10]",
    "[[true, false, true, true]]",
    '[{"Position": "0, 0, 10, 10"}]',
    '[{"Position": null, "Confidence": 0.5}]',
    '{"a": {"b": [[[]]]}}',
    "[" * 50_000,
    "[" * 50_000 + "]" * 50_000,
    "(" * 3000 + ")" * 3000,
    "[1," * 200_000,
    "[0,0,1,1]," * (MAX_LENGTH // 5),
    json.dumps([[0, 0, 10, 10]] * 501),
    "\ud800 \x00 </answer><answer>",
    "<answer>[[0, 0, 10, 10]",
]


def score(name, text, answer, **options):
    return REWARDS[name].score(text, answer, **options)


def detection(*boxes):
    return f"<think>hm</think><answer>{list(boxes)}</answer>"


def said(box, confidence):
    return {"Position": box, "Confidence": confidence}


@pytest.mark.parametrize("text", BROKEN, ids=range(len(BROKEN)))
def test_what_cannot_be_read_is_worth_nothing(text):
    for name in BOXES:
        if text == "<answer>[[0, 0, 10, 10]":  # a tag that is not closed does no harm
            continue
        assert score(name, text, ANSWERS[name]) == 0, name
    for name in ("exact_match", "think_format"):
        assert score(name, text, ANSWERS[name]) == 0, name
    assert -1 <= score("picture_world_caption", text, ANSWERS["picture_world_caption"]) <= 0


def test_every_reward_is_tested():
    assert set(ANSWERS) == set(OF_ONE_TEXT)


def test_the_command_lists_every_reward(capsys):
    cli.main(["objectives"])
    printed = capsys.readouterr().out
    blocks = {block.partition("\n")[0]: " ".join(block.split()) for block in printed.split("\n\n")}
    assert "grpo" in blocks
    for name, reward in REWARDS.items():
        assert reward.formula
        assert "arXiv" in reward.source or name in ("picture_world_caption", "python")
        for part in (reward.formula, reward.source, reward.solution, *reward.options):
            assert part in blocks[name], name
    assert "options: found=0.5, low=0.5, high=0.75" in blocks["box_recall"]


@pytest.mark.parametrize(
    "text",
    [
        "[[0, 0, 10, 10], [20, 20, 30, 30]]",
        "here: ```json\n[[0, 0, 10, 10], [20.0, 20, 30, 30]]\n```",
        "[{'Position': [0, 0, 10, 10], 'Confidence': 1}, {'Position': [20, 20, 30, 30]}]",
        '[{"bbox_2d": [0, 0, 10, 10], "label": "cat"}, {"bbox_2d": [20, 20, 30, 30]}]',
        "cat-[0, 0, 10, 10], dog-[ 20,20.0 , 30, 30 ]",
        "<answer>[(0, 0, 10, 10), (20, 20, 30, 30)]</answer> and [1, 1, 2, 2]",
        "[0, 0, 10, 10], [20, 20, 30, 30]",
        "[0, 0, 10, 10] and [20, 20, 30, 30]",
        "[0, 0, 10, 10]\n[20, 20, 30, 30]",
        '{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [20, 20, 30, 30]}',
        '{"boxes": [[0, 0, 10, 10], [20, 20, 30, 30]]}',
        '{"boxes": [{"bbox": [0, 0, 10, 10]}, {"bbox": [20, 20, 30, 30]}]}',
        '{"cat": [0, 0, 10, 10], "dog": [20, 20, 30, 30]}',
        "[[[0, 0, 10, 10]], [[20, 20, 30, 30]]]",
    ],
)
def test_forms_of_boxes(text):
    """As a model writes them, and as what is right."""
    found = [prediction.box for prediction in read_predictions(text)]
    assert found == [(0, 0, 10, 10), (20, 20, 30, 30)]
    assert true_boxes(text).tolist() == [[0, 0, 10, 10], [20, 20, 30, 30]]
    for name in set(BOXES) - {"confidence"}:
        assert score(name, text, [[0, 0, 10, 10], [20, 20, 30, 30]]) == 1, name


@pytest.mark.parametrize(
    "text",
    [
        "[[0, 0, 10, 10], [1, 2, 3]]",
        "[0, 0, 10, 10], [1, 2, 3]",
        "[0, 0, 10, 10], [30, 30, 20, 20]",
        '{"bbox_2d": [0, 0, 10, 10]}, {"bbox_2d": [20, 20]}',
        '{"bbox_2d": [20, 20]}, {"note": [0, 0, 10, 10]}',
        '{"boxes": [[0, 0, 10, 10], [1, 2, 3]]}',
        '{"cat": [0, 0, 10, 10], "dog": [30, 30, 20, 20]}',
    ],
)
def test_a_broken_box_beside_a_whole_one_is_of_no_format(text):
    """It is among those that the text says, and no pattern overlooks it."""
    assert len(read_predictions(text)) == 2
    assert score("box_format", text, [[0, 0, 10, 10]]) == 0
    assert score("iou", text, [[0, 0, 10, 10]]) in (0, 0.5)
    with pytest.raises(DataError, match="boxes"):
        true_boxes(text)


def test_a_single_box():
    assert [p.box for p in read_predictions("[1, 2, 3, 4]")] == [(1, 2, 3, 4)]
    assert [p.box for p in read_predictions('{"box": [1, 2, 3, 4]}')] == [(1, 2, 3, 4)]


def test_ious_against_pixels():
    rng = np.random.default_rng(0)
    corners = rng.integers(0, 12, (2, 5, 2)), rng.integers(13, 20, (2, 5, 2))
    first, second = (
        np.concatenate([low, high], axis=-1) for low, high in zip(*corners, strict=True)
    )
    y, x = np.mgrid[:20, :20]

    def pixels(box):
        return (x >= box[0]) & (x < box[2]) & (y >= box[1]) & (y < box[3])

    for i, j in itertools.product(range(5), range(5)):
        a, b = pixels(first[i]), pixels(second[j])
        wanted = (a & b).sum() / (a | b).sum()
        assert ious(first.astype(float), second.astype(float))[i, j] == pytest.approx(wanted)


def test_matching_is_the_best_of_all():
    rng = np.random.default_rng(1)
    for _ in range(20):
        low = rng.random((7, 2)) * 10
        boxes = np.concatenate([low, low + 1 + rng.random((7, 2)) * 8], axis=1)
        predictions = read_predictions(json.dumps(boxes[:4].tolist()))
        overlap = ious(boxes[:4], boxes[4:])
        best = max(
            sum(overlap[i, j] for j, i in enumerate(order))
            for order in itertools.permutations(range(4), 3)
        )
        assert sum(match(predictions, boxes[4:]).values()) == pytest.approx(best)


def test_visual_rft():
    """Two true boxes; one is hit by half, one missed, and one box is invented."""
    truth = {"boxes": [[0, 0, 10, 10], [50, 50, 60, 60]]}
    text = detection(said([0, 0, 10, 5], 0.9), said([80, 80, 90, 90], 0.3), said([1, 1, 0, 0], 0.2))
    assert score("iou", text, truth) == pytest.approx(0.5 / 3)
    assert score("confidence", text, truth) == pytest.approx((0.9 + 0.7) / 3)
    assert score("confidence", detection([0, 0, 10, 5]), truth) == 0
    assert score("confidence", detection(said([0, 0, 10, 5], 7)), truth) == 0
    assert score("think_format", text, truth) == 1
    assert score("box_format", text, truth) == 0
    assert score("iou", "[]", []) == 1
    assert score("iou", "[[0, 0, 1, 1]]", []) == 0


def test_vision_r1():
    """IoU 0.6 and 0.8 of three true boxes, and one that overlaps too little."""
    truth = [[0, 0, 10, 10], [50, 50, 60, 60], [100, 100, 110, 110]]
    text = "[[0, 0, 10, 6], [50, 50, 60, 58], [100, 100, 110, 101]]"
    assert score("box_format", text, truth) == 1
    assert score("box_recall", text, truth) == pytest.approx(2 / 3)
    assert score("box_precision", text, truth) == pytest.approx((0.6 + 1 + 0) / 3)
    later = {"found": 0.75, "low": 0.75, "high": 0.9}
    assert score("box_recall", text, truth, **later) == 0
    assert score("box_precision", text, truth, **later) == pytest.approx(0.8 / 3)


def test_box_precision_counts_every_match():
    """A perfect box and a stray one, which is matched with the box that was missed."""
    truth = [[0, 0, 10, 10], [50, 50, 60, 60]]
    assert score("box_precision", "[[0, 0, 10, 10], [90, 90, 95, 95]]", truth) == 0.5
    assert score("box_precision", "[[0, 0, 10, 10]]", truth) == 1


@pytest.mark.parametrize(
    "solution",
    [
        "<answer>[{'Position': [0, 0, 10, 10], 'Confidence': 1}]</answer>",
        "[[0, 0, 10, 10]]",
        {"boxes": "[0, 0, 10, 10]"},
        [{"bbox_2d": [0, 0, 10, 10], "label": "cat"}],
        {"bbox_2d": [0, 0, 10, 10], "label": "cat"},
        [0, 0, 10, 10],
    ],
)
def test_right_boxes_in_the_forms_of_models(solution):
    for name in BOXES:
        assert score(name, detection(said([0, 0, 10, 10], 1.0)), solution) == 1, name


@pytest.mark.parametrize("answer", ["No Objects", "<answer>[[1, 2, 3]]</answer>", "[[0, 0, 0, 0]]"])
def test_texts_without_boxes_are_no_right_ones(answer):
    with pytest.raises(DataError, match="boxes"):
        true_boxes(answer)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a tail</think><answer> The Cat. </answer>", 1),
        ("the  cat", 1),
        ("cat", 0),
        ("<answer>the cat", 0),
        ("<answer></answer>", 0),
    ],
)
def test_exact_match(text, value):
    assert score("exact_match", text, "the cat") == value
    assert score("exact_match", text, "<answer> the cat </answer>") == value


@pytest.mark.parametrize(
    ("text", "answer"),
    [("-5", "5"), ("50%", "50"), ("$5", "5"), ("C#", "C"), ("C++", "C"), (".5", "5"), ("#", "*")],
)
def test_signs_are_part_of_an_answer(text, answer):
    for first, second in ((text, answer), (answer, text)):
        assert score("exact_match", first, second) == 0
    assert score("exact_match", f"({text}).", text) == 1


@pytest.mark.parametrize("text", ["5.", '"5"', "\u201c5!\u201d", "[5]", " ( 5 ) ", "5;", "`5`"])
def test_punctuation_quotes_and_brackets_around_an_answer(text):
    assert score("exact_match", text, "5") == 1
    assert score("exact_match", text.replace("5", "Cat"), "cat") == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        (" <think></think>\n<answer></answer>\n", 1),
        ("<think>a</think> so <answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>b</answer></think>", 0),
        ("<think>a</think><answer>b</answer> yes", 0),
        ("<think><think>a</think><answer>b</answer>", 0),
    ],
)
def test_think_format(text, value):
    assert score("think_format", text, None) == value


@pytest.mark.parametrize(
    ("caption", "value"),
    [
        ("there are two red stars and a blue ring .", 1.0),
        ("there is a red star .", 0.5),
        ("there is a red star and a green cross .", 0.0),
        ("there is a green cross .", -1.0),
        ("there is a red red star and a fish .", 0.0),
    ],
)
def test_picture_world_caption(caption, value):
    assert score("picture_world_caption", caption, SCENE.to_dict()) == pytest.approx(value)
    measured = caption_metrics([caption], [SCENE])
    if not measured["unparsed"]:
        assert value == pytest.approx(measured["recall"] - measured["chair_i"])
    only = score("picture_world_caption", caption, SCENE.to_dict(), invented=0.0, recall=3.0)
    assert only == pytest.approx(3 * measured["recall"])


@pytest.mark.parametrize("name", sorted(set(OF_ONE_TEXT) - {"think_format"}))
@pytest.mark.parametrize("answer", [None, 3, {"boxes": [[0, 0, 0, 0]]}, [[1, 2, 3]], {"things": 1}])
def test_answers_that_cannot_be_used_are_refused(name, answer):
    with pytest.raises(DataError, match="boxes" if name in BOXES else name):
        score(name, "", answer)


def test_true_boxes():
    assert true_boxes({"boxes": []}).shape == (0, 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("<think>Answer 2 is better.</think><answer>2</answer>", 1.5 + 0.5),
        ("<think>Answer 1 is better.</think><answer>2</answer>", 0.5 + 0.5),
        ("<think>hm</think><answer>2</answer>", 1 + 0.5),
        ("Answer 2 is better. [[B]]", 1.5),
        ("<think>Answer 1 is better.</think><answer>1</answer>", 0.5),
        ("nothing", 0.0),
    ],
)
def test_verdicts_on_pairs(text, value):
    """R1-Reward: 0.5 format + right (1 + 0.5 consistency)."""
    assert score("pair_verdict", text, "2") == value
    assert score("pair_verdict", text, 2, format=0, consistency=0) == (value >= 1)


def test_a_solution_that_is_no_verdict():
    with pytest.raises(DataError, match="pair_verdict compares with 1, 2 or tie, not with 'left'"):
        score("pair_verdict", "<answer>1</answer>", "left")
