"""`mmpo generate`: responses to prompts, as JSONL."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint, check_speaker, load_checkpoint
from mmpo_jax.commands.results import Results
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.formats.media_keys import said_of
from mmpo_jax.data.formats.writing import messages, template_columns
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import Record, VideoRef
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.usable import usable_records
from mmpo_jax.generation.responses import generate_stage
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.command_recipes import GenerateRecipe
from mmpo_jax.recipes.sampling import Decoding

log = logging.getLogger(__name__)


def main(recipe: GenerateRecipe) -> None:
    print(f"responses: {run_generation(recipe)}")


def run_generation(recipe: GenerateRecipe) -> str:
    """Samples responses to the prompt of every usable row; responses it has are not read.

    Returns:
      The file, one line per row: `id`, `images`, `videos`, `prompt`, `responses`, and for every
      response whether it `finished` by itself and was not cut at `max_new_tokens`, and the ids of
      its tokens.
    """
    results = Results.at(recipe.output, "responses", recipe.data)
    record_set = recipe.data.load(supervised=False)
    mesh = make_mesh(**recipe.devices.model_dump())
    check_speaker(recipe.model, "mmpo generate")
    checkpoint = load_checkpoint(recipe.model, mesh, recipe.attention, recipe.template)
    record_set, tokenized = usable_records(
        record_set, checkpoint.processor, recipe.lengths, results.skipped
    )
    responses = sampled_responses(
        checkpoint,
        tokenized,
        recipe.sampling,
        recipe.lengths or fitting_lengths(tokenized),
        mesh,
        folder=results.parts,
        batch_size=recipe.sampling.batch_size,
        seed=recipe.seed,
    )
    return results.write(
        _line(record, responses[record.id], results) for record in record_set.records
    )


def sampled_responses(
    checkpoint: Checkpoint,
    records: Sequence[TokenizedRecord],
    decoding: Decoding,
    lengths: Lengths,
    mesh: Mesh,
    **options: Any,
) -> dict[str, list[dict[str, Any]]]:
    """Id of a record -> its samples, each with `text`, `finished` and `token_ids`; the log says how
    many were cut. See `generate_stage`."""
    generated = generate_stage(checkpoint, records, decoding, lengths, mesh, **options).table
    responses: dict[str, list[dict[str, Any]]] = {record.id: [] for record in records}
    columns = ["prompt_id", "text", "finished", "token_ids"]
    for response in generated.select(columns).to_pylist():
        responses[response["prompt_id"]].append(response)
    log.info(
        "%d of %d responses were cut at max_new_tokens (%d)",
        generated.num_rows - sum(generated["finished"].to_pylist()),
        generated.num_rows,
        decoding.max_new_tokens,
    )
    return responses


def _named(video: VideoRef, results: Results) -> Any:
    """The frames of a video, or its file, as a row names them."""
    if video.file is not None:
        return results.name_image(video.file)
    return [results.name_image(frame) for frame in video.frames]


def _line(record: Record, responses: list[dict[str, Any]], results: Results) -> dict[str, Any]:
    """A row that `mmpo score` and `mmpo train` read again."""
    line: dict[str, Any] = {"id": record.id}
    if record.images:
        line["images"] = [results.name_image(image) for image in record.images]
    if record.videos:
        line["videos"] = [
            {"frames" if video.file is None else "video": _named(video, results), **said_of(video)}
            for video in record.videos
        ]
    said = messages(record.prompt, record)
    plain = len(said) == 1 and isinstance(said[0]["content"], str) and said[0]["role"] == "user"
    line |= {**template_columns(record), "prompt": said[0]["content"] if plain else said}
    line["responses"] = [response["text"] for response in responses]
    line["finished"] = [response["finished"] for response in responses]
    line["response_ids"] = [response["token_ids"] for response in responses]
    return line
