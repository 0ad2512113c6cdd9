"""From tokenized records to what a step consumes: the fields and the reference of objectives."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_items
from mmpo_jax.data.contexts import (
    OtherImage,
    all_contexts,
    arranged,
    context_names,
    differs,
    filled_responses,
    tokenize_contexts,
)
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import Example
from mmpo_jax.data.skipped import SkipReason
from mmpo_jax.data.tokenization import Tokenize, TokenizedRecord
from mmpo_jax.objectives.registry import FIELDS, VIEWS, is_field
from mmpo_jax.objectives.terms import Term, needs
from mmpo_jax.recipes.training import Reference, Training
from mmpo_jax.training.fields import lacks, maker_of, score_names
from mmpo_jax.training.losses import needs_reference, recipe_terms
from mmpo_jax.training.reference import check_given, reference_stage


def prepare_examples(
    start: Checkpoint,
    records: Sequence[TokenizedRecord],
    config: Training,
    lengths: Lengths,
    mesh: Mesh,
    *,
    folder: str,
    seen: Collection[int] | None = None,
) -> list[Example]:
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
    if "mismatched" in needed:
        records = with_mismatched(records)
    reference = None
    if needs_reference(terms) and config.reference.type == "given":
        reference = _given(records)
        if config.reference.check:
            first = [c for record in records[: config.batch_size] for _, c in all_contexts(record)]
            check_given(start, first, reference, config, lengths, mesh)
    elif needs_reference(terms) and config.reference.type == "cached":
        read = [r for i, r in enumerate(records) if seen is None or i in seen]
        reference = reference_stage(
            start,
            [context for record in read for _, context in all_contexts(record)],
            lengths,
            mesh,
            folder=folder,
            per_token="reference_tokens" in needed,
            batch_size=config.batch_size,
            compute_dtype=config.compute_dtype,
        )
        for record in records:
            for _, context in all_contexts(record):
                reference.setdefault(context.id, _unknown(context, "reference_tokens" in needed))
    return make_examples(records, needed, reference)


def with_mismatched(records: Sequence[TokenizedRecord]) -> list[TokenizedRecord]:
    """Records with the responses of others to other prompts or images after their own.

    So they are scored in the same pass, by the reference too. See `_mismatched_places`.

    Raises:
      DataError: there is only one record.
    """
    if len(records) < 2:
        raise DataError(
            f"the objective compares with {VIEWS['mismatched']}, and there is only one record"
        )
    for record in records:
        if record.shows_later:
            raise DataError(
                f"the objective compares with {VIEWS['mismatched']}, and those of {record.id!r} "
                "show images of their own: leave such rows out"
            )
    return [
        dataclasses.replace(
            record,
            responses=(
                *record.responses,
                *(dataclasses.replace(r, mismatched=True) for r in records[place].responses),
            ),
        )
        for record, place in zip(records, _mismatched_places(records), strict=True)
    ]


def _mismatched_places(records: Sequence[TokenizedRecord]) -> list[int]:
    """For every record, the place of the one whose responses are its mismatched ones.

    The records stand in a circle, cut into runs of one prompt with one set of images. A record
    takes one of the run before its own: in runs of one length the first takes the first, and so on,
    so all responses of the data serve once, and not the last of every prompt alone, which in pairs
    that were exported one by one is always the rejected one. Of a longer run before, the last ones
    are taken; of a shorter one all, in turn. Where there is only one run, the record before.
    """
    count = len(records)
    starts = [i for i in range(count) if not _same_question(records[i - 1], records[i])]
    if not starts:
        return [(i - 1) % count for i in range(count)]
    places = [0] * count
    before = range(starts[-1] - count, starts[0])
    for start, end in zip(starts, [*starts[1:], starts[0] + count], strict=True):
        run = range(start, end)
        for number, place in enumerate(run):
            places[place % count] = before[(number - len(run)) % len(before)] % count
        before = run
    return places


def _same_question(first: TokenizedRecord, second: TokenizedRecord) -> bool:
    """Whether two records have the same prompt, images and videos, whatever these are called."""

    def shown(record: TokenizedRecord) -> list[Any]:
        frames = [video.frames for video in record.videos]
        return [[(i.data, i.path, i.edit) for i in row] for row in (record.images, *frames)]

    return np.array_equal(first.prompt_ids, second.prompt_ids) and shown(first) == shown(second)


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
    for term in terms:
        for field in sorted(filter(is_field, term.needs)):
            problem = lacks(record, field)
            if problem is not None:
                reason, detail = problem
                return reason, f"{term.objective.name} needs the field {field!r}: {detail}"
    if _compares_texts(terms) and not differs(record):
        cut = any(response.truncated for response in filled_responses(record))
        where = " as far as the largest bucket keeps them" if cut else ""
        return "same_responses", f"better and worse responses are the same tokens{where}"
    if reference.type != "given" or not needs_reference(terms):
        return None
    if any(response.source.log_prob is None for response in record.responses):
        return "no_reference", "the data hold no reference log-probs of the responses"
    if any(response.truncated for response in record.responses):
        return "no_reference", "a response lost its tail, and the data's log-prob is of all of it"
    return None


def _unknown(record: TokenizedRecord, per_token: bool) -> np.ndarray:
    """NaN in the shape of the reference's log-probs: float32[R], or [R, t] per token."""
    longest = max(len(response.ids) for response in record.responses)
    shape = (len(record.responses), longest) if per_token else (len(record.responses),)
    return np.full(shape, np.nan, np.float32)


def _compares_texts(terms: Sequence[Term]) -> bool:
    """Whether the objectives that compare responses do so by their texts alone: after another image
    a text compares with itself."""
    compared = [term for term in terms if term.objective.kind in ("pairs", "rankings")]
    return bool(compared) and not any("other_image" in term.needs for term in compared)


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

    Ranks are always among the fields, 0 where there are none: losses of tokens learn the best.

    Args:
      records: with responses.
      needs: names, as objectives have them; those of fields count.
      reference: id of a record in a context -> float32[S] or [S, t], if one was computed.

    Raises:
      DataError: no record has a field that is needed, or their scores have different names.
    """
    name = "log_probs" if "reference_tokens" in needs else "sums"
    makers = {field: maker_of(field) for field in sorted(filter(is_field, needs))}
    own = [_own(record) for record in records]
    for field in makers:
        if records and not any(lacks(record, field) is None for record in own):
            raise DataError(
                f"no row has the field {field!r}, which the objective needs: "
                f"{FIELDS[field.partition('/')[0]]}"
            )
    called = score_names(own) if makers.keys() & {"score", "win_rate"} else set()
    if len(called) > 1:
        raise DataError(
            f"the rows' scores are called {', '.join(sorted(called))}; the data's option `score` "
            "says which one is meant"
        )
    names = context_names(records)
    examples = []
    for record, own_responses in zip(records, own, strict=True):
        contexts = arranged(record, names)
        scores = {}
        if reference is not None:
            found = [None if row is None else reference[row.id] for row in contexts]
            scores[name] = _stacked(found)
        mismatched = np.array([r.mismatched for r in record.responses], np.float32)
        fields = {
            field: _lengthened(make(own_responses), len(mismatched))
            for field, make in (makers | {"rank": maker_of("rank")}).items()
        }
        if "mismatched" in needs:
            fields["mismatched"] = mismatched
        examples.append(Example(contexts, fields, scores, names))
    return examples


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


def fingerprint_fields(examples: Sequence[Example]) -> str:
    """SHA-256 of what the data say of the responses."""
    return fingerprint_items(
        {name: value.tolist() for name, value in example.fields.items()} for example in examples
    )
