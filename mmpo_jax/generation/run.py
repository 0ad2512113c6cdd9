"""`mmpo generate`: responses to a recipe's prompts, as JSONL."""

from __future__ import annotations

import json
import os

from mmpo_jax.checkpoint import load_checkpoint
from mmpo_jax.data.sources import load_source, usable_records
from mmpo_jax.files import write_atomic
from mmpo_jax.generation.responses import generate_responses
from mmpo_jax.generation.sampler import Decoding
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipe import GenerateRecipe

FILE = "responses.jsonl"


def run_generation(recipe: GenerateRecipe) -> str:
    """Samples responses to every usable row.

    Returns:
      The file, one line per row: `id`, `prompt`, `responses`.
    """
    mesh = make_mesh(**recipe.devices.model_dump())
    checkpoint = load_checkpoint(recipe.model, mesh, recipe.attention)
    source, tokenized = usable_records(
        load_source(recipe.data, supervised=False),
        checkpoint.processor,
        recipe.lengths,
        recipe.output,
    )
    generated = generate_responses(
        checkpoint.model,
        checkpoint.params,
        checkpoint.processor,
        tokenized,
        Decoding(**recipe.sampling.model_dump(exclude={"batch_size"})),
        recipe.lengths,
        mesh,
        batch_size=recipe.sampling.batch_size,
        seed=recipe.seed,
    )
    texts: dict[str, list[str]] = {record.id: [] for record in source.records}
    for response in generated:
        texts[response.prompt_id].append(response.text)
    lines = [
        json.dumps(
            {"id": record.id, "prompt": record.prompt[-1].text, "responses": texts[record.id]}
        )
        for record in source.records
    ]
    path = os.path.join(recipe.output, FILE)
    write_atomic(path, "".join(line + "\n" for line in lines).encode())
    return path
