"""Where a recipe's `model` points, and what a checkpoint folder has beside its weights."""

from __future__ import annotations

import functools
import glob
import json
import os
import re
from pathlib import Path
from typing import Any

import huggingface_hub
from etils import epath

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import (
    cache_folder,
    check_reachable,
    fingerprint_bytes,
    is_local,
    read_json,
    write_atomic,
)
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.model import Model
from mmpo_jax.models.reward_head import reward_head_entries

BUILTIN = {"builtin:picture_world": Path(__file__).parent.parent / "picture_world" / "checkpoint"}
"""Checkpoints that ship with the package."""

OLD_NAMES = {"builtin:shapes": "builtin:picture_world"}
"""Names that checkpoints of the package had before; recipes and model cards may hold them."""

PROCESSOR_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
)
"""What is copied beside the weights, so that the folder is a whole checkpoint."""

PARTS_OF_PROCESSORS = {
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}
"""Sections of `processor_config.json` -> the files that hold the same."""

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""What a folder holds instead, if it is an adapter's in PEFT's format."""

BASE = "base"
"""Folder in a run's, beside its checkpoints: config, tokenizer and processor of their model."""

QUANTIZED_BASE = "quantized_base"
"""Key of a `config.json` whose model was trained above a quantised base: its integers."""

HUB_ID = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w./-]+))?")
"""organisation/name, or organisation/name@revision."""


def resolve_folder(name: str, weights: bool = True) -> str:
    """The folder a recipe's `model` names, on this machine or in a bucket.

    A folder that is there comes before a hub id of the same spelling. What a hub id names is
    downloaded once and kept in Hugging Face's cache, with its weights or without.

    Raises:
      ModelError: there is no such folder, built-in checkpoint or repository, or it cannot be
        reached.
    """
    name = OLD_NAMES.get(name, name)
    if name in BUILTIN:
        return str(BUILTIN[name])
    if name.startswith("builtin:"):
        raise ModelError(f"{name}: unknown; built in are {', '.join(BUILTIN)}")
    if not is_local(name):
        return _bucket_folder(name.rstrip("/"))
    if os.path.isdir(name):
        return os.path.abspath(name)
    if not is_on_hub(name):
        raise ModelError(f"{name}: there is no such checkpoint folder")
    return _download(name, *split_hub_id(name), weights)


def is_on_hub(name: str) -> bool:
    """Whether `resolve_folder` looks for a recipe's `model` on the hub."""
    return is_local(name) and HUB_ID.fullmatch(name) is not None and not os.path.isdir(name)


def split_hub_id(name: str) -> tuple[str, str | None]:
    """(organisation/name, revision) of a hub id."""
    repository, _, revision = name.partition("@")
    return repository, revision or None


def _bucket_folder(name: str) -> str:
    try:
        check_reachable(name)
    except MmpoError as error:
        raise ModelError(str(error)) from error
    folder = epath.Path(name)
    above = (folder, folder.parent, folder.parent.parent)  # of a run, its checkpoints, or a step
    known = [folder / "config.json", folder / ADAPTER_CONFIG]
    known += [each / BASE / "config.json" for each in above]
    if not any(file.exists() for file in known):
        raise ModelError(f"{name}/config.json: not found, and it is no training run")
    return name


def _download(name: str, repository: str, revision: str | None, weights: bool) -> str:
    """Config, processor and, if they are wanted, safetensors files of a repository, also those that
    its config names; never pickles or code."""
    tensors = "model*.safetensors*", ADAPTER_WEIGHTS
    fetch = functools.partial(
        huggingface_hub.snapshot_download,
        repository,
        revision=revision,
        ignore_patterns=["*/*"],
    )
    try:
        config = read_json(os.path.join(fetch(allow_patterns=["config.json"]), "config.json"))
        named = [*tensors, *_named_weights(config.get("transformers_weights"))]
        files = ["config.json", ADAPTER_CONFIG, *PROCESSOR_FILES]
        return fetch(allow_patterns=[*files, *(named if weights else [])])
    except (
        huggingface_hub.errors.RepositoryNotFoundError,
        huggingface_hub.errors.RevisionNotFoundError,
    ) as error:
        raise ModelError(
            f"{name}: no such folder here, and the hub has no such repository or revision, or not "
            "for you (`hf auth login`)"
        ) from error
    except (
        huggingface_hub.errors.HfHubHTTPError,
        huggingface_hub.errors.LocalEntryNotFoundError,
        huggingface_hub.errors.OfflineModeIsEnabled,
        huggingface_hub.errors.HFValidationError,
        ConnectionError,
    ) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ModelError(
            f"{name}: no such folder here, nothing of that name in the hub's cache, and the hub "
            f"cannot be reached: {first_line}"
        ) from error


def _named_weights(named: Any) -> list[str]:
    """Patterns of the safetensors files that a config names as `transformers_weights`: the file,
    or an index and what it may name."""
    if not isinstance(named, str):
        return []
    stem, ending, _ = named.partition(".safetensors")
    if named == stem + ".safetensors.index.json":
        ending = "*.safetensors*"
    elif named != stem + ".safetensors":
        return []  # a pickle for instance, which is never loaded
    return [glob.escape(stem) + ending]


def side_files(folder: str) -> str:
    """A local folder with config, tokenizer and processor: `folder`, or a copy out of a bucket."""
    if is_local(folder):
        return folder
    copy = os.path.join(cache_folder(), "buckets", fingerprint_bytes(folder.encode())[:16])
    copy_base(folder, copy)
    return copy


def copy_base(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    chat_template: str | None = None,
) -> None:
    """Copies what lies beside the weights: config, tokenizer, processor, templates.

    Settings of images and videos that are in `processor_config.json` only, as transformers 5
    writes them, are also written to the files where older readers look for them.

    Args:
      source: a checkpoint folder.
      target: made if missing.
      chat_template: written in place of the source's; None copies that.
    """
    epath.Path(target).mkdir(parents=True, exist_ok=True)
    for name in ("config.json", *PROCESSOR_FILES):
        origin, copy = epath.Path(source) / name, epath.Path(target) / name
        if origin.exists():
            write_atomic(copy, origin.read_bytes())
        else:
            copy.unlink(missing_ok=True)
    processor = read_json(epath.Path(target) / "processor_config.json")
    for key, name in PARTS_OF_PROCESSORS.items():
        copy = epath.Path(target) / name
        if processor.get(key) and not copy.exists():
            _write_settings(copy, processor[key])
    if chat_template is not None:
        _replace_template(epath.Path(target), chat_template)


def _replace_template(folder: epath.Path, chat_template: str) -> None:
    """Leaves one chat template in a folder, wherever older writers put theirs."""
    write_atomic(folder / "chat_template.jinja", chat_template.encode())
    (folder / "chat_template.json").unlink(missing_ok=True)
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    if settings.pop("chat_template", None) is not None:
        _write_settings(path, settings)


def _write_settings(path: epath.Path, settings: dict[str, Any]) -> None:
    """Writes a JSON file as transformers does."""
    write_atomic(path, (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode())


def write_untied(folder: str | os.PathLike[str]) -> None:
    """Makes `config.json` not call a head tied that has weights of its own."""
    path = epath.Path(folder) / "config.json"
    config = read_json(path)
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    if not any(part.get("tie_word_embeddings") for part in parts):
        return
    for part in parts:
        part["tie_word_embeddings"] = False
    _write_settings(path, config)


def write_quantized_base(folder: str | os.PathLike[str], kind: str | None) -> None:
    """Makes `config.json` say above a base of which integers the weights were trained, if they
    were: merged they look like any others, and lie near to the steps of these."""
    if kind is None:
        return
    path = epath.Path(folder) / "config.json"
    _write_settings(path, read_json(path) | {QUANTIZED_BASE: kind})


def write_left_out(folder: str | os.PathLike[str], model: Model) -> None:
    """Makes `config.json` name no part of the model that has no weights here."""
    path = epath.Path(folder) / "config.json"
    config = read_json(path)
    parts = [name for name in model.family.left_out if config.get(name) is not None]
    if parts:
        config |= dict.fromkeys(parts)
        _write_settings(path, config)


def write_dtype(folder: str | os.PathLike[str], name: str) -> None:
    """Makes `config.json` say what dtype the weights have, under the key it has for that."""
    path = epath.Path(folder) / "config.json"
    config = read_json(path)
    parts = [config, *(value for value in config.values() if isinstance(value, dict))]
    stated = [(part, key) for part in parts for key in ("dtype", "torch_dtype") if part.get(key)]
    if not any(part is config for part, _ in stated):
        stated.append((config, "torch_dtype"))  # which all versions of transformers read
    if all(part.get(key) == name for part, key in stated):
        return
    for part, key in stated:
        part[key] = name
    _write_settings(path, config)


def write_reward_head(folder: str | os.PathLike[str], model: Model) -> None:
    """Makes `config.json` say what reward head the weights have, if they have one."""
    head = model.config.reward_head
    if head is None:
        return
    path = epath.Path(folder) / "config.json"
    reward_class = model.family.reward_classes.get(model.config.family)
    config = read_json(path) | reward_head_entries(head, reward_class)
    _write_settings(path, config)
