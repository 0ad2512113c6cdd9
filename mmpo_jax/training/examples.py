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
from mmpo_jax.objectives.registry import FIELDS, is_field
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
    if "desirable" not in needs(terms) and any(
        response.source.desirable is False for response in record.responses
    ):
        return "undesirable", "a response that is labelled as not desirable"
    problems = (lacks(record, field) for field in sorted(filter(is_field, needs(terms))))
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
    makers = {field: _maker(field) for field in sorted(filter(is_field, needs))}
    for field in makers:
        if records and not any(lacks(record, field) is None for record in records):
            raise DataError(
                f"no row has the field {field!r}, which the objective needs: "
                f"{FIELDS[field.partition('/')[0]]}"
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
    if field == "rank" and (not record.ranked or len({x.rank for x in sources}) < 2):
        return "incomplete_pair", "no responses of different ranks, which the objective compares"
    if field in ("score", "win_rate") and not all(len(source.scores) == 1 for source in sources):
        return "no_score", "not every response has one score"
    kind, _, dimension = field.partition("/")
    if kind == "scores" and any(dimension not in source.scores for source in sources):
        return "no_score", f"not every response has a score for {dimension!r}"
    if field == "consistency" and any(field not in source.scores for source in sources):
        return "no_score", "not every response has a score 'consistency'"
    if field == "gold" and (not record.ranked or len(set(_ranks(record))) < 3):
        return "incomplete_pair", "no three different ranks, the best of which is gold"
    if field == "desirable" and any(source.desirable is None for source in sources):
        return "no_label", "not every response is said to be desirable or not"
    return None


def _ranks(record: TokenizedRecord) -> np.ndarray:
    return np.array([response.source.rank or 0 for response in record.responses], np.float32)


def _scores(record: TokenizedRecord) -> np.ndarray:
    return np.array(
        [next(iter(response.source.scores.values())) for response in record.responses], np.float32
    )


def _win_rates(record: TokenizedRecord) -> np.ndarray:
    """The mean over the record's responses, itself included, of sigmoid(score - theirs)."""
    scores = _scores(record).astype(np.float64)
    return (0.5 + 0.5 * np.tanh((scores[:, None] - scores) / 2)).mean(axis=1).astype(np.float32)


def _gold(record: TokenizedRecord) -> np.ndarray:
    """1 for the first of the best."""
    ranks = _ranks(record)
    return (np.arange(len(ranks)) == ranks.argmin()).astype(np.float32)


def _dimension(name: str) -> Callable[[TokenizedRecord], np.ndarray]:
    return lambda record: np.array([r.source.scores[name] for r in record.responses], np.float32)


def _desirable(record: TokenizedRecord) -> np.ndarray:
    return np.array([bool(response.source.desirable) for response in record.responses], np.float32)


MAKERS: dict[str, Callable[[TokenizedRecord], np.ndarray]] = {
    "rank": _ranks,
    "score": _scores,
    "desirable": _desirable,
    "win_rate": _win_rates,
    "gold": _gold,
    "consistency": _dimension("consistency"),
}
"""How a field comes out of a record; see `_maker` for those of a name."""


def _maker(field: str) -> Callable[[TokenizedRecord], np.ndarray]:
    kind, _, dimension = field.partition("/")
    return _dimension(dimension) if kind == "scores" else MAKERS[field]
