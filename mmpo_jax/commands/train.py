"""`mmpo train`: a recipe from its data to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from mmpo_jax.checkpoints.cards import make_card
from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_start
from mmpo_jax.core import progress
from mmpo_jax.core.files import check_reachable, fingerprint_items
from mmpo_jax.data.pipeline import Example, MixtureEntry
from mmpo_jax.data.skipped import SKIPPED_FILE
from mmpo_jax.data.sources import LearnedFile, scored_by
from mmpo_jax.data.tokenization import TokenizedRecord, fingerprint_records
from mmpo_jax.data.usable import usable_records
from mmpo_jax.objectives.registry import is_field
from mmpo_jax.objectives.terms import needs
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.recipes.recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.examples import fingerprint_fields, prepare_examples, tokenizer_for, unfit
from mmpo_jax.training.loop import Run, TrainingData, check_training, rows_to_see, train
from mmpo_jax.training.losses import recipe_terms
from mmpo_jax.training.metrics import FILE, read_metrics
from mmpo_jax.training.on_policy import prompt_examples, unrewardable, with_token_limit
from mmpo_jax.training.saving import save_result
from mmpo_jax.training.validation import Held, best_row, hold_out

log = logging.getLogger(__name__)

VALIDATION = "validation"
"""Folder of what belongs to held-out rows."""


def main(recipe: TrainRecipe) -> None:
    print(f"model: {run_training(recipe)}")


def run_training(recipe: TrainRecipe) -> str:
    """Trains on the recipe's data.

    Returns:
      The Hugging Face folder of the result.
    """
    check_reachable(recipe.output)
    mesh = make_mesh(**recipe.devices.model_dump())
    start = load_start(recipe.model, _random_seed(recipe), mesh, recipe.attention, recipe.template)
    model, processor = start.model, start.processor
    training, rollout = recipe.training, recipe.rollout
    if rollout is not None:
        training = with_token_limit(training, rollout)
    check_training(training, model, mesh)
    data = training_data(recipe, start)
    if len(data.records) < training.batch_size:
        count = len(data.records)
        log.warning("training.batch_size is %d, of %d rows in all", training.batch_size, count)
    seen = rows_to_see(training, data.parts, recipe.seed)
    prepared = {
        name: prepare_examples(
            start,
            records,
            training,
            recipe.lengths,
            mesh,
            folder=os.path.join(recipe.output, name),
            seen=None if name else seen,
        )
        if rollout is None
        else prompt_examples(records)
        for name, records in (("", data.records), (VALIDATION, data.held))
        if records
    }
    with progress.doing("checksums of the data"):
        of_data = _data_identity(data, prepared, training)
    identity: dict[str, Any] = {
        "model": start.fingerprint,
        **processor.fingerprints(),
        "data": of_data,
        "training": training.identity(),
        "lengths": recipe.lengths.model_dump(mode="json"),
        "seed": recipe.seed,
    }
    if recipe.validation is not None:
        identity["validation"] = recipe.validation.model_dump(mode="json", exclude={"data"})
    if rollout is not None:
        identity["rollout"] = rollout.model_dump(mode="json")
        identity["answers"] = fingerprint_items(row.solution for row in data.records)
    held = None
    if recipe.validation is not None:
        held = Held(prepared[VALIDATION], recipe.validation)
    card = make_card(
        recipe,
        model,
        {},
        from_hub=start.hub_id is not None,
        base_fingerprint=start.fingerprint,
    )
    trained = train(
        start,
        TrainingData(prepared[""], data.parts, held, rollout),
        training,
        recipe.lengths,
        mesh,
        Run(recipe.output, identity, recipe.seed, card),
    )
    rows = read_metrics(os.path.join(recipe.output, FILE)) or [{}]
    measured = rows[-1] if recipe.validation is None else best_row(rows, recipe.validation)
    card = dataclasses.replace(card, metrics=measured)
    rows_to_measure = prepared.get(VALIDATION, prepared[""]) if rollout is None else []
    with progress.doing("saving the model"):
        folder = save_result(
            recipe.output, start, trained, training, recipe.lengths, card, mesh, rows_to_measure
        )
    if rollout is None:
        read = data.records if seen is None else [data.records[place] for place in seen]
        _tell_cuts(read, recipe.lengths.response[-1])
    return folder


def _tell_cuts(records: Sequence[TokenizedRecord], limit: int) -> None:
    """The run's last word on what it did not see of the data."""
    responses = [response for record in records for response in record.responses]
    cut = sum(response.truncated > 0 for response in responses)
    log.info(
        "%d of %d responses trained on lost their tail to the largest bucket, %d tokens",
        cut,
        len(responses),
        limit,
    )


def _data_identity(
    data: TokenizedData, prepared: Mapping[str, Sequence[Example]], training: Training
) -> dict[str, Any]:
    """Fingerprints of the rows and of what the objectives read of them."""
    identity: dict[str, Any] = {
        "rows": fingerprint_records(data.records),
        "held-out rows": fingerprint_records(data.held),
        "fields": [fingerprint_fields(examples) for examples in prepared.values()],
        "parts": [[part.size, part.weight] for part in data.parts],
    }
    if training.reference.type == "given":  # with the data, and not from the model
        identity["log-probs"] = fingerprint_items(
            {name: value.tolist() for name, value in example.reference.items()}
            for examples in prepared.values()
            for example in examples
        )
    return identity


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """What a recipe trains on and what it holds out."""

    records: list[TokenizedRecord]
    parts: list[MixtureEntry]
    """The data sets that stand one after another in `records`, but for those wholly held out."""
    held: list[TokenizedRecord]


def training_data(recipe: TrainRecipe, start: Checkpoint) -> TokenizedData:
    """The rows of all of a recipe's data.

    Raises:
      DataError: too many rows of one of them cannot be used.
      MmpoError: a share cannot be held out, as there is only one prompt.
    """
    several = len(recipe.data) > 1
    sets = []
    for number, data in enumerate(recipe.data):
        name = f"{number}." if several else ""
        rows = usable_rows(recipe, data, start, name + SKIPPED_FILE)
        if several:  # ids are unique in one file
            rows = [_prefixed(row, number) for row in rows]
        sets.append(rows)
    held: list[TokenizedRecord] = []
    if recipe.validation is not None and recipe.validation.share is not None:
        sides = hold_out(sets, recipe.validation.share)
        sets = [rows for rows, _ in sides]
        held = [row for _, others in sides for row in others]
    parts = []
    for number, (rows, data) in enumerate(zip(sets, recipe.data, strict=True)):
        if rows:
            parts.append(MixtureEntry(len(rows), data.weight))
        else:
            log.warning("data.%d: all of its rows are held out, and none is trained on", number)
    records = [row for rows in sets for row in rows]
    if recipe.validation is not None and recipe.validation.data is not None:
        held = usable_rows(recipe, recipe.validation.data, start, f"{VALIDATION}.{SKIPPED_FILE}")
        log.info("held out: %d rows of other data", len(held))
    return TokenizedData(records, parts, held)


def _prefixed(record: TokenizedRecord, number: int) -> TokenizedRecord:
    others = tuple((name, _prefixed(context, number)) for name, context in record.others)
    return dataclasses.replace(record, id=f"{number}/{record.id}", others=others)


def usable_rows(
    recipe: TrainRecipe, data: PictureWorldData | LearnedFile, start: Checkpoint, skipped: str
) -> list[TokenizedRecord]:
    """The rows the objectives learn from, each with the responses they read.

    Objectives of tokens, such as SFT, take whole dialogues, and of ranked responses the best only,
    unless one of them chooses by a score or a verdict; those of sampled responses take prompts.

    Args:
      recipe: of the run.
      data: one of its data sets.
      start: what training starts from.
      skipped: file in the run's folder for rows that cannot be used.

    Raises:
      DataError: too many rows cannot be used.
    """
    terms, rollout = recipe_terms(recipe.training), recipe.rollout
    skipped = os.path.join(recipe.output, skipped)
    if rollout is not None:
        record_set = data.load(supervised=False)
        _, records = usable_records(
            record_set,
            start.processor,
            recipe.lengths,
            skipped,
            lambda record: unrewardable(record, rollout),
        )
        return records
    supervised = all(term.objective.kind == "tokens" for term in terms)
    record_set = data.load(supervised=True, messages_as="dialogue" if supervised else "last_turn")
    if isinstance(data, LearnedFile) and data.score is not None:
        record_set = scored_by(record_set, data.score)
    _, records = usable_records(
        record_set,
        start.processor,
        recipe.lengths,
        skipped,
        lambda record: unfit(record, terms, recipe.training.reference),
        tokenizer_for(terms, recipe.seed),
    )
    # Without fields but the turn, nothing is read of the responses that are not learned.
    best_only = supervised and {"turn"} >= set(filter(is_field, needs(terms)))
    return [_best(record) for record in records] if best_only else records


def _best(record: TokenizedRecord) -> TokenizedRecord:
    """The record with the responses of the best rank only, where there are ranks."""
    if not record.ranked:
        return record
    best = min(response.source.rank or 0 for response in record.responses)
    return _of_rank(record, best)


def _of_rank(record: TokenizedRecord, rank: int) -> TokenizedRecord:
    kept = tuple(response for response in record.responses if response.source.rank == rank)
    others = tuple((name, _of_rank(other, rank)) for name, other in record.others)
    return dataclasses.replace(record, responses=kept, others=others)


def _random_seed(recipe: TrainRecipe) -> int | None:
    return recipe.seed if recipe.weights == "random" else None
