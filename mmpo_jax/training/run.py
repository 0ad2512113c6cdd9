"""`mmpo train`: a recipe from its data to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import os

from mmpo_jax.checkpoint import Checkpoint, load_start
from mmpo_jax.data.pipeline import Example
from mmpo_jax.data.rows import SkipReason
from mmpo_jax.data.sources import load_source, usable_records
from mmpo_jax.data.tokenization import TokenizedRecord, fingerprint_records
from mmpo_jax.files import fingerprint_json
from mmpo_jax.models.huggingface import save_model
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipe import Dpo, Sft, TrainRecipe
from mmpo_jax.training.loop import check_training, train
from mmpo_jax.training.losses import REFERENCE, needs_reference
from mmpo_jax.training.reference import reference_stage

MODEL = "model"
"""Where a run's result lies in its output folder."""


def run_training(recipe: TrainRecipe) -> str:
    """Trains on the recipe's data.

    Returns:
      The Hugging Face folder of the result.
    """
    mesh = make_mesh(**recipe.devices.model_dump())
    start = load_start(recipe.model, random_seed=_random_seed(recipe), attention=recipe.attention)
    model, processor = start.model, start.processor
    check_training(recipe.training, model, mesh)
    objective = recipe.training.objective
    records = training_records(recipe, start)
    examples = [Example(record, {}) for record in records]
    if needs_reference(objective):
        sums = reference_stage(
            model,
            start.params,
            processor,
            records,
            recipe.lengths,
            mesh,
            folder=recipe.output,
            model_fingerprint=start.fingerprint,
            batch_size=recipe.training.batch_size,
            compute_dtype=recipe.training.compute_dtype,
        )
        examples = [Example(record, {REFERENCE: sums[record.id]}) for record in records]
    identity = fingerprint_json(
        [
            start.fingerprint,
            processor.fingerprints(),
            fingerprint_records(records),
            recipe.training.identity(),
            recipe.lengths.model_dump(mode="json"),
            recipe.seed,
        ]
    )
    trained = train(
        model,
        start.params,
        processor,
        examples,
        recipe.training,
        recipe.lengths,
        mesh,
        folder=recipe.output,
        identity=identity,
        seed=recipe.seed,
    )
    target = os.path.join(recipe.output, MODEL)
    save_model(target, model, trained, processor.folder)
    return target


def training_records(recipe: TrainRecipe, start: Checkpoint) -> list[TokenizedRecord]:
    """The rows the objective learns from, each with the responses it reads.

    DPO takes pairs. SFT takes whole dialogues, and of a preference the best response only.

    Raises:
      DataError: too many rows cannot be used.
    """
    objective = recipe.training.objective
    supervised = isinstance(objective, Sft)
    source = load_source(
        recipe.data, supervised=True, messages_as="dialogue" if supervised else "last_turn"
    )
    _, records = usable_records(
        source,
        start.processor,
        recipe.lengths,
        recipe.output,
        lambda record: _unfit(record, objective),
    )
    if not supervised:
        return records
    return [
        dataclasses.replace(record, responses=record.responses[:1]) if record.ranked else record
        for record in records
    ]


def _unfit(record: TokenizedRecord, objective: Dpo | Sft) -> tuple[SkipReason, str] | None:
    if isinstance(objective, Sft):
        return None if record.responses else ("empty_response", "no response to learn")
    if record.ranked and len(record.responses) == 2:
        return None
    detail = "no chosen and rejected response, which dpo compares"
    return "incomplete_pair", detail


def _random_seed(recipe: TrainRecipe) -> int | None:
    return recipe.seed if recipe.weights == "random" else None
