"""`mmpo train`: a recipe from its data to a Hugging Face folder."""

from __future__ import annotations

import logging
import os

from mmpo_jax.data.pipeline import Example, tokenize_records
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.readers import write_skipped
from mmpo_jax.data.sources import Source, load_source
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.files import fingerprint_folder, fingerprint_json
from mmpo_jax.models.config import load_config
from mmpo_jax.models.folders import resolve_folder
from mmpo_jax.models.huggingface import load_params, save_model
from mmpo_jax.models.llava import Model
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipe import Lengths, TrainRecipe
from mmpo_jax.training.loop import train
from mmpo_jax.training.losses import REFERENCE, needs_reference
from mmpo_jax.training.reference import reference_stage

log = logging.getLogger(__name__)

MODEL = "model"
"""Where a run's result lies in its output folder."""


def run_training(recipe: TrainRecipe) -> str:
    """Trains on the recipe's data.

    Returns:
      The Hugging Face folder of the result.
    """
    folder = resolve_folder(recipe.model)
    model = Model.create(load_config(folder))
    processor = Processor(folder, model.config)
    mesh = make_mesh(**recipe.devices.model_dump())
    source, records = usable_records(
        load_source(recipe.data, supervised=True), processor, recipe.lengths, recipe.output
    )
    random = recipe.weights == "random"
    params = model.init(recipe.seed) if random else load_params(folder, model)
    examples = [Example(record, {}) for record in records]
    if needs_reference(recipe.training.objective):
        rewards = reference_stage(
            model,
            params,
            processor,
            records,
            recipe.lengths,
            mesh,
            folder=recipe.output,
            model_fingerprint=fingerprint_folder(folder),
            batch_size=recipe.training.batch_size,
        )
        examples = [Example(record, {REFERENCE: rewards[record.id]}) for record in records]
    identity = fingerprint_json(
        [
            "random" if random else fingerprint_folder(folder),
            source.fingerprint,
            recipe.model_dump(mode="json", exclude={"output", "devices"}),
        ]
    )
    trained = train(
        model,
        params,
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


def usable_records(
    source: Source, processor: Processor, lengths: Lengths, output: str
) -> tuple[Source, list[TokenizedRecord]]:
    """Tokenizes a source; what cannot be used goes to `skipped.jsonl`, counted by reason.

    Raises:
      DataError: more rows were skipped than the recipe allows, or none is left.
    """
    tokenized, skipped = tokenize_records(source.records, processor, lengths)
    kept = {record.id for record in tokenized}
    source = source.skip([r for r in source.records if r.id in kept], skipped)
    cut = sum(response.truncated > 0 for r in tokenized for response in r.responses)
    if cut:
        log.warning("%d responses were cut to %d tokens", cut, lengths.response[-1])
    if source.skipped:
        os.makedirs(output, exist_ok=True)
        write_skipped(os.path.join(output, "skipped.jsonl"), source.skipped)
    return source, tokenized
