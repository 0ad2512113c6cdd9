"""The model of a run is chosen by prompts of the user's own that no round is trained on.

Every model answers the held-out prompts, and the judge of the rounds judges the answers: the same
prompts, samples of the same seed, the same judge. Benchmarks are never looked at.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence

import pyarrow as pa
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.data.records import Record
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.feedback.judge import Judge, Responses
from mmpo_jax.feedback.scores import VERDICTS, accepted
from mmpo_jax.generation.responses import generate_stage
from mmpo_jax.recipes.align_recipe import AlignRecipe, Selection
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.training.validation import hold_out

log = logging.getLogger(__name__)

FOLDER = "held_out"
"""Folder of a round in which what was made of held-out prompts is."""


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Prompts that no round is trained on."""

    records: Sequence[Record]
    tokenized: Sequence[TokenizedRecord]


def split_held_out(
    records: Sequence[Record], tokenized: Sequence[TokenizedRecord], selection: Selection
) -> tuple[list[Record], HeldOut]:
    """(prompts of the rounds, those that are held out), whatever their order.

    Raises:
      MmpoError: all rows have the same prompt.
    """
    ((_, held),) = hold_out([tokenized], selection.share)
    names = {record.id for record in held}
    return [record for record in records if record.id not in names], HeldOut(
        [record for record in records if record.id in names],
        [record for record in tokenized if record.id in names],
    )


def judge_held_out(
    held: HeldOut,
    checkpoint: Checkpoint,
    judge: Judge,
    recipe: AlignRecipe,
    mesh: Mesh,
    folder: str,
) -> dict[str, float]:
    """What the judge says of a model's answers to held-out prompts.

    Args:
      held: the prompts.
      checkpoint: the model.
      judge: of the recipe.
      recipe: of the alignment, which has `selection`.
      mesh: the devices.
      folder: of the model's round.

    Returns:
      `held_out/score`, the mean over the answers that have one; `held_out/words`, their mean
      length; and where claims were judged `held_out/rejected_share`.
    """
    assert recipe.selection is not None
    place = os.path.join(folder, FOLDER)
    options = recipe.sampling.model_dump(include=set(Decoding.model_fields))
    with progress.doing("held-out prompts"):
        progress.tell()
        generated = generate_stage(
            checkpoint,
            held.tokenized,
            Decoding(**options | {"num_samples": recipe.selection.num_samples}),
            recipe.lengths,
            mesh,
            folder=place,
            batch_size=recipe.sampling.batch_size,
            seed=recipe.seed,
        )
        judged = judge.judge(Responses(place, held.records, generated))
    texts = generated.table["text"].to_pylist()
    scores = [x for x in judged.table["score"].to_pylist() if not math.isnan(x)]
    claims, rejected = count_verdicts(judged.table)
    values = {
        "held_out/score": sum(scores) / len(scores) if scores else math.nan,
        "held_out/words": sum(len(text.split()) for text in texts) / len(texts),
    }
    if claims:
        values["held_out/rejected_share"] = rejected / claims
    return values


def count_verdicts(judged: pa.Table) -> tuple[int, int]:
    """(claims with a verdict, those of them that were rejected) of a stage `judge`."""
    verdicts = [
        accepted(verdict["p_yes"], verdict["p_no"])
        for text in judged["details"].to_pylist()
        for verdict in json.loads(text).get(VERDICTS, [])
        if None not in (verdict["p_yes"], verdict["p_no"])
    ]
    return len(verdicts), verdicts.count(False)


def best_round(held: Mapping[int, Mapping[str, float]], selection: Selection | None) -> int:
    """The number of the round with the best model, the first of equal ones; of no selection the
    last.

    Args:
      held: what `judge_held_out` says, by round, the start model's under 0.
      selection: of the recipe.
    """
    rounds = [index for index in held if index]
    if selection is None:
        return rounds[-1]
    return min(rounds, key=lambda index: (_loss(held[index], selection), index))


def _loss(of_round: Mapping[str, float], selection: Selection) -> float:
    """What is to be small; infinity of nothing."""
    value = of_round.get(f"held_out/{selection.by}", math.nan)
    if math.isnan(value):
        return math.inf
    return value if selection.by == "rejected_share" else -value


def tell_choice(held: Mapping[int, Mapping[str, float]], selection: Selection, best: int) -> None:
    """Says in the log which round's model is the result, by what, and how the others do."""
    told = ", ".join(
        f"{f'round {index}' if index else 'start'} "
        f"{of_round.get(f'held_out/{selection.by}', math.nan):.4g} "
        f"({of_round['held_out/words']:.1f} words)"
        for index, of_round in held.items()
    )
    log.info("the result is the model of round %d: %s of held-out prompts", best, selection.by)
    log.info("%s: %s; no benchmark was looked at to choose", selection.by, told)
    if _loss(held[0], selection) <= _loss(held[best], selection):
        log.warning("on held-out prompts no round is better than the start by %s", selection.by)
