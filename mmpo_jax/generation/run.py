"""`mmpo generate`: responses to prompts, as JSONL."""

from __future__ import annotations

from typing import Any

from mmpo_jax.checkpoint import load_checkpoint
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.records import Record
from mmpo_jax.data.results import Results, tell_progress
from mmpo_jax.data.sources import load_source, usable_records
from mmpo_jax.generation.responses import generate_stage
from mmpo_jax.generation.sampler import Decoding
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipe import GenerateRecipe


def run_generation(recipe: GenerateRecipe) -> str:
    """Samples responses to the prompt of every usable row; responses it has are not read.

    Returns:
      The file, one line per row: `id`, `images`, `prompt`, `responses`.
    """
    results = Results.at(recipe.output, "responses")
    mesh = make_mesh(**recipe.devices.model_dump())
    checkpoint = load_checkpoint(recipe.model, mesh, recipe.attention, recipe.template)
    source, tokenized = usable_records(
        load_source(recipe.data, supervised=False),
        checkpoint.processor,
        recipe.lengths,
        results.skipped,
    )
    generated = generate_stage(
        checkpoint.model,
        checkpoint.params,
        checkpoint.processor,
        tokenized,
        Decoding(**recipe.sampling.model_dump(exclude={"batch_size"})),
        recipe.lengths or fitting_lengths(tokenized),
        mesh,
        folder=results.parts,
        model_fingerprint=checkpoint.fingerprint,
        batch_size=recipe.sampling.batch_size,
        seed=recipe.seed,
        progress=tell_progress,
    )
    texts: dict[str, list[str]] = {record.id: [] for record in source.records}
    for response in generated.select(["prompt_id", "text"]).to_pylist():
        texts[response["prompt_id"]].append(response["text"])
    return results.write(_line(record, texts[record.id], results) for record in source.records)


def _line(record: Record, responses: list[str], results: Results) -> dict[str, Any]:
    """A row that `mmpo score` and `mmpo train` read again."""
    line: dict[str, Any] = {"id": record.id}
    if record.images:
        line["images"] = [results.name_image(image) for image in record.images]
    line["prompt"] = record.prompt[-1].text
    if len(record.prompt) > 1:
        line["prompt"] = [{"role": turn.role, "content": turn.text} for turn in record.prompt]
    return line | {"responses": responses}
