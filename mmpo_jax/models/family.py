"""What one architecture adds to the shared building blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from jax.sharding import PartitionSpec

from mmpo_jax.models.config import ModelConfig
from mmpo_jax.models.frame_sampling import evenly
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.vlm import VisionLanguageModel

Size = tuple[int, int]
"""(height, width) of an upright image in pixels."""


@dataclasses.dataclass(frozen=True)
class Clip:
    """What layouts depend on of a video."""

    frames: int
    size: Size
    rate: float | None = None
    """Frames per second of these frames, where known."""
    times: tuple[float, ...] = ()
    """Seconds at which the frames are, where they are chosen from a file; else they are at even
    distances from 0 on."""


Renaming = tuple[tuple[str, str], ...]
"""(regular expression, replacement), applied in order."""


@dataclasses.dataclass(frozen=True)
class Videos:
    """What a family does to videos, which are lists of upright frames."""

    placeholder: Callable[[Any, Any], int]
    """(config, tokenizer) -> id of the token that the chat template writes for a video."""
    settings: str
    """Name of the settings file of the video processor; transformers' own needs torchvision."""
    layouts: Callable[[Any, dict[str, Any], Sequence[Clip]], list[Layout]]
    """(config, settings, a prompt's videos) -> how each becomes tokens."""
    pixels: Callable[[Any, dict[str, Any], Sequence[Sequence[Any]]], list[np.ndarray]]
    """(config, settings, RGB frames of a prompt's videos) -> float32[slots, *slot_shape] each."""
    frame: Callable[[Any, Layout], Layout] = lambda tokenizer, layout: layout
    """(tokenizer, a video's layout) -> the layout with the tokens that stand around its frames."""
    read_settings: Callable[[Any, dict[str, Any], Any], dict[str, Any]] = (
        lambda config, settings, processor: settings
    )
    """(config, settings as the file has them, image processor) -> `settings` of these functions;
    raises `ModelError` for what is not implemented, or does not fit the config."""
    sample: Callable[[Mapping[str, Any], int, float | None], np.ndarray] = evenly
    """Which frames of a file are shown, see `frame_sampling.evenly`."""


@dataclasses.dataclass(frozen=True)
class Images:
    """The image half of a family: from pictures to the rows of `Batch.pixel_values`."""

    processors: tuple[str, ...]
    """Image processor classes of transformers that its checkpoints name, without `Pil`."""
    placeholders: Callable[[Any], tuple[int, ...]]
    """config -> ids of the tokens that image features replace."""
    slot_shape: Callable[[Any], tuple[int, ...]]
    """config -> shape of one row of `pixel_values`, without B and I."""
    layouts: Callable[[Any, Any, Sequence[Size]], list[Layout]]
    """(config, image processor, sizes of a prompt's images) -> how each becomes tokens."""
    pixels: Callable[[Any, Any, Sequence[Any]], list[np.ndarray]]
    """(config, image processor, a prompt's RGB images) -> float32[slots, *slot_shape] each."""
    sized: bool
    """Whether layouts depend on the sizes; where not, files need not be opened for them."""
    frame: Callable[[Any, Layout], Layout] = lambda tokenizer, layout: layout
    """(tokenizer, an image's layout) -> the layout with the tokens that stand around it."""
    spelled: Callable[[Any], tuple[str, str]] | None = None
    """tokenizer -> (what chat templates write for an image, or for a video, what stands there for
    the tokenizer: text, and in it the placeholder), where these differ."""
    check: Callable[[Any, Any], None] = lambda config, processor: None
    """(config, image processor); raises `ModelError` for settings that are not implemented, or do
    not fit the config."""
    slot_shape_of: Callable[[Any, Any], tuple[int, ...]] | None = None
    """(config, image processor) -> `slot_shape`, where the processor's settings decide about it;
    plans, which read none, take the usual one."""
    describe: Callable[[Any, Sequence[Layout], int], dict[str, np.ndarray]] = (
        lambda config, layouts, slots: {}
    )
    """(config, a prompt's layouts, I) -> one row of `Batch.patches`, arrays [I, ...]."""
    load: Callable[..., Any] | None = None
    """Settings as keyword arguments -> the image processor, where transformers has none that needs
    no torchvision."""
    extras: int = 0
    """Learned vectors in front of the pool of image features."""
    vectors: int = 1
    """K: how many vectors of the pool a token is mixed from."""


def pixels_of_each(processor: Any, images: Sequence[Any], **options: Any) -> list[np.ndarray]:
    """float32 `pixel_values` of every image by itself, with an axis in front: of one, or of what
    the image is cut into.

    Args:
      processor: an image processor of transformers.
      images: in RGB.
      options: of the processor.
    """
    made = [processor(images=x, return_tensors="np", **options)["pixel_values"] for x in images]
    return [np.asarray(values, np.float32) for values in made]


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture; `families/` has a file for each."""

    model_types: tuple[str, ...]
    """config.json's `model_type`s."""
    read_config: Callable[[Any], ModelConfig]
    """`transformers` config -> ours; raises `ModelError` for what is not implemented."""
    module: type[VisionLanguageModel]
    rules: tuple[tuple[str, PartitionSpec], ...]
    """Rules of sharding, see `Model.rules`."""
    read_keys: Renaming
    """Turns a tensor's name in any layout that transformers has written into the parameter's own
    path, with dots for slashes."""
    write_keys: Renaming
    """The way back, into the oldest layout, which all versions of transformers read."""
    module_keys: Renaming = (
        (r"^language_model\.model\.", "model.language_model."),
        (r"^vision_tower\.vision_model\.", "model.vision_tower."),
        (r"^(vision_tower|multi_modal_projector)\.", r"model.\1."),
    )
    """The way from written names to those of the modules in transformers 5, under which PEFT keeps
    adapters; by default LLaVA's and its successors'."""
    unread: tuple[str, ...] = ()
    """Regular expressions: names of tensors that files may have and transformers does not read, or
    reads for what is `left_out`."""
    left_out: tuple[str, ...] = ()
    """Sections of config.json for parts that are not implemented and without which a model runs;
    null in folders that are saved."""
    reward_classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """`model_type` -> transformers' class of a decoder under a linear head with one output, where
    there is one."""
    images: Images | None = None
    videos: Videos | None = None
    joined_experts: Literal["inputs_first", "outputs_first"] | None = None
    """How the oldest layout has all experts of a layer in one tensor, if it has, see
    `checkpoints.expert_tensors`."""
    tensor_shapes: Callable[[Any], dict[str, tuple[int, ...]]] = lambda config: {}
    """config -> shapes of the tensors that are written with other axes than ours: patch
    convolutions, vectors with axes of one in front."""
