"""From tokenized records to what a step consumes: the fields and the reference of objectives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_items
from mmpo_jax.data.contexts import all_names, arranged, tokenize_contexts
from mmpo_jax.data.critiques import tokenize_scored
from mmpo_jax.data.examples import Example, Examples
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.skipped import Problem
from mmpo_jax.data.tokenization import Tokenize, TokenizedRecord
from mmpo_jax.data.tokenized_rows import ContextRows, KnownRows, known
from mmpo_jax.objectives.registry import FIELDS, is_field
from mmpo_jax.objectives.terms import Term, needs, rows_read
from mmpo_jax.recipes.training import NoReference, Reference, Training
from mmpo_jax.training.fields import says, score_names
from mmpo_jax.training.losses import needs_reference, recipe_terms
from mmpo_jax.training.mismatched import with_mismatched
from mmpo_jax.training.reference import check_given, reference_stage
from mmpo_jax.training.row_use import (
    FIELDS_COLUMN,
    GIVEN_COLUMN,
    SCORE_COLUMN,
    LearnedUse,
    digest_fields,
    field_values,
    given_column,
    given_log_probs,
)

Scores = Callable[[TokenizedRecord], np.ndarray]
"""The reference's log-probs of a record in a context, float32[S] or [S, t]."""


def prepare_examples(
    start: Checkpoint,
    records: Sequence[TokenizedRecord],
    config: Training,
    lengths: Lengths,
    mesh: Mesh,
    *,
    folder: str,
    seen: Collection[int] | None = None,
) -> LearnedExamples:
    """Examples of records, with the reference's log-probs where they are computed before training.

    Args:
      start: what training starts from.
      records: with responses.
      config: of the training stage.
      lengths: bucket sizes.
      mesh: the devices.
      folder: of the reference's cache.
      seen: indices of the records that the run will read; the reference of the others is not
        computed, and is not a number. None for all.

    Raises:
      DataError: the data lack a field that an objective needs, or hold log-probs of a reference
        that is another model.
    """
    terms = recipe_terms(config)
    needed = needs(terms)
    rows = known(records)
    if rows_read(terms).mismatched:
        rows = with_mismatched(rows)
    reference: Mapping[str, np.ndarray] | Scores | None = None
    if needs_reference(terms) and config.reference.type == "given":
        reference = _given
        if config.reference.check:
            first = list(ContextRows(rows[: config.batch_size]))
            given = {context.id: _given(context) for context in first}
            check_given(start, first, given, config, lengths, mesh)
    elif needs_reference(terms) and config.reference.type == "cached":
        read = rows if seen is None else rows.take(np.array(sorted(seen), int))
        reference = reference_stage(
            start,
            ContextRows(read),
            lengths,
            mesh,
            folder=folder,
            per_token="reference_tokens" in needed,
            batch_size=config.batch_size,
            compute_dtype=config.compute_dtype,
        )
    return make_examples(rows, needed, reference)


def unfit(record: TokenizedRecord, terms: Sequence[Term], reference: Reference) -> Problem | None:
    """(reason, detail) why a record cannot be learned from; None if it can."""
    return LearnedUse.of(terms, reference).unfit(record)


def tokenizer_for(terms: Sequence[Term], seed: int) -> Tokenize:
    """Tokenizes records in the contexts that the terms need.

    Args:
      terms: whose options agree on the contexts, as a recipe's do.
      seed: of what is random in other images.
    """
    use = LearnedUse.of(terms, NoReference(), seed)
    if use.scored is not None:
        return functools.partial(tokenize_scored, scored=use.scored)
    return functools.partial(tokenize_contexts, other=use.other, joint=use.joint)


class LearnedExamples(Examples):
    """Examples of records, each in as many contexts as any of them."""

    def __init__(self, rows: KnownRows, fields: Sequence[str], marked: bool):
        """
        Args:
          rows: with responses.
          fields: names of the fields.
          marked: whether a field says which responses are mismatched.
        """
        super().__init__(rows, all_names(rows.sizes.contexts))
        self.fields, self.marked = fields, marked
        self.scores: tuple[str, Scores] | None = None
        """What the reference's log-probs are called, and they, where there are any."""

    def make(self, record: TokenizedRecord) -> Example:
        contexts = arranged(record, self.names)
        scores = {}
        if self.scores is not None:
            name, of = self.scores
            scores[name] = _stacked([None if row is None else of(row) for row in contexts])
        mismatched = np.array([r.mismatched for r in record.responses], np.float32)
        fields = {
            field: _lengthened(values, len(mismatched))
            for field, values in field_values(_own(record), self.fields).items()
        }
        if self.marked:
            fields["mismatched"] = mismatched
        return Example(contexts, fields, scores, self.names)


def make_examples(
    records: Sequence[TokenizedRecord],
    needs: Collection[str],
    reference: Mapping[str, np.ndarray] | Scores | None = None,
) -> LearnedExamples:
    """Examples of records, each in as many contexts as any of them.

    Ranks are always among the fields, 0 where there are none: losses of tokens learn the best.

    Args:
      records: with responses.
      needs: names, as objectives have them; those of fields count.
      reference: the reference's log-probs of a record in a context, or id -> these, float32[S] or
        [S, t], if there are any; of records without an id there they are not a number.

    Raises:
      DataError: no record has a field that is needed, or their scores have different names.
    """
    rows = known(records)
    fields = sorted(filter(is_field, needs))
    for field in fields:
        if len(rows) and not any(says(_own(record), field) for record in rows):
            raise DataError(
                f"no row has the field {field!r}, which the objective needs: "
                f"{FIELDS[field.partition('/')[0]]}"
            )
    called = _score_names(rows) if {"score", "win_rate"} & set(fields) else set()
    if len(called) > 1:
        raise DataError(
            f"the rows' scores are called {', '.join(sorted(called))}; the data's option `score` "
            "says which one is meant"
        )
    examples = LearnedExamples(rows, fields, "mismatched" in needs)
    if reference is not None:
        per_token = "reference_tokens" in needs
        of = reference if callable(reference) else functools.partial(_found, reference, per_token)
        examples.scores = ("log_probs" if per_token else "sums", of)
    return examples


def _score_names(rows: KnownRows) -> set[str]:
    if rows.has_column(SCORE_COLUMN):
        return set(rows.column(SCORE_COLUMN))
    return score_names([_own(record) for record in rows])


def _given(context: TokenizedRecord) -> np.ndarray:
    """float32[S] as the data give them."""
    return np.array(given_log_probs(context), np.float32)


def _found(
    reference: Mapping[str, np.ndarray], per_token: bool, context: TokenizedRecord
) -> np.ndarray:
    found = reference.get(context.id)
    return _unknown(context, per_token) if found is None else found


def _unknown(record: TokenizedRecord, per_token: bool) -> np.ndarray:
    """NaN in the shape of the reference's log-probs: float32[R], or [R, t] per token."""
    longest = max(len(response.ids) for response in record.responses)
    shape = (len(record.responses), longest) if per_token else (len(record.responses),)
    return np.full(shape, np.nan, np.float32)


def _own(record: TokenizedRecord) -> TokenizedRecord:
    """The record without the responses of another one."""
    kept = tuple(response for response in record.responses if not response.mismatched)
    return dataclasses.replace(record, responses=kept)


def _lengthened(values: np.ndarray, length: int) -> np.ndarray:
    """float32[length, ...]: the values, then zeros."""
    return np.pad(values, [(0, length - len(values)), *[(0, 0)] * (values.ndim - 1)])


def _stacked(rows: Sequence[np.ndarray | None]) -> np.ndarray:
    """float32[C, ...] of rows of different lengths, zeros where one has none."""
    known = [row for row in rows if row is not None]
    shape = np.max([row.shape for row in known], axis=0)
    stacked = np.zeros((len(rows), *shape), np.float32)
    for place, row in zip(stacked, rows, strict=True):
        if row is not None:
            place[tuple(map(slice, row.shape))] = row
    return stacked


def fingerprint_fields(examples: LearnedExamples) -> str:
    """SHA-256 of what the data say of the responses."""
    rows = examples.rows
    if rows.has_column(FIELDS_COLUMN):
        digests = rows.column(FIELDS_COLUMN)
    else:
        digests = [digest_fields(_own(record), examples.fields) for record in rows]
    counts = rows.sizes.responses.tolist() if examples.marked else [0] * len(rows)
    return fingerprint_items(zip(digests, counts, strict=True))


def fingerprint_given(examples: LearnedExamples) -> str:
    """SHA-256 of the reference's log-probs that the data give."""
    rows = examples.rows
    if rows.has_column(GIVEN_COLUMN):
        return fingerprint_items(rows.column(GIVEN_COLUMN))
    return fingerprint_items(given_column(record) for record in rows)
