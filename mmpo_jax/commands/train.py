"""`mmpo train`: a recipe from its data to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from typing import Any

import numpy as np

from mmpo_jax.checkpoints.cards import make_card
from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_start, model_config
from mmpo_jax.checkpoints.orbax import check_holds_checkpoints
from mmpo_jax.checkpoints.upload import check_hub, upload_result
from mmpo_jax.core import progress
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_items
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.data.row_stage import can_be_stored, tokenized_rows
from mmpo_jax.data.skipped import SKIPPED_FILE
from mmpo_jax.data.sources import LearnedFile, with_scores
from mmpo_jax.data.tokenized_rows import (
    KnownRows,
    ListedRows,
    concatenated,
    fingerprint_records,
    fingerprint_solutions,
    prefixed,
)
from mmpo_jax.data.usable import usable_records
from mmpo_jax.evaluation.along import along_training, write_tax
from mmpo_jax.evaluation.measure import check_questions
from mmpo_jax.evaluation.tax import render_tax
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.picture_world.source import PictureWorldData
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.batches import TrainingData
from mmpo_jax.training.examples import LearnedExamples, fingerprint_fields, fingerprint_given
from mmpo_jax.training.losses import recipe_terms
from mmpo_jax.training.on_policy import with_token_limit
from mmpo_jax.training.plan import check_training, mesh_sizes, rows_to_see, trained_config
from mmpo_jax.training.row_use import LearnedUse, PromptUse
from mmpo_jax.training.stage import VALIDATION, TrainingStage, stage_data, train_stage
from mmpo_jax.training.teacher import open_teacher
from mmpo_jax.training.tracking import check_tracking
from mmpo_jax.training.validation import hold_out

log = logging.getLogger(__name__)

ROWS = "data"
"""Folder of the tokenised rows."""


def main(recipe: TrainRecipe) -> None:
    check_hub(recipe.hub)
    folder = run_training(recipe)
    print(f"model: {folder}")
    if place := upload_result(folder, recipe.hub):
        print(f"hub: {place}")


def run_training(recipe: TrainRecipe) -> str:
    """Trains on the recipe's data.

    Returns:
      The Hugging Face folder of the result.
    """
    check_holds_checkpoints(recipe.output)
    check_tracking(recipe.training.wandb)
    check_questions(recipe.evaluation or ())
    if recipe.rollout is not None:
        for section in recipe.rollout.rules:
            section.key()  # which loads a function of the user's, before anything heavy
    if recipe.weights == "random" and recipe.training.quantization is not None:
        raise MmpoError(
            "training.lora.quantize_base: with `weights: random` no file has the base, which "
            "checkpoints of adapters name"
        )
    decoder = model_config(recipe.model).decoder
    mesh = make_mesh(**mesh_sizes(recipe.devices, recipe.training, decoder))
    start = load_start(
        recipe.model,
        _random_seed(recipe),
        mesh,
        recipe.attention,
        recipe.template,
        functools.partial(trained_config, recipe.training, recipe.reward_head),
        recipe.seed,
        quantization=recipe.training.quantization,
    )
    training = recipe.training
    if recipe.rollout is not None:
        training = with_token_limit(training, recipe.rollout)
    check_training(training, start.model, mesh)
    if training.teacher is not None:
        open_teacher(training.teacher, start)  # which says what is wrong with it
    stage = TrainingStage(
        start,
        training,
        recipe.lengths,
        mesh,
        folder=recipe.output,
        run_folder=recipe.output,
        seed=recipe.seed,
        name=os.path.basename(os.path.normpath(recipe.output)),
        card=make_card(
            recipe,
            start.model,
            {},
            from_hub=start.hub_id is not None,
            base_fingerprint=start.fingerprint,
            quantized_base=start.quantized_base,
        ),
        validation=recipe.validation,
        rollout=recipe.rollout,
    )
    rows = training_data(recipe, start)
    if len(rows.records) < training.batch_size:
        count = len(rows.records)
        log.warning("training.batch_size is %d, of %d rows in all", training.batch_size, count)
    data = stage_data(stage, rows.records, rows.parts, rows.held)
    with progress.doing("checksums of the data"):
        identity = stage.identity() | _data_identity(rows, data, training)
    if recipe.evaluation is not None:
        along = along_training(recipe.evaluation, recipe.evaluate_every, stage, identity)
        data = dataclasses.replace(data, measurements=along)
    folder = train_stage(stage, data, identity)
    if recipe.evaluation is not None:
        with progress.doing("comparing what was measured"):
            tax = write_tax(recipe.evaluation, stage, folder, recipe.attention)
        print(render_tax(tax))
    if recipe.rollout is None:
        _tell_cuts(rows, stage)
    return folder


def _tell_cuts(rows: TokenizedData, stage: TrainingStage) -> None:
    """The run's last word on what it did not see of the data."""
    seen = rows_to_see(stage.training, rows.parts, stage.seed)
    read = rows.records if seen is None else rows.records.take(np.array(sorted(seen), int))
    log.info(
        "%d of %d responses trained on lost their tail to the largest bucket, %d tokens",
        read.sizes.truncated.sum(),
        read.sizes.responses.sum(),
        stage.lengths.response[-1],
    )


def _data_identity(rows: TokenizedData, data: TrainingData, training: Training) -> dict[str, Any]:
    """Fingerprints of the rows and of what the objectives read of them."""
    prepared = [data.examples, *([data.held.examples] if data.held is not None else [])]
    learned = [each for each in prepared if isinstance(each, LearnedExamples)]
    of_data: dict[str, Any] = {
        "rows": fingerprint_records(rows.records),
        "held-out rows": fingerprint_records(rows.held),
        "fields": [fingerprint_fields(examples) for examples in learned],
        "parts": [[part.size, part.weight] for part in rows.parts],
    }
    if training.reference.type == "given":  # with the data, and not from the model
        of_data["log-probs"] = fingerprint_items(map(fingerprint_given, learned))
    identity: dict[str, Any] = {"data": of_data}
    if data.rollout is not None:
        identity["answers"] = fingerprint_solutions(rows.records)
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
        use = PromptUse.of(recipe.rollout, training)
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
    if isinstance(data, LearnedFile) and use.supervised:
        record_set = with_scores(record_set, data)
    _, records = usable_records(
        record_set, start.processor, recipe.lengths, skipped, use.unfit, use.tokenize
    )
    return ListedRows([use.select(record) for record in records])


def _random_seed(recipe: TrainRecipe) -> int | None:
    return recipe.seed if recipe.weights == "random" else None
