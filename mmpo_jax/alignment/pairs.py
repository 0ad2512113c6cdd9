"""The pairs of a round as rows of its training."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import pyarrow as pa

from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.tally import warn_of_cuts
from mmpo_jax.data.tokenization import TokenizedRecord, tokenize_records
from mmpo_jax.data.usable import count_cut
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.training.examples import tokenizer_for, unfit
from mmpo_jax.training.losses import recipe_terms

log = logging.getLogger(__name__)


def pair_rows(
    name: str, pairs: Sequence[Record], processor: Processor, recipe: AlignRecipe
) -> list[TokenizedRecord]:
    """Pairs that the recipe's objectives can learn from, tokenized; the log names the others.

    Args:
      name: of them all, for the log.
      pairs: of `pair_records`.
      processor: of the model that is trained.
      recipe: of the alignment.
    """
    terms = recipe_terms(recipe.training)
    records, skipped = tokenize_records(
        pairs, processor, recipe.lengths, name, tokenizer_for(terms, recipe.seed)
    )
    for row in skipped:
        log.warning("%s: skipped %s", name, row)
    usable = []
    for record in records:
        problem = unfit(record, terms, recipe.training.reference)
        if problem is None:
            usable.append(record)
        else:
            log.warning("%s: skipped id %r: %s: %s", name, record.id, *problem)
    warn_of_cuts(name, sum(map(count_cut, usable)), recipe.lengths.response[-1])
    return usable


def pair_records(records: Sequence[Record], generated: pa.Table, pairs: pa.Table) -> list[Record]:
    """Every pair as a record with the chosen response first, of the tokens that were sampled,
    where they are known."""
    by_id = {record.id: record for record in records}
    columns = (generated[name].to_pylist() for name in ("prompt_id", "sample", "finished"))
    ids = generated["token_ids"].combine_chunks()
    sampled = {
        (prompt_id, sample): (finished, ids[place])
        for place, (prompt_id, sample, finished) in enumerate(zip(*columns, strict=True))
    }
    return [
        dataclasses.replace(
            by_id[row["prompt_id"]],
            id=f"{row['prompt_id']}/{row['chosen_sample']}-{row['rejected_sample']}",
            responses=tuple(
                _sampled(row[side], rank, *sampled[row["prompt_id"], row[f"{side}_sample"]])
                for side, rank in (("chosen", 1), ("rejected", 2))
            ),
        )
        for row in pairs.to_pylist()
    ]


def _sampled(text: str, rank: int, finished: bool, ids: pa.ListScalar) -> Response:
    """A response that is trained as the very tokens that were sampled, cut or not; as its text
    where they are not known."""
    token_ids = tuple(ids.as_py()) if ids.is_valid else None
    return Response.of(text, rank=rank, finished=finished, token_ids=token_ids)
