"""A checkpoint's architecture, apart from its parameters."""

from __future__ import annotations

import dataclasses
import functools
import json
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
from mmpo_jax.models.safetensors_files import read_header, weight_files
from mmpo_jax.models.vlm import VisionLanguageModel

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


def load_config(folder: str | os.PathLike[str]) -> ModelConfig:
    """Reads `config.json` of a checkpoint folder.

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
    text = getattr(config, "text_config", None)
    # Where the two switches differ transformers ties a head that is not stored.
    if text and config.tie_word_embeddings and getattr(text, "tie_word_embeddings", None) is False:
        text.tie_word_embeddings = not _stores_head(folder)
    try:
        return read_config(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _stores_head(folder: str | os.PathLike[str]) -> bool:
    """False only where all weights lie in the folder, without a head."""
    try:
        tensors = [tensor for file in weight_files(folder) for tensor in read_header(file)]
    except ModelError:  # told where the weights are read
        return True
    return any(tensor.name.endswith("lm_head.weight") for tensor in tensors)


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
