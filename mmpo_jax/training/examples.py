"""From tokenized records to what a step consumes: the fields and the reference of objectives."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoint import Checkpoint
from mmpo_jax.data.pipeline import Example
from mmpo_jax.data.rows import SkipReason
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.errors import DataError
from mmpo_jax.objectives.registry import FIELDS
from mmpo_jax.objectives.terms import Term, needs
from mmpo_jax.recipe import Lengths
from mmpo_jax.recipe_training import Reference, Training
from mmpo_jax.training.losses import needs_reference, recipe_terms
from mmpo_jax.training.reference import reference_stage


def prepare_examples(
    start: Checkpoint,
    records: Sequence[TokenizedRecord],
    config: Training,
    lengths: Lengths,
    mesh: Mesh,
    *,
    folder: str,
    progress: Callable[[str, int, int], None] = lambda stage, part, parts: None,
) -> list[Example]:
    """Examples of records, with the reference's log-probs where they are computed before training.

    Args:
      start: what training starts from.
      records: with responses.
      config: of the training stage.
      lengths: bucket sizes.
      mesh: the devices.
      folder: of the reference's cache.
      progress: see `reference.score_stage`.

    Raises:
      DataError: the data lack a field that an objective needs.
    """
    terms = recipe_terms(config)
    needed = needs(terms)
    reference = None
    if needs_reference(terms) and config.reference.type == "given":
        reference = _given(records)
    elif needs_reference(terms) and config.reference.type == "cached":
        reference = reference_stage(
            start.model,
            start.params,
            start.processor,
            records,
            lengths,
            mesh,
            folder=folder,
            per_token="reference_tokens" in needed,
            model_fingerprint=start.fingerprint,
            batch_size=config.batch_size,
            compute_dtype=config.compute_dtype,
            progress=progress,
        )
    return make_examples(records, needed, reference)


def unfit(
    record: TokenizedRecord, terms: Sequence[Term], reference: Reference
) -> tuple[SkipReason, str] | None:
    """(reason, detail) why a record cannot be learned from; None if it can."""
    if not record.responses:
        return "empty_response", "no response to learn"
    problems = (lacks(record, field) for field in sorted(needs(terms) & FIELDS.keys()))
    problem = next((problem for problem in problems if problem is not None), None)
    if problem is not None or reference.type != "given" or not needs_reference(terms):
        return problem
    if any(response.source.log_prob is None for response in record.responses):
        return "no_reference", "the data hold no reference log-probs of the responses"
    return None


def _given(records: Sequence[TokenizedRecord]) -> dict[str, np.ndarray]:
    return {
        record.id: np.array([r.source.log_prob for r in record.responses], np.float32)
        for record in records
    }


def make_examples(
    records: Sequence[TokenizedRecord],
    needs: Collection[str],
    reference: Mapping[str, np.ndarray] | None = None,
) -> list[Example]:
    """Examples of records in one context.

    Args:
      records: with responses.
      needs: names, as objectives have them; those of fields count.
      reference: record id -> float32[S] or [S, t], if one was computed.

    Raises:
      DataError: no record has a field that is needed.
    """
    name = "log_probs" if "reference_tokens" in needs else "sums"
    makers = {field: MAKERS[field] for field in sorted(needs & FIELDS.keys())}
    for field in makers:
        if records and not any(lacks(record, field) is None for record in records):
            raise DataError(
                f"no row has the field {field!r}, which the objective needs: {FIELDS[field]}"
            )
    return [
        Example(
            (record,),
            {field: make(record) for field, make in makers.items()},
            {} if reference is None else {name: reference[record.id][None]},
        )
        for record in records
    ]


def lacks(record: TokenizedRecord, field: str) -> tuple[SkipReason, str] | None:
    """(reason, detail) why an objective that needs `field` cannot use a record; None if it can."""
    sources = [response.source for response in record.responses]
    if field == "rank" and not record.ranked:
        return "incomplete_pair", "no ranked responses, which the objective compares"
    if field == "score" and not all(len(source.scores) == 1 for source in sources):
        return "no_score", "not every response has one score"
    if field == "scores" and not all(source.scores for source in sources):
        return "no_score", "not every response has scores"
    if field == "desirable" and any(source.desirable is None for source in sources):
        return "no_label", "not every response is said to be desirable or not"
    return None


def _ranks(record: TokenizedRecord) -> np.ndarray:
    return np.array([response.source.rank or 0 for response in record.responses], np.float32)


def _scores(record: TokenizedRecord) -> np.ndarray:
    return np.array(
        [next(iter(response.source.scores.values())) for response in record.responses], np.float32
    )


def _desirable(record: TokenizedRecord) -> np.ndarray:
    return np.array([bool(response.source.desirable) for response in record.responses], np.float32)


MAKERS: dict[str, Callable[[TokenizedRecord], np.ndarray]] = {
    "rank": _ranks,
    "score": _scores,
    "desirable": _desirable,
}
"""How a field comes out of a record."""
