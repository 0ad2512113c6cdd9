"""A record's prompts: the one its responses answer, and others that show the same texts.

A context is a row of a batch. All responses of a record stand in a row of the context `MAIN`: in
one row where they answer the same prompt about the same images, else in several. `OTHER_IMAGE`
has the same texts again, after other images.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Edit, EditKind, ImageRef, Record, VideoRef
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse, tokenize

MAIN = "main"
OTHER_IMAGE = "other_image"


@dataclasses.dataclass(frozen=True)
class OtherImage:
    """The origin of other images.

    The changes depend on the seed and the record's id, and are the same in every epoch: the
    reference's log-probs are computed once.
    """

    kind: EditKind | None
    """How images are changed; None for those of the data: the record's other ones, or a response's
    own."""
    step: int = 0
    """Step of diffusion, for `noise`."""
    seed: int = 0
    share: float = 0.0
    """Share of the patches that are hidden, for `masked`."""


@dataclasses.dataclass(frozen=True)
class _Context:
    name: str
    record: Record
    """The record with the responses that stand here only."""
    places: tuple[int, ...]
    """Their places among those of the whole record."""


def tokenize_contexts(
    record: Record,
    processor: Processor,
    max_prompt: int,
    max_response: int,
    *,
    other: OtherImage | None = None,
    joint: bool = False,
) -> TokenizedRecord:
    """Tokenizes a record in all its contexts.

    Args:
      record, processor, max_prompt, max_response: see `tokenize`.
      other: where other images come from; None where none are wanted.
      joint: whether prompts are part of the responses, and learned with them.

    Returns:
      The record in its first context, with the others beside it; a response that does not stand in
      a context has no tokens there.

    Raises:
      UnusableRow: see `tokenize`; or there is no image to change, and the data give no other.
    """
    shown: tuple[ImageRef, ...] = ()
    if other is not None and other.kind is None:
        record, shown = _with_shown(record)
    contexts = _own(_joined(record) if joint else record)
    if other is not None:
        contexts += [_with_other_image(context, other, shown) for context in contexts]
    rows: list[tuple[str, TokenizedRecord]] = []
    for context in contexts:
        row = tokenize(context.record, processor, max_prompt, max_response, share_text=not joint)
        row = _spread(_all_counted(row) if joint else row, context, record)
        id_ = context_id(record.id, [c.name for c in contexts], len(rows))
        rows.append((context.name, dataclasses.replace(row, id=id_)))
    if other is not None:
        _check_same_texts([row for _, row in rows])
    (_, first), *others = rows
    return dataclasses.replace(first, ranked=record.ranked, others=tuple(others))


def all_contexts(record: TokenizedRecord) -> list[tuple[str, TokenizedRecord]]:
    """(name, record) of every context, the first one included."""
    return [(MAIN, record), *record.others]


def differs(record: TokenizedRecord) -> bool:
    """Whether some response differs from one of another rank: in its tokens, or in the prompt or
    images that it answers. Where none does, nothing is to be learned from comparing them."""
    tokens: list[list[Any]] = [[] for _ in record.responses]
    for name, context in all_contexts(record):
        for seen, response in zip(tokens, context.responses, strict=True):
            seen.append((name, response.ids.tobytes(), response.loss_mask.tobytes()))
    return differ([(r.source.rank, seen) for r, seen in zip(record.responses, tokens, strict=True)])


def differ(responses: Sequence[tuple[int | None, Any]]) -> bool:
    """Whether two of these (rank, content) differ in both."""
    return any(
        rank != other_rank and content != other
        for (rank, content), (other_rank, other) in itertools.combinations(responses, 2)
    )


def context_names(records: Sequence[TokenizedRecord]) -> tuple[str, ...]:
    """The names of all contexts that any of the records has, `MAIN` first: as often as one does."""
    return all_names([name for name, _ in all_contexts(record)] for record in records)


def all_names(of_records: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """`context_names` of the names of each record's contexts."""
    counts: dict[str, int] = {MAIN: 1}
    for names in dict.fromkeys(map(tuple, of_records)):
        counts |= {name: max(counts.get(name, 0), names.count(name)) for name in names}
    return tuple(name for name, count in counts.items() for _ in range(count))


def context_id(id_: str, names: Sequence[str], place: int) -> str:
    """The id of one of a record's contexts.

    Args:
      id_: of the record, and of its first context.
      names: of its contexts.
      place: which of them.
    """
    if not place:
        return id_
    before = names[:place].count(names[place])
    return f"{id_}#{names[place]}{before + 1 if before else ''}"


def arranged(record: TokenizedRecord, names: Sequence[str]) -> tuple[TokenizedRecord | None, ...]:
    """The record's contexts in the places of their names; None where it has not so many."""
    left: dict[str, list[TokenizedRecord]] = {}
    for name, context in all_contexts(record):
        left.setdefault(name, []).append(context)
    return tuple(left[name].pop(0) if left.get(name) else None for name in names)


def filled_responses(record: TokenizedRecord) -> list[TokenizedResponse]:
    """Every response as it stands in the row that has its tokens."""
    rows = [context for name, context in all_contexts(record) if name == MAIN]
    columns = zip(*(row.responses for row in rows), strict=True)
    return [max(column, key=lambda response: len(response.ids)) for column in columns]


def _own(record: Record) -> list[_Context]:
    """The rows of `MAIN`: a row for every prompt and images that responses answer."""
    groups: dict[tuple, list[int]] = {}
    for place, response in enumerate(record.responses):
        images = record.images if response.images is None else response.images
        prompt = record.prompt if response.prompt is None else response.prompt
        groups.setdefault((images, prompt), []).append(place)
    contexts = []
    for (images, prompt), places in groups.items():
        here = tuple(
            dataclasses.replace(record.responses[place], images=None, prompt=None)
            for place in places
        )
        row = dataclasses.replace(record, images=images, prompt=prompt, responses=here)
        contexts.append(_Context(MAIN, row, tuple(places)))
    return contexts or [_Context(MAIN, record, ())]


def _joined(record: Record) -> Record:
    """A record in which every response begins with the turns of its prompt."""
    responses = []
    for response in record.responses:
        prompt = record.prompt if response.prompt is None else response.prompt
        turns = (*prompt, *response.turns)
        responses.append(dataclasses.replace(response, turns=turns, prompt=None))
    return dataclasses.replace(record, prompt=(), responses=tuple(responses))


def _all_counted(row: TokenizedRecord) -> TokenizedRecord:
    responses = tuple(
        dataclasses.replace(response, loss_mask=np.ones_like(response.loss_mask))
        for response in row.responses
    )
    return dataclasses.replace(row, responses=responses)


def _with_shown(record: Record) -> tuple[Record, tuple[ImageRef, ...]]:
    """(the record, those that the data show in place of its images).

    Where no images are given as others they are a response's own, which then is about the record's.
    A response that repeats another one's text about them is left out: it is there for them.
    """
    if record.other_images is not None:
        return record, record.other_images
    shown = [response.images for response in record.responses if response.images is not None]
    if not shown:
        raise UnusableRow("no_other_image", "the data give none, nor a response its own")
    plain = [response.turns for response in record.responses if response.images is None]
    kept = tuple(
        dataclasses.replace(response, images=None)
        for response in record.responses
        if response.images is None or response.turns not in plain
    )
    return dataclasses.replace(record, responses=kept), shown[0]


def _with_other_image(
    context: _Context, other: OtherImage, shown: tuple[ImageRef, ...]
) -> _Context:
    record = context.record
    record = (
        dataclasses.replace(record, images=shown)
        if other.kind is None
        else changed_images(record, other)
    )
    return dataclasses.replace(context, name=OTHER_IMAGE, record=record)


def _check_same_texts(rows: Sequence[TokenizedRecord]) -> None:
    """The second half of the rows has the tokens of the first, or tokens could not be compared."""
    half = len(rows) // 2
    for row, twin in zip(rows[:half], rows[half:], strict=True):
        for ours, theirs in zip(row.responses, twin.responses, strict=True):
            if not np.array_equal(ours.ids, theirs.ids):
                raise UnusableRow("dialogues_differ", "the other image moves the responses' start")


AnyRecord = TypeVar("AnyRecord", Record, TokenizedRecord)


def changed_images(record: AnyRecord, other: OtherImage) -> AnyRecord:
    """The record with every image and video changed; they keep their sizes, and prompts their
    tokens.

    Args:
      record: tokenized or not.
      other: how.

    Raises:
      UnusableRow: there is none.
    """
    assert other.kind is not None
    if not (record.images or record.videos):
        raise UnusableRow("no_other_image", "there is no image to change")
    edits = [
        Edit(
            other.kind,
            int(fingerprint_json([other.seed, record.id, number])[:15], 16),
            other.step,
            other.share,
        )
        for number in range(len(record.images) + len(record.videos))
    ]
    images = tuple(
        dataclasses.replace(image, edit=edit)
        for image, edit in zip(record.images, edits, strict=False)
    )
    videos = tuple(
        _changed_video(video, edit)
        for video, edit in zip(record.videos, edits[len(images) :], strict=True)
    )
    return dataclasses.replace(record, images=images, videos=videos)


def _changed_video(video: VideoRef, edit: Edit) -> VideoRef:
    return video.with_parts(dataclasses.replace(part, edit=edit) for part in video.parts)


def _spread(row: TokenizedRecord, context: _Context, record: Record) -> TokenizedRecord:
    """The row with a place for every response of the record."""
    here = dict(zip(context.places, row.responses, strict=True))
    responses = tuple(
        dataclasses.replace(here[place], source=source)
        if place in here
        else TokenizedResponse(np.zeros(0, np.int32), np.zeros(0, bool), 0, source)
        for place, source in enumerate(record.responses)
    )
    return dataclasses.replace(row, responses=responses)
