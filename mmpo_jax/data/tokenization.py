"""The tokenisation contract: a record's prompt, shared once, and its responses.

BOS once, at the start. EOS at the end of a response, unless generation had cut it; one that is
typed in a text is whatever the tokenizer makes of it. Image tokens are never cut: too long a prompt
drops the row; an over-long response loses its tail.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from mmpo_jax.data.chat_template import TemplateRefusal
from mmpo_jax.data.control_tokens import has_stand_ins
from mmpo_jax.data.dialogues import Segment, dialogue_of, segments
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import MediaError, Processor
from mmpo_jax.data.records import ImageRef, MediaRef, Record, Response, VideoRef, last_question
from mmpo_jax.data.segments import covered_tokens
from mmpo_jax.data.skipped import SkippedRow, SkipReason
from mmpo_jax.models.layout import Layout

UNLIMITED = 2**30
"""A limit of lengths that nothing reaches."""


@dataclasses.dataclass(frozen=True)
class TokenizedResponse:
    """One response: everything after the shared prompt."""

    ids: np.ndarray
    """int32[t]."""
    loss_mask: np.ndarray
    """bool[t]; True at the assistant's tokens, the final EOS included."""
    truncated: int
    """How many tokens the length limit cut off."""
    source: Response
    """The response before tokenisation."""
    span_tokens: tuple[tuple[int, int], ...] = ()
    """[start, end) of the tokens of each of the source's spans; may end beyond those left."""
    mismatched: bool = False
    """Whether it answers another record's prompt."""
    criticised: bool = False
    """Whether it ends with a critique of itself, see `data.critiques`."""


@dataclasses.dataclass(frozen=True)
class SeenTokens:
    """What a prompt is of which some tokens are left out, see `data.hidden_tokens`."""

    whole: np.ndarray
    """int32[w]; the prompt with all of its tokens."""
    kept: np.ndarray
    """int32[p]; places in it of those that are there, in order."""


@dataclasses.dataclass(frozen=True)
class TokenizedRecord:
    """A record as token ids; images stay references until a batch is made."""

    id: str
    prompt_ids: np.ndarray
    """int32[p]; image placeholders expanded."""
    responses: tuple[TokenizedResponse, ...]
    images: tuple[ImageRef, ...]
    layouts: tuple[Layout, ...]
    """Layout of each image and video, in the order of the dialogue."""
    ranked: bool = False
    """Whether responses have ranks, as `Record.ranked`."""
    videos: tuple[VideoRef, ...] = ()
    others: tuple[tuple[str, TokenizedRecord], ...] = ()
    """(name, the same responses in that context); see `data.contexts`."""
    solution: Any = dataclasses.field(default=None, hash=False)
    """What rewards compare with, as `Record.solution`."""
    question: str = ""
    """What the user says last in the prompt, as rewards are told."""
    asked: Record | None = dataclasses.field(default=None, hash=False)
    """The record without its responses, where a reward model is to be told the whole prompt."""
    order: tuple[int, ...] = ()
    """Places of the layouts' media among the images, then the videos; () for this very order."""
    shows_later: bool = False
    """Whether images stand in its responses and not only in its prompt."""
    left_out: tuple[int, ...] = ()
    """Places of the row's responses that could not be used."""
    seen: SeenTokens | None = None
    """Where tokens of the prompt are left out, the prompt that they are of."""

    @property
    def whole_prompt(self) -> np.ndarray:
        """int32[w]; the prompt with what is left out of it."""
        return self.prompt_ids if self.seen is None else self.seen.whole

    @property
    def num_slots(self) -> int:
        """How many rows of `Batch.pixel_values` the images take."""
        return sum(layout.slots for layout in self.layouts)


class RowRejected(Exception):
    """A row that cannot be used; `reason` is the word it is counted under."""

    def __init__(self, reason: SkipReason, detail: str):
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def tokenize(
    record: Record,
    processor: Processor,
    max_prompt: int,
    max_response: int,
    *,
    share_text: bool = True,
) -> TokenizedRecord:
    """Tokenizes a record; what its responses' dialogues have in common becomes the prompt.

    With a prompt in the record, that is the rendered prompt up to the assistant's header. Without
    (dialogues about the same images), it is the longest common start of the dialogues' prompts:
    the images and whatever text precedes the first difference. Images of later turns are in the
    responses. A response without an assistant turn is a question to be answered: it ends with the
    assistant's header and has no loss.

    Args:
      record: with or without responses.
      processor: of the checkpoint.
      max_prompt: more tokens of a prompt are refused.
      max_response: more tokens of a response are cut.
      share_text: whether text that dialogues begin with goes into the shared prompt; if not, only
        what stands up to the images does.

    Raises:
      RowRejected: the prompt is longer than `max_prompt`, the model cannot take an image, a
        response has nothing to learn, or a text has characters that stand for control tokens.
    """
    if _has_stand_ins(record):
        raise RowRejected(
            "bad_text", "a character from U+10F000 to U+10FFFD, which stand for control tokens"
        )
    if any(response.images is not None for response in record.responses):
        raise RowRejected("own_images", "a response has images of its own")
    if any(response.prompt is not None for response in record.responses):
        raise RowRejected("own_prompt", "a response has a prompt of its own")
    try:
        layouts = processor.layouts(record.images, record.videos)
    except MediaError as error:
        raise RowRejected("image_broken", str(error)) from error
    try:
        made = [_encoded(record, response, layouts, processor) for response in record.responses]
        if not made:
            made = [_encoded(record, None, layouts, processor)]
    except TemplateRefusal as error:
        raise RowRejected("template_refuses", str(error)) from error
    orders = {tuple(encoded.order) for encoded in made}
    if len(orders) > 1:
        raise RowRejected("dialogues_differ", "the responses show the media in different orders")
    (order,) = orders
    if len(order) < len(layouts):
        detail = f"the chat template shows {len(order)} of {len(layouts)} images and videos"
        raise RowRejected("image_count", detail)
    starts = [encoded.pieces[0].ids for encoded in made]
    shared = max_prompt if share_text else 0
    prompt = starts[0] if record.prompt else _common_start(starts, shared, processor)
    if any(start[: len(prompt)] != prompt for start in starts):
        raise RowRejected("dialogues_differ", "the responses do not share the rendered prompt")
    if not prompt:
        raise RowRejected("dialogues_differ", "the dialogues do not begin with a common token")
    if len(prompt) > max_prompt:
        raise RowRejected(
            "prompt_too_long", f"the prompt has {len(prompt)} tokens, the limit is {max_prompt}"
        )
    limit = processor.config.decoder.position_limit
    longest = max(sum(len(piece.ids) for piece in encoded.pieces) for encoded in made)
    if limit is not None and min(longest, len(prompt) + max_response) > limit:
        raise RowRejected(
            "prompt_too_long", f"{longest} tokens, the model's positions end at {limit}"
        )
    responses = []
    for response, encoded in zip(record.responses, made, strict=False):
        one = _response(response, encoded.pieces, len(prompt), max_response, processor)
        if response.spans:
            spans = _span_tokens(response, encoded, len(prompt), processor)
            one = dataclasses.replace(one, span_tokens=spans)
        responses.append(one)
    return TokenizedRecord(
        id=record.id,
        prompt_ids=np.array(prompt, np.int32),
        responses=tuple(responses),
        images=record.images,
        layouts=tuple(layouts[place] for place in order),
        ranked=record.ranked,
        videos=record.videos,
        solution=record.solution,
        question=last_question(record.prompt),
        order=order,
        shows_later=any(_holds(r.ids, processor.placeholders) for r in responses),
        left_out=tuple(place for place, *_ in record.left_out),
    )


def _has_stand_ins(record: Record) -> bool:
    """Whether anything that is rendered has the characters of `control_tokens`."""
    turns = [*record.prompt, *(turn for response in record.responses for turn in response.turns)]
    said = [record.template, *(turn.keys for turn in turns)]
    others = (json.dumps(value, ensure_ascii=False, default=str) for value in said if value)
    return any(map(has_stand_ins, (*(turn.text for turn in turns), *others)))


Tokenize = Callable[[Record, Processor, int, int], TokenizedRecord]
"""`tokenize`, or another function of its kind."""


def tokenize_prompt(
    record: Record, processor: Processor, max_prompt: int, max_response: int
) -> TokenizedRecord:
    """`tokenize` of the prompt alone, whatever responses there are.

    Raises:
      RowRejected: there is no prompt, or see `tokenize`.
    """
    if not record.prompt:
        raise RowRejected("no_prompt", "the row's responses do not share a prompt")
    alone = dataclasses.replace(record, responses=())
    return tokenize(alone, processor, max_prompt, max_response)


def tokenize_records(
    records: Sequence[Record],
    processor: Processor,
    lengths: Lengths | None,
    name: str = "",
    function: Tokenize = tokenize,
) -> tuple[list[TokenizedRecord], list[SkippedRow]]:
    """Tokenizes the records of the source `name`; what does not fit is left out with a reason."""
    limits = (UNLIMITED, UNLIMITED)
    if lengths is not None:
        limits = lengths.prompt[-1], lengths.response[-1]
    kept, skipped = [], []
    for record in records:
        try:
            kept.append(function(record, processor, *limits))
        except RowRejected as error:
            skipped.append(SkippedRow(name, record.row, record.id, error.reason, error.detail))
    return kept, skipped


def content_of(
    record: TokenizedRecord,
    of_media: Callable[[MediaRef], Any] = operator.methodcaller("fingerprint"),
) -> list[Any]:
    """What a model sees of a record, as JSON: tokens, loss masks and digests of encoded images, or
    what else stands for an image and a video."""
    return [
        record.prompt_ids.tolist(),
        [[r.ids.tolist(), r.loss_mask.tolist()] for r in record.responses],
        [of_media(image) for image in record.images],
        [of_media(video) for video in record.videos],
        *([name, content_of(other, of_media)] for name, other in record.others),
    ]


def prompt_digest(record: TokenizedRecord) -> str:
    """SHA-256 of a record's prompt and of what it shows."""
    digest = hashlib.sha256(record.prompt_ids.tobytes())
    digests = [image.fingerprint() for image in record.images]
    digests += [video.fingerprint() for video in record.videos]
    digest.update("".join(digests).encode())
    return digest.hexdigest()


class Piece(NamedTuple):
    """A segment of a dialogue as tokens."""

    ids: list[int]
    answer: bool
    learned: bool


@dataclasses.dataclass(frozen=True)
class _Encoded:
    """A dialogue as tokens."""

    segments: list[Segment]
    pieces: list[Piece]
    order: list[int]
    """Places of the media in the layouts, as they come."""


def _encoded(
    record: Record, response: Response | None, layouts: Sequence[Layout], processor: Processor
) -> _Encoded:
    """The tokens of a record's prompt and one of its responses.

    No token reaches over a cut (see `_continued`), so that a prompt's ids are the same in training
    as in generation.

    Raises:
      TemplateRefusal: see `segments`.
      RowRejected: an answer shows something.
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
            raise RowRejected("image_position", "an answer holds the image placeholder")
        pieces.append(Piece(ids, segment.answer, segment.learned))
    return _Encoded(found, pieces, order)


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


def _common_start(rows: Sequence[list[int]], limit: int, processor: Processor) -> list[int]:
    """What the dialogues begin with; text beyond `limit` tokens is left to the responses."""
    length = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        length += 1
    common = rows[0][:length]
    with_images = max(
        (i + 1 for i, t in enumerate(common) if t in processor.placeholders), default=1
    )
    return common[: max(limit, with_images)]


def _response(
    source: Response, pieces: Sequence[Piece], start: int, max_response: int, processor: Processor
) -> TokenizedResponse:
    ids = np.concatenate([np.array(piece.ids, np.int32) for piece in pieces])[start:]
    lengths = [len(piece.ids) for piece in pieces]
    mask = np.repeat(np.array([piece.learned for piece in pieces], bool), lengths)[start:]
    kept = slice(0, max_response)
    asks = not any(piece.answer for piece in pieces)
    if asks and len(ids) > max_response:
        raise RowRejected("question_too_long", f"{len(ids)} tokens, the limit is {max_response}")
    if not asks and not mask[kept].any():
        raise RowRejected("empty_response", "no token of the assistant is left to learn")
    if _holds(ids[max_response:], processor.placeholders):
        detail = f"images end beyond token {max_response} of a response, and are never cut"
        raise RowRejected("response_too_long", detail)
    return TokenizedResponse(ids[kept], mask[kept], max(0, len(ids) - max_response), source)


def _holds(ids: np.ndarray, tokens: Sequence[int]) -> bool:
    """Whether any of the ids is one of a few tokens."""
    return any((ids == token).any() for token in tokens)


def _span_tokens(
    response: Response, encoded: _Encoded, start: int, processor: Processor
) -> tuple[tuple[int, int], ...]:
    """[start, end) of the tokens of each span, counted from the response's first; where a span is
    in no token, an empty range.

    Raises:
      RowRejected: the chat template changes the text that the spans are of.
    """
    answer = max(place for place, piece in enumerate(encoded.pieces) if piece.answer)
    segment = encoded.segments[answer]
    before = processor.control.written(segment.start)
    said = processor.control.written(segment.text)
    spoken = response.text.strip()  # templates may trim
    place = said.find(spoken)
    if place < 0:
        raise RowRejected("span_not_found", "the chat template changes the text of the response")
    place += len(before) - (len(response.text) - len(response.text.lstrip()))
    offsets = _offsets(segment.start, segment.start + segment.text, processor)
    shift = sum(len(piece.ids) for piece in encoded.pieces[:answer]) - start
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
