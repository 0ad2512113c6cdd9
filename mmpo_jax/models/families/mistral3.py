"""Mistral Small 3.x and Ministral 3: Pixtral's tower over images of any size, squares of patches
merged to one feature, Mistral's decoder.

A token ends every line of an image, another one its last.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.models import decoder, projector, qwen_media, vision_pixtral
from mmpo_jax.models.config import ModelError, expect, read_decoder
from mmpo_jax.models.families import llava
from mmpo_jax.models.family import Family, Size
from mmpo_jax.models.layers import ACTIVATIONS, rms_norm
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.linear import linear
from mmpo_jax.models.media_limits import PictureSizeError, size_text
from mmpo_jax.models.vision_pixtral import PixtralTower, read_vision
from mmpo_jax.models.vlm import VisionLanguageModel

BREAK, END = "[IMG_BREAK]", "[IMG_END]"
"""Tokens behind a line of an image, and behind its last."""


@dataclasses.dataclass(frozen=True)
class Mistral3Config(qwen_media.PatchesConfig):
    """Mistral 3's own switches."""

    projector_act: str
    projector_bias: bool


def read_config(config: Any) -> Mistral3Config:
    """
    Raises:
      ModelError: an architecture or a switch that is not implemented.
    """
    tower = read_vision(config.vision_config, config.spatial_merge_size)
    expect(config.projector_hidden_act, tuple(ACTIVATIONS), "projector_hidden_act")
    # The projector's norm takes one layer's width, so of several there is no feature.
    last = -1, tower.num_layers, [-1], [tower.num_layers]
    expect(config.vision_feature_layer, last, "vision_feature_layer")
    return Mistral3Config(
        family=config.model_type,
        decoder=read_decoder(config.text_config, config.tie_word_embeddings),
        vision=tower,
        image_token_id=config.image_token_id,
        projector_act=config.projector_hidden_act,
        projector_bias=config.multimodal_projector_bias,
    )


class PatchMerger(projector.Projector):
    """Squares of normalised patches to one feature each, then two dense layers."""

    def __init__(self, config: Mistral3Config, rngs: nnx.Rngs):
        size, text = config.vision.hidden_size, config.decoder
        bias = config.projector_bias
        super().__init__(size, text.hidden_size, config.projector_act, bias, rngs)
        self.square = config.vision.merge_size**2
        self.norm = rms_norm(size, text.rms_norm_eps, False, rngs)
        self.merging_layer = linear(size * self.square, size, False, rngs)

    def __call__(self, x: Float[Array, "B *s D"]) -> Float[Array, "B M F"]:
        """[B, ..., D], the patches of a square one after another -> [B, squares, outputs]."""
        squares = self.norm(x).reshape(len(x), -1, self.square, x.shape[-1])
        # A channel of all patches, then the next one.
        joined = squares.swapaxes(2, 3).reshape(*squares.shape[:2], -1)
        return super().__call__(self.merging_layer(joined))


class Mistral3(VisionLanguageModel):
    """Every slot is a group of patches; squares of them become a feature."""

    def __init__(self, config: Mistral3Config, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.vision_tower = PixtralTower(config.vision, rngs)
        self.multi_modal_projector = PatchMerger(config, rngs)

    def image_features(self, batch, remat):
        return self.multi_modal_projector(
            self.vision_tower(batch.pixel_values, batch.patches, remat)
        )


def image_grid(config: Mistral3Config, processor: Any, size: Size) -> qwen_media.Grid:
    """The tokens of an image that is shrunk to the processor's limits and stretched to whole ones.

    Raises:
      DataError: it is too long and narrow.
    """
    limits = _limits(processor)
    ratio = max(edge / limit for edge, limit in zip(size, limits, strict=True))
    height, width = (math.floor(edge / ratio) if ratio > 1 else edge for edge in size)
    if not height or not width:
        raise PictureSizeError(f"{size_text(size)} are too narrow for {limits[0]}")
    return 1, -(-height // config.edge), -(-width // config.edge)


def _limits(processor: Any) -> Size:
    """Height and width of an image at most."""
    size = processor.size
    if size.longest_edge:
        return size.longest_edge, size.longest_edge
    return size.height, size.width


def layouts(config: Mistral3Config, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    grids = [image_grid(config, processor, size) for size in sizes]
    return [qwen_media.layout(config, config.image_token_id, grid) for grid in grids]


def pixels(config: Mistral3Config, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    tower, made = config.vision, []
    for image in images:
        grid = image_grid(config, processor, (image.height, image.width))
        # transformers' processor of the whole model asks for whole tokens in the place of patches.
        values = processor(images=image, patch_size=config.edge, return_tensors="np")
        cut = np.asarray(values["pixel_values"][0]).reshape(
            tower.num_channels,
            *(grid[1], tower.merge_size, tower.patch_size),
            *(grid[2], tower.merge_size, tower.patch_size),
        )
        # Row and column of the token, of the patch within it, and the patch.
        patches = cut.transpose(1, 4, 2, 5, 0, 3, 6)
        made.append(qwen_media.in_slots(config, patches, grid))
    return made


def check_processor(config: Mistral3Config, processor: Any) -> None:
    """
    Raises:
      ModelError: it does not resize, or cuts the middle out.
    """
    del config
    expect(processor.do_resize, (True,), "preprocessor_config.json: do_resize")
    expect(bool(processor.do_center_crop), (False,), "preprocessor_config.json: do_center_crop")


def frame_image(tokenizer: Any, layout: Layout) -> Layout:
    """With a token at the end of each line.

    Raises:
      ModelError: the tokenizer has no such tokens.
    """
    known = tokenizer.get_added_vocab()
    for token in (BREAK, END):
        if token not in known:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no token {token}")
    assert layout.steps is not None
    rows = int(layout.steps[1].max()) + 1
    lines = layout.ids.reshape(rows, -1)
    ends = np.full((rows, 1), known[BREAK], np.int32)
    ends[-1] = known[END]
    return dataclasses.replace(layout, ids=np.concatenate([lines, ends], axis=1).ravel())


READ_KEYS = (
    *llava.READ_KEYS,
    (r"^vision_tower\.transformer\.", "vision_tower."),
    (r"^vision_tower\.ln_pre\.", "vision_tower.pre_norm."),
    (r"^vision_tower\.patch_conv\.", "vision_tower.patch_embedding."),
    (r"^multi_modal_projector\.patch_merger\.", "multi_modal_projector."),
)
WRITE_KEYS = (
    (r"^vision_tower\.layers\.", "vision_tower.transformer.layers."),
    (r"^vision_tower\.pre_norm\.", "vision_tower.ln_pre."),
    (r"^vision_tower\.patch_embedding\.", "vision_tower.patch_conv."),
    (
        r"^multi_modal_projector\.merging_layer\.",
        "multi_modal_projector.patch_merger.merging_layer.",
    ),
    (r"^language_model\.(?!lm_head)", "language_model.model."),
)


def tensor_shapes(config: Mistral3Config) -> dict[str, tuple[int, ...]]:
    tower = config.vision
    patch = tower.hidden_size, tower.num_channels, tower.patch_size, tower.patch_size
    return {"vision_tower.patch_conv.weight": patch}


FAMILY = Family(
    model_types=("mistral3",),
    read_config=read_config,
    module=Mistral3,
    rules=(
        *vision_pixtral.SHARDING_RULES,
        *projector.SHARDING_RULES,
        (r"multi_modal_projector/merging_layer/kernel", PartitionSpec("fsdp", "tensor")),
        (r"multi_modal_projector/norm/scale", PartitionSpec()),
        *decoder.SHARDING_RULES,
    ),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    images=dataclasses.replace(
        qwen_media.IMAGES,
        processors=("PixtralImageProcessor",),
        layouts=layouts,
        pixels=pixels,
        frame=frame_image,
        check=check_processor,
    ),
    tensor_shapes=tensor_shapes,
)
