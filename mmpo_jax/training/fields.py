"""What the data say of responses, as arrays for objectives: one function per field."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from mmpo_jax.data.contexts import filled_responses
from mmpo_jax.data.records import LOG_PROB, SCORE, Response, Span
from mmpo_jax.data.segments import changed_segments
from mmpo_jax.data.skipped import SkipReason
from mmpo_jax.data.tokenization import TokenizedRecord


def lacks(record: TokenizedRecord, field: str) -> tuple[SkipReason, str] | None:
    """(reason, detail) why an objective that needs `field` cannot use a record; None if it can."""
    sources = [response.source for response in record.responses]
    if field == "ranks" and not record.ranked:
        return "incomplete_pair", "not every response has a rank, or there is only one response"
    if field == "rank" and (not record.ranked or len({x.rank for x in sources}) < 2):
        return "incomplete_pair", "no responses of different ranks, which the objective compares"
    if field in ("score", "win_rate") and _score_name(sources) is None:
        return "no_score", "not every response has one score; the data's option `score` names one"
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
    if field == "turn" and not any(turns.max() > 0 for turns in _turns_of(record)):
        return (
            "no_dialogue",
            "no turn of the assistant follows the response; mmpo correct writes some",
        )
    if field == "other_models":
        return _unlike_log_probs(sources)
    if field == "desirable" and None in _verdicts(record):
        return (
            "no_label",
            "not every response is said to be desirable or not, or better than others",
        )
    return None


def says(record: TokenizedRecord, field: str) -> bool:
    """Whether a record has a field to learn from; of critiques, of which a row may have none."""
    if field == "critique":
        return any(response.criticised for response in filled_responses(record))
    return lacks(record, field) is None


def _unlike_log_probs(sources: Sequence[Response]) -> tuple[SkipReason, str] | None:
    for source in sources:
        found = _log_probs(source)
        if not found:
            return "no_score", f"not every response has a score {LOG_PROB}MODEL"
        for name, value in found.items():
            if value > 0:
                return "bad_log_prob", f"{name} is {value}; a log-prob is at most 0"
    return None


def _log_probs(source: Response) -> dict[str, float]:
    """Log-probs per token under other models, by the names of scores."""
    return {name: value for name, value in source.scores.items() if name.startswith(LOG_PROB)}


def score_names(records: Sequence[TokenizedRecord]) -> set[str]:
    """What the scores are called that `score` and `win_rate` are made of."""
    return {str(_score_name([r.source for r in record.responses])) for record in records}


def _score_name(sources: Sequence[Response]) -> str | None:
    """What the score of all responses is called: `SCORE`, or as the only one of all is, log-probs
    aside; None where they have not one in common."""
    if all(SCORE in source.scores for source in sources):
        return SCORE
    named = {name for source in sources for name in source.scores.keys() - _log_probs(source)}
    if len(named) != 1 or not all(named <= source.scores.keys() for source in sources):
        return None
    return named.pop()


def _ranks(record: TokenizedRecord) -> Float[np.ndarray, " S"]:
    return np.array([response.source.rank or 0 for response in record.responses], np.float32)


def _scores(record: TokenizedRecord) -> Float[np.ndarray, " S"]:
    name = _score_name([response.source for response in record.responses])
    assert name is not None
    return _dimension(name)(record)


def _win_rates(record: TokenizedRecord) -> Float[np.ndarray, " S"]:
    """The mean over the record's responses, itself included, of sigmoid(score - theirs)."""
    scores = _scores(record).astype(np.float64)
    return (0.5 + 0.5 * np.tanh((scores[:, None] - scores) / 2)).mean(axis=1).astype(np.float32)


def _gold(record: TokenizedRecord) -> Float[np.ndarray, " S"]:
    """1 for the first of the best."""
    ranks = _ranks(record)
    return (np.arange(len(ranks)) == ranks.argmin()).astype(np.float32)


def _dimension(name: str) -> Callable[[TokenizedRecord], Float[np.ndarray, " S"]]:
    return lambda record: np.array([r.source.scores[name] for r in record.responses], np.float32)


def _verdicts(record: TokenizedRecord) -> list[bool | None]:
    """Whether each response is desirable; of ranked ones that nothing else is said of, the best
    are, unless all are tied."""
    sources = [response.source for response in record.responses]
    ranks = _ranks(record)
    if record.ranked and len(set(ranks)) > 1 and all(s.desirable is None for s in sources):
        return [bool(verdict) for verdict in ranks == ranks.min()]
    return [source.desirable for source in sources]


def _desirable(record: TokenizedRecord) -> Float[np.ndarray, " S"]:
    return np.array([bool(verdict) for verdict in _verdicts(record)], np.float32)


def _other_models(record: TokenizedRecord) -> Float[np.ndarray, " S"]:
    found = [list(_log_probs(response.source).values()) for response in record.responses]
    return np.array([np.mean(values) for values in found], np.float32)


def _of_tokens(values: Sequence[np.ndarray]) -> Float[np.ndarray, "S t"]:
    """float32[S, t] of what is said of every response's tokens."""
    longest = max(len(value) for value in values)
    return np.array([np.pad(value, (0, longest - len(value))) for value in values], np.float32)


def _spanned(
    record: TokenizedRecord, value: Callable[[Span], float | None], default: float
) -> Float[np.ndarray, "S t"]:
    """float32[S, t]: the value of the span a token is in, else the default; of spans that share a
    token the last one's."""
    rows = []
    for response in filled_responses(record):
        row = np.full(len(response.ids), default)
        for span, (first, end) in zip(response.source.spans, response.span_tokens, strict=True):
            of_span = value(span)
            if of_span is not None:
                row[first:end] = of_span
        rows.append(row)
    return _of_tokens(rows)


def _token_weights(record: TokenizedRecord) -> Float[np.ndarray, "S t"]:
    return _spanned(record, lambda span: span.weight, 1.0)


def _phrases(record: TokenizedRecord) -> Float[np.ndarray, "S t"]:
    """0 where a token is in no phrase, else 1 + the phrase's number."""
    return _spanned(record, lambda span: None if span.phrase is None else span.phrase + 1, 0.0)


def _changed(record: TokenizedRecord) -> Float[np.ndarray, "S t"]:
    """1 in changed segments: in spans where there are any, else where the tokens of two responses
    differ."""
    responses = filled_responses(record)
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


def _turns(record: TokenizedRecord) -> Float[np.ndarray, "S t"]:
    return _of_tokens(_turns_of(record))


def _turns_of(record: TokenizedRecord) -> list[Int[np.ndarray, " t"]]:
    """int[t] of every response: how many turns of the assistant end before a token.

    Responses that nothing ranks and that open with somebody else's turn are dialogues about the
    same images: the first is the response, and the turns of the others count on behind it.
    """
    found, before = [], 0
    for response in filled_responses(record):
        steps = np.diff(response.loss_mask.astype(int), prepend=0)
        opens = not record.ranked and not response.loss_mask[:1].any()
        found.append(np.cumsum(steps < 0) + (before if opens else 0))
        before += int((steps > 0).sum())
    return found


def _critiques(record: TokenizedRecord) -> Float[np.ndarray, "S t"]:
    """1 at the tokens of critiques, and of what is learned with them."""
    return _of_tokens(
        [
            response.loss_mask * np.float32(response.criticised)
            for response in filled_responses(record)
        ]
    )


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
    "critique": _critiques,
    "ranks": _ranks,
}
"""How a field comes out of a record; see `maker_of` for those of a name."""


def maker_of(field: str) -> Callable[[TokenizedRecord], np.ndarray]:
    kind, _, dimension = field.partition("/")
    return _dimension(dimension) if kind == "scores" else MAKERS[field]
