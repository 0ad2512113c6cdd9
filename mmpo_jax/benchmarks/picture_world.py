"""The picture world: captions of held-out scenes, sampled and greedy, and questions about them."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from mmpo_jax.benchmarks.benchmark import Asked, Files, Metric, Scores, benchmark
from mmpo_jax.benchmarks.tables import Row, as_id, said
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.sections import PositiveInt, Seed
from mmpo_jax.data.records import Record, Turn
from mmpo_jax.picture_world import records as world
from mmpo_jax.picture_world.language import ANSWERS, Question
from mmpo_jax.picture_world.metrics import caption_counts, ratios
from mmpo_jax.picture_world.render import MIN_IMAGE_SIZE
from mmpo_jax.picture_world.world import Scene

Split = Literal["train", "align", "validation", "test"]
NonNegative = Annotated[int, Field(ge=0, strict=True)]

SAMPLED, GREEDY, QUESTIONS = "sampled", "greedy", "questions"
"""What the names of its ways to ask begin with."""

LENGTH = "mean length [words]"
METRICS = (
    Metric("sampled/chair_i", "less", heading="CHAIR_i", curve="CHAIR_i"),
    Metric("sampled/chair_s", "less", heading="CHAIR_s", curve="CHAIR_s"),
    Metric("sampled/recall", "more", guards="recall", heading="recall", curve="recall"),
    Metric("sampled/mean_length", form=".1f", guards="length", heading="length", curve=LENGTH),
    Metric("sampled/unparsed", "less", guards="reading", column=False),
    Metric("greedy/chair_i", "less", curve="CHAIR_i", column=False),
    Metric("greedy/chair_s", "less", heading="greedy CHAIR_s", curve="CHAIR_s"),
    Metric("greedy/recall", "more", guards="recall", heading="greedy recall", curve="recall"),
    Metric("greedy/mean_length", form=".1f", curve=LENGTH, column=False),
    Metric("yes_no_accuracy", "more", guards="accuracy", heading="yes/no"),
)


def asked(
    files: Files,
    *,
    split: Split = "test",
    size: PositiveInt = 500,
    seed: Seed = 0,
    image_size: Annotated[int, Field(ge=MIN_IMAGE_SIZE)] = 48,
    questions: NonNegative = 8,
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,),
    max_new_tokens: PositiveInt = 64,
) -> list[Asked]:
    """A caption of every scene for each of `seeds`, sampled at temperature 1, a greedy one, and so
    many yes/no questions about each, answered by the more likely word."""
    scenes = world.prompt_records(split, seed, size, image_size)
    captions = [
        Asked(scenes, max_new_tokens, 1.0, seed=number, name=f"{SAMPLED}-{number}")
        for number in seeds
    ]
    captions.append(Asked(scenes, max_new_tokens, name=GREEDY))
    about = [
        Record(f"{scene.id}/{place}", scene.images, (Turn("user", question.text),), ())
        for index, scene in enumerate(scenes)
        for place, question in enumerate(_held_out(split, seed, index, questions))
    ]
    return [*captions, *([Asked(about, 1, name=QUESTIONS, reads="yes_no")] if about else [])]


@benchmark(
    source="",
    answers="`response` by `id`, `sampled-SEED/SCENE`, `greedy/SCENE` or `questions/SCENE/NUMBER`",
    metrics=METRICS,
    asks=asked,
)
def picture_world(
    files: Files,
    answers: Sequence[Row],
    *,
    split: Split = "test",
    size: PositiveInt = 500,
    seed: Seed = 0,
    questions: NonNegative = 8,
) -> Scores:
    """CHAIR, recall and length of captions against the scenes themselves, and the share of right
    answers to yes/no questions.

    `sampled/...` are of all captions of all seeds, `greedy/...` of the greedy ones, with the names
    of `picture_world.metrics.caption_metrics`; `yes_no_accuracy` is of all questions, `yes_no/...`
    of each kind.
    """
    scenes = world.scenes(split, seed, size)
    names = [world.scene_id(split, seed, index) for index in range(size)]
    places = {name: index for index, name in enumerate(names)}
    rows: list[dict[str, Any]] = [{"id": name, "answers": {}, "scores": {}} for name in names]
    held_out = functools.cache(lambda index: _held_out(split, seed, index, questions))
    for answer in answers:
        way, name, number = _place(answer, places)
        row, text = rows[places[name]], said(answer, "response")
        row["answers"][way if number is None else f"{way}/{number}"] = text
        if number is None:
            counts = _of_caption(way, text, scenes[places[name]])
        else:
            counts = _of_answer(answer, text, number, held_out(places[name]))
        for metric, pair in counts.items():
            before = row["scores"].get(metric, (0, 0))
            row["scores"][metric] = tuple(map(sum, zip(before, pair, strict=True)))
    answered = [row for row in rows if row["scores"]]
    metrics = _pooled([row["scores"] for row in answered])
    beside = {"scenes": len(answered), "answers": len(answers)}
    return Scores(metrics, beside, answered)


def _held_out(split: str, seed: int, index: int, count: int) -> list[Question]:
    return world.held_out_questions(split, seed, index, count)


def _place(answer: Row, places: Mapping[str, int]) -> tuple[str, str, int | None]:
    """(way of asking, scene, number of the question) of an answer.

    Raises:
      MmpoError: it is none's.
    """
    way, _, rest = as_id(answer.need("id")).partition("/")
    name, _, number = rest.partition("/")
    is_question = way == QUESTIONS
    known = is_question or way == GREEDY or way.startswith(f"{SAMPLED}-")
    if not known or name not in places or is_question != number.isdigit():
        raise MmpoError(
            f"{answer.name}: there is no question {answer.get('id')!r} about these {len(places)} "
            "scenes"
        )
    return way, name, int(number) if is_question else None


def _of_caption(way: str, text: str, scene: Scene) -> dict[str, tuple[int, int]]:
    decoding = way.partition("-")[0]
    return {f"{decoding}/{name}": pair for name, pair in caption_counts(text, scene).items()}


def _of_answer(
    answer: Row, text: str, number: int, questions: Sequence[Question]
) -> dict[str, tuple[int, int]]:
    if number >= len(questions):
        raise MmpoError(
            f"{answer.name}: a scene has {len(questions)} questions, and {answer.get('id')!r} is "
            "none of them; `questions` says how many were asked"
        )
    question = questions[number]
    pair = int(text.strip().lower() == ANSWERS[question.answer]), 1
    return {"yes_no_accuracy": pair, f"yes_no/{question.kind}": pair}


def _pooled(counts: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, float]:
    """The metrics of all scenes; a scene need not have all kinds of questions."""
    names = sorted({name for of_scene in counts for name in of_scene}, key=_order)
    kept = [{name: of_scene.get(name, (0, 0)) for name in names} for of_scene in counts]
    return ratios(kept)


def _order(name: str) -> tuple[int, str]:
    kinds = (SAMPLED, GREEDY, "yes_no_accuracy", "yes_no")
    return next(n for n, kind in enumerate(kinds) if name.startswith(kind)), name
