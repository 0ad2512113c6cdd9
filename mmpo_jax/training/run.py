"""`mmpo train`: a recipe from its data to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

from mmpo_jax.checkpoint import Checkpoint, load_start
from mmpo_jax.data.pipeline import Example
from mmpo_jax.data.sources import SKIPPED, load_source, usable_records
from mmpo_jax.data.tokenization import TokenizedRecord, fingerprint_records
from mmpo_jax.files import fingerprint_json
from mmpo_jax.models.card import ModelCard, make_card
from mmpo_jax.models.huggingface import save_model, weights_dtype
from mmpo_jax.models.model import Params
from mmpo_jax.models.peft import save_adapter
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipe import Lora, Rollout, TrainRecipe
from mmpo_jax.training.examples import prepare_examples, unfit
from mmpo_jax.training.loop import check_training, train
from mmpo_jax.training.metrics import FILE, read_metrics
from mmpo_jax.training.on_policy import unrewardable, with_token_limit

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
    training, rollout = recipe.training, recipe.rollout
    check_training(training, model, mesh)
    made_of: list[Any] = []
    if rollout is None:
        records = training_records(recipe, start)
        examples = prepare_examples(
            start, records, training, recipe.lengths, mesh, folder=recipe.output
        )
    else:
        records = prompt_records(recipe, rollout, start)
        examples = [Example((record,), {}) for record in records]
        training = with_token_limit(training, rollout)
        made_of = [rollout.model_dump(mode="json"), [record.answer for record in records]]
    identity = fingerprint_json(
        [
            start.fingerprint,
            processor.fingerprints(),
            fingerprint_records(records),
            training.identity(),
            recipe.lengths.model_dump(mode="json"),
            recipe.seed,
            *made_of,
        ]
    )
    card = make_card(recipe, model, {}, from_hub=start.hub_id is not None)
    trained = train(
        model,
        start.params,
        processor,
        examples,
        training,
        recipe.lengths,
        mesh,
        folder=recipe.output,
        identity=identity,
        seed=recipe.seed,
        card=card,
        rollout=rollout,
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
    """The rows the objectives learn from, each with the responses they read.

    Objectives of tokens, such as SFT, take whole dialogues, and of ranked responses the best only.

    Raises:
      DataError: too many rows cannot be used.
    """
    training = recipe.training
    terms = [section.term() for section in training.objective]
    supervised = all(term.objective.kind == "tokens" for term in terms)
    source = load_source(
        recipe.data, supervised=True, messages_as="dialogue" if supervised else "last_turn"
    )
    _, records = usable_records(
        source,
        start.processor,
        recipe.lengths,
        os.path.join(recipe.output, SKIPPED),
        lambda record: unfit(record, terms, training.reference),
    )
    return [_best(record) for record in records] if supervised else records


def prompt_records(
    recipe: TrainRecipe, rollout: Rollout, start: Checkpoint
) -> list[TokenizedRecord]:
    """The rows whose prompts are sampled from, with what the rewards compare with.

    Raises:
      DataError: too many rows cannot be used.
    """
    _, records = usable_records(
        load_source(recipe.data, supervised=False),
        start.processor,
        recipe.lengths,
        os.path.join(recipe.output, SKIPPED),
        lambda record: unrewardable(record, rollout),
    )
    return records


def _best(record: TokenizedRecord) -> TokenizedRecord:
    """With the responses of the best rank only, where there are ranks."""
    if not record.ranked:
        return record
    best = min(response.source.rank or 0 for response in record.responses)
    kept = tuple(response for response in record.responses if response.source.rank == best)
    return dataclasses.replace(record, responses=kept)


def _random_seed(recipe: TrainRecipe) -> int | None:
    return recipe.seed if recipe.weights == "random" else None
