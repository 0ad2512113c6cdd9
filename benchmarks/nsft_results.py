"""nSFT against its baselines on the picture world: hallucination, and the price in answers.

    python benchmarks/nsft_results.py --seeds 0 1 2 --output runs/nsft

Of the same scenes, true data have a true caption and the worst of the model's own, own data the
best and the worst of its own. Every method gets the same learning rates to try (tried_rates.py).
Prints the tables of tries and results, those in docs/results.md.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np
from picture_world_preferences import correct
from tried_rates import Method, compare, parse_options

from mmpo_jax.correction.corrections import Error, corrected
from mmpo_jax.correction.correctors import scene_of
from mmpo_jax.data.files import write_rows
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.readers import read_records
from mmpo_jax.data.records import Record
from mmpo_jax.picture_world.language import ANSWERS, questions

KL = ("training.objective.kl_weight=0.1", "training.reference.type=online")
SFT, NSFT, DPO, GT_DPO = (
    f"objectives/picture_world_{name}" for name in ("sft", "nsft", "dpo", "gt_dpo")
)
METHODS = {
    "continual SFT": Method(SFT, "true_pairs"),
    "GT-DPO": Method(GT_DPO, "true_pairs"),
    "nSFT": Method(NSFT, "true_corrections"),
    "nSFT with KL": Method(NSFT, "true_corrections", KL),
    "nSFT, questions apart": Method(NSFT, "true_corrections_apart"),
    "nSFT, other questions": Method(NSFT, "true_corrections_other"),
    "SFT, own captions": Method(SFT, "pairs"),
    "DPO, own captions": Method(DPO, "pairs"),
    "nSFT, own captions": Method(NSFT, "corrections"),
}


def main() -> None:
    options = parse_options(__doc__, "runs/nsft", METHODS)
    compare(options, METHODS, lambda bench: make_variants(bench.data, bench.seed))


def make_variants(data: str, seed: int) -> None:
    """Writes other forms of the corrected true pairs: with the questions apart, and with as many
    questions about the scene that have nothing to do with what was said wrong."""
    other = os.path.join(data, "true_corrections_other.jsonl")
    if os.path.exists(other):
        return
    correct(os.path.join(data, "true_pairs.jsonl"), seed, "_apart", layout="apart")
    writer = Writer(root=data, copies=os.path.join(data, "images"))
    records, _ = read_records(os.path.join(data, "true_corrections.jsonl"))
    rng = np.random.default_rng(seed)
    rows = (
        FORMATS["record"].write(other_questions(record, rng, seed), writer) for record in records
    )
    write_rows(other, rows)


def other_questions(record: Record, rng: np.random.Generator, seed: int) -> Record:
    """A corrected record with as many other questions, as many of them with the answer yes."""
    scene = scene_of(record.solution)
    assert scene is not None
    chosen, rejected = record.responses
    plain = dataclasses.replace(chosen, turns=chosen.turns[:1])
    count = (len(chosen.turns) - 1) // 2
    asked = questions(scene, rng, count)
    yes, no = ([question.text for question in asked if question.answer is a] for a in (True, False))
    errors = [Error("other", "", *pair) for pair in zip(yes, no, strict=True)]
    before = dataclasses.replace(record, responses=(plain, rejected))
    return corrected(before, errors, (ANSWERS[True], ANSWERS[False]), seed, "dialogue")


if __name__ == "__main__":
    main()
