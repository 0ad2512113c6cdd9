"""A record's prompt and one of its responses as tokens, and which of them its spans are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from mmpo_jax.data.dialogues import Segment, dialogue_of, segments
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.segments import covered_tokens
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.models.layout import Layout


class Piece(NamedTuple):
    """A segment of a dialogue as tokens."""

    ids: list[int]
    answer: bool
    """Whether the assistant says it."""
    learned: bool
    """Whether it is to be learned."""


@dataclasses.dataclass(frozen=True)
class DialogueTokens:
    """A dialogue as tokens."""

    segments: list[Segment]
    pieces: list[Piece]
    order: list[int]
    """Places of the media in the layouts, as they come."""


def dialogue_tokens(
    record: Record, response: Response | None, layouts: Sequence[Layout], processor: Processor
) -> DialogueTokens:
    """The tokens of a record's prompt and one of its responses.

    No token reaches over a cut (see `_continued`), so that a prompt's ids are the same in training
    as in generation.

    Raises:
      TemplateRefusal: see `segments`.
      UnusableRow: an answer shows something.
    """
    finished = response is None or response.finished
    found = segments(dialogue_of(record, response), processor, finished)
    order: list[int] = []
    pieces = []
    for place, segment in enumerate(found):
        ids = _continued(segment.start, segment.start + segment.text, processor)
        if not segment.answer:
            ids = ids if place else _begun(ids, processor)
            ids = processor.expand_media(ids, layouts, len(record.images), order)
        elif place == len(found) - 1:
            assert response is not None
            ids = _answer_ids(ids, response, finished, processor)
        if segment.answer and any(token in ids for token in processor.placeholders):
            raise UnusableRow("image_position", "an answer holds the image placeholder")
        pieces.append(Piece(ids, segment.answer, segment.learned))
    return DialogueTokens(found, pieces, order)


def _answer_ids(
    ids: list[int], response: Response, finished: bool, processor: Processor
) -> list[int]:
    """The tokens of the last answer: those that were sampled where they are of this tokenizer and
    say the response's text, else those of the text, with EOS at the end if it is finished."""
    sampled = response.token_ids
    if sampled and len(response.turns) == 1 and not response.spans:
        ended = sampled[-1] in processor.eos_ids
        known = min(sampled) >= 0 and max(sampled) < len(processor.tokenizer)
        if known and ended == finished and processor.decode(sampled) == response.text:
            return list(sampled)
    if finished and not processor.ends_answers:
        return [*ids, processor.eos_id]
    if finished and ids[-1:] != [processor.eos_id]:  # EOS grew together with the text before it
        return [*ids, processor.eos_id]
    return ids


def _continued(start: str, text: str, processor: Processor) -> list[int]:
    """Token ids of what `text` adds to its beginning `start`.

    As they are in the whole text, where the tokens of `start` are a beginning of it too: by itself
    the piece may begin otherwise, as SentencePiece puts a space in front of whatever it is given.
    Where a token would reach over the cut, the piece is tokenized by itself.
    """
    begun, whole = processor.encode(start), processor.encode(text)
    if whole[: len(begun)] == begun:
        return whole[len(begun) :]
    return processor.encode(text[len(start) :])


def _begun(ids: list[int], processor: Processor) -> list[int]:
    """BOS once, in front, whether the template writes it or not."""
    bos = processor.tokenizer.bos_token_id
    written = bool(ids) and ids[0] == bos
    if bos is None or not (written or processor.adds_bos):
        return ids
    while ids and ids[0] == bos:
        ids = ids[1:]
    return [bos, *ids]


def span_tokens(
    response: Response, dialogue: DialogueTokens, start: int, processor: Processor
) -> tuple[tuple[int, int], ...]:
    """[start, end) of the tokens of each span, counted from the response's first; where a span is
    in no token, an empty range.

    Raises:
      UnusableRow: the chat template changes the text that the spans are of.
    """
    answer = max(place for place, piece in enumerate(dialogue.pieces) if piece.answer)
    segment = dialogue.segments[answer]
    before = processor.control.written(segment.start)
    said = processor.control.written(segment.text)
    spoken = response.text.strip()  # templates may trim
    place = said.find(spoken)
    if place < 0:
        raise UnusableRow("span_not_found", "the chat template changes the text of the response")
    place += len(before) - (len(response.text) - len(response.text.lstrip()))
    offsets = _offsets(segment.start, segment.start + segment.text, processor)
    shift = sum(len(piece.ids) for piece in dialogue.pieces[:answer]) - start
    found = []
    for span in response.spans:
        first, end = covered_tokens(before + said, offsets, place + span.start, place + span.end)
        found.append((first + shift, end + shift))
    return tuple(found)


def _offsets(start: str, text: str, processor: Processor) -> list[tuple[int, int]]:
    """Characters of `text`, with control tokens written out, that each of the tokens `_continued`
    gives stands for."""
    begun, (whole, places) = processor.encode(start), processor.encode_with_offsets(text)
    if whole[: len(begun)] == begun:
        return places[len(begun) :]
    _, places = processor.encode_with_offsets(text[len(start) :])
    shift = len(processor.control.written(start))
    return [(first + shift, last + shift) for first, last in places]
