"""`mmpo train`: a recipe from its data to a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import logging
import os

from mmpo_jax.data.pipeline import Example, tokenize_records
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.readers import SkippedRow, write_skipped
from mmpo_jax.data.sources import Source, load_source
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.files import fingerprint_folder, fingerprint_json
from mmpo_jax.models.config import load_config
from mmpo_jax.models.folders import resolve_folder
from mmpo_jax.models.huggingface import load_params, save_model
from mmpo_jax.models.llava import Model
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipe import Dpo, Lengths, Sft, TrainRecipe
from mmpo_jax.training.loop import train
from mmpo_jax.training.losses import REFERENCE, needs_reference
from mmpo_jax.training.reference import reference_stage

log = logging.getLogger(__name__)

MODEL = "model"
"""Where a run's result lies in its output folder."""
SKIPPED = "skipped.jsonl"
"""Rows of the data that were left out, with reasons."""


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
        load_source(recipe.data, supervised=True),
        processor,
        recipe.lengths,
        recipe.output,
        recipe.training.objective,
    )
    random = recipe.weights == "random"
    params = model.init(recipe.seed) if random else load_params(folder, model)
    # The weights that lie in the folder do not matter to a model that starts from random ones.
    start = (
        fingerprint_json(["random", recipe.seed, dataclasses.asdict(model.config)])
        if random
        else fingerprint_folder(folder)
    )
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
            model_fingerprint=start,
            batch_size=recipe.training.batch_size,
        )
        examples = [Example(record, {REFERENCE: rewards[record.id]}) for record in records]
    identity = fingerprint_json(
        [
            start,
            processor.fingerprints(),
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
    source: Source,
    processor: Processor,
    lengths: Lengths,
    output: str,
    objective: Dpo | Sft | None = None,
) -> tuple[Source, list[TokenizedRecord]]:
    """Tokenizes a source; what cannot be used goes to `skipped.jsonl` with the reason.

    Args:
      source: the records.
      processor: of the checkpoint.
      lengths: bucket sizes; the largest are the limits.
      output: folder of `skipped.jsonl`.
      objective: what the rows are for; those without the responses it compares are skipped.

    Raises:
      DataError: more rows were skipped than the recipe allows, or none is left.
    """
    tokenized, skipped = tokenize_records(source.records, processor, lengths, source.name)
    if objective is not None:
        skipped += [
            _unfit(source.name, row, objective) for row in tokenized if not _fits(row, objective)
        ]
        tokenized = [row for row in tokenized if _fits(row, objective)]
    kept = {record.id for record in tokenized}
    source = source.skip([record for record in source.records if record.id in kept], skipped)
    if source.skipped:
        write_skipped(os.path.join(output, SKIPPED), source.skipped)
    source.check()
    cut = sum(response.truncated > 0 for row in tokenized for response in row.responses)
    if cut:
        log.warning(
            "%s: %d responses were cut to %d tokens", source.name, cut, lengths.response[-1]
        )
    return source, tokenized


def _fits(record: TokenizedRecord, objective: Dpo | Sft) -> bool:
    return len(record.responses) == 2 if isinstance(objective, Dpo) else len(record.responses) > 0


def _unfit(name: str, record: TokenizedRecord, objective: Dpo | Sft) -> SkippedRow:
    pairwise = isinstance(objective, Dpo)
    wanted = "a chosen and a rejected one" if pairwise else "at least one"
    return SkippedRow(
        file=name,
        row=None,
        id=record.id,
        reason="incomplete_pair" if pairwise else "empty_response",
        detail=f"{len(record.responses)} responses, {objective.type} needs {wanted}",
    )
