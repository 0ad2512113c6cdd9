"""From tokenized records to what a step consumes: the fields and the reference of objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoint import Checkpoint
from mmpo_jax.data.pipeline import Example
from mmpo_jax.data.rows import SkipReason
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.errors import DataError
from mmpo_jax.objectives.registry import FIELDS, VIEWS
from mmpo_jax.objectives.terms import Term, needs
from mmpo_jax.recipe import Lengths, Reference, Training
from mmpo_jax.training.losses import needs_reference
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
    terms = [section.term() for section in config.objective]
    needed = needs(terms)
    if "mismatched" in needed:
        records = with_mismatched(records)
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


def with_mismatched(records: Sequence[TokenizedRecord]) -> list[TokenizedRecord]:
    """Records with the responses of the record before after their own; the first has the last's.

    So they are scored in the same pass, by the reference too, and all responses of the data serve
    once as mismatched ones.

    Raises:
      DataError: there is only one record.
    """
    if len(records) < 2:
        raise DataError(
            f"the objective compares with {VIEWS['mismatched']}, and there is only one record"
        )
    others = [records[-1], *records[:-1]]
    return [
        dataclasses.replace(
            record,
            responses=(
                *record.responses,
                *(dataclasses.replace(r, mismatched=True) for r in other.responses),
            ),
        )
        for record, other in zip(records, others, strict=True)
    ]


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
    makers = {field: MAKERS[field] for field in sorted(needs & MAKERS.keys())}
    for field in makers.keys() & FIELDS.keys():
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
    if field in ("scores", "other_models") and not all(source.scores for source in sources):
        return "no_score", "not every response has scores"
    if field == "desirable" and None in _verdicts(record):
        return (
            "no_label",
            "not every response is said to be desirable or not, or better than others",
        )
    return None


def _ranks(record: TokenizedRecord) -> np.ndarray:
    return np.array([response.source.rank or 0 for response in record.responses], np.float32)


def _scores(record: TokenizedRecord) -> np.ndarray:
    return np.array(
        [next(iter(response.source.scores.values())) for response in record.responses], np.float32
    )


def _verdicts(record: TokenizedRecord) -> list[bool | None]:
    """Whether each response is desirable; of ranked ones that nothing else is said of, the best
    are, unless all are tied."""
    sources = [response.source for response in record.responses]
    ranks = [r.source.rank for r in record.responses if not r.mismatched]
    if record.ranked and len(set(ranks)) > 1 and all(s.desirable is None for s in sources):
        best = min(rank for rank in ranks if rank is not None)
        return [source.rank == best for source in sources]
    return [source.desirable for source in sources]


def _desirable(record: TokenizedRecord) -> np.ndarray:
    return np.array([bool(verdict) for verdict in _verdicts(record)], np.float32)


def _other_models(record: TokenizedRecord) -> np.ndarray:
    scores = [list(response.source.scores.values()) for response in record.responses]
    return np.array([np.mean(values) if values else 0 for values in scores], np.float32)


def _mismatched(record: TokenizedRecord) -> np.ndarray:
    return np.array([response.mismatched for response in record.responses], np.float32)


MAKERS: dict[str, Callable[[TokenizedRecord], np.ndarray]] = {
    "rank": _ranks,
    "score": _scores,
    "desirable": _desirable,
    "other_models": _other_models,
    "mismatched": _mismatched,
}
"""How a field, or what tells a view apart, comes out of a record."""
