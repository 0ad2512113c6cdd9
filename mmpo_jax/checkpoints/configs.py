"""The config of a checkpoint folder."""

from __future__ import annotations

import dataclasses
import json
import logging
import os

import transformers

from mmpo_jax.checkpoints.safetensors_files import (
    StoredTensor,
    equal_tensors,
    read_header,
    weight_files,
)
from mmpo_jax.models.config import ModelConfig, ModelError
from mmpo_jax.models.model import check_kind, read_config

log = logging.getLogger(__name__)


def load_config(
    folder: str | os.PathLike[str], weights: str | os.PathLike[str] | None = None
) -> ModelConfig:
    """Reads `config.json` of a checkpoint folder.

    As in transformers the config's own `tie_word_embeddings` counts and not that of `text_config`,
    and a head that is stored beside an embedding with other values is not tied whatever it says.

    Args:
      folder: with the config.
      weights: where the safetensors files lie, if elsewhere.

    Raises:
      ModelError: the folder has no readable config, or one of an architecture or with a switch
        that is not implemented.
    """
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ModelError(f"{path}: not found; a checkpoint folder has a config.json")
    try:
        with open(path, encoding="utf-8") as file:
            kind = json.load(file).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: cannot be read as a model config: {error}") from error
    check_kind(kind, f"{path}: ")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types, its own validators bare ones
        told = f"{type(error).__name__}: {error}"
        raise ModelError(f"{path}: transformers cannot read it as a {kind}: {told}") from error
    if config.tie_word_embeddings and has_own_head(folder if weights is None else weights):
        log.warning(
            "%s: tie_word_embeddings is true, but a head with other values than the embedding is "
            "stored: it is used, and not tied, as transformers has it",
            path,
        )
        config.tie_word_embeddings = False
    try:
        made = read_config(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error
    tied = made.decoder.tie_word_embeddings
    if made.reward_head is None or tied or has_language_head(weights or folder):
        return made
    return without_language_head(made)


def without_language_head(config: ModelConfig) -> ModelConfig:
    """The config of a reward model that says nothing, as transformers' classes have it."""
    decoder = dataclasses.replace(config.decoder, language_head=False)
    return dataclasses.replace(config, decoder=decoder)


def has_language_head(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder's weights have a language-model head; also where there are no weights."""
    names = [tensor.name for tensor in _tensors(folder)]
    return not names or any(name.endswith("lm_head.weight") for name in names)


def has_own_head(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder's weights have a head and an embedding of other values.

    Both are read for that if there are both; else only headers are.

    Raises:
      ModelError: one of the two cannot be read.
    """
    tensors = _tensors(folder)
    heads, embeddings = (
        [tensor for tensor in tensors if tensor.name.endswith(f"{name}.weight")]
        for name in ("lm_head", "embed_tokens")
    )
    return bool(heads and embeddings) and not equal_tensors(heads[0], embeddings[0])


def _tensors(folder: str | os.PathLike[str]) -> list[StoredTensor]:
    """What a folder's files hold; nothing where they cannot be read, which is told later."""
    try:
        return [tensor for file in weight_files(folder) for tensor in read_header(file)]
    except ModelError:
        return []
