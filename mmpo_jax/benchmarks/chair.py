"""CHAIR: classes of COCO that captions invent, Rohrbach et al. 2018 (arXiv 1809.02156)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

from mmpo_jax.benchmarks.benchmark import Asked, Files, Metric, Scores, benchmark
from mmpo_jax.benchmarks.coco import (
    COCO_SOURCE,
    Mentions,
    Totals,
    Vocabulary,
    beside_of,
    check_can_score,
    first_file,
    held_by,
    image_number,
    published_file,
    read_annotations,
    read_classes,
)
from mmpo_jax.benchmarks.english import English, Tokenizer
from mmpo_jax.benchmarks.singulars import singular_by_rules
from mmpo_jax.benchmarks.tables import Row, said
from mmpo_jax.core.sections import PositiveInt, Seed
from mmpo_jax.data.records import Record, Turn

Singulars = Literal["pattern", "wordnet"]

SOURCE = (
    f"{COCO_SOURCE} (instances_*2014.json, captions_*2014.json) and "
    "github.com/LisaAnne/Hallucination, data/synonyms.txt"
)
DOUBLES = (
    *("motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal"),
    *("stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "sports ball"),
    *("baseball bat", "baseball glove", "tennis racket", "wine glass", "hot dog", "cell phone"),
    *("mobile phone", "teddy bear", "hair drier", "potted plant", "laptop computer"),
)
"""Names of classes that are two words."""

TABLES = ("synonyms.txt", "data/synonyms.txt", "chair_original_synonyms.txt")
"""What the table of synonyms is called."""

METRICS = (
    Metric("CHAIRs", "less", curve=True),
    Metric("CHAIRi", "less", curve=True),
    Metric("recall", "more", guards="recall", curve=True),
    Metric("words_per_caption", None, ".1f", guards="length", heading="words"),
)


def questions(
    files: Files,
    *,
    count: PositiveInt = 500,
    seed: Seed = 0,
    prompt: str = "Please describe this image in detail.",
    max_new_tokens: PositiveInt = 512,
) -> list[Asked]:
    """Some images of val2014, drawn by the seed, to be described greedily.

    As papers do, each of which draws its own, so numbers are compared on the same ones alone.
    """
    check_can_score(files, *TABLES)
    path = published_file(files.folder, "captions_val2014.json")
    listed = sorted(read_annotations(path).get("images", ()), key=lambda image: image["id"])
    drawn = random.Random(seed).sample(listed, min(count, len(listed)))
    records = [
        Record(
            id=str(image["id"]),
            images=(files.image(Row(str(path), image["id"], image), "file_name"),),
            prompt=(Turn("user", prompt),),
            responses=(),
        )
        for image in drawn
    ]
    return [Asked(records, max_new_tokens)]


@benchmark(
    source=SOURCE,
    answers="`caption` or `response` by `image_id` or `id` of COCO, or the script's own file with "
    "`imgToEval`",
    metrics=METRICS,
    asks=questions,
    images="COCO val2014 (cocodataset.org)",
)
def chair(
    files: Files,
    answers: Sequence[Row],
    *,
    singulars: Singulars = "pattern",
    tokenizer: Tokenizer = "nltk_3.8",
) -> Scores:
    """Share of captions that mention a class which is not in the image (CHAIRs), and share of
    such mentions (CHAIRi).

    An image holds what masks or one of its reference captions say. The official script finds
    singulars by the rules of pattern.en, which lose "bus" and "glass"; `wordnet` takes those of
    WordNet, as later copies do. Both are of words that are divided as by nltk 3.8, or the installed
    one.
    """
    english = English(tokenizer)
    singular = singular_by_rules if singulars == "pattern" else english.singular
    classes = read_classes(first_file(files, *TABLES), stripped=False)
    vocabulary = Vocabulary.of(classes, DOUBLES)

    def words_of(text: str) -> list[str]:
        return vocabulary.joined([singular(word) for word in english.tokens(text.lower())])

    captions = [row for answer in answers for row in _captions(answer)]
    images = [image_number(row.need("image_id", "id"), row.name) for row in captions]
    held = held_by(images, files.folder, vocabulary, words_of)
    mentions = [
        Mentions(image, text, vocabulary.named(words_of(text)), held[image])
        for image, text in zip(images, map(_text, captions), strict=True)
    ]
    totals = Totals.of(mentions)
    metrics = {**_copied(answers), "CHAIRs": totals.of_all, "CHAIRi": totals.of_mentions}
    rows = [_row(one) for one in mentions]
    return Scores(metrics, beside_of(totals, mentions), rows, english.made_with())


def _row(one: Mentions) -> dict[str, Any]:
    scores = {
        "CHAIRs": bool(one.invented),
        "CHAIRi": [len(one.invented), len(one.named)],
        "recall": [len(one.right), len(one.held)],
        "words_per_caption": len(one.caption.split()),
    }
    return {**one.told(), "scores": scores}


def _captions(answer: Row) -> list[Row]:
    """A row, or those of the script's file, which is one object."""
    captions = answer.get("imgToEval")
    if captions is None:
        return [answer]
    return [Row(answer.file, number, values) for number, values in enumerate(captions.values(), 1)]


def _text(row: Row) -> str:
    return said(row, "caption", "response", "answer", "text")


def _copied(answers: Sequence[Row]) -> dict[str, float]:
    """What other tools said of the captions, which the script repeats (SPICE, CIDEr, ...)."""
    overall = answers[0].get("overall") or {}
    return {name: float(value) for name, value in overall.items() if isinstance(value, int | float)}
