"""InternVL3: InternViT over tiles, pixel shuffle, a projector with a norm, a decoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Shaped

from mmpo_jax.models import decoder, projector, vision
from mmpo_jax.models.config import ModelConfig, ModelError, expect, read_decoder
from mmpo_jax.models.families import llava
from mmpo_jax.models.family import Clip, Family, Images, Size, Videos, pixels_of_each
from mmpo_jax.models.frame_sampling import centred
from mmpo_jax.models.layers import ACTIVATIONS, layer_norm
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.tiles import TileModel
from mmpo_jax.models.torch_resize import frame_pixels
from mmpo_jax.models.vision import VisionConfig, read_vision


@dataclasses.dataclass(frozen=True)
class InternVLConfig(ModelConfig):
    """InternVL's own switches."""

    vision: VisionConfig
    image_token_id: int
    feature_layer: int
    """Index into the tower's hidden states: 0 is the embedding, i the output of layer i."""
    shuffle: int
    """Patches of a square of so many by so many become the channels of one feature."""
    projector_act: str

    @property
    def num_image_tokens(self) -> int:
        """N: features of one tile."""
        return (self.vision.side // self.shuffle) ** 2


def read_config(config: Any) -> InternVLConfig:
    """
    Raises:
      ModelError: an architecture or a switch that is not implemented.
    """
    tower = read_vision(config.vision_config)
    expect(config.projector_hidden_act, tuple(ACTIVATIONS), "projector_hidden_act")
    # With the class token the features would not form a square.
    expect(config.vision_feature_select_strategy, ("default",), "vision_feature_select_strategy")
    shuffle = round(1 / config.downsample_ratio)
    if shuffle * config.downsample_ratio != 1 or tower.side % shuffle:
        raise ModelError(
            f"downsample_ratio is {config.downsample_ratio}; its inverse has to be a whole number "
            f"that divides the tower's {tower.side} patches along an edge"
        )
    layer = config.vision_feature_layer
    if not isinstance(layer, int) or not -tower.num_layers - 1 <= layer <= tower.num_layers:
        raise ModelError(f"vision_feature_layer is {layer!r}, of {tower.num_layers} layers")
    if layer != -1 and tower.post_norm == "applied":  # the norm is not part of the last layer
        tower = dataclasses.replace(tower, post_norm="stored")
    return InternVLConfig(
        family=config.model_type,
        decoder=read_decoder(config.text_config, config.tie_word_embeddings),
        vision=tower,
        image_token_id=config.image_token_id,
        feature_layer=layer % (tower.num_layers + 1),
        shuffle=shuffle,
        projector_act=config.projector_hidden_act,
    )


class InternVLProjector(projector.Projector):
    """A norm in front of the two dense layers."""

    def __init__(self, inputs: int, outputs: int, act: str, rngs: nnx.Rngs):
        super().__init__(inputs, outputs, act, True, rngs)
        self.layer_norm = layer_norm(inputs, 1e-5, rngs)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b F"]:
        return super().__call__(self.layer_norm(x))


class InternVL(TileModel):
    """A tile's features are squares of patches."""

    def __init__(self, config: InternVLConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.feature_layer, self.shuffle = config.feature_layer, config.shuffle
        self.multi_modal_projector = InternVLProjector(
            config.vision.hidden_size * config.shuffle**2,
            config.decoder.hidden_size,
            config.projector_act,
            rngs,
        )

    def tile_features(self, pixels, remat):
        features = self.vision_tower(pixels, (self.feature_layer,), remat)
        return pixel_shuffle(features[:, 1:], self.shuffle)


def pixel_shuffle(x: Shaped[Array, "M S D"], k: int) -> Shaped[Array, "M N F"]:
    """Joins the channels of k x k neighbours, line by line: [M, s*s, D] -> [M, (s/k)^2, k*k*D]."""
    m, count, d = x.shape
    side = round(count**0.5) // k
    x = x.reshape(m, side, k, side, k, d).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(m, side * side, k * k * d)


CROPPED = {"crop_to_patches": True}
"""InternVL's processor asks for tiles whatever the image processor's own settings say."""


def layouts(config: InternVLConfig, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    counts = [processor.get_number_of_image_patches(*size, CROPPED) for size in sizes]
    return [_tiles(config, count) for count in counts]


def pixels(config: InternVLConfig, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    del config
    return pixels_of_each(processor, images, **CROPPED)


def frame_image(tokenizer: Any, layout: Layout) -> Layout:
    start, end = _marks(tokenizer)
    return dataclasses.replace(layout, ids=np.array([start, *layout.ids, end], np.int32))


def video_layouts(
    config: InternVLConfig, settings: Mapping[str, Any], clips: Sequence[Clip]
) -> list[Layout]:
    del settings
    return [_tiles(config, clip.frames) for clip in clips]


def video_pixels(
    config: InternVLConfig, settings: Mapping[str, Any], videos: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    return [frame_pixels(settings, frames, config.vision.pixel_shape) for frames in videos]


def frame_video(tokenizer: Any, layout: Layout) -> Layout:
    """Every frame as an image on a line of its own, under its number from 1 on.

    The chat template writes a video at the beginning of a line. The labels are tokenized as they
    stand in the whole prompt, between two special tokens.
    """
    start, end = _marks(tokenizer)

    def behind_image(text: str) -> list[int]:
        marked = tokenizer.end_image_token + text + tokenizer.start_image_token
        return tokenizer(marked, add_special_tokens=False)["input_ids"][1:-1]

    ids: list[int] = []
    for number, features in enumerate(np.split(layout.ids, layout.slots), 1):
        ids += [*behind_image(f"\nFrame{number}: "), start, *features, end]
    return dataclasses.replace(layout, ids=np.array(ids[len(behind_image("\n")) :], np.int32))


def _tiles(config: InternVLConfig, count: int) -> Layout:
    return Layout.plain(config.image_token_id, config.num_image_tokens * count, count)


def _marks(tokenizer: Any) -> tuple[int, int]:
    """Ids of the tokens in front of and behind an image."""
    return _named(tokenizer, "start_image_token"), _named(tokenizer, "end_image_token")


def _named(tokenizer: Any, name: str) -> int:
    """
    Raises:
      ModelError: the tokenizer's files do not say which token this is.
    """
    token = getattr(tokenizer, f"{name}_id", None)
    if token is None:
        raise ModelError(
            f"{tokenizer.name_or_path}: tokenizer_config.json names no {name}, which InternVL's "
            "checkpoints in the format of transformers do"
        )
    return token


READ_KEYS = (
    *llava.READ_KEYS,
    (r"^vision_tower\.layer\.", "vision_tower.layers."),
    (r"^(vision_tower\.layers\.\d+)\.attention\.projection_layer\.", r"\1.self_attn.out_proj."),
    (r"^(vision_tower\.layers\.\d+)\.attention\.", r"\1.self_attn."),
    (r"^(vision_tower\.layers\.\d+)\.layernorm_before\.", r"\1.layer_norm1."),
    (r"^(vision_tower\.layers\.\d+)\.layernorm_after\.", r"\1.layer_norm2."),
    (r"^(vision_tower\.layers\.\d+)\.lambda_1$", r"\1.attention_factor"),
    (r"^(vision_tower\.layers\.\d+)\.lambda_2$", r"\1.mlp_factor"),
    (r"^vision_tower\.embeddings\.cls_token$", "vision_tower.embeddings.class_embedding"),
    (
        r"^vision_tower\.embeddings\.position_embeddings$",
        "vision_tower.embeddings.position_embedding.weight",
    ),
    (
        r"^vision_tower\.embeddings\.patch_embeddings\.projection\.",
        "vision_tower.embeddings.patch_embedding.",
    ),
    (r"^vision_tower\.layernorm\.", "vision_tower.post_layernorm."),
)
WRITE_KEYS = (
    (r"^vision_tower\.post_layernorm\.", "vision_tower.layernorm."),
    (r"^(vision_tower\.embeddings)\.patch_embedding\.", r"\1.patch_embeddings.projection."),
    (r"^(vision_tower\.embeddings)\.position_embedding\.weight$", r"\1.position_embeddings"),
    (r"^(vision_tower\.embeddings)\.class_embedding$", r"\1.cls_token"),
    (r"^vision_tower\.layers\.", "vision_tower.encoder.layer."),
    (r"^(vision_tower\..*)\.mlp_factor$", r"\1.lambda_2"),
    (r"^(vision_tower\..*)\.attention_factor$", r"\1.lambda_1"),
    (r"^(vision_tower\..*)\.layer_norm2\.", r"\1.layernorm_after."),
    (r"^(vision_tower\..*)\.layer_norm1\.", r"\1.layernorm_before."),
    (r"^(vision_tower\..*)\.self_attn\.out_proj\.", r"\1.attention.projection_layer."),
    (r"^(vision_tower\..*)\.self_attn\.", r"\1.attention."),
    (r"^language_model\.(?!lm_head)", "language_model.model."),
)


def tensor_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    tower, base = config.vision, "vision_tower.embeddings."
    return {
        base + "patch_embeddings.projection.weight": tower.patch_kernel_shape,
        base + "position_embeddings": (1, tower.num_tokens, tower.hidden_size),
        base + "cls_token": (1, 1, tower.hidden_size),
    }


FAMILY = Family(
    model_types=("internvl",),
    read_config=read_config,
    module=InternVL,
    rules=(
        *vision.SHARDING_RULES,
        *projector.SHARDING_RULES,
        (r"multi_modal_projector/layer_norm/(scale|bias)", PartitionSpec()),
        *decoder.SHARDING_RULES,
    ),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    images=Images(
        processors=("GotOcr2ImageProcessor",),
        placeholders=lambda config: (config.image_token_id,),
        slot_shape=lambda config: config.vision.pixel_shape,
        layouts=layouts,
        pixels=pixels,
        sized=True,
        frame=frame_image,
    ),
    videos=Videos(
        placeholder=lambda config, tokenizer: _named(tokenizer, "video_token"),
        settings="video_preprocessor_config.json",
        layouts=video_layouts,
        pixels=video_pixels,
        frame=frame_video,
        sample=centred,
    ),
    tensor_shapes=tensor_shapes,
)
