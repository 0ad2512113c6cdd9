"""What a checkpoint's folder says of text and pixels: tokenizer, chat template, image processor.

Broken or missing files are a `ProcessorError` that names them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import transformers

from mmpo_jax.core.errors import MmpoError

TOKENIZERS = ("tokenizer.model", "vocab.json", "merges.txt")
"""Files that tokenizers are made of where there is no tokenizer.json."""


class ProcessorError(MmpoError):
    """A checkpoint folder whose tokenizer, template or image processor cannot be used."""


def load_tokenizer(folder: str) -> Any:
    """The tokenizer, of whatever files it is made.

    Raises:
      ProcessorError: there is none, or it cannot be read.
    """
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers and its Rust tokenizers raise many types
        path = os.path.join(folder, "tokenizer.json")
        if os.path.isfile(path):
            raise ProcessorError(f"{folder}: cannot load the tokenizer: {error}") from error
        others = [name for name in TOKENIZERS if os.path.isfile(os.path.join(folder, name))]
        tried = f", and {' and '.join(others)} cannot be read as one" if others else ""
        raise ProcessorError(
            f"{path}: not found{tried}: cannot load the tokenizer; expected tokenizer.json, or "
            "a SentencePiece model as tokenizer.model, or vocab.json and merges.txt"
        ) from error
    # What is too long is dropped with a reason, or cut and counted.
    tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
    return tokenizer


def processor_template(folder: str) -> str | None:
    """What `chat_template.json` says, where processors of transformers 4.4x put their template.

    It comes before the tokenizer's own, which may be that of the text model.
    """
    path = os.path.join(folder, "chat_template.json")
    if os.path.isfile(os.path.join(folder, "chat_template.jinja")) or not os.path.isfile(path):
        return None
    try:
        with open(path, encoding="utf-8") as file:
            return str(json.load(file)["chat_template"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ProcessorError(f"{path}: not a chat template: {error!r}") from error


def generation_eos_ids(folder: str) -> tuple[int, ...]:
    """The ids that end a response according to `generation_config.json`; none without that file.

    Raises:
      ProcessorError: the file cannot be read.
    """
    path = os.path.join(folder, "generation_config.json")
    if not os.path.isfile(path):
        return ()
    try:
        with open(path, encoding="utf-8") as file:
            ids = json.load(file).get("eos_token_id")
        ids = [] if ids is None else [ids] if isinstance(ids, int) else ids
        return tuple(map(int, ids))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ProcessorError(f"{path}: not a generation config: {error}") from error


def plain_encoder(tokenizer: Any) -> Any:
    """The backend of a tokenizer that gives the ids of texts as they are asked for here; None where
    the tokenizer itself does something before or behind it, or the backend cuts or pads.

    Half of what a call of the tokenizer takes is in the offsets that it computes beside.
    """
    base = transformers.PreTrainedTokenizerFast
    kind = type(tokenizer)
    if not isinstance(tokenizer, base) or any(
        getattr(kind, name) is not getattr(base, name) for name in ("__call__", "_encode_plus")
    ):
        return None
    backend = tokenizer.backend_tokenizer
    state = (backend.truncation, backend.padding, backend.encode_special_tokens or None)
    as_is = state == (None, None, None) and not tokenizer.split_special_tokens
    return backend if as_is else None


def load_video_settings(folder: str, name: str) -> dict[str, Any]:
    """The video processor's settings; those of the image processor where there are none."""
    _, settings = _read_settings(folder, "video_processor", (name, "preprocessor_config.json"))
    return {key: value for key, value in settings.items() if is_setting(key)}


def load_image_processor(
    folder: str, known: Sequence[str], load: Callable[..., Any] | None = None
) -> Any:
    """The image processor in its PIL form, which needs neither torch nor torchvision.

    Args:
      folder: of the checkpoint.
      known: classes that its file may name.
      load: see `Images.load`.
    """
    path, settings = _read_settings(folder, "image_processor", ("preprocessor_config.json",))
    kind = settings.get("image_processor_type", known[0])
    kind = re.sub("(Fast|Pil)$", "", kind)
    if kind not in known:
        raise ProcessorError(
            f"{path}: image_processor_type {kind!r} is not supported; this architecture's "
            f"are {', '.join(known)}"
        )
    return (load or getattr(transformers, f"{kind}Pil"))(**settings)


def _read_settings(folder: str, key: str, names: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """(file, settings) where transformers looks for them: `key` of processor_config.json, which
    is where 5.x writes them, else the first of the files `names`."""
    for name in ("processor_config.json", *names):
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            continue
        try:
            with open(path) as file:
                settings = json.load(file)
            settings = settings if name in names else settings.get(key)
        except (OSError, ValueError, AttributeError) as error:
            raise ProcessorError(f"{path}: {error}") from error
        if settings is not None:
            return path, settings
    raise ProcessorError(
        f"{folder}: no {' or '.join(names)}, and no {key} in processor_config.json"
    )


def is_setting(key: str) -> bool:
    """Whether a key of such a file says how images are processed, and not by what."""
    return key not in (
        "image_processor_type",
        "processor_class",
        "transformers_version",
        "video_processor_type",
    )
