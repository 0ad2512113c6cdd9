"""From tokenized records to what a step consumes: the fields and the reference of objectives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoint import Checkpoint
from mmpo_jax.data.contexts import (
    OtherImage,
    all_contexts,
    answers,
    arranged,
    context_names,
    tokenize_contexts,
)
from mmpo_jax.data.pipeline import Example
from mmpo_jax.data.records import Span
from mmpo_jax.data.rows import SkipReason
from mmpo_jax.data.segments import changed_segments
from mmpo_jax.data.tokenization import Tokenize, TokenizedRecord, TokenizedResponse
from mmpo_jax.errors import DataError
from mmpo_jax.files import fingerprint_json
from mmpo_jax.objectives.registry import FIELDS, VIEWS, is_field
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
            [context for record in records for _, context in all_contexts(record)],
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
        context.id: np.array(
            [r.source.log_prob if len(r.ids) else 0 for r in context.responses], np.float32
        )
        for record in records
        for _, context in all_contexts(record)
    }


def tokenizer_for(terms: Sequence[Term], seed: int) -> Tokenize:
    """Tokenizes records in the contexts that the terms need.

    Args:
      terms: whose options agree on the contexts, as a recipe's do.
      seed: of what is random in other images.
    """
    others = [term.options for term in terms if "other_image" in term.needs]
    other = None
    if others:
        kind, step = others[0]["image"], others[0]["noise_step"]
        other = OtherImage(None if kind == "data" else kind, step, seed)
    joint = any(term.options.get("joint") for term in terms)
    return functools.partial(tokenize_contexts, other=other, joint=joint)


def make_examples(
    records: Sequence[TokenizedRecord],
    needs: Collection[str],
    reference: Mapping[str, np.ndarray] | None = None,
) -> list[Example]:
    """Examples of records, each in as many contexts as any of them.

    Args:
      records: with responses.
      needs: names, as objectives have them; those of fields count.
      reference: id of a record in a context -> float32[S] or [S, t], if one was computed.

    Raises:
      DataError: no record has a field that is needed.
    """
    name = "log_probs" if "reference_tokens" in needs else "sums"
    asked = sorted(need for need in needs if is_field(need) or need in MAKERS)
    makers = {field: _maker(field) for field in asked}
    for field in filter(is_field, makers):
        if records and not any(lacks(record, field) is None for record in records):
            raise DataError(
                f"no row has the field {field!r}, which the objective needs: "
                f"{FIELDS[field.partition('/')[0]]}"
            )
    names = context_names(records)
    examples = []
    for record in records:
        contexts = arranged(record, names)
        scores = {}
        if reference is not None:
            found = [None if row is None else reference[row.id] for row in contexts]
            scores[name] = _stacked(found)
        fields = {field: make(record) for field, make in makers.items()}
        examples.append(Example(contexts, fields, scores, names))
    return examples


def _stacked(rows: Sequence[np.ndarray | None]) -> np.ndarray:
    """float32[C, ...] of rows of different lengths, zeros where one has none."""
    known = [row for row in rows if row is not None]
    shape = np.max([row.shape for row in known], axis=0)
    stacked = np.zeros((len(rows), *shape), np.float32)
    for place, row in zip(stacked, rows, strict=True):
        if row is not None:
            place[tuple(map(slice, row.shape))] = row
    return stacked


def fingerprint_fields(examples: Sequence[Example]) -> str:
    """SHA-256 of what the data say of the responses."""
    return fingerprint_json(
        [{name: value.tolist() for name, value in example.fields.items()} for example in examples]
    )


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
    spans = [span for source in sources for span in source.spans]
    if field == "token_weights" and not any(span.weight is not None for span in spans):
        return "no_spans", "no span has a weight"
    if field == "phrases" and not any(span.phrase is not None for span in spans):
        return "no_spans", "no span has the number of a phrase"
    if field == "changed" and not spans and len(sources) != 2:
        return "no_spans", "no span says what changed, and the responses are not two to compare"
    if field == "turn" and not any(_turns_of(response).max() > 0 for response in answers(record)):
        return "no_dialogue", "no turn of the assistant follows the response"
    if field == "other_models" and not all(source.scores for source in sources):
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


def _of_tokens(values: Sequence[np.ndarray]) -> np.ndarray:
    """float32[S, t] of what is said of every response's tokens."""
    longest = max(len(value) for value in values)
    return np.array([np.pad(value, (0, longest - len(value))) for value in values], np.float32)


def _spanned(
    record: TokenizedRecord, value: Callable[[Span], float | None], default: float
) -> np.ndarray:
    """float32[S, t]: the value of the span a token is in, else the default; of spans that share a
    token the last one's."""
    rows = []
    for response in answers(record):
        row = np.full(len(response.ids), default)
        for span, (first, end) in zip(response.source.spans, response.span_tokens, strict=True):
            of_span = value(span)
            if of_span is not None:
                row[first:end] = of_span
        rows.append(row)
    return _of_tokens(rows)


def _token_weights(record: TokenizedRecord) -> np.ndarray:
    return _spanned(record, lambda span: span.weight, 1.0)


def _phrases(record: TokenizedRecord) -> np.ndarray:
    """0 where a token is in no phrase, else 1 + the phrase's number."""
    return _spanned(record, lambda span: None if span.phrase is None else span.phrase + 1, 0.0)


def _changed(record: TokenizedRecord) -> np.ndarray:
    """1 in changed segments: in spans where there are any, else where the tokens of two responses
    differ."""
    responses = answers(record)
    if any(response.source.spans for response in responses):
        return _spanned(record, lambda span: 1.0, 0.0)
    ids = [response.ids.tolist() for response in responses]
    rows = []
    for tokens, ranges in zip(ids, changed_segments(*ids), strict=True):
        row = np.zeros(len(tokens))
        for first, end in ranges:
            row[first:end] = 1
        rows.append(row)
    return _of_tokens(rows)


def _turns(record: TokenizedRecord) -> np.ndarray:
    return _of_tokens([_turns_of(response) for response in answers(record)])


def _turns_of(response: TokenizedResponse) -> np.ndarray:
    """int[t]: how many turns of the assistant end before a token."""
    spoken = response.loss_mask.astype(int)
    return np.cumsum(np.diff(spoken, prepend=0) < 0)


MAKERS: dict[str, Callable[[TokenizedRecord], np.ndarray]] = {
    "rank": _ranks,
    "score": _scores,
    "desirable": _desirable,
    "win_rate": _win_rates,
    "gold": _gold,
    "consistency": _dimension("consistency"),
    "token_weights": _token_weights,
    "phrases": _phrases,
    "changed": _changed,
    "turn": _turns,
    "other_models": _other_models,
    "mismatched": _mismatched,
}
"""How a field, or what tells a view apart, comes out of a record; see `_maker` for those of a
name."""


def _maker(field: str) -> Callable[[TokenizedRecord], np.ndarray]:
    kind, _, dimension = field.partition("/")
    return _dimension(dimension) if kind == "scores" else MAKERS[field]
