"""One round of RLAIF-V: generate, divide, conquer, combine, reference, train.

Every stage reads the table of the one before and writes its own (see `core/stages.py`), so a round
goes on where it was stopped, and a changed input runs again what depends on it.

Source of the rules: RLAIF-V (Yu et al. 2024, arXiv 2405.17220) and its repository.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.alignment.pairs import pair_records, pair_rows
from mmpo_jax.checkpoints.cards import ModelCard
from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.checkpoints.fingerprints import fingerprint_model, has_fingerprint
from mmpo_jax.core import progress
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import (
    canonical_json,
    fingerprint_items,
    fingerprint_json,
    read_json,
    write_atomic,
)
from mmpo_jax.core.stages import Stage, StageOutput, run_stage
from mmpo_jax.data.records import Record
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.feedback.claims import Splitter
from mmpo_jax.feedback.labeler import Labeler
from mmpo_jax.feedback.pairing import combine
from mmpo_jax.feedback.scores import ScoredResponse
from mmpo_jax.generation.responses import GENERATED, PROMPTS_PER_PART, generate_stage
from mmpo_jax.recipes.recipe import AlignRecipe
from mmpo_jax.training.loop import TrainingData
from mmpo_jax.training.saving import MODEL
from mmpo_jax.training.stage import TrainingStage, stage_data, train_stage

CONQUER_RULES = 2
"""Part of the key of verdicts: changes with how the labeler is asked."""
COMBINE_RULES = 2
"""Part of the key of pairs: changes with what makes them."""


@dataclasses.dataclass(frozen=True)
class Round:
    """What one round works with."""

    index: int
    """1 for the first."""
    folder: str
    start: Checkpoint
    """What generates, and the reference of the training, which lets go of it."""
    records: list[Record]
    """This round's prompts."""
    tokenized: list[TokenizedRecord]
    recipe: AlignRecipe
    mesh: Mesh
    card: ModelCard
    """Card of the alignment's result, without metrics."""

    def stage(self, name: str, inputs: dict[str, str], settings: Any, num_parts: int = 1) -> Stage:
        return Stage(self.folder, name, inputs, settings, num_parts)

    def run(self, stage: Stage, make_part: Callable[[int], pa.Table]) -> StageOutput:
        def make(part: int) -> pa.Table:
            activity.start_at(part)
            progress.tell()
            return make_part(part)

        with progress.doing(stage.name, stage.num_parts, "parts") as activity:
            return run_stage(stage, make)

    @property
    def num_parts(self) -> int:
        return max(1, -(-len(self.tokenized) // PROMPTS_PER_PART))


def run_round(
    work: Round, splitter: Splitter, labeler: Callable[[], Labeler], labeler_key: str
) -> str:
    """Runs or finishes a round.

    Args:
      work: the round.
      splitter: divides responses into claims.
      labeler: makes the labeler, called only if there is something to label.
      labeler_key: fingerprint of the labeler.

    Returns:
      The Hugging Face folder of the trained model.
    """
    generated = generated_responses(work)
    divided = divide_stage(work, generated, splitter)
    judged = conquer_stage(work, divided, labeler, labeler_key)
    pairs = combine_stage(work, divided, judged)
    return train_round(work, generated, pairs)


def generated_responses(work: Round) -> StageOutput:
    """n responses to every prompt: prompt_id, sample, text, num_tokens, finished."""
    sampling, start = work.recipe.sampling, work.start
    return generate_stage(
        start,
        work.tokenized,
        sampling,
        work.recipe.lengths,
        work.mesh,
        folder=work.folder,
        batch_size=sampling.batch_size,
        seed=work.recipe.seed,
        round_index=work.index,
    )


def divide_stage(work: Round, generated: StageOutput, splitter: Splitter) -> StageOutput:
    """Every response with its claims: ... + claims, questions, unparsed."""
    asked = {record.id: record.prompt[-1].text for record in work.records}

    def make_part(part: int) -> pa.Table:
        samples = work.recipe.sampling.num_samples
        table = generated.table.slice(part * PROMPTS_PER_PART * samples, PROMPTS_PER_PART * samples)
        divisions = [
            splitter.divide(asked[prompt_id.as_py()], text.as_py())
            for prompt_id, text in zip(table["prompt_id"], table["text"], strict=True)
        ]
        added = [
            [[claim.text for claim in division.claims] for division in divisions],
            [[claim.question for claim in division.claims] for division in divisions],
            [list(division.unparsed) for division in divisions],
        ]
        # The other columns as they are: token ids are many, and each would become an object.
        columns = [table[name] for name in GENERATED.names]
        columns += [pa.array(values, pa.list_(pa.string())) for values in added]
        return pa.table(columns, schema=_DIVIDED)

    inputs = {"responses": generated.fingerprint, "questions": fingerprint_json(asked)}
    settings = {"splitter": splitter.name}
    return work.run(work.stage("divide", inputs, settings, work.num_parts), make_part)


def conquer_stage(
    work: Round, divided: StageOutput, labeler: Callable[[], Labeler], labeler_key: str
) -> StageOutput:
    """The labeler's answer to every question about every image, each asked once.

    Columns: prompt_id, question, p_yes, p_no.
    """
    feedback = work.recipe.feedback
    loaded = functools.cache(labeler)  # goes away with this stage: training needs the memory
    questions: dict[str, dict[str, None]] = {record.id: {} for record in work.records}
    for row in divided.table.select(["prompt_id", "questions"]).to_pylist():
        questions[row["prompt_id"]].update(dict.fromkeys(row["questions"]))

    def make_part(part: int) -> pa.Table:
        items = [
            (
                record.id,
                record.images,
                tuple(question + feedback.suffix for question in questions[record.id]),
            )
            for record in _part(work.records, part)
        ]
        rows = []
        for (name, _, _), answers in zip(items, loaded().answer(items), strict=True):
            for question, (p_yes, p_no) in zip(questions[name], answers, strict=True):
                rows.append({"prompt_id": name, "question": question, "p_yes": p_yes, "p_no": p_no})
        return pa.Table.from_pylist(rows, schema=_JUDGED)

    inputs = {
        "claims": divided.fingerprint,
        "labeler": labeler_key,
        "images": fingerprint_items([i.fingerprint() for i in r.images] for r in work.records),
    }
    settings = {"rules": CONQUER_RULES, "suffix": feedback.suffix}
    return work.run(work.stage("conquer", inputs, settings, work.num_parts), make_part)


def combine_stage(work: Round, divided: StageOutput, judged: StageOutput) -> StageOutput:
    """Preference pairs; what became of everything else is in the table's metadata."""
    pairing = work.recipe.pairing

    def make_part(_: int) -> pa.Table:
        result = combine(
            scored_responses(divided.table, judged.table),
            seed=work.recipe.seed,
            round_number=work.index,
            score=pairing.score,
            min_difference=pairing.min_difference,
            max_pairs_per_prompt=pairing.max_pairs_per_prompt,
            balance=pairing.length_balance,
            duplicate_claims=pairing.duplicate_claims,
        )
        table = pa.Table.from_pylist(
            [dataclasses.asdict(pair) for pair in result.pairs], schema=_PAIRS
        )
        metadata = {
            "counts": canonical_json(dict(result.counts)),
            "length_threshold": canonical_json(result.length_threshold),
        }
        return table.replace_schema_metadata(metadata)

    inputs = {"claims": divided.fingerprint, "verdicts": judged.fingerprint}
    settings = {
        "rules": COMBINE_RULES,
        **pairing.model_dump(),
        "seed": work.recipe.seed,
        "round": work.index,
    }
    return work.run(work.stage("combine", inputs, settings), make_part)


def scored_responses(divided: pa.Table, judged: pa.Table) -> list[ScoredResponse]:
    """Joins responses with the answers to their questions.

    A piece that the splitter could not read counts as a claim that was rejected: what nobody can
    check must not pay, or the model learns to end in fragments.
    """
    answers: dict[str, dict[str, tuple[float, float]]] = collections.defaultdict(dict)
    for row in judged.to_pylist():
        answers[row["prompt_id"]][row["question"]] = (row["p_yes"], row["p_no"])
    scored = []
    read = ["prompt_id", "sample", "text", "claims", "questions", "unparsed"]
    for row in divided.select(read).to_pylist():
        given = [answers[row["prompt_id"]][question] for question in row["questions"]]
        given += [(0.0, 1.0)] * len(row["unparsed"])
        scored.append(
            ScoredResponse(
                prompt_id=row["prompt_id"],
                sample=row["sample"],
                text=row["text"],
                claims=(*row["claims"], *row["unparsed"]),
                p_yes=tuple(p_yes for p_yes, _ in given),
                p_no=tuple(p_no for _, p_no in given),
            )
        )
    return scored


def train_round(work: Round, generated: StageOutput, pairs: StageOutput) -> str:
    """DPO from the round's start model, which is also the reference, on the round's own pairs."""
    stage = training_stage(work)
    target = os.path.join(work.folder, MODEL)
    manifest = os.path.join(work.folder, "train.json")
    inputs = stage.identity() | {
        "pairs": pairs.fingerprint,
        "tokens": generated.fingerprint,
        "seed": work.recipe.seed,
        "round": work.index,
    }
    identity = fingerprint_json(inputs)
    if _is_trained(manifest, target, identity):
        return target
    if not pairs.table.num_rows:
        raise MmpoError(
            f"round {work.index}: no preference pair is left; what became of the responses: "
            f"{pairs.table.schema.metadata[b'counts'].decode()}"
        )
    data = pair_data(work, generated.table, pairs.table)
    _discard_other_run(stage.run_folder, identity)
    with progress.doing("train"):
        progress.tell()
        train_stage(stage, data, inputs)
    done = {"identity": identity, "inputs": inputs, "model": fingerprint_model(target)}
    write_atomic(manifest, json.dumps(done, indent=1).encode())
    return target


def training_stage(work: Round) -> TrainingStage:
    """The round's training, whose result is float32 whatever the alignment's is saved in: the next
    round goes on from what was trained."""
    recipe = work.recipe
    return TrainingStage(
        work.start,
        recipe.training.model_copy(update={"save_dtype": "float32"}),
        recipe.lengths,
        work.mesh,
        folder=work.folder,
        run_folder=os.path.join(work.folder, "train"),
        seed=recipe.seed + work.index,
        card=work.card,
    )


def pair_data(work: Round, generated: pa.Table, pairs: pa.Table) -> TrainingData:
    """The round's pairs as training takes them, with the reference's log-probs."""
    records = pair_records(work.records, generated, pairs)
    name = f"round {work.index}: pairs"
    rows = pair_rows(name, records, work.start.processor, work.recipe)
    return stage_data(training_stage(work), rows)


def _is_trained(manifest: str, target: str, identity: str) -> bool:
    done = read_json(manifest)
    return done.get("identity") == identity and has_fingerprint(target, done["model"])


def _discard_other_run(folder: str, identity: str) -> None:
    """Checkpoints of other inputs are of no use to a round whose inputs changed."""
    marker = os.path.join(folder, "identity")
    if os.path.isfile(marker):
        with open(marker) as file:
            if file.read() == identity:
                return
    shutil.rmtree(folder, ignore_errors=True)
    write_atomic(marker, identity.encode())


def _part(items: list[Any], part: int) -> list[Any]:
    return items[part * PROMPTS_PER_PART : (part + 1) * PROMPTS_PER_PART]


_DIVIDED = pa.schema(
    [
        *GENERATED,
        ("claims", pa.list_(pa.string())),
        ("questions", pa.list_(pa.string())),
        ("unparsed", pa.list_(pa.string())),
    ]
)
_JUDGED = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("question", pa.string()),
        ("p_yes", pa.float64()),
        ("p_no", pa.float64()),
    ]
)
_PAIRS = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_sample", pa.int32()),
        ("rejected_sample", pa.int32()),
        ("chosen_score", pa.float64()),
        ("rejected_score", pa.float64()),
    ]
)
