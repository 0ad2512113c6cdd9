"""`mmpo train`: a recipe from its data to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np

from mmpo_jax.checkpoints.cards import make_card
from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_start
from mmpo_jax.core import progress
from mmpo_jax.core.files import check_reachable
from mmpo_jax.data.pipeline import Examples, MixtureEntry
from mmpo_jax.data.row_stage import can_be_stored, tokenized_rows
from mmpo_jax.data.skipped import SKIPPED_FILE
from mmpo_jax.data.sources import LearnedFile, scored_by
from mmpo_jax.data.tokenized_rows import (
    KnownRows,
    ListedRows,
    concatenated,
    fingerprint_records,
    fingerprint_solutions,
    prefixed,
)
from mmpo_jax.data.usable import usable_records
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.recipes.recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.examples import (
    LearnedExamples,
    fingerprint_fields,
    fingerprint_given,
    prepare_examples,
)
from mmpo_jax.training.loop import Run, TrainingData, check_training, rows_to_see, train
from mmpo_jax.training.losses import recipe_terms
from mmpo_jax.training.metrics import FILE, read_metrics
from mmpo_jax.training.on_policy import prompt_examples, with_token_limit
from mmpo_jax.training.row_use import LearnedUse, PromptUse
from mmpo_jax.training.saving import save_result
from mmpo_jax.training.validation import Held, best_row, hold_out

log = logging.getLogger(__name__)

ROWS = "data"
"""Folder of the tokenised rows."""
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
        identity["answers"] = fingerprint_solutions(data.records)
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
        read = data.records if seen is None else data.records.take(np.array(sorted(seen), int))
        _tell_cuts(read, recipe.lengths.response[-1])
    return folder


def _tell_cuts(records: KnownRows, limit: int) -> None:
    """The run's last word on what it did not see of the data."""
    log.info(
        "%d of %d responses trained on lost their tail to the largest bucket, %d tokens",
        records.sizes.truncated.sum(),
        records.sizes.responses.sum(),
        limit,
    )


def _data_identity(
    data: TokenizedData, prepared: Mapping[str, Examples], training: Training
) -> dict[str, Any]:
    """Fingerprints of the rows and of what the objectives read of them."""
    learned = [each for each in prepared.values() if isinstance(each, LearnedExamples)]
    identity: dict[str, Any] = {
        "rows": fingerprint_records(data.records),
        "held-out rows": fingerprint_records(data.held),
        "fields": [fingerprint_fields(examples) for examples in learned],
        "parts": [[part.size, part.weight] for part in data.parts],
    }
    if training.reference.type == "given":  # with the data, and not from the model
        identity["log-probs"] = [fingerprint_given(examples) for examples in learned]
    return identity


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """What a recipe trains on and what it holds out."""

    records: KnownRows
    parts: list[MixtureEntry]
    """The data sets that stand one after another in `records`, but for those wholly held out."""
    held: KnownRows


def training_data(recipe: TrainRecipe, start: Checkpoint) -> TokenizedData:
    """The rows of all of a recipe's data.

    Raises:
      DataError: too many rows of one of them cannot be used.
      MmpoError: a share cannot be held out, as there is only one prompt.
    """
    several = len(recipe.data) > 1
    sets: list[KnownRows] = []
    for number, data in enumerate(recipe.data):
        name = f"{number}." if several else ""
        rows = usable_rows(recipe, data, start, name)
        if several:  # ids are unique in one file
            rows = prefixed(rows, f"{number}/")
        sets.append(rows)
    held: KnownRows = ListedRows([])
    if recipe.validation is not None and recipe.validation.share is not None:
        sides = hold_out(sets, recipe.validation.share)
        sets = [rows for rows, _ in sides]
        held = concatenated([others for _, others in sides])
    parts = []
    for number, (rows, data) in enumerate(zip(sets, recipe.data, strict=True)):
        if len(rows):
            parts.append(MixtureEntry(len(rows), data.weight))
        else:
            log.warning("data.%d: all of its rows are held out, and none is trained on", number)
    if recipe.validation is not None and recipe.validation.data is not None:
        held = usable_rows(recipe, recipe.validation.data, start, f"{VALIDATION}.")
        log.info("held out: %d rows of other data", len(held))
    return TokenizedData(concatenated(sets), parts, held)


def usable_rows(
    recipe: TrainRecipe, data: PictureWorldData | LearnedFile, start: Checkpoint, name: str
) -> KnownRows:
    """The rows the objectives learn from, each with the responses they read.

    Args:
      recipe: of the run.
      data: one of its data sets.
      start: what training starts from.
      name: in front of those of its files in the run's folder, such as `rejected_rows.jsonl`.

    Raises:
      DataError: too many rows cannot be used.
    """
    training, skipped = recipe.training, os.path.join(recipe.output, name + SKIPPED_FILE)
    use: LearnedUse | PromptUse
    if recipe.rollout is not None:
        use = PromptUse.of(recipe.rollout)
    else:
        use = LearnedUse.of(recipe_terms(training), training.reference, recipe.seed)
    if isinstance(data, LearnedFile) and can_be_stored(data):
        return tokenized_rows(
            data,
            use,
            start.processor,
            recipe.lengths,
            folder=os.path.join(recipe.output, ROWS),
            name=f"{name}rows".replace(".", "-"),
            skipped_file=skipped,
            workers=training.workers,
        )
    record_set = data.load(supervised=use.supervised, messages_as=use.messages_as)
    if isinstance(data, LearnedFile) and data.score is not None and use.supervised:
        record_set = scored_by(record_set, data.score)
    _, records = usable_records(
        record_set, start.processor, recipe.lengths, skipped, use.unfit, use.tokenize
    )
    return ListedRows([use.select(record) for record in records])


def _random_seed(recipe: TrainRecipe) -> int | None:
    return recipe.seed if recipe.weights == "random" else None
