"""Checkpoints by their configs: no weight is read."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from typing import Any

import jax.numpy as jnp
import numpy as np

from mmpo_jax.checkpoints.folders import is_on_hub, resolve_folder
from mmpo_jax.checkpoints.locations import Location, locate
from mmpo_jax.checkpoints.weights import load_model_config
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.processor import Processor
from mmpo_jax.models.config import ModelConfig
from mmpo_jax.models.family import Size
from mmpo_jax.models.model import Model
from mmpo_jax.models.precision import inference_dtype
from mmpo_jax.models.quantized import Quantization
from mmpo_jax.planning.abstract import shapes_of

USUAL_IMAGE: Size = (896, 896)
"""Height and width of the largest usual picture: 4 or 9 tiles and the whole in families that cut,
1,024 tokens in Qwen2.5-VL."""


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint before its weights are read."""

    name: str
    """As the recipe has it."""
    model: Model
    processor: Processor
    dtype: np.dtype
    """Of its weights."""
    picture_tokens: int
    """Tokens of a prompt's picture; 0 without pictures."""
    slots: int
    """Rows of `pixel_values` that the picture takes."""
    quantization: Quantization | None = None
    """What its decoder's kernels are quantised to, if they are."""

    @property
    def inference_dtype(self) -> np.dtype:
        """What generation, labelling and scoring by `auto` compute in."""
        shapes = {p: np.empty(0, self.dtype) for p in flatten(shapes_of(self.model))}
        return inference_dtype(unflatten(shapes))

    def with_config(self, config: ModelConfig) -> Opened:
        """The checkpoint under a reward head, say."""
        model = self.model
        if config != model.config:
            model = Model.create(config, model.attention)
        return dataclasses.replace(self, model=model)

    def with_dtype(self, dtype: Any) -> Opened:
        """The checkpoint with weights of another dtype, as a training saves them."""
        return dataclasses.replace(self, dtype=np.dtype(dtype))

    def quantized(self, quantization: Quantization | None) -> Opened:
        """The checkpoint as it is below adapters."""
        return dataclasses.replace(self, quantization=quantization)


@functools.cache
def open_config(
    name: str, attention: str, template: str = "auto", image: Size | None = None
) -> Opened:
    """A checkpoint by its config, tokenizer and processor; weights may be missing.

    Args:
      name: as a recipe has it.
      attention: see `attention.BACKENDS`.
      template: of the dialogues.
      image: height and width of a prompt's picture; None for `USUAL_IMAGE`.

    Raises:
      MmpoError: a file is missing or cannot be read.
    """
    location = locate(resolve_folder(name, weights=False) if is_on_hub(name) else name)
    model = Model.create(load_model_config(location), attention)
    processor = Processor(location.base, model.config, template)
    tokens, slots = 0, 0
    if processor.images is not None:
        sizes = [image or USUAL_IMAGE]
        (layout,) = processor.images.layouts(model.config, processor.image_processor, sizes)
        tokens = len(processor.images.frame(processor.tokenizer, layout).ids)
        slots = layout.slots
    return Opened(name, model, processor, stored_dtype(location), tokens, slots)


def stored_dtype(location: Location) -> np.dtype:
    """Dtype of a checkpoint's weights, as its config says: float32 of a run, and where adapters are
    merged.

    Raises:
      MmpoError: the config names none that is known.
    """
    if location.is_orbax or location.adapters:
        return np.dtype(np.float32)
    path = os.path.join(location.base, "config.json")
    with open(path, encoding="utf-8") as file:
        config = json.load(file)
    text = config.get("text_config") or {}
    said = (part.get(key) for part in (config, text) for key in ("dtype", "torch_dtype"))
    name = next((one for one in said if one), "float32")
    try:
        return np.dtype(getattr(jnp, str(name).removeprefix("torch.")))
    except (AttributeError, TypeError) as error:
        raise MmpoError(f"{path}: no dtype of weights is called {name!r}") from error
