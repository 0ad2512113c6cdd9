"""`mmpo select`: the best of several responses, by the model's own reward or a reward model's."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from mmpo_jax.checkpoints.checkpoint import (
    Checkpoint,
    check_speaker,
    open_checkpoint,
    open_reward_model,
)
from mmpo_jax.commands.generate import sampled_responses
from mmpo_jax.commands.results import Results
from mmpo_jax.commands.reward import score_usable
from mmpo_jax.commands.score import without_responses
from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.skipped import write_skipped
from mmpo_jax.data.sources import RecordSet
from mmpo_jax.data.tokenization import Tokenize, TokenizedRecord, tokenize_records
from mmpo_jax.data.usable import any_row, usable_records, without_shown_media
from mmpo_jax.feedback.implicit import (
    of_policy,
    open_both,
    reward_stage,
    tokenizer_for_both,
)
from mmpo_jax.feedback.selection import Selection, best_of, describe_selection
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.command_recipes import SelectRecipe
from mmpo_jax.recipes.sampling import BestOfNSampling
from mmpo_jax.recipes.scoring import RewardModelAsked
from mmpo_jax.reward_models.reading import Reading
from mmpo_jax.reward_models.scoring import Rewarded
from mmpo_jax.scoring.log_probs import chosen_dtype

log = logging.getLogger(__name__)

REPORT = "selection.json"
"""Name of the file that says what choosing does to lengths."""


def main(recipe: SelectRecipe) -> None:
    if recipe.reward_model is not None:
        print(f"best: {run_reward_model(recipe, recipe.reward_model)}")
        return
    path, selection = run_selection(recipe)
    print(*selection.lines(), sep="\n")
    print(f"best: {path}")


def run_reward_model(recipe: SelectRecipe, asked: RewardModelAsked) -> str:
    """Samples responses, or takes those of the data, and has a reward model choose.

    Returns:
      The file, as that of `run_selection`, with the `critiques` of every response.
    """
    results = Results.at(recipe.output, "best", recipe.data)
    record_set = recipe.data.load(supervised=recipe.sampling is None)
    mesh = make_mesh(**recipe.devices.model_dump())
    judge = open_reward_model(asked.model, recipe.attention, asked.template)
    reading = Reading.of(asked, judge.model, asked.model)
    if recipe.sampling is not None:
        check_speaker(recipe.model, "mmpo select")
        policy = open_checkpoint(recipe.model, recipe.attention, recipe.template)
        record_set, prompts = usable_records(
            record_set, policy.processor, recipe.lengths, results.skipped
        )
        samples = _sampled(recipe, recipe.sampling, policy, prompts, mesh, results)
        answered = [_answered(record, samples[record.id]) for record in record_set.records]
        record_set = dataclasses.replace(record_set, records=answered)
    records, tokenized, rewarded = score_usable(
        recipe, record_set, judge, reading, asked, results, mesh
    )
    texts = [[response.text for response in record.responses] for record in records]
    lines = map(_line, tokenized, texts, [one.rewards for one in rewarded])
    critiques = map(_critiques_line, tokenized, rewarded)
    pairs = zip(lines, critiques, strict=True)
    return results.write(line | own for line, own in pairs)


def run_selection(recipe: SelectRecipe) -> tuple[str, Selection]:
    """Samples responses, or takes those of the data, and chooses one for every usable prompt.

    Returns:
      The file, one line per prompt: `id`, `responses`, `rewards` and the place of the `best`, of
      equal ones the first; and what choosing does to lengths, which is also in `REPORT`. A response
      that could not be used is null, and so is its reward.
    """
    assert recipe.reference is not None
    results = Results.at(recipe.output, "best", recipe.data)
    record_set = recipe.data.load(supervised=recipe.sampling is None)
    mesh = make_mesh(**recipe.devices.model_dump())
    policy, reference = open_both(recipe.model, recipe.reference, recipe.attention, recipe.template)
    both = tokenizer_for_both(reference.processor)
    record_set, records = usable_records(
        record_set,
        policy.processor,
        recipe.lengths,
        results.skipped,
        any_row if recipe.sampling else without_responses,
        both,
    )
    policy = policy.reloaded(mesh)
    if recipe.sampling is not None:
        samples = _sampled(recipe, recipe.sampling, policy, of_policy(records), mesh, results)
        answered = [_answered(record, samples[record.id]) for record in record_set.records]
        record_set = dataclasses.replace(record_set, records=answered)
        records = _tokenized(record_set, policy.processor, recipe.lengths, results.skipped, both)
    rewards = reward_stage(
        policy,
        reference,
        records,
        recipe.lengths,
        mesh,
        beta=recipe.reward.beta,
        folder=results.parts,
        batch_size=recipe.batch_size,
        compute_dtype=chosen_dtype(recipe.reward.compute_dtype, policy),
    )
    texts = [[response.source.text for response in record.responses] for record in records]
    selection = describe_selection(rewards, texts)
    fingerprints = {"policy": policy.fingerprint, "reference": reference.fingerprint}
    report = json.dumps(fingerprints | selection.to_json(), indent=1) + "\n"
    on_one(lambda: write_atomic(results.beside(REPORT), report.encode()))
    values = [row.per_token if recipe.reward.per_token else row.summed for row in rewards]
    return results.write(map(_line, records, texts, values)), selection


def _sampled(
    recipe: SelectRecipe,
    sampling: BestOfNSampling,
    policy: Checkpoint,
    prompts: Sequence[TokenizedRecord],
    mesh: Mesh,
    results: Results,
) -> dict[str, list[dict[str, Any]]]:
    return sampled_responses(
        policy,
        prompts,
        sampling,
        recipe.lengths or fitting_lengths(prompts),
        mesh,
        folder=results.parts,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
    )


def _answered(record: Record, samples: Sequence[Mapping[str, Any]]) -> Record:
    responses = tuple(
        Response.of(one["text"], finished=one["finished"], token_ids=tuple(one["token_ids"]))
        for one in samples
    )
    return dataclasses.replace(record, responses=responses)


def _tokenized(
    record_set: RecordSet,
    processor: Processor,
    lengths: Lengths | None,
    skipped_file: str,
    function: Tokenize,
) -> list[TokenizedRecord]:
    """Records with samples, of the very tokens that were sampled. A sample that shows an image is
    left out, and so is a row of which nothing can be scored.

    Raises:
      DataError: none is left.
    """
    name = record_set.name
    with progress.doing(f"tokenising samples of {name}"):
        records = [without_shown_media(record, processor) for record in record_set.records]
        kept, skipped = tokenize_records(records, processor, lengths, name, function)
    for row in skipped:
        log.warning("%s: skipped %s", name, row)
    if skipped:
        on_one(lambda: write_skipped(skipped_file, [*record_set.skipped, *skipped]))
    if not kept:
        raise DataError(f"{name}: no sample can be scored; {skipped[0]}")
    return kept


def _line(
    record: TokenizedRecord, said: Sequence[str], rewards: Float[np.ndarray, " R"]
) -> dict[str, Any]:
    texts: list[str | None] = [*said]
    values = [None if math.isnan(reward) else float(reward) for reward in rewards]
    best = best_of(np.where(np.isnan(rewards), -np.inf, rewards))
    for place in record.left_out:  # in order
        texts.insert(place, None)
        values.insert(place, None)
        best += place <= best
    return {"id": record.id, "responses": texts, "rewards": values, "best": best}


def _critiques_line(record: TokenizedRecord, rewarded: Rewarded) -> dict[str, Any]:
    critiques = [*rewarded.critiques]
    for place in record.left_out:  # in order
        critiques.insert(place, [])
    return {"critiques": critiques}
