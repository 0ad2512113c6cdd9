"""Object HalBench: classes of COCO that descriptions invent, Yu et al. 2023 (arXiv 2312.00849)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from mmpo_jax.benchmarks.benchmark import Asked, Files, Metric, Scores, benchmark, share
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
    read_classes,
)
from mmpo_jax.benchmarks.english import English, Tokenizer
from mmpo_jax.benchmarks.extracted_objects import (
    Caption,
    Extracted,
    Reading,
    asked_objects,
    published_objects,
)
from mmpo_jax.benchmarks.judging import Judge
from mmpo_jax.benchmarks.noun_runs import Nouns, Parser, noun_runs, parser_of
from mmpo_jax.benchmarks.tables import Row, have_ids, match_by_order, read_table, said
from mmpo_jax.core.sections import PositiveInt
from mmpo_jax.data.records import Record, Turn

Objects = Literal["judge", "words"]

QUESTIONS = ("obj_halbench_300_with_image.jsonl", "eval/data/obj_halbench_300_with_image.jsonl")
TABLES = ("synonyms_refine.txt", "eval/data/synonyms_refine.txt")
SOURCE = (
    f"{COCO_SOURCE} (instances_*2014.json, captions_*2014.json) and github.com/RLHF-V/RLAIF-V, "
    "eval/data/synonyms_refine.txt and, to ask a model, obj_halbench_300_with_image.jsonl"
)
METRICS = (
    Metric("CHAIRs_refine", "less", heading="response hall", curve=True),
    Metric("CHAIRi", "less", heading="object hall", curve=True),
    Metric("obj_rec", "more", guards="recall", heading="recall", curve=True),
    Metric("avg_word_len", None, ".1f", guards="length", heading="words"),
    Metric("unparsed_ratio", "less", guards="reading", heading="unparsed"),
)


def questions(files: Files, *, max_new_tokens: PositiveInt = 1024) -> list[Asked]:
    """The 300 questions, answered greedily; the official script also takes temperature 0, but
    searches by three beams.
    """
    check_can_score(files, *TABLES)
    records = [
        Record(
            id=str(image_number(row.need("image_id"), row.name)),
            images=(files.image(row, "image", "image_path"),),
            prompt=(Turn("user", row.text("question")),),
            responses=(),
        )
        for row in read_table(first_file(files, *QUESTIONS))
    ]
    return [Asked(records, max_new_tokens)]


@benchmark(
    source=SOURCE,
    answers="`text`, `answer` or `response` with `image_id` (or `id`), or in the questions' order; "
    "`prompt` or `question` where a judge is asked without the file of questions",
    judgements="`extract_objs` (a list), `objs` (the nouns of it) or `reply` (a judge's) by "
    "`image_id`, or hall_*.json of the official script",
    unjudged=("objects", "words"),
    metrics=METRICS,
    asks=questions,
    images="COCO (in the file of questions)",
)
def object_halbench(
    files: Files,
    answers: Sequence[Row],
    judge: Judge,
    *,
    objects: Objects = "judge",
    reading: Reading = "official",
    nouns: Nouns = "installed",
    tokenizer: Tokenizer = "nltk_3.8",
) -> Scores:
    """Share of descriptions with a class that is not in the image, of those with any class
    (Response Hall, CHAIRs_refine) and of all (CHAIRs), and of such mentions (Object Hall, CHAIRi).

    A judge lists the objects of a description; the nouns in their names that are words for a class
    are its mentions, each word once. With objects=words they are those of the description itself,
    each time, without a judge. The official script reads a reply that is JSON, or else its last
    line if that is; `any_list` the first list in it, also in a code fence, and `()` as empty.
    spaCy finds the nouns where en_core_web_trf is installed, else nltk.
    """
    english = English(tokenizer)
    classes = read_classes(first_file(files, *TABLES), stripped=True)
    vocabulary = Vocabulary.of(classes, [word for word in classes if " " in word])

    def words_of(text: str) -> list[str]:
        return vocabulary.joined([english.singular(word) for word in english.tokens(text.lower())])

    captions = _captions(files, answers)
    held = held_by({one.image for one in captions}, files.folder, vocabulary, words_of)
    made_with: dict[str, str] = {}
    if objects == "words":
        found = [Extracted(nouns=words_of(one.text)) for one in captions]
    else:
        published = published_objects(judge, captions, reading)
        found = published or asked_objects(files, judge, captions, reading)
        if any(one.names and one.nouns is None for one in found):
            parse, made_with["nouns"] = parser_of(nouns, english)
            found = [_with_nouns(one, vocabulary, parse) for one in found]
    rows = []
    counted: list[Mentions] = []
    for caption, one in zip(captions, found, strict=True):
        mentions = _mentions(caption, one, vocabulary, held[caption.image])
        rows.append(_row(caption, one, mentions))
        counted += [] if mentions is None else [mentions]
    return Scores(
        _metrics(counted), _beside(counted, found), rows, {**made_with, **english.made_with()}
    )


def _with_nouns(one: Extracted, vocabulary: Vocabulary, parse: Parser) -> Extracted:
    """With the nouns of its names, each once: of a name with pairs that are one, these alone."""
    if one.names is None or one.nouns is not None:
        return one
    nouns: list[str] = []
    for name in one.names:
        parsed = parse(f"a {name}")
        nouns += vocabulary.pairs_of([lemma for lemma, _ in parsed]) or noun_runs(parsed)
    return dataclasses.replace(one, nouns=list(dict.fromkeys(nouns)))


def _mentions(
    caption: Caption, one: Extracted, vocabulary: Vocabulary, held: frozenset[str]
) -> Mentions | None:
    """The classes that a description mentions; None where nobody could say."""
    if one.nouns is None and one.names is None:
        return None
    return Mentions(caption.image, caption.text, vocabulary.named(one.nouns or ()), held)


def _captions(files: Files, answers: Sequence[Row]) -> list[Caption]:
    """The descriptions, with their images and questions by number or by order.

    Raises:
      MmpoError: there are no numbers, and no file of questions.
    """
    is_named = have_ids(answers, "image_id")
    asked: list[Row] = []
    if not is_named or any((files.folder / name).exists() for name in QUESTIONS):
        asked = read_table(first_file(files, *QUESTIONS))
    if is_named:
        numbers = [row.need("image_id", "id") for row in answers]
    else:
        numbers = [question.need("image_id") for question, _ in match_by_order(asked, answers)]
    images = [image_number(n, row.name) for n, row in zip(numbers, answers, strict=True)]
    told = {image_number(row.need("image_id"), row.name): row.get("question") for row in asked}
    return [
        Caption(image, row.get("prompt", "question") or told.get(image), _text(row))
        for image, row in zip(images, answers, strict=True)
    ]


def _text(row: Row) -> str:
    return said(row, "text", "answer", "response", "caption").replace("Assistant:", "").strip()


def _metrics(counted: Sequence[Mentions]) -> dict[str, float]:
    """What the official script and its summary print, the summary in percent."""
    totals = Totals.of(counted)
    response, object_ = totals.of_those_with_objects, totals.of_mentions
    words = share(sum(_words(one.caption) for one in counted), len(counted))
    return {
        "Response Hall": 100 * response,
        "Object Hall": 100 * object_,
        "Response Correct": 100 * (1 - response),
        "Object Correct": 100 * (1 - object_),
        "Object Recall": 100 * totals.recall,
        "Average Length": words,
        "COCO Sent Number": totals.with_objects,
        "COCO Word Number": totals.right,
        "GT Word Number": totals.held,
        "CHAIRs": totals.of_all,
        "CHAIRs_refine": response,
        "CHAIRi": object_,
        "obj_rec": totals.recall,
        "sentence_num": totals.captions,
        "coco_sentence_num": totals.with_objects,
        "coco_word_count": totals.right,
        "gt_word_count": totals.held,
        "avg_word_len": words,
        "correct_rate": 1 - response,
        "object_correct_rate": 1 - object_,
    }


def _words(text: str) -> int:
    """As the script counts them: what single blanks divide, of nothing one."""
    return len(text.strip().split(" "))


def _unread(one: Extracted) -> bool:
    return one.names is None and one.nouns is None


def _beside(counted: Sequence[Mentions], found: Sequence[Extracted]) -> dict[str, float]:
    unread = [one for one in found if _unread(one)]
    without = sum(one.reply is None for one in unread)
    return {
        **beside_of(Totals.of(counted), counted),
        "unparsed": len(unread) - without,
        "unparsed_ratio": share(len(unread) - without, len(found)),
        "without_judgement": without,
        "descriptions": len(found),
    }


def _row(caption: Caption, one: Extracted, mentions: Mentions | None) -> dict[str, Any]:
    scores: dict[str, Any] = {metric.name: [0, 0] for metric in METRICS}
    scores["unparsed_ratio"] = _unread(one) and one.reply is not None
    if mentions is not None:
        scores["CHAIRs_refine"] = [bool(mentions.invented), bool(mentions.named)]
        scores["CHAIRi"] = [len(mentions.invented), len(mentions.named)]
        scores["obj_rec"] = [len(mentions.right), len(mentions.held)]
        scores["avg_word_len"] = _words(caption.text)
    told = {"id": caption.image, "caption": caption.text} if mentions is None else mentions.told()
    return {**told, "reply": one.reply, "objects": one.names, "nouns": one.nouns, "scores": scores}
