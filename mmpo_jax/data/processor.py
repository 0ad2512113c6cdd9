"""Text and pixels of a checkpoint: its own tokenizer, chat template and image processor.

One object serves generation, labelling, reference, training and evaluation, so that all of them
see the same ids and the same pixels.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import transformers

from mmpo_jax.data.images import open_image
from mmpo_jax.data.records import ImageRef, Turn
from mmpo_jax.errors import MmpoError
from mmpo_jax.files import fingerprint_json
from mmpo_jax.models.config import LlavaConfig

PIXEL_CACHE_BYTES = 512 * 2**20


class ProcessorError(MmpoError):
    """A checkpoint folder whose tokenizer, template or image processor cannot be used."""


class Processor:
    """Turns turns into token ids and images into pixels, as the checkpoint's own files say."""

    def __init__(self, folder: str | os.PathLike[str], config: LlavaConfig):
        """
        Raises:
          ProcessorError: a file is missing or broken, or does not belong to the model.
        """
        self.folder = os.fspath(folder)
        self.image_token_id = config.image_token_id
        self.num_image_tokens = config.num_image_tokens
        self.tokenizer = _load_tokenizer(self.folder)
        self.image_processor = _load_image_processor(self.folder)
        self.pixel_shape = (
            config.vision.num_channels,
            config.vision.image_size,
            config.vision.image_size,
        )
        self._check(config)
        self._pixels: collections.OrderedDict[Any, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_token_id

    @functools.cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts BOS in front of a text."""
        return self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]

    @property
    def pad_id(self) -> int:
        pad = self.tokenizer.pad_token_id
        return self.eos_id if pad is None else pad

    def render(self, turns: Sequence[Turn], num_images: int, for_answer: bool) -> str:
        """The chat template's text; images go in front of the first user turn's text.

        Args:
          turns: the dialogue so far.
          num_images: images of the record.
          for_answer: end with the header of the assistant's next turn.
        """
        messages = []
        images_left = num_images
        for turn in turns:
            content: list[dict[str, str]] = []
            if turn.role == "user" and images_left:
                content = [{"type": "image"}] * images_left
                images_left = 0
            messages.append(
                {"role": turn.role, "content": [*content, {"type": "text", "text": turn.text}]}
            )
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=for_answer
        )

    def encode(self, text: str) -> list[int]:
        """Token ids of rendered text, each image placeholder once; adds no special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def expand_images(self, ids: Sequence[int]) -> list[int]:
        """Every image placeholder repeated to one token per image feature."""
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (self.num_image_tokens if token == self.image_token_id else 1)
        return expanded

    def decode(self, ids: Sequence[int]) -> str:
        """The text of a response, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()

    def pixels(self, image: ImageRef) -> np.ndarray:
        """float32[C, H, W] of one image, as the checkpoint's image processor makes them.

        Raises:
          DataError: the image cannot be read.
        """
        key = image.data if image.data is not None else str(image.path)
        with self._lock:
            if key in self._pixels:
                return self._pixels[key]
        processed = self.image_processor(images=open_image(image), return_tensors="np")
        pixels = np.asarray(processed["pixel_values"][0], np.float32)
        with self._lock:
            self._pixels[key] = pixels
            while len(self._pixels) * pixels.nbytes > PIXEL_CACHE_BYTES:
                self._pixels.popitem(last=False)
        return pixels

    def fingerprints(self) -> dict[str, str]:
        """What cached results depend on: tokenizer, chat template and image preprocessing."""
        image = {k: v for k, v in self.image_processor.to_dict().items() if _is_setting(k)}
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        vocabulary = backend.to_str() if backend else json.dumps(self.tokenizer.get_vocab())
        return {
            "tokenizer": fingerprint_json([vocabulary, self.eos_id, self.image_token_id]),
            "template": fingerprint_json(self.tokenizer.chat_template),
            "image_processor": fingerprint_json([image, self.num_image_tokens]),
        }

    def _check(self, config: LlavaConfig) -> None:
        size = len(self.tokenizer)
        if size > config.decoder.vocab_size:
            raise ProcessorError(
                f"{self.folder}: the tokenizer has {size} ids, the model's vocabulary only "
                f"{config.decoder.vocab_size}; they do not belong together"
            )
        if self.tokenizer.eos_token_id is None:
            raise ProcessorError(f"{self.folder}: the tokenizer has no EOS token")
        if not self.tokenizer.chat_template:
            raise ProcessorError(f"{self.folder}: no chat template (chat_template.jinja)")
        rendered = self.encode(self.render([Turn("user", "?")], 1, True))
        if rendered.count(self.image_token_id) != 1:
            raise ProcessorError(
                f"{self.folder}: the chat template writes {rendered.count(self.image_token_id)} "
                f"image tokens (id {self.image_token_id}, from config.json) for one image"
            )
        blank = np.zeros((7, 5, 3), np.uint8)
        made = self.image_processor(images=blank, return_tensors="np")["pixel_values"][0].shape
        if tuple(made) != self.pixel_shape:
            raise ProcessorError(
                f"{self.folder}: the image processor makes images of shape {tuple(made)}, "
                f"config.json says {self.pixel_shape}"
            )


def _load_tokenizer(folder: str) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and its Rust tokenizers raise many types
        raise ProcessorError(f"{folder}: cannot load the tokenizer: {error}") from error


def _load_image_processor(folder: str) -> Any:
    """The CLIP image processor in its PIL form, which needs neither torch nor torchvision."""
    for name, key in (
        ("preprocessor_config.json", None),
        ("processor_config.json", "image_processor"),
    ):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path) as file:
                settings = json.load(file)
            settings = settings if key is None else settings.get(key)
        except (OSError, ValueError) as error:
            raise ProcessorError(f"{path}: {error}") from error
        if settings is None:
            continue
        kind = settings.get("image_processor_type", "CLIPImageProcessor")
        if not kind.startswith("CLIPImageProcessor"):
            raise ProcessorError(f"{path}: image_processor_type {kind!r} is not supported")
        return transformers.CLIPImageProcessorPil(**settings)
    raise ProcessorError(f"{folder}: no preprocessor_config.json or processor_config.json")


def _is_setting(key: str) -> bool:
    return key not in ("image_processor_type", "processor_class", "transformers_version")
