"""`mmpo train`: a recipe from its data to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import os

from mmpo_jax.checkpoint import Checkpoint, load_start
from mmpo_jax.data.pipeline import Example
from mmpo_jax.data.rows import SkipReason
from mmpo_jax.data.sources import SKIPPED, load_source, usable_records
from mmpo_jax.data.tokenization import TokenizedRecord, fingerprint_records
from mmpo_jax.files import fingerprint_json
from mmpo_jax.models.card import ModelCard, make_card
from mmpo_jax.models.huggingface import save_model, weights_dtype
from mmpo_jax.models.model import Params
from mmpo_jax.models.peft import save_adapter
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipe import Dpo, Lora, Sft, TrainRecipe
from mmpo_jax.training.loop import check_training, train
from mmpo_jax.training.losses import REFERENCE, needs_reference
from mmpo_jax.training.metrics import FILE, read_metrics
from mmpo_jax.training.reference import reference_stage

MODEL, ADAPTER = "model", "adapter"
"""Where a run's result lies in its output folder."""


def run_training(recipe: TrainRecipe) -> str:
    """Trains on the recipe's data.

    Returns:
      The Hugging Face folder of the result.
    """
    mesh = make_mesh(**recipe.devices.model_dump())
    start = load_start(recipe.model, _random_seed(recipe), mesh, recipe.attention, recipe.template)
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
    card = make_card(recipe, model, {}, from_hub=start.hub_id is not None)
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
        card=card,
    )
    metrics = read_metrics(os.path.join(recipe.output, FILE)) or [{}]
    card = dataclasses.replace(card, metrics=metrics[-1])
    return save_result(recipe.output, start, trained, recipe.training.lora, card)


def save_result(
    output: str,
    start: Checkpoint,
    trained: Params,
    lora: Lora | None,
    card: ModelCard | None = None,
) -> str:
    """Writes the trained model, and of adapters also themselves.

    Args:
      output: gets `model/`, a Hugging Face folder with adapters merged, and `adapter/` in PEFT's
        format if there are any.
      start: what the training began with: adapters belong to it, and the model has its dtype.
      trained: parameters, with adapters beside kernels if `lora` is given.
      lora: the recipe's section.
      card: of the model; None where it is written later.

    Returns:
      The Hugging Face folder.
    """
    if lora is not None:
        folder = os.path.join(output, ADAPTER)
        base = start.hub_id or start.folder
        save_adapter(folder, start.model, trained, base=base, dropout=lora.dropout)
    target = os.path.join(output, MODEL)
    save_model(
        target,
        start.model,
        trained,
        start.processor.folder,
        dtype=weights_dtype(start.params),
        card=card,
        chat_template=start.processor.chat_template,
    )
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
        os.path.join(recipe.output, SKIPPED),
        lambda record: _unfit(record, objective),
    )
    ordered = [_best_first(record) for record in records]
    if not supervised:
        return ordered
    return [
        dataclasses.replace(record, responses=record.responses[:1]) if record.ranked else record
        for record in ordered
    ]


def _best_first(record: TokenizedRecord) -> TokenizedRecord:
    """A preference whatever the order of its responses in the data."""
    if not record.ranked:
        return record
    responses = sorted(record.responses, key=lambda response: response.source.rank or 0)
    return dataclasses.replace(record, responses=tuple(responses))


def _unfit(record: TokenizedRecord, objective: Dpo | Sft) -> tuple[SkipReason, str] | None:
    if isinstance(objective, Sft):
        if any(response.source.desirable is False for response in record.responses):
            return "undesirable", "a response that is labelled as not desirable"
        return None if record.responses else ("empty_response", "no response to learn")
    ranks = [response.source.rank for response in record.responses]
    if record.ranked and len(ranks) == 2 and ranks[0] != ranks[1]:
        return None
    detail = "no chosen and rejected response, which dpo compares"
    return "incomplete_pair", detail


def _random_seed(recipe: TrainRecipe) -> int | None:
    return recipe.seed if recipe.weights == "random" else None
