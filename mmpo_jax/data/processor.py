"""Text and pixels of a checkpoint: its own tokenizer, chat template and image processor.

One object serves generation, labelling, reference, training and evaluation, so that all of them
see the same ids and the same pixels.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.chat_template import REMEMBERED, ChatTemplate, TemplateRefusal
from mmpo_jax.data.control_tokens import ControlTokens, has_stand_ins, has_written_out, in_texts
from mmpo_jax.data.images import image_size
from mmpo_jax.data.media_pixels import clip_of, image_pixels, named, video_pixels
from mmpo_jax.data.pixel_cache import PixelCache, pixel_key
from mmpo_jax.data.processor_files import (
    ProcessorError,
    generation_eos_ids,
    is_setting,
    load_image_processor,
    load_tokenizer,
    load_video_settings,
    plain_encoder,
    processor_template,
)
from mmpo_jax.data.records import ImageRef, Medium, Response, Turn, VideoRef
from mmpo_jax.data.templates import TEMPLATES
from mmpo_jax.models.config import ModelConfig
from mmpo_jax.models.families import FAMILIES
from mmpo_jax.models.layout import Layout


class Processor:
    """Turns turns into token ids and images into pixels, as the checkpoint's own files say."""

    def __init__(self, folder: str | os.PathLike[str], config: ModelConfig, template: str = "auto"):
        """
        Args:
          folder: of the checkpoint.
          config: of the model.
          template: a key of `TEMPLATES`, or `auto` for the checkpoint's own chat template.

        Raises:
          ProcessorError: a file is missing or broken, or does not belong to the model.
        """
        self.folder = os.fspath(folder)
        self.template = template
        self.config = config
        self.images = FAMILIES[config.family].images
        self.videos = FAMILIES[config.family].videos
        self.tokenizer = load_tokenizer(self.folder)
        self.tokenizer.chat_template = (
            self.chat_template or processor_template(self.folder) or self.tokenizer.chat_template
        )
        self._chat = ChatTemplate(self.folder, self.tokenizer, self.images is not None)
        self.placeholders: tuple[int, ...] = ()
        self.slot_shape: tuple[int, ...] = ()
        if self.images is not None:
            self.image_processor = load_image_processor(
                self.folder, self.images.processors, self.images.load
            )
            self.images.check(config, self.image_processor)
            self.placeholders = self.images.placeholders(config)
            self.slot_shape = self.images.slot_shape(config)
            if self.images.slot_shape_of is not None:
                self.slot_shape = self.images.slot_shape_of(config, self.image_processor)
        if self.videos is not None:
            settings = load_video_settings(self.folder, self.videos.settings)
            self.video_settings = self.videos.read_settings(config, settings, self.image_processor)
            placeholder = self.videos.placeholder(config, self.tokenizer)
            self.placeholders = (*self.placeholders, placeholder)
        self._spelled: tuple[str, str] | None = None
        if self.images is not None and self.images.spelled is not None:
            self._spelled = self.images.spelled(self.tokenizer)
        self._kept_pixels = PixelCache()
        # Responses go on from one prompt, which would be encoded for each of them again.
        self._encode_plain = functools.lru_cache(REMEMBERED)(self._encode_text)
        self._check()

    def _encode_text(self, text: str) -> tuple[int, ...]:
        encoder = plain_encoder(self.tokenizer)
        if encoder is None:
            return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        (encoded,) = encoder.encode_batch_fast([text], add_special_tokens=False)
        return tuple(encoded.ids)

    @property
    def chat_template(self) -> str | None:
        """What stands in place of the checkpoint's own chat template; None where nothing does.

        It belongs into every folder that this checkpoint's results are written to.
        """
        return TEMPLATES.get(self.template)

    @property
    def answer_ending(self) -> str | None:
        """What the chat template writes behind the last answer of a dialogue; None where it does
        not write the answer as it is."""
        return self._chat.ending

    @property
    def ends_answers(self) -> bool:
        """Whether the chat template itself writes EOS after an answer."""
        return self.tokenizer.eos_token in (self.answer_ending or "")

    @functools.cached_property
    def control(self) -> ControlTokens:
        """The tokenizer's control tokens, as they may be typed in texts.

        Raises:
          ProcessorError: the tokenizer cannot tell them from text.
        """
        if not self.tokenizer.is_fast:
            raise ProcessorError(f"{self.folder}: control tokens in texts need a tokenizer.json")
        written = self._spelled[:1] if self._spelled else ()
        ids = self.tokenizer.convert_tokens_to_ids(list(written))
        return ControlTokens(self.tokenizer, (*self.placeholders, *ids))

    @property
    def eos_id(self) -> int:
        """What ends a response in training."""
        return self.tokenizer.eos_token_id

    @functools.cached_property
    def eos_ids(self) -> tuple[int, ...]:
        """What ends a response in generation: EOS, and what `generation_config.json` adds to it.

        Raises:
          ProcessorError: that file cannot be read.
        """
        return tuple(dict.fromkeys([self.eos_id, *generation_eos_ids(self.folder)]))

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS in front of a text."""
        return self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def render(
        self,
        turns: Sequence[Turn],
        for_answer: bool,
        arguments: Mapping[str, Any] | None = None,
        plain_text: bool = False,
    ) -> str:
        """The chat template's text of a dialogue.

        Media are where the turns have them, and the template's placeholder is written for each.
        The same placeholder typed in a text is none: a character stands for it, see
        `control_tokens`, and `encode` makes text of it.

        Args:
          turns: the dialogue so far.
          for_answer: end with the header of the assistant's next turn.
          arguments: of the template beside the messages, such as `tools`.
          plain_text: whether all control tokens in texts, keys and arguments are text.

        Raises:
          TemplateRefusal: it does not take such a dialogue, or writes an object with typed control
            tokens as it is, where no character stands for them.
        """
        stands = bool(self.placeholders and self.tokenizer.is_fast) or plain_text
        if stands:
            names = None if plain_text else self.control.placeholders
            given = list(turns), arguments
            turns = [self._as_text(turn, names) for turn in turns]
            arguments = in_texts(arguments, lambda text: self.control.stand_in(text, names))
            stands = (turns, arguments) != given
        text = self._chat.render(turns, for_answer, arguments)
        if stands and has_written_out(text):
            raise TemplateRefusal(
                f"{self.folder}: the chat template writes keys of messages, or arguments, as "
                "Python does, in which typed control tokens cannot stay text"
            )
        return text.replace(*self._spelled) if self._spelled else text

    def _as_text(self, turn: Turn, names: Sequence[str] | None) -> Turn:
        """A turn in which these control tokens, typed in its texts and keys, stay text."""

        def change(text: str) -> str:
            return self.control.stand_in(text, names)

        content = turn.content
        if isinstance(content, str):
            content = change(content)
        else:
            content = tuple(change(one) if isinstance(one, str) else one for one in content)
        keys = in_texts(turn.keys, change) if turn.keys else turn.keys
        if (content, keys) == (turn.content, turn.keys):
            return turn
        return dataclasses.replace(turn, content=content, keys=keys)

    def shows_media(self, response: Response) -> bool:
        """Whether an answer of a response holds a token that stands for media: among the ids that
        were sampled, or typed where the tokenizer cannot keep it text."""
        if any(token in self.placeholders for token in response.token_ids or ()):
            return True
        if self.tokenizer.is_fast or not self.placeholders:
            return False
        typed = self.tokenizer.convert_ids_to_tokens(list(self.placeholders))
        said = [turn.text for turn in response.turns if turn.role == "assistant"]
        return any(name in text for text in said for name in typed)

    def reads_key(self, key: str) -> bool:
        """Whether the chat template may read a key of messages, or an argument, of this name."""
        return self._chat.reads_key(key)

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text, each image placeholder once; adds no special tokens."""
        if has_stand_ins(text):
            return self.control.encode(text)[0]
        return list(self._encode_plain(text))

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """`encode`, and the characters [start, end) of the text that every token stands for.

        Raises:
          ProcessorError: the tokenizer cannot say.
        """
        if not self.tokenizer.is_fast:
            raise ProcessorError(f"{self.folder}: spans of a text need a tokenizer.json")
        if has_stand_ins(text):
            return self.control.encode(text)
        made = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return made["input_ids"], made["offset_mapping"]

    def layouts(self, images: Sequence[ImageRef], videos: Sequence[VideoRef] = ()) -> list[Layout]:
        """How each image, then each video of a prompt becomes tokens.

        Raises:
          DataError: the model takes none, or one cannot be read, where its size matters.
          MediaError: the model cannot take one of this size.
        """
        made: list[Layout] = []
        if images:
            if self.images is None:
                raise DataError(f"{self.folder}: this model takes no images")
            known = [image_size(image) if self.images.sized else (1, 1) for image in images]
            with named(images):
                plain = self.images.layouts(self.config, self.image_processor, known)
            made += [self.images.frame(self.tokenizer, layout) for layout in plain]
        if videos:
            if self.videos is None:
                raise DataError(f"{self.folder}: this model takes no videos")
            with named(videos):
                clips = [clip_of(self.videos, self.video_settings, video)[0] for video in videos]
                plain = self.videos.layouts(self.config, self.video_settings, clips)
            made += [self.videos.frame(self.tokenizer, layout) for layout in plain]
        return made

    def expand_media(
        self, ids: Sequence[int], layouts: Sequence[Layout], images: int, order: list[int]
    ) -> list[int]:
        """Placeholders, one per medium, replaced by their layouts' tokens.

        Args:
          ids: as `encode` gives them; those of a later piece of the same dialogue go on.
          layouts: of the images, then of the videos.
          images: how many of them are images'.
          order: places in `layouts` of the media so far; grows.

        Raises:
          TemplateRefusal: there are more placeholders than media.
        """
        if not any(token in ids for token in self.placeholders):
            return list(ids)
        expanded: list[int] = []
        for token in ids:
            if token not in self.placeholders:
                expanded.append(token)
                continue
            video = self.videos is not None and token == self.placeholders[-1]
            left = range(images, len(layouts)) if video else range(images)
            place = next((place for place in left if place not in order), None)
            if place is None:
                raise TemplateRefusal(
                    f"{self.folder}: the chat template writes more media than the dialogue has"
                )
            order.append(place)
            expanded += layouts[place].ids.tolist()
        return expanded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def pixels(
        self, images: Sequence[ImageRef], videos: Sequence[VideoRef] = ()
    ) -> list[np.ndarray]:
        """float32[slots, *slot_shape] of each of a prompt's images, then of its videos, as the
        checkpoint's files say.

        Raises:
          DataError: an image or a frame cannot be read.
          MediaError: the model cannot take one of them.
        """
        if not images and not videos:
            return []
        key = pixel_key(images, videos)
        if (kept := self._kept_pixels.get(key)) is not None:
            return kept
        made: list[np.ndarray] = []
        if images:
            assert self.images is not None
            made += image_pixels(self.images, self.config, self.image_processor, images)
        if videos:
            assert self.videos is not None
            made += video_pixels(self.videos, self.config, self.video_settings, videos)
        self._kept_pixels.put(key, made)
        return made

    def fingerprints(self) -> dict[str, str]:
        """What cached results depend on: tokenizer, chat template and image preprocessing."""
        image: dict[str, Any] = {}
        if self.images is not None:
            settings = self.image_processor.to_dict()
            image = {key: value for key, value in settings.items() if is_setting(key)}
        if self.videos is not None:
            image["video"] = self.video_settings
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        return {
            "tokenizer": fingerprint_json([vocabulary, self.eos_ids, self.placeholders]),
            "template": fingerprint_json(self.tokenizer.chat_template),
            "image_processor": fingerprint_json([image, self.slot_shape]),
        }

    def _check(self) -> None:
        size, known = len(self.tokenizer), self.config.decoder.vocab_size
        # Placeholders have no embedding: features stand in their places.
        beyond = [token for token in range(known, size) if token not in self.placeholders]
        if beyond:
            raise ProcessorError(
                f"{self.folder}: the tokenizer has {size} ids, the model's vocabulary only "
                f"{known}; they do not belong together"
            )
        if self.tokenizer.eos_token_id is None:
            raise ProcessorError(f"{self.folder}: the tokenizer has no EOS token")
        if max(self.eos_ids) >= known:
            raise ProcessorError(
                f"{self.folder}: generation_config.json has the EOS id {max(self.eos_ids)}, the "
                f"model's vocabulary only {known} ids"
            )
        if not self.tokenizer.chat_template:
            raise ProcessorError(f"{self.folder}: no chat template (chat_template.jinja)")
        shown = "?" if self.images is None else (Medium.IMAGE, "?")
        rendered = self.encode(self.render([Turn("user", shown)], True))
        if self.images is None:
            return
        written = sum(rendered.count(token) for token in self.placeholders)
        if written != 1:
            ids = ", ".join(map(str, self.placeholders))
            raise ProcessorError(
                f"{self.folder}: the chat template writes {written} image tokens (id {ids}, from "
                "config.json) for one image"
            )
        blank = Image.fromarray(np.zeros((70, 50, 3), np.uint8))
        (made,) = self.images.pixels(self.config, self.image_processor, [blank])
        if made.shape[1:] != self.slot_shape:
            raise ProcessorError(
                f"{self.folder}: the image processor makes images of shape {made.shape[1:]}, "
                f"config.json says {self.slot_shape}"
            )
