"""The tokenisation contract: a record's prompt, shared once, and its responses.

BOS once, at the start. EOS exactly once, at the end of a response, unless generation had cut it.
Image tokens are never cut: too long a prompt drops the row; an over-long response loses its tail.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmpo_jax.data.processor import MediaError, Processor, TemplateRefusal
from mmpo_jax.data.processor_files import ProcessorError
from mmpo_jax.data.readers import SkippedRow
from mmpo_jax.data.records import ImageRef, Record, Response, Turn, VideoRef
from mmpo_jax.data.rows import SkipReason
from mmpo_jax.data.segments import covered_tokens
from mmpo_jax.files import fingerprint_json
from mmpo_jax.models.layout import Layout
from mmpo_jax.recipe import Lengths

UNLIMITED = 2**30
"""As the limit of a length."""


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
    """What it was made of."""
    span_tokens: tuple[tuple[int, int], ...] = ()
    """[start, end) of the tokens of each of the source's spans; may end beyond those left."""
    mismatched: bool = False
    """Whether it answers another record's prompt."""


@dataclasses.dataclass(frozen=True)
class TokenizedRecord:
    """A record as token ids; images stay references until a batch is made."""

    id: str
    prompt_ids: np.ndarray
    """int32[p]; image placeholders expanded."""
    responses: tuple[TokenizedResponse, ...]
    images: tuple[ImageRef, ...]
    layouts: tuple[Layout, ...]
    """One for each image, then one for each video."""
    ranked: bool = False
    """As in `Record`."""
    videos: tuple[VideoRef, ...] = ()
    others: tuple[tuple[str, TokenizedRecord], ...] = ()
    """The same responses in other contexts, by name; see `data.contexts`."""
    answer: Any = dataclasses.field(default=None, hash=False)
    """As in `Record`."""

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
    the images and whatever text precedes the first difference. A response without an assistant
    turn is a question to be answered: it ends with the assistant's header and has no loss.

    Args:
      record: with or without responses.
      processor: of the checkpoint.
      max_prompt: more tokens of a prompt are refused.
      max_response: more tokens of a response are cut.
      share_text: whether text that dialogues begin with goes into the shared prompt; if not, only
        what stands up to the images does.

    Raises:
      RowRejected: the prompt is longer than `max_prompt`, the model cannot take an image, or a
        response has nothing to learn.
    """
    if any(response.images is not None for response in record.responses):
        raise RowRejected("own_images", "a response has images of its own")
    if any(response.prompt is not None for response in record.responses):
        raise RowRejected("own_prompt", "a response has a prompt of its own")
    try:
        layouts = tuple(processor.layouts(record.images, record.videos))
    except MediaError as error:
        raise RowRejected("image_broken", str(error)) from error
    try:
        dialogues = [
            _segments(
                (*record.prompt, *response.turns), record, layouts, processor, response.finished
            )
            for response in record.responses
        ]
        if not dialogues:
            dialogues = [_segments(record.prompt, record, layouts, processor)]
    except TemplateRefusal as error:
        raise RowRejected("template_refuses", str(error)) from error
    starts = [segments[0][0] for segments in dialogues]
    shared = max_prompt if share_text else 0
    prompt = starts[0] if record.prompt else _common_start(starts, shared, processor)
    if any(start[: len(prompt)] != prompt for start in starts):
        raise RowRejected("dialogues_differ", "the responses do not share the rendered prompt")
    features = sum(token in processor.placeholders for token in prompt)
    if features != sum(len(layout.index) for layout in layouts):
        raise RowRejected("image_count", "the shared prompt does not hold every image of the row")
    if len(prompt) > max_prompt:
        raise RowRejected(
            "prompt_too_long", f"the prompt has {len(prompt)} tokens, the limit is {max_prompt}"
        )
    limit = processor.config.decoder.rope.limit
    longest = max(sum(len(ids) for ids, _ in segments) for segments in dialogues)
    if limit is not None and min(longest, len(prompt) + max_response) > limit:
        raise RowRejected(
            "prompt_too_long", f"{longest} tokens, the model's positions end at {limit}"
        )
    responses = []
    for response, segments in zip(record.responses, dialogues, strict=False):
        made = _response(response, segments, len(prompt), max_response)
        if response.spans:
            spans = _span_tokens(response, record, segments, len(prompt), processor)
            made = dataclasses.replace(made, span_tokens=spans)
        responses.append(made)
        if np.isin(responses[-1].ids, processor.placeholders).any():
            raise RowRejected("image_position", "a response holds the image placeholder")
    return TokenizedRecord(
        id=record.id,
        prompt_ids=np.array(prompt, np.int32),
        responses=tuple(responses),
        images=record.images,
        layouts=layouts,
        ranked=record.ranked,
        videos=record.videos,
        answer=record.answer,
    )


Tokenize = Callable[[Record, Processor, int, int], TokenizedRecord]
"""`tokenize`, or another function of its kind."""


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


def fingerprint_records(records: Sequence[TokenizedRecord]) -> str:
    """SHA-256 of what a model sees of the records: tokens, loss masks and encoded images."""
    return fingerprint_json([_seen(record) for record in records])


def _seen(record: TokenizedRecord) -> list[Any]:
    return [
        record.id,
        record.prompt_ids.tolist(),
        [[r.ids.tolist(), r.loss_mask.tolist()] for r in record.responses],
        [image.fingerprint() for image in record.images],
        [video.fingerprint() for video in record.videos],
        *([name, _seen(other)] for name, other in record.others),
    ]


Segment = tuple[list[int], bool]
"""(token ids, spoken by the assistant)."""


def _segments(
    turns: Sequence[Turn],
    record: Record,
    layouts: Sequence[Layout],
    processor: Processor,
    finished: bool = True,
) -> list[Segment]:
    """A dialogue's tokens: the record's prompt whole, then cut where the assistant begins and ends.

    No token reaches over a cut (see `_continued`), so that a prompt's ids are the same in training
    as in generation.
    """
    segments: list[Segment] = []
    done = ""

    def render(turns: Sequence[Turn], for_answer: bool) -> str:
        return processor.render(turns, len(record.images), for_answer, len(record.videos))

    for index, turn in enumerate(turns):
        if turn.role != "assistant" or index < len(record.prompt):
            continue
        before = render(turns[:index], True)
        after = render(turns[: index + 1], False)
        if not (after.startswith(before) and before.startswith(done)):
            raise ProcessorError(
                f"{processor.folder}: the chat template rewrites earlier turns, so a response "
                "cannot be told from its prompt"
            )
        last = index == len(turns) - 1
        if last and not processor.ends_answers:
            after = after.rstrip()  # what such a template puts between answers, before EOS
        answer = _continued(before, after, processor)
        segments.append((_continued(done, before, processor), False))
        segments.append((_ended(answer, processor, finished) if last else answer, True))
        done = after
    if not turns or turns[-1].role != "assistant":
        rest = render(turns, True)
        segments.append((_continued(done, rest, processor), False))
    first = processor.expand_images(_begun(segments[0][0], processor), layouts)
    return [(first, False), *segments[1:]]


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


def _ended(ids: list[int], processor: Processor, finished: bool) -> list[int]:
    """EOS once, at the end, whatever the template writes after an answer; none if it was cut."""
    if processor.eos_id in ids:
        ids = ids[: ids.index(processor.eos_id)]
    return [*ids, processor.eos_id] if finished else ids


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
    source: Response, segments: list[Segment], start: int, max_response: int
) -> TokenizedResponse:
    ids = [token for segment, _ in segments for token in segment][start:]
    mask = [spoken for segment, spoken in segments for _ in segment][start:]
    kept = slice(0, max_response)
    asks = not any(spoken for _, spoken in segments)
    if asks and len(ids) > max_response:
        raise RowRejected("question_too_long", f"{len(ids)} tokens, the limit is {max_response}")
    if not asks and not any(mask[kept]):
        raise RowRejected("empty_response", "no token of the assistant is left to learn")
    return TokenizedResponse(
        np.array(ids[kept], np.int32),
        np.array(mask[kept], bool),
        max(0, len(ids) - max_response),
        source,
    )


def _span_tokens(
    response: Response,
    record: Record,
    segments: Sequence[Segment],
    start: int,
    processor: Processor,
) -> tuple[tuple[int, int], ...]:
    """[start, end) of the tokens of each span, counted from the response's first; where a span is
    in no token, an empty range.

    Raises:
      RowRejected: the chat template changes the text that the spans are of.
    """
    turns = (*record.prompt, *response.turns)
    last = max(place for place, turn in enumerate(turns) if turn.role == "assistant")

    def render(turns: Sequence[Turn], for_answer: bool) -> str:
        return processor.render(turns, len(record.images), for_answer, len(record.videos))

    before, after = render(turns[:last], True), render(turns[: last + 1], False)
    spoken = response.text.strip()
    place = after.find(spoken, len(before))
    if place < 0:
        raise RowRejected("span_not_found", "the chat template changes the text of the response")
    place -= len(response.text) - len(response.text.lstrip())
    offsets = _offsets(before, after, processor)
    answer = max(index for index, (_, assistant) in enumerate(segments) if assistant)
    shift = sum(len(ids) for ids, _ in segments[:answer]) - start
    found = []
    for span in response.spans:
        first, end = covered_tokens(after, offsets, place + span.start, place + span.end)
        found.append((first + shift, end + shift))
    return tuple(found)


def _offsets(start: str, text: str, processor: Processor) -> list[tuple[int, int]]:
    """Characters of `text` that each of the tokens `_continued` gives stands for."""
    begun, (whole, places) = processor.encode(start), processor.encode_with_offsets(text)
    if whole[: len(begun)] == begun:
        return places[len(begun) :]
    _, places = processor.encode_with_offsets(text[len(start) :])
    return [(first + len(start), last + len(start)) for first, last in places]
