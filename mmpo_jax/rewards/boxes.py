"""Rewards of detected boxes, as in Visual-RFT (arXiv 2503.01785) and Vision-R1 (arXiv 2503.18013).

Boxes are corners [left, top, right, bottom], in the units that the data's solutions have. A model
may write them as JSON or as Python literals: one or several, in a list, with commas between or
under `boxes` of an object; each as four numbers, or as an object with them under one of `BOX_KEYS`
and perhaps a confidence. What is written so and is not four numbers in order is a broken box. In
other text, literals of other forms included, every `[a, b, c, d]` of four numbers is a box. The
data may write the right ones in the same forms.
"""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.optimize import linear_sum_assignment

from mmpo_jax.core.errors import DataError
from mmpo_jax.objectives.registry import Share
from mmpo_jax.rewards.registry import final_answer, reward

BOX_KEYS = ("Position", "bbox_2d", "bbox", "box", "position")
CONFIDENCE_KEYS = ("Confidence", "confidence", "score")
TRUTH = (
    "boxes [left, top, right, bottom]: a list, an object with one as `boxes`, or a text with them"
)

MAX_BOXES = 500
"""Most boxes in a text; more are worth 0, as matching them would take long."""
MAX_COORDINATE = 1e6
"""Largest coordinate; what is beyond it is none, so that areas stay far from overflowing."""

_NUMBER = r"\s*([-+]?(?:\d{1,12}(?:\.\d{0,12})?|\.\d{1,12}))\s*"
_QUADRUPLE = re.compile(rf"\[{_NUMBER},{_NUMBER},{_NUMBER},{_NUMBER}\]")


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One thing that a text says to be somewhere."""

    box: tuple[float, float, float, float] | None
    """None where it is no box: not four numbers, or corners in the wrong order."""
    confidence: float | None = None
    """None where none, or none from 0 to 1, was given."""


def read_predictions(text: str) -> list[Prediction] | None:
    """The boxes of a text, broken ones included; None where it holds no list of any."""
    text = final_answer(text)
    places = [place for bracket in "[{" if (place := text.find(bracket)) >= 0]
    if not places:
        return None
    inside = text[min(places) : max(text.rfind("]"), text.rfind("}")) + 1]
    entries = _entries(_literal(inside))
    if entries is None or not any(map(_says_a_box, entries)):
        found = [[float(number) for number in match] for match in _QUADRUPLE.findall(inside)]
        entries = found or entries
    if entries is None or len(entries) > MAX_BOXES:
        return None
    return [_prediction(entry) for entry in entries]


def _entries(value: Any) -> Sequence[Any] | None:
    """What is listed in a value, each to be a box; None where it is no list, and no single box."""
    if isinstance(value, Mapping) and isinstance(value.get("boxes"), list | tuple):
        value = value["boxes"]
    if isinstance(value, Mapping) or (isinstance(value, list | tuple) and _is_quadruple(value)):
        return [value]
    return value if isinstance(value, list | tuple) else None


def _literal(text: str) -> Any:
    """JSON, or a Python literal as models write it; None where it is neither."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _is_quadruple(value: Sequence[Any]) -> bool:
    return len(value) == 4 and not any(isinstance(x, Mapping | Sequence) for x in value)


def _says_a_box(entry: Any) -> bool:
    """Whether an entry is in a form of boxes, be it a whole or a broken one."""
    if isinstance(entry, Mapping):
        return any(key in entry for key in BOX_KEYS)
    nested = Mapping | list | tuple
    return isinstance(entry, list | tuple) and not any(isinstance(x, nested) for x in entry)


def _prediction(entry: Any) -> Prediction:
    confidence = None
    if isinstance(entry, Mapping):
        confidence = next((entry[key] for key in CONFIDENCE_KEYS if key in entry), None)
        entry = next((entry[key] for key in BOX_KEYS if key in entry), None)
    sure = _number(confidence)
    return Prediction(_box(entry), sure if sure is not None and 0 <= sure <= 1 else None)


def _box(value: Any) -> tuple[float, float, float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 4:
        return None
    numbers = [_number(x) for x in value]
    if any(x is None or abs(x) > MAX_COORDINATE for x in numbers):
        return None
    left, top, right, bottom = (float(x) for x in numbers if x is not None)
    return (left, top, right, bottom) if left < right and top < bottom else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:
        return None


def true_boxes(solution: Any) -> np.ndarray:
    """float64[G, 4] of boxes in one of the forms that models write, as a value or as a text, or of
    an object that holds either as `boxes`.

    Raises:
      DataError: it is none of them, or some box is broken.
    """
    boxes = solution.get("boxes", solution) if isinstance(solution, Mapping) else solution
    predictions: list[Prediction] | None = None
    if isinstance(boxes, str):
        predictions = read_predictions(boxes)
    elif (entries := _entries(boxes)) is not None:
        predictions = [_prediction(entry) for entry in entries]
    read = [None] if predictions is None else [prediction.box for prediction in predictions]
    if None in read:
        raise DataError(f"rewards of boxes compare with a list of boxes, not {solution!r:.80}")
    return np.array(read, np.float64).reshape(-1, 4)


def ious(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of every two boxes: [P, 4], [G, 4] -> [P, G]."""
    corner = np.maximum(first[:, None, :2], second[None, :, :2])
    opposite = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.prod(np.maximum(opposite - corner, 0), axis=-1)
    areas = [np.prod(boxes[:, 2:] - boxes[:, :2], axis=-1) for boxes in (first, second)]
    return common / (areas[0][:, None] + areas[1][None, :] - common)


def match(predictions: Sequence[Prediction], truth: np.ndarray) -> dict[int, float]:
    """Index of a prediction -> its IoU with the true box that it is matched with.

    One to one, with the largest sum of IoU (Hungarian matching). Of whole boxes as many are matched
    as there are true ones, if need be with an IoU of 0; broken ones never are.
    """
    whole = [(i, p.box) for i, p in enumerate(predictions) if p.box is not None]
    if not whole or not len(truth):
        return {}
    overlap = ious(np.array([box for _, box in whole]), truth)
    rows, columns = linear_sum_assignment(overlap, maximize=True)
    return {
        whole[row][0]: float(overlap[row, column])
        for row, column in zip(rows, columns, strict=True)
    }


@reward(TRUTH)
def iou(text: str, solution: Any) -> float:
    """Sum of the IoU of boxes said with the true ones they match / max(boxes said, boxes true).

    Visual-RFT (arXiv 2503.01785). Matched one to one, with the largest sum.
    """
    truth, predictions = true_boxes(solution), read_predictions(text)
    if predictions is None:
        return 0.0
    most = max(len(predictions), len(truth))
    return sum(match(predictions, truth).values()) / most if most else 1.0


@reward(TRUTH)
def confidence(text: str, solution: Any) -> float:
    """Mean over the boxes said of c where one overlaps its match, else 1 - c; c its confidence.

    Visual-RFT (arXiv 2503.01785). A broken box, or one without a confidence, gets nothing.
    """
    truth, predictions = true_boxes(solution), read_predictions(text)
    if not predictions:
        return 0.0
    matched = match(predictions, truth)
    total = 0.0
    for i, said in enumerate(predictions):
        if said.box is not None and said.confidence is not None:
            hit = matched.get(i, 0.0) > 0
            total += said.confidence if hit else 1 - said.confidence
    return total / len(predictions)


@reward(TRUTH)
def box_format(text: str, solution: Any) -> float:
    """1 where the text has boxes and every one is whole; else 0.

    Vision-R1 (arXiv 2503.18013): its dual format reward.
    """
    true_boxes(solution)
    predictions = read_predictions(text)
    return float(bool(predictions) and all(p.box is not None for p in predictions or ()))


@reward(TRUTH)
def box_recall(
    text: str, solution: Any, *, found: Share = 0.5, low: Share = 0.5, high: Share = 0.75
) -> float:
    """f(true boxes that are matched with an IoU of `found` / true boxes); f(x) is 1 from `high` on,
    0 below `low`, else x.

    Vision-R1 (arXiv 2503.18013), eq. 5; its second stage has 0.75, 0.75 and 0.9.
    """
    truth, predictions = true_boxes(solution), read_predictions(text)
    if predictions is None or not len(truth):
        return 0.0
    hits = sum(value >= found for value in match(predictions, truth).values())
    return differentiate(hits / len(truth), low, high)


@reward(TRUTH)
def box_precision(
    text: str, solution: Any, *, found: Share = 0.5, low: Share = 0.5, high: Share = 0.75
) -> float:
    """Mean over the matches of f(IoU) where that is `found` at least, else 0; f(x) is 1 from `high`
    on, 0 below `low`, else x.

    Vision-R1 (arXiv 2503.18013), eq. 6; its second stage has 0.75, 0.75 and 0.9.
    """
    truth, predictions = true_boxes(solution), read_predictions(text)
    matched = match(predictions or [], truth)
    if not matched:
        return 0.0
    each = [differentiate(value, low, high) * (value >= found) for value in matched.values()]
    return sum(each) / len(each)


def differentiate(value: float, low: float, high: float) -> float:
    """1 from `high` on, 0 below `low`, else the value itself."""
    if value >= high:
        return 1.0
    return 0.0 if value < low else value
