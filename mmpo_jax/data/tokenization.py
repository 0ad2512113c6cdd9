"""The tokenisation contract: a record's prompt, shared once, and its responses.

BOS once, at the start. EOS at the end of a response, unless generation had cut it; one that is
typed in a text is whatever the tokenizer makes of it. Image tokens are never cut: too long a prompt
drops the row; an over-long response loses its tail.
"""

from __future__ import annotations

import dataclasses
import hashlib
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mmpo_jax.data.chat_template import TemplateRefusal
from mmpo_jax.data.control_tokens import has_stand_ins
from mmpo_jax.data.dialogue_tokens import (
    DialogueTokens,
    Piece,
    dialogue_tokens,
    span_tokens,
)
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.media_pixels import MediaError
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, MediaRef, Record, Response, VideoRef, last_question
from mmpo_jax.data.skipped import SkippedRow, UnusableRow
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
      UnusableRow: the prompt is longer than `max_prompt`, the model cannot take an image, a
        response has nothing to learn, or a text has characters that stand for control tokens.
    """
    _check_takes(record)
    layouts, order, dialogues = _read(record, processor)
    prompt = _shared_prompt(record, dialogues, max_prompt if share_text else 0, processor)
    if len(prompt) > max_prompt:
        raise UnusableRow(
            "prompt_too_long", f"the prompt has {len(prompt)} tokens, the limit is {max_prompt}"
        )
    limit = processor.config.decoder.position_limit
    longest = max(sum(len(piece.ids) for piece in one.pieces) for one in dialogues)
    if limit is not None and min(longest, len(prompt) + max_response) > limit:
        raise UnusableRow(
            "prompt_too_long", f"{longest} tokens, the model's positions end at {limit}"
        )
    responses = []
    for response, dialogue in zip(record.responses, dialogues, strict=False):
        one = _response(response, dialogue.pieces, len(prompt), max_response, processor)
        if response.spans:
            spans = span_tokens(response, dialogue, len(prompt), processor)
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
        order=tuple(order),
        shows_later=any(_holds(r.ids, processor.placeholders) for r in responses),
        left_out=tuple(place for place, *_ in record.left_out),
    )


Tokenize = Callable[[Record, Processor, int, int], TokenizedRecord]
"""`tokenize`, or another function of its kind."""


def tokenize_prompt(
    record: Record, processor: Processor, max_prompt: int, max_response: int
) -> TokenizedRecord:
    """`tokenize` of the prompt alone, whatever responses there are.

    Raises:
      UnusableRow: there is no prompt, or see `tokenize`.
    """
    if not record.prompt:
        raise UnusableRow("no_prompt", "the row's responses do not share a prompt")
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
        except UnusableRow as error:
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


def _check_takes(record: Record) -> None:
    """
    Raises:
      UnusableRow: a response has images or a prompt of its own, or a text has characters that
        stand for control tokens.
    """
    if any(map(has_stand_ins, record.texts)):
        raise UnusableRow(
            "bad_text", "a character from U+10F000 to U+10FFFD, which stand for control tokens"
        )
    if any(response.images is not None for response in record.responses):
        raise UnusableRow("own_images", "a response has images of its own")
    if any(response.prompt is not None for response in record.responses):
        raise UnusableRow("own_prompt", "a response has a prompt of its own")


def _read(
    record: Record, processor: Processor
) -> tuple[list[Layout], list[int], list[DialogueTokens]]:
    """(layouts of the media, their order in the dialogues, the dialogue of every response; that of
    the prompt where there is none).

    Raises:
      UnusableRow: the model cannot take an image, the chat template cannot take a dialogue, or the
        dialogues show the media in different orders or not all of them.
    """
    try:
        layouts = processor.layouts(record.images, record.videos)
    except MediaError as error:
        raise UnusableRow(error.reason, str(error)) from error
    try:
        responses = record.responses or (None,)
        made = [dialogue_tokens(record, response, layouts, processor) for response in responses]
    except TemplateRefusal as error:
        raise UnusableRow("template_refuses", str(error)) from error
    orders = {tuple(dialogue.order) for dialogue in made}
    if len(orders) > 1:
        raise UnusableRow("dialogues_differ", "the responses show the media in different orders")
    order = made[0].order
    if len(order) < len(layouts):
        detail = f"the chat template shows {len(order)} of {len(layouts)} images and videos"
        raise UnusableRow("image_count", detail)
    return layouts, order, made


def _shared_prompt(
    record: Record, dialogues: Sequence[DialogueTokens], limit: int, processor: Processor
) -> list[int]:
    """The tokens that all dialogues begin with: the record's prompt, or where it has none what
    they have in common, see `_common_start`.

    Raises:
      UnusableRow: they begin with different tokens.
    """
    starts = [dialogue.pieces[0].ids for dialogue in dialogues]
    prompt = starts[0] if record.prompt else _common_start(starts, limit, processor)
    if any(start[: len(prompt)] != prompt for start in starts):
        raise UnusableRow("dialogues_differ", "the responses do not share the rendered prompt")
    if not prompt:
        raise UnusableRow("dialogues_differ", "the dialogues do not begin with a common token")
    return prompt


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
        raise UnusableRow("question_too_long", f"{len(ids)} tokens, the limit is {max_response}")
    if not asks and not mask[kept].any():
        raise UnusableRow("empty_response", "no token of the assistant is left to learn")
    if _holds(ids[max_response:], processor.placeholders):
        detail = f"images end beyond token {max_response} of a response, and are never cut"
        raise UnusableRow("response_too_long", detail)
    return TokenizedResponse(ids[kept], mask[kept], max(0, len(ids) - max_response), source)


def _holds(ids: np.ndarray, tokens: Sequence[int]) -> bool:
    """Whether any of the ids is one of a few tokens."""
    return any((ids == token).any() for token in tokens)
