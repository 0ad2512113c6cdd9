"""`mmpo score`: the log-prob of every response of every row, as JSONL."""

from __future__ import annotations

from typing import Any

from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.commands.results import Results
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.skipped import Problem
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.data.usable import usable_records
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.command_recipes import ScoreRecipe
from mmpo_jax.scoring.log_probs import chosen_dtype, score_stage


def main(recipe: ScoreRecipe) -> None:
    print(f"scores: {run_scoring(recipe)}")


def run_scoring(recipe: ScoreRecipe) -> str:
    """Scores the responses of every usable row, as the reference of training is scored.

    Returns:
      The file, one line per row: `id`, `logps`, `num_tokens`, and with `tokens` also `prompt_ids`
      and `response_ids`. A response's log-prob is the sum over the assistant's tokens, EOS
      included; where its turns go on with the user's, these are in its ids but not in the sum.
      A response that could not be used has null.
    """
    results = Results.at(recipe.output, "scores", recipe.data)
    record_set = recipe.data.load(supervised=True)
    mesh = make_mesh(**recipe.devices.model_dump())
    checkpoint = load_checkpoint(recipe.model, mesh, recipe.attention, recipe.template)
    _, records = usable_records(
        record_set, checkpoint.processor, recipe.lengths, results.skipped, without_responses
    )
    scoring = recipe.scoring
    scores = score_stage(
        checkpoint,
        records,
        recipe.lengths or fitting_lengths(records),
        mesh,
        name="score",
        folder=results.parts,
        batch_size=scoring.batch_size,
        compute_dtype=chosen_dtype(scoring.compute_dtype, checkpoint),
    )
    lines = [
        _line(row, record, scoring.tokens)
        for row, record in zip(scores.to_pylist(), records, strict=True)
    ]
    return results.write(lines)


def _line(row: dict[str, Any], record: TokenizedRecord, tokens: bool) -> dict[str, Any]:
    line = {"id": record.id, "logps": row["log_probs"], "num_tokens": row["num_tokens"]}
    for place in record.left_out:  # in order
        line["logps"].insert(place, None)
        line["num_tokens"].insert(place, 0)
    if tokens:
        line["prompt_ids"] = record.prompt_ids.tolist()
        line["response_ids"] = [response.ids.tolist() for response in record.responses]
        for place in record.left_out:
            line["response_ids"].insert(place, [])
    return line


def without_responses(record: TokenizedRecord) -> Problem | None:
    """Why a row is left out that has no response; None where it has one."""
    return None if record.responses else ("empty_response", "no response to score")
