"""A checkpoint's architecture, apart from its parameters."""

from __future__ import annotations

import dataclasses
import functools
import logging
from typing import Any

import jax
from flax import nnx
from jax.sharding import PartitionSpec

from mmpo_jax.models import reward_head
from mmpo_jax.models.config import ModelConfig, ModelError
from mmpo_jax.models.experts import ExpertLinear
from mmpo_jax.models.families import FAMILIES
from mmpo_jax.models.family import Family
from mmpo_jax.models.linear import Linear
from mmpo_jax.models.quantized import SCALES
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
        head = () if self.config.reward_head is None else reward_head.SHARDING_RULES
        return (*head, *self.family.rules)

    def bind(self, params: Params) -> VisionLanguageModel:
        """The module with these parameters in it, for use inside a pure function.

        The tree says what is computed: where the leaves of an adapter lie beside a kernel (see
        `lora`), or the scales of a quantised one, the layer has them.
        """
        flat = nnx.traversals.flatten_mapping(params)
        beside = (path for path in list(flat) if path[-1].startswith("lora_") or path[-1] == SCALES)
        adapters = {path: flat.pop(path) for path in beside}
        module = nnx.merge(self.graphdef, nnx.traversals.unflatten_mapping(flat))
        for (*parents, name), leaf in adapters.items():
            layer = functools.reduce(getattr, parents, module)
            assert isinstance(layer, Linear | ExpertLinear), (
                f"{'/'.join(parents)} cannot have an adapter"
            )
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


def read_config(config: Any) -> ModelConfig:
    """The configuration of a `transformers` config.

    Raises:
      ModelError: an architecture or a switch that is not implemented.
    """
    check_kind(config.model_type)
    made = FAMILIES[config.model_type].read_config(config)
    return dataclasses.replace(made, reward_head=reward_head.read_reward_head(config))


def check_kind(kind: object, where: str = "") -> None:
    """
    Raises:
      ModelError: it is no `model_type` that is implemented.
    """
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise ModelError(f"{where}model_type is {kind!r}; this version implements {known}")
