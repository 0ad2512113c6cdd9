"""A checkpoint's architecture, apart from its parameters."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
from typing import Any

import jax
import transformers
from flax import nnx
from jax.sharding import PartitionSpec

from mmpo_jax.models.config import ModelConfig, ModelError
from mmpo_jax.models.families import FAMILIES
from mmpo_jax.models.family import Family
from mmpo_jax.models.layers import Linear
from mmpo_jax.models.safetensors_files import equal_tensors, read_header, weight_files
from mmpo_jax.models.vlm import VisionLanguageModel

log = logging.getLogger(__name__)

Params = Any
"""A nested dict of arrays, as `nnx.to_pure_dict` gives it."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model without its parameters: hashable, so that `jax.jit` can take it as static."""

    config: ModelConfig
    graphdef: Any
    attention: str = "auto"
    """See `VisionLanguageModel.attention`."""

    @classmethod
    def create(cls, config: ModelConfig, attention: str = "auto") -> Model:
        module = FAMILIES[config.family].module
        abstract = nnx.eval_shape(lambda: module(config, nnx.Rngs(0)))
        return cls(config, nnx.split(abstract)[0], attention)

    @property
    def family(self) -> Family:
        return FAMILIES[self.config.family]

    @property
    def rules(self) -> tuple[tuple[str, PartitionSpec], ...]:
        """(regular expression over a parameter's whole path, its PartitionSpec); the first match
        counts."""
        return self.family.rules

    def bind(self, params: Params) -> VisionLanguageModel:
        """The module with these parameters in it, for use inside a pure function.

        The tree says what is computed: where the leaves of an adapter lie beside a kernel (see
        `lora`), the layer has it.
        """
        flat = nnx.traversals.flatten_mapping(params)
        adapters = {path: flat.pop(path) for path in list(flat) if path[-1].startswith("lora_")}
        module = nnx.merge(self.graphdef, nnx.traversals.unflatten_mapping(flat))
        for (*parents, name), leaf in adapters.items():
            layer = functools.reduce(getattr, parents, module)
            assert isinstance(layer, Linear), f"{'/'.join(parents)} cannot have an adapter"
            setattr(layer, name, nnx.Param(leaf))
        module.attention = self.attention
        return module

    def init(self, seed: int) -> Params:
        """Random float32 parameters."""
        module = self.family.module(self.config, nnx.Rngs(seed))
        return nnx.to_pure_dict(nnx.split(module)[1])

    def abstract_params(self) -> Params:
        """The parameters' shapes, as `init` would make them."""
        return jax.eval_shape(lambda: self.init(0))


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
    _check_kind(kind, f"{path}: ")
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
        return read_config(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def has_own_head(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder's weights have a head and an embedding of other values.

    Both are read for that if there are both; else only headers are.

    Raises:
      ModelError: one of the two cannot be read.
    """
    try:
        tensors = [tensor for file in weight_files(folder) for tensor in read_header(file)]
    except ModelError:  # told where the weights are read
        return False
    heads, embeddings = (
        [tensor for tensor in tensors if tensor.name.endswith(f"{name}.weight")]
        for name in ("lm_head", "embed_tokens")
    )
    return bool(heads and embeddings) and not equal_tensors(heads[0], embeddings[0])


def read_config(config: Any) -> ModelConfig:
    """The configuration of a `transformers` config.

    Raises:
      ModelError: an architecture or a switch that is not implemented.
    """
    _check_kind(config.model_type)
    return FAMILIES[config.model_type].read_config(config)


def _check_kind(kind: object, where: str = "") -> None:
    """
    Raises:
      ModelError: it is no `model_type` that is implemented.
    """
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{where}model_type is {kind!r}; this version implements {known}")
