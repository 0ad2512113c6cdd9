"""Folders of runs as `mmpo align` and `mmpo train` leave them, without running anything."""

import io
import itertools
import json
import math

import numpy as np
import pyarrow as pa
from PIL import Image

from mmpo_jax.core.files import write_table
from mmpo_jax.core.timings import add_time
from mmpo_jax.data.records import ImageRef, Record, Turn
from mmpo_jax.feedback.judge import JUDGED
from mmpo_jax.feedback.scores import accepted
from mmpo_jax.reporting.browse import SeenPair, SeenPrompt, SeenResponse, Sighting
from mmpo_jax.reporting.prompts import write_prompts
from mmpo_jax.reporting.thumbnails import MAX_BYTES

EVIL = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=2</script>&amp;\''
"""What a page must show to the letter."""
RECIPE = {
    "model": "builtin:picture_world",
    "rounds": 2,
    "data": {"source": "file", "path": "prompts.jsonl"},
    "feedback": {"type": "claims"},
    "training": {"objective": [{"type": "dpo"}], "batch_size": 8},
}
THINGS = ("dog", "red hat", "bicycle", "bench", "tall tree", "river", "boat", "old man")


def picture(number, size=64):
    """An image's bytes, another colour for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, 3, dtype=np.uint8)
    image = Image.fromarray(np.broadcast_to(pixels, (size, size, 3)).copy())
    written = io.BytesIO()
    image.save(written, "PNG")
    return written.getvalue()


def one_response(draw, number):
    """(text, claims as the judge's details have them)."""
    said = [THINGS[place] for place in draw.permutation(len(THINGS))[: draw.integers(1, 5)]]
    verdicts = [
        {
            "claim": f"There is a {thing}.",
            "question": f"Is there a {thing}?",
            "p_yes": float(yes),
            "p_no": float(1 - yes),
        }
        for thing, yes in zip(said, draw.random(len(said)), strict=True)
    ]
    return f"Number {number}: I see a " + " and a ".join(said) + ".", verdicts


def write_round(folder, ids, seed=0, samples=4, texts=()):
    """The stages of a round that is judged and paired.

    Args:
      folder: of the round.
      ids: of its prompts.
      seed: of what is said.
      samples: responses of every prompt.
      texts: what the first responses say instead.
    """
    draw = np.random.default_rng(seed)
    records, generated, judged, pairs = [], [], [], []
    for number, name in enumerate(ids):
        image = ImageRef(f"{name}.png", data=picture(number))
        turn = Turn("user", f"What is in picture {name}?")
        records.append(Record(id=name, prompt=(turn,), images=(image,), responses=()))
        scores = []
        for sample in range(samples):
            text, verdicts = one_response(draw, sample)
            if len(generated) < len(texts):
                text = texts[len(generated)]
            failed = draw.random() < 0.05
            score = -sum(not accepted(each["p_yes"], each["p_no"]) for each in verdicts)
            scores.append(math.nan if failed else float(score))
            generated.append(
                {"prompt_id": name, "sample": sample, "text": text, "finished": sample != 1}
            )
            judged.append(
                {
                    "prompt_id": name,
                    "sample": sample,
                    "score": scores[-1],
                    "reason": "no_claims" if failed else None,
                    "details": json.dumps({"verdicts": verdicts}),
                }
            )
        known = [sample for sample in range(samples) if not math.isnan(scores[sample])]
        best, worst = (pick(known, key=lambda s: scores[s]) for pick in (max, min))
        if scores[best] > scores[worst]:
            sides = {"chosen": best, "rejected": worst}
            pairs.append(
                {"prompt_id": name}
                | {f"{side}_sample": sample for side, sample in sides.items()}
                | {f"{side}_score": scores[sample] for side, sample in sides.items()}
            )
    write_table(folder / "generate.parquet", pa.Table.from_pylist(generated))
    write_table(folder / "judge.parquet", pa.Table.from_pylist(judged, schema=JUDGED))
    write_table(folder / "pairs.parquet", pa.Table.from_pylist(pairs))
    write_prompts(str(folder), records)


def write_curves(folder, steps=20, seed=0):
    draw = np.random.default_rng(seed)
    rows = []
    for step in range(1, steps + 1):
        margin = step / steps + 0.1 * draw.random()
        row = {
            "step": step,
            "loss": 0.7 - 0.3 * margin,
            "rewards/margins": margin,
            "rewards/accuracies": min(1.0, 0.5 + margin / 2),
            "rewards/chosen": margin / 3,
            "rewards/rejected": -margin / 2,
            "grad_norm": None if step == 3 else draw.random(),
            "perf/tokens_per_second": 1000 + 50 * draw.random(),
        }
        if step % 5 == 0:
            row["eval_loss"] = row["loss"] + 0.05
        rows.append(json.dumps(row))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("\n".join(rows) + "\n")


SHOWN = (
    ("sampled/chair_s", "CHAIR_s", "less"),
    ("greedy/chair_s", "CHAIR_s", "less"),
    ("sampled/recall", "recall", "more"),
    ("greedy/recall", "recall", "more"),
    ("sampled/mean_length", "length", None),
    ("yes_no_accuracy", "", "more"),
)
"""Metric, title of its curve and which way is better."""
WORLD = "picture_world"


def world_metrics(index, seed):
    """What a round was measured to be; an error rate is not among what is shown."""
    wobble = 0.01 * seed
    values = {
        "sampled/chair_s": 0.48 / (index + 1) + wobble,
        "greedy/chair_s": 0.4 / (index + 1) + wobble,
        "sampled/recall": 0.95 - 0.01 * index + wobble,
        "greedy/recall": 0.99 - 0.01 * index,
        "sampled/mean_length": 12.0 - index,
        "yes_no_accuracy": 0.99,
        "sampled/error_colour": 0.02,
    }
    return {f"{WORLD}/{name}": value for name, value in values.items()}


def world_shown():
    return [
        {"key": f"{WORLD}/{name}", "benchmark": WORLD, "heading": name, "better": better}
        | {"format": ".3f", "guards": None, "panel": panel}
        for name, panel, better in SHOWN
    ]


def world_tax(rounds, seed):
    """Gains and losses, as `evaluation.tax` writes them."""
    rows = []
    for name, panel, better in SHOWN:
        values = [world_metrics(index, seed)[f"{WORLD}/{name}"] for index in range(rounds + 1)]
        cells = []
        for value in values:
            cell = {"value": value, "low": value - 0.02, "high": value + 0.02}
            gained = value - values[0]
            way = "more" if gained > 0 else "less"
            verdict = "same" if not gained else "better" if way == better else "worse"
            tested = {"difference": gained, "p": 0.003, "test": "mcnemar", "verdict": verdict}
            cells.append(cell | (tested if cells else dict.fromkeys(tested)))
        row = {"benchmark": WORLD, "metric": name, "heading": name, "format": ".3f"}
        row |= {"panel": panel}
        rows.append(row | {"better": better, "guards": None, "records": 500, "cells": cells})
    compared = ["start", *(f"round {index}" for index in range(1, rounds + 1))]
    tax = {"compared": compared, "result": compared[-1], "confidence": 0.95, "rows": rows}
    return tax | {"warnings": [f"round {rounds}: recall fell"]}


def write_answers(folder, index, questions=6):
    """What a model answered to a benchmark's questions, of which all but the last are kept."""
    rows = [
        {"id": f"q{number}", "response": f"yes , {number} circles" + " and a star" * (index == 2)}
        for number in range(questions)
    ]
    folder.mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{WORLD}.answers.jsonl").write_text(lines)
    scored = [{"id": row["id"], "scores": {"sampled/chair_s": 1}, "read": "yes"} for row in rows]
    (folder / f"{WORLD}.scores.json").write_text(json.dumps({"rows": scored}))
    records = [
        Record(f"q{number}", (ImageRef("q.png", data=picture(99)),), (Turn("user", "What ?"),), ())
        for number in range(questions - 1)
    ]
    write_prompts(str(folder), records, f"{WORLD}-prompts")


def write_alignment(
    folder, prompts=12, rounds=2, seed=0, same_prompts=False, questions=0, **of_round
):
    """A finished alignment; its folder."""
    folder.mkdir(parents=True)
    recipe = {**RECIPE, "rounds": rounds, "seed": seed}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    rows = []
    for index in range(rounds + 1):
        place = folder / f"round-{index}"
        place.mkdir()
        metrics = world_metrics(index, seed)
        told = {"metrics": metrics, "shown": world_shown()}
        (place / "evaluation.json").write_text(json.dumps(told))
        if questions:
            write_answers(place / "evaluation", index, questions)
        add_time(place, "evaluate", "k", {"seconds": 4.0 + index})
        row = {"index": index, "metrics": metrics, "sources": {}}
        if index:
            first = 0 if same_prompts else (index - 1) * prompts
            ids = [f"p{number:04d}" for number in range(first, first + prompts)]
            write_round(place, ids, seed=seed + index, **of_round)
            write_curves(place / "train", seed=seed + index)
            (place / "train.json").write_text('{"trained": 5}')
            row |= {"prompts": prompts, "responses": 4 * prompts, "pairs": 5, "trained": 5}
            row |= {"claims": 80, "rejected_claims": 20, "dpo_accuracy": 0.8, "dpo_margin": 0.1}
        rows.append(row)
    (folder / "rounds.json").write_text(json.dumps(rows))
    (folder / "tax.json").write_text(json.dumps(world_tax(rounds, seed)))
    (folder / "model.json").write_text("{}")
    return folder


def write_training(folder, finished=True, seed=0):
    """A training; its folder."""
    write_curves(folder, steps=300, seed=seed)
    (folder / "base").mkdir()
    recipe = {"model": "somewhere", "seed": seed, "data": [{"source": "file", "path": "a.jsonl"}]}
    recipe["training"] = {"objective": [{"type": "dpo"}], "optimizer": {"learning_rate": 5e-7}}
    (folder / "base" / "card.json").write_text(json.dumps({"recipe": recipe}))
    if finished:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    return folder


def large_prompts(count, samples=10, words=90, claims=8):
    """Prompts as photographs have them, with responses and claims as long as RLAIF-V's, of words
    that are as frequent as English ones; their pictures are as large as any."""
    draw = np.random.default_rng(0)
    letters = draw.integers(97, 123, (4000, 11), dtype=np.uint8)
    known = np.array([bytes(row[: 2 + place % 9]).decode() for place, row in enumerate(letters)])
    said_of_prompt = 15 + samples * (words + 18 * claims)
    said = iter(known[np.minimum(draw.zipf(1.15, count * said_of_prompt), 4000) - 1].tolist())

    def text(size):
        return " ".join(itertools.islice(said, size))

    def response(sample):
        said = [(text(9), text(9), float(yes), float(1 - yes)) for yes in draw.random(claims)]
        return SeenResponse(sample, "policy", text(words), True, -1.0, None, said)

    return [
        SeenPrompt(
            f"prompt-{number}",
            text(15),
            [f"images/{number}.jpg"],
            [draw.bytes(MAX_BYTES)],
            [Sighting(0, 1, [response(i) for i in range(samples)], [SeenPair(0, 1, 2.0)])],
        )
        for number in range(count)
    ]
