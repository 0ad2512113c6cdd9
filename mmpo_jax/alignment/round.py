"""One round of alignment: generate, judge, pair, train.

Every stage reads the table of the one before and writes its own (see `core/stages.py`), so a round
goes on where it was stopped, and a changed input runs again what depends on it.

Source of the rules: RLAIF-V (Yu et al. 2024, arXiv 2405.17220) and its repository.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Collection, Sequence

import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.alignment.candidates import Asked, round_responses
from mmpo_jax.alignment.examples import PROMPTS, write_examples
from mmpo_jax.alignment.pairs import pair_records, pair_rows
from mmpo_jax.alignment.sentences import begun_records, judged_sentences
from mmpo_jax.checkpoints.cards import ModelCard
from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_start
from mmpo_jax.checkpoints.fingerprints import fingerprint_model, has_fingerprint
from mmpo_jax.core import progress
from mmpo_jax.core.buckets import is_file, remove_tree
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import (
    canonical_json,
    fingerprint_json,
    read_bytes,
    read_json,
    write_atomic,
    write_json,
)
from mmpo_jax.core.processes import on_one
from mmpo_jax.core.stages import Stage, StageOutput, run_told_stage
from mmpo_jax.core.timings import timed
from mmpo_jax.data.notes import by_count
from mmpo_jax.data.records import Record
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.feedback.ahead import asking_ahead
from mmpo_jax.feedback.judge import (
    AskingAhead,
    Judge,
    Responses,
    rows_in_parts,
    scored_responses,
)
from mmpo_jax.feedback.pairing import Balance, PairingResult, ScoredResponse, make_pairs
from mmpo_jax.feedback.served import Servers
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.reporting.prompts import write_prompts
from mmpo_jax.training.batches import TrainingData
from mmpo_jax.training.saving import MODEL
from mmpo_jax.training.stage import TrainingStage, stage_data, train_stage
from mmpo_jax.training.validation import hold_out

log = logging.getLogger(__name__)

TRAIN = "train"
"""Folder of a round's training in that of the round."""
PAIR_RULES = 3
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
    """Devices as the training has them."""
    inference_mesh: Mesh
    """The same as all else has them."""
    card: ModelCard
    """Card of the alignment's result, without metrics."""
    servers: Servers
    """Clients of the run."""
    run_before: str | None = None
    """Folder of the training of the round before; None for the first."""


def run_round(work: Round, judge: Judge) -> str:
    """Runs or finishes a round.

    Args:
      work: the round.
      judge: gives its responses their scores.

    Returns:
      The Hugging Face folder of the trained model.
    """
    generated, judged = judged_responses(work, judge)
    tell_failed(work.index, judged.table)
    pairs = pairs_stage(work, generated, judged)
    prompts = begun_records(work.records, generated.table)
    left_out = pairs_left_out(work, generated, judged, [prompt.id for prompt in prompts[:PROMPTS]])
    write_examples(work.folder, prompts, generated.table, judged.table, pairs.table, left_out)
    write_prompts(work.folder, prompts)
    return train_round(work, generated, pairs)


def tell_failed(index: int, judged: pa.Table) -> None:
    """Says in the log why responses of a round have no score, with counts."""
    failed = Counter(reason for reason in judged["reason"].to_pylist() if reason is not None)
    if failed:
        log.warning("round %d: responses that failed: %s", index, by_count(failed))


def judged_responses(work: Round, judge: Judge) -> tuple[StageOutput, StageOutput]:
    """(the responses to every prompt, see `round_responses` and `judged_sentences`; their
    scores)."""
    asked = Asked(
        work.start,
        work.records,
        work.tokenized,
        work.recipe,
        work.inference_mesh,
        work.folder,
        work.index,
        work.servers,
    )
    if work.recipe.sentences is not None:
        return judged_sentences(asked, judge, work.recipe.sentences)
    asks_ahead = judge.ask_ahead if isinstance(judge, AskingAhead) and judge.asks_ahead else None
    with asking_ahead(asks_ahead) as ask_ahead:

        def finished(rows: pa.Table) -> None:
            for part in rows_in_parts(work.folder, work.records, rows):
                ask_ahead(part)

        generated = round_responses(dataclasses.replace(asked, finished=finished))
    answered = set(generated.table["prompt_id"].to_pylist())
    records = [record for record in work.records if record.id in answered]
    return generated, judge.judge(Responses(work.folder, records, generated))


def pairs_stage(work: Round, generated: StageOutput, judged: StageOutput) -> StageOutput:
    """Preference pairs; what became of everything else is in the table's metadata."""
    pairing = work.recipe.pairing

    def make_part(_: int) -> pa.Table:
        scored = scored_responses(generated.table, judged.table)
        result = _paired(work, scored, pairing.length_balance)
        table = pa.Table.from_pylist(
            [dataclasses.asdict(pair) for pair in result.pairs], schema=_PAIRS
        )
        metadata = {
            "counts": canonical_json(dict(result.counts)),
            "length_threshold": canonical_json(result.length_threshold),
        }
        return table.replace_schema_metadata(metadata)

    inputs = {"responses": generated.fingerprint, "scores": judged.fingerprint}
    settings = {
        "rules": PAIR_RULES,
        **pairing.model_dump(exclude_none=True),
        **_clean(work.recipe),
        "seed": work.recipe.seed,
        "round": work.index,
    }
    return run_told_stage(Stage(work.folder, "pairs", inputs, settings), make_part)


def pairs_left_out(
    work: Round, generated: StageOutput, judged: StageOutput, prompt_ids: Collection[str]
) -> dict[str, dict[str, int]]:
    """What became of the pairs of some prompts, by prompt: the counts of `make_pairs`.

    All steps but the last look at one prompt alone, so they are made again for each. The pairs that
    they leave are counted as `pairs`; what is not among the round's is left out by length.
    """
    of_prompt: dict[str, list[ScoredResponse]] = {prompt_id: [] for prompt_id in prompt_ids}
    for response in scored_responses(generated.table, judged.table):
        if response.prompt_id in of_prompt:
            of_prompt[response.prompt_id].append(response)
    return {
        prompt_id: _paired(work, responses, "none").counts
        for prompt_id, responses in of_prompt.items()
    }


def _paired(work: Round, responses: Sequence[ScoredResponse], balance: Balance) -> PairingResult:
    """Pairs of responses by the recipe's rules, with this balance of lengths."""
    pairing = work.recipe.pairing
    return make_pairs(
        responses,
        seed=work.recipe.seed,
        round_number=work.index,
        min_difference=pairing.min_difference,
        max_pairs_per_prompt=pairing.max_pairs_per_prompt,
        balance=balance,
        chosen_from=pairing.chosen_from,
        rejected_from=pairing.rejected_from,
        **_clean(work.recipe),
    )


def _clean(recipe: AlignRecipe) -> dict[str, float]:
    """The score that a chosen sentence needs, where sentences are paired."""
    return {} if recipe.sentences is None else {"chosen_at_least": recipe.sentences.clean}


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
    if on_one(lambda: _is_trained(manifest, target, identity)):
        return target
    if not pairs.table.num_rows:
        raise MmpoError(
            f"round {work.index}: no preference pair is left; what became of the responses: "
            f"{pairs.table.schema.metadata[b'counts'].decode()}"
        )
    # Judges may have taken its place on the devices, or it lies as they have it.
    work = dataclasses.replace(work, start=training_start(work))
    stage = training_stage(work)
    data = pair_data(work, generated.table, pairs.table)
    on_one(lambda: _discard_other_run(stage.run_folder, identity))
    took = timed(work.folder, "train", identity, {"rows": len(data.examples)})
    with progress.doing("train"), took:
        progress.tell()
        train_stage(stage, data, inputs)

    def note() -> None:
        done = {
            "identity": identity,
            "inputs": inputs,
            "model": fingerprint_model(target),
            "trained": len(data.examples),
        }
        write_json(manifest, done)

    on_one(note)
    return target


def training_start(work: Round) -> Checkpoint:
    """What the round trains: its start, or where that was trained above a quantised base the same
    base with its adapters, as merged and quantised again most of them would be rounded away."""
    recipe, quantization = work.recipe, work.recipe.training.quantization
    if quantization is None or work.run_before is None:
        return work.start.moved(work.mesh, quantization)
    work.start.release()
    return load_start(
        work.run_before, mesh=work.mesh, attention=recipe.attention, quantization=quantization
    )


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
        run_folder=os.path.join(work.folder, TRAIN),
        seed=recipe.seed + work.index,
        name=f"{os.path.basename(os.path.normpath(recipe.output))}/round-{work.index}",
        card=work.card,
        validation=recipe.validation,
    )


def pair_data(work: Round, generated: pa.Table, pairs: pa.Table) -> TrainingData:
    """The round's pairs as training takes them, with the reference's log-probs; a share of them is
    held out where the recipe says so."""
    records = pair_records(begun_records(work.records, generated), generated, pairs)
    name = f"round {work.index}: pairs"
    rows: Sequence[TokenizedRecord] = pair_rows(name, records, work.start.processor, work.recipe)
    held: Sequence[TokenizedRecord] = []
    validation = work.recipe.validation
    if validation is not None and validation.share is not None:
        ((rows, held),) = hold_out([rows], validation.share)
    return stage_data(training_stage(work), rows, held=held)


def _is_trained(manifest: str, target: str, identity: str) -> bool:
    done = read_json(manifest)
    return done.get("identity") == identity and has_fingerprint(target, done["model"])


def _discard_other_run(folder: str, identity: str) -> None:
    """Checkpoints of other inputs are of no use to a round whose inputs changed."""
    marker = os.path.join(folder, "identity")
    if is_file(marker) and read_bytes(marker) == identity.encode():
        return
    remove_tree(folder)
    write_atomic(marker, identity.encode())


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
