"""Messages of a request as a tokenised prompt, with its images decoded."""

from __future__ import annotations

import base64
import binascii
import secrets
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.images import ImageTooLarge, image_size
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import IMAGE, ImageRef, Piece, Record, Turn
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import UNLIMITED, TokenizedRecord, tokenize
from mmpo_jax.generation.engine import Asked
from mmpo_jax.recipes.serving import Serving
from mmpo_jax.serving.protocol import SEEDS, ChatBody, ImagePart, Message
from mmpo_jax.serving.refusals import bad_request

RESERVED = frozenset({"messages", "tokenize", "chat_template", "return_tensors"})
"""Arguments of the chat template that are not the client's."""
GREEDY_BELOW = 1e-5
"""Temperature below which sampling is greedy: logits divided by it would leave float32; vLLM's."""
LEAST_TOP_P = 1e-6
"""In float32 a smaller one may keep no token at all."""
MOST_TOKENS = 2**31 - 1
"""What int32 holds, and no vocabulary has."""


@dataclass(frozen=True)
class Prompts:
    """Makes prompts of requests, in any thread."""

    processor: Processor
    serving: Serving
    positions: int
    """Tokens of a prompt and its response, at most."""
    lock: threading.Lock
    """Held while a text is tokenised: tokenizers are not made for several threads."""

    def asked(self, body: ChatBody) -> Asked:
        """What a request asks the engine for.

        Raises:
          Refusal: it cannot be answered.
        """
        if body.n > self.serving.max_choices:
            raise bad_request(f"n: at most {self.serving.max_choices} on this server", "n")
        record = self._tokenized(_record(body, self.processor, self.serving))
        length = len(record.prompt_ids)
        longest = min(self.serving.max_prompt_tokens, self.positions - 1)
        if length > longest:
            raise bad_request(
                f"the prompt has {length} tokens, those of its images included; this server takes "
                f"{longest}",
                "messages",
                "context_length_exceeded",
            )
        try:
            self.processor.pixels(record.images)
        except DataError as error:
            raise bad_request(str(error), "messages", "invalid_image") from error
        limit = min(self.serving.max_new_tokens, self.positions - length)
        seed = secrets.randbits(64) if body.seed is None else body.seed % SEEDS
        return Asked(
            record,
            min(body.max_new_tokens or limit, limit),
            num_samples=body.n,
            temperature=_temperature(body),
            top_k=min(max(0, body.top_k or 0), MOST_TOKENS),
            top_p=1.0 if body.top_p is None else max(body.top_p, LEAST_TOP_P),
            seed=seed,
            tells_top=bool(body.top_logprobs),
        )

    def _tokenized(self, record: Record) -> TokenizedRecord:
        try:
            with self.lock:
                return tokenize(record, self.processor, UNLIMITED, UNLIMITED)
        except UnusableRow as error:
            raise bad_request(error.detail, "messages", error.reason) from error
        except DataError as error:
            raise bad_request(str(error), "messages") from error


def _temperature(body: ChatBody) -> float:
    if body.temperature is None:
        return 1.0
    return body.temperature if body.temperature >= GREEDY_BELOW else 0.0


def _record(body: ChatBody, processor: Processor, serving: Serving) -> Record:
    """The record that messages are.

    Raises:
      Refusal: a message or an image cannot be used.
    """
    images: list[ImageRef] = []
    turns = []
    for number, message in enumerate(body.messages):
        place = f"messages[{number}]"
        content = _content(message, place, images, serving)
        keys = _keys(message, place, processor)
        turns.append(Turn(message.role, content, keys))
    if all(turn.role in ("system", "developer") for turn in turns):
        raise bad_request("messages: nobody says anything but the system", "messages")
    for image in images:
        _check_size(image, serving)
    arguments = body.chat_template_kwargs or {}
    for name in arguments:
        if name in RESERVED or not processor.reads_key(name):
            raise bad_request(
                f"chat_template_kwargs: the chat template knows no {name}", "chat_template_kwargs"
            )
    return Record("", tuple(images), tuple(turns), (), template=arguments)


def _content(
    message: Message, place: str, images: list[ImageRef], serving: Serving
) -> str | tuple[Piece, ...]:
    """The content of a turn; its images are added to those before."""
    if message.content is None or isinstance(message.content, str):
        _check_text(message.content or "", place)
        return message.content or ""
    pieces: list[Piece] = []
    for number, part in enumerate(message.content):
        where = f"{place}.content[{number}]"
        if isinstance(part, ImagePart):
            if message.role == "assistant":
                raise bad_request(f"{where}: the assistant shows no images", "messages")
            if len(images) == serving.max_images:
                raise bad_request(
                    f"{where}: more than {serving.max_images} images", "messages", "too_many_images"
                )
            images.append(ImageRef(where, data=_image_bytes(part.image_url.url, where)))
            pieces.append(IMAGE)
        else:
            _check_text(part.text, where)
            pieces.append(part.text)
    if len(pieces) == 1 and isinstance(pieces[0], str):
        return pieces[0]
    return tuple(pieces)


def _check_text(text: str, place: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise bad_request(f"{place}: no valid Unicode", "messages") from error


def _keys(message: Message, place: str, processor: Processor) -> Mapping[str, Any]:
    keys = {name: value for name, value in (message.model_extra or {}).items() if value}
    for name in keys:
        if name != "name" and not processor.reads_key(name):
            raise bad_request(f"{place}.{name}: the chat template does not read it", "messages")
    return keys


def _image_bytes(url: str, place: str) -> bytes:
    """The encoded image of a data URL.

    Raises:
      Refusal: it is none, or nothing that can be decoded.
    """
    scheme, _, rest = url.partition(":")
    if scheme.lower() != "data":
        kind = f"{scheme[:20]}: URLs" if rest else "anything else"
        raise bad_request(
            f"{place}: an image is a data URL (data:image/png;base64,...); this server opens no "
            f"{kind}",
            "messages",
            "invalid_image_url",
        )
    head, comma, data = rest.partition(",")
    if not comma or not head.lower().startswith("image/") or not head.lower().endswith(";base64"):
        raise bad_request(
            f"{place}: a data URL of an image begins with data:image/png;base64, or the like",
            "messages",
            "invalid_image_url",
        )
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise bad_request(f"{place}: no base64: {error}", "messages", "invalid_image") from error


def _check_size(image: ImageRef, serving: Serving) -> None:
    """Looks at an image's header, before anything is decoded.

    Raises:
      Refusal: it is no image, or a larger one than this server takes.
    """
    try:
        height, width = image_size(image)
    except ImageTooLarge as error:
        raise bad_request(str(error), "messages", "image_too_large") from error
    except DataError as error:
        raise bad_request(str(error), "messages", "invalid_image") from error
    if height * width > serving.max_megapixels * 1_000_000:
        raise bad_request(
            f"image {image.name} has {width} x {height} pixels; this server takes "
            f"{serving.max_megapixels} megapixels",
            "messages",
            "image_too_large",
        )
