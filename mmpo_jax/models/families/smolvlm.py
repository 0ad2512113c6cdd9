"""SmolVLM, SmolVLM2 and Idefics3: SigLIP over tiles and a small copy of the whole, pixel shuffle, a
matrix, a Llama decoder.

The tower of transformers takes images that are padded at their edges. Its image processors never
pad one: whatever the size, they make whole tiles, whose patches have the tower's own positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.models import decoder, smolvlm_video, vision
from mmpo_jax.models.config import ModelConfig, ModelError, expect, read_decoder
from mmpo_jax.models.families.internvl import pixel_shuffle
from mmpo_jax.models.family import Clip, Family, Images, Size, Videos, pixels_of_each
from mmpo_jax.models.frame_sampling import FRAME_RATE
from mmpo_jax.models.layers import ACTIVATIONS
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.linear import linear
from mmpo_jax.models.media_limits import VideoLengthError
from mmpo_jax.models.smolvlm_video import LARGEST
from mmpo_jax.models.tiles import TileModel
from mmpo_jax.models.vision import VisionConfig

VIDEO = "<video>"
"""What chat templates write for a video."""


@dataclasses.dataclass(frozen=True)
class SmolVLMConfig(ModelConfig):
    """SmolVLM's own switches."""

    vision: VisionConfig
    image_token_id: int
    shuffle: int
    """Patches of a square of so many by so many become the channels of one feature."""

    @property
    def feature_layer(self) -> int:
        """Index into the tower's hidden states: the last layer's."""
        return self.vision.num_layers

    @property
    def num_image_tokens(self) -> int:
        """N: features of one tile."""
        return (self.vision.side // self.shuffle) ** 2


def read_config(config: Any) -> SmolVLMConfig:
    """
    Raises:
      ModelError: an architecture or a switch that is not implemented.
    """
    tower = read_tower(config.vision_config)
    if tower.side % config.scale_factor:
        raise ModelError(
            f"scale_factor is {config.scale_factor}; it has to divide the tower's {tower.side} "
            "patches along an edge"
        )
    return SmolVLMConfig(
        family=config.model_type,
        decoder=read_decoder(config.text_config, config.tie_word_embeddings),
        vision=tower,
        image_token_id=config.image_token_id,
        shuffle=config.scale_factor,
    )


def read_tower(config: Any, key: str = "vision_config") -> VisionConfig:
    """The tower of a transformers `Idefics3VisionConfig` or `SmolVLMVisionConfig`.

    Raises:
      ModelError: a switch that is not implemented.
    """
    expect(config.hidden_act, tuple(ACTIVATIONS), f"{key}.hidden_act")
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ModelError(f"{key}.{name} is {getattr(config, name)!r}, expected one number")
    tower = VisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_channels=config.num_channels,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        class_token=False,
        patch_bias=True,
        pre_norm=False,
        qkv_bias=True,
        qk_norm=False,
        layer_norm="layer_norm",
        layer_scale=False,
        post_norm="applied",
    )
    if not has_own_positions(tower.side):
        raise ModelError(
            f"{key}.image_size is {config.image_size} and its patch_size {config.patch_size}; "
            f"transformers rounds the positions of {tower.side} patches to others than their own"
        )
    return tower


def has_own_positions(side: int) -> bool:
    """Whether transformers finds every one of `side` patches along an edge at its own position: it
    looks for their fractions of the edge, in float32, between those of the positions."""
    number = np.arange(side, dtype=np.float32)
    fractions = number * (np.float32(1) / np.float32(side))
    bounds = np.arange(1 / side, 1, 1 / side).astype(np.float32)
    return np.array_equal(np.searchsorted(bounds, fractions, side="right"), number)


class Connector(nnx.Module):
    """Squares of features, side by side, to the decoder's width."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.proj = linear(inputs, outputs, False, rngs)

    def __call__(self, x: Float[Array, "*b D"]) -> Float[Array, "*b F"]:
        return self.proj(x)


class SmolVLM(TileModel):
    """A tile's features are squares of patches."""

    def __init__(self, config: SmolVLMConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        self.feature_layer, self.shuffle = config.feature_layer, config.shuffle
        self.multi_modal_projector = Connector(
            config.vision.hidden_size * config.shuffle**2, config.decoder.hidden_size, rngs
        )

    def tile_features(self, pixels, remat):
        features = self.vision_tower(pixels, (self.feature_layer,), remat)
        return pixel_shuffle(features, self.shuffle)


def tile_grid(processor: Any, size: Size) -> tuple[int, int]:
    """Rows and columns of the tiles that an image is cut into; (0, 0) where the whole is one.

    The longer edge is scaled to the processor's `size`, and then both are stretched to whole tiles.
    """
    if not processor.do_image_splitting:
        return 0, 0
    tile = processor.max_image_size["longest_edge"]
    if processor.do_resize:
        size = _scaled(size, processor.size["longest_edge"])
    height, width = size
    ratio = width / height
    if width >= height:
        columns = math.ceil(width / tile)
        rows = math.ceil(int(columns * tile / ratio) / tile)
    else:
        rows = math.ceil(height / tile)
        columns = math.ceil(int(rows * tile * ratio) / tile)
    return (rows, columns) if rows > 1 or columns > 1 else (0, 0)


def _scaled(size: Size, longest: int) -> Size:
    """Height and width of an image whose longer edge is scaled to so many pixels; the other is
    made even."""
    height, width = size
    ratio = width / height
    if width >= height:
        height, width = _even(int(longest / ratio)), longest
    else:
        height, width = longest, _even(int(longest * ratio))
    if longest > LARGEST:
        ratio = width / height
        if width >= height:
            height, width = int(LARGEST / ratio), LARGEST
        else:
            height, width = LARGEST, int(LARGEST * ratio)
    return max(height, 1), max(width, 1)


def _even(edge: int) -> int:
    return max(edge + edge % 2, 1)


def layouts(config: SmolVLMConfig, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    made = []
    for size in sizes:
        rows, columns = tile_grid(processor, size)
        tiles = rows * columns + 1
        plain = Layout.plain(config.image_token_id, tiles * config.num_image_tokens, tiles)
        # Row and column of the tile of every feature, from 1 on; 0 in the copy of the whole.
        row, column = np.divmod(np.arange(tiles, dtype=np.int32), max(columns, 1))
        places = np.stack([np.zeros_like(row), row + 1, column + 1])
        places[:, -1] = 0
        steps = np.repeat(places, config.num_image_tokens, axis=1)
        made.append(dataclasses.replace(plain, steps=steps))
    return made


def pixels(config: SmolVLMConfig, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    del config
    return [made[0] for made in pixels_of_each(processor, images)]


def check_processor(config: SmolVLMConfig, processor: Any) -> None:
    """
    Raises:
      ModelError: it makes tiles of another size than the tower's.
    """
    file = "preprocessor_config.json"
    edge = processor.max_image_size["longest_edge"]
    expect(edge, (config.vision.image_size,), f"{file}: max_image_size.longest_edge")
    if processor.do_resize and not processor.size.get("longest_edge"):
        raise ModelError(f"{file}: size is {processor.size}; this version implements longest_edge")


def frame_image(tokenizer: Any, layout: Layout) -> Layout:
    """Every tile behind its row and column, one line of them a line, and the whole at the end."""
    assert layout.steps is not None
    fake, image, whole = _marks(tokenizer)
    per_tile = len(layout.ids) // layout.slots
    places = layout.steps[1:, ::per_tile].T.tolist()
    text, last = "", 1
    for row, column in places[:-1]:
        text += "\n" * (row - last) + f"{fake}<row_{row}_col_{column}>{image}"
        last = row
    text += "\n\n" * (layout.slots > 1) + f"{fake}{whole}{image}{fake}"
    return _with_text(tokenizer, layout, "", text)


def _with_text(tokenizer: Any, layout: Layout, before: str, text: str) -> Layout:
    """The layout with the tokens of a text that has the placeholder once per tile.

    Args:
      tokenizer: of the checkpoint.
      layout: of an image or a video.
      before: what the prompt has in front of the text, whose tokens end where it does.
      text: ends with a token of its own.
    """

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    ids = np.array(encode(before + text)[len(encode(before)) :], np.int32)
    counts = np.where(ids == layout.ids[0], len(layout.ids) // layout.slots, 1)
    return dataclasses.replace(layout, ids=np.repeat(ids, counts))


def video_token(config: SmolVLMConfig, tokenizer: Any) -> int:
    """Id of what stands for a video in rendered text; added to a tokenizer without one, as text of
    transformers' processors has it before any tokenizer sees it."""
    if VIDEO not in tokenizer.get_vocab():
        tokenizer.add_tokens([transformers.AddedToken(VIDEO, special=True)], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(VIDEO)


def video_layouts(
    config: SmolVLMConfig, settings: Mapping[str, Any], clips: Sequence[Clip]
) -> list[Layout]:
    """
    Raises:
      DataError: a video has more frames than there are words for.
    """
    del settings
    made = []
    for clip in clips:
        if clip.frames >= 1000:
            raise VideoLengthError(
                f"a video of {clip.frames} frames; this model is told of 999 at most"
            )
        rate = clip.rate or FRAME_RATE
        times = clip.times or tuple(frame / rate for frame in range(clip.frames))
        # A list of frames has no length but the time of its last.
        length = round(clip.frames / rate, 6) if clip.times else times[-1]
        count = clip.frames * config.num_image_tokens
        plain = Layout.plain(config.image_token_id, count, clip.frames)
        made.append(dataclasses.replace(plain, times=(*times, length)))
    return made


def video_pixels(
    config: SmolVLMConfig, settings: Mapping[str, Any], videos: Sequence[Sequence[Any]]
) -> list[np.ndarray]:
    shape = config.vision.pixel_shape
    return [smolvlm_video.frame_pixels(settings, frames, shape) for frames in videos]


def frame_video(tokenizer: Any, layout: Layout) -> Layout:
    """What is said of a video, then every frame behind its time."""
    fake, image, whole = _marks(tokenizer)
    *times, length = layout.times
    text = smolvlm_video.introduced(layout.slots, length)
    for seconds in times:
        text += f"{smolvlm_video.label(seconds)}{fake}{whole}{image}{fake}"
    return _with_text(tokenizer, layout, smolvlm_video.INTRODUCTION, text)


def _marks(tokenizer: Any) -> tuple[str, str, str]:
    """What stands around tiles, for a feature, and in front of the copy of the whole.

    Raises:
      ModelError: one of the first two is no token of its own.
    """
    known = tokenizer.get_added_vocab()
    names = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "global_image_token": "<global-img>",
    }
    fake, image, whole = (getattr(tokenizer, name, None) or said for name, said in names.items())
    for token in (fake, image):
        if token not in known:
            raise ModelError(f"{tokenizer.name_or_path}: the tokenizer has no token {token}")
    return fake, image, whole


READ_KEYS = (
    (r"^model\.vision_model\.encoder\.", "vision_tower."),
    (r"^model\.vision_model\.", "vision_tower."),
    (r"^model\.connector\.modality_projection\.", "multi_modal_projector."),
    (r"^model\.text_model\.", "language_model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
WRITE_KEYS = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.", "model.text_model."),
    (r"^multi_modal_projector\.", "model.connector.modality_projection."),
    (r"^vision_tower\.layers\.", "vision_tower.encoder.layers."),
    (r"^vision_tower\.", "model.vision_model."),
)


def tensor_shapes(config: SmolVLMConfig) -> dict[str, tuple[int, ...]]:
    kernel = config.vision.patch_kernel_shape
    return {"model.vision_model.embeddings.patch_embedding.weight": kernel}


IMAGES = Images(
    processors=("Idefics3ImageProcessor", "SmolVLMImageProcessor"),
    placeholders=lambda config: (config.image_token_id,),
    slot_shape=lambda config: config.vision.pixel_shape,
    layouts=layouts,
    pixels=pixels,
    sized=True,
    frame=frame_image,
    check=check_processor,
)

FAMILY = Family(
    model_types=("idefics3",),
    read_config=read_config,
    module=SmolVLM,
    rules=(
        *vision.SHARDING_RULES,
        (r"multi_modal_projector/proj/kernel", PartitionSpec("fsdp", "tensor")),
        *decoder.SHARDING_RULES,
    ),
    read_keys=READ_KEYS,
    write_keys=WRITE_KEYS,
    module_keys=(),  # names of files are those of modules
    images=IMAGES,
    tensor_shapes=tensor_shapes,
)
"""Images alone."""

SMOLVLM = dataclasses.replace(
    FAMILY,
    model_types=("smolvlm",),
    images=dataclasses.replace(
        IMAGES,
        # What stands around every video is text, and tokenized with that beside it.
        spelled=lambda tokenizer: (
            VIDEO,
            f"{smolvlm_video.INTRODUCTION}{VIDEO}{smolvlm_video.END}",
        ),
    ),
    videos=Videos(
        placeholder=video_token,
        settings="video_preprocessor_config.json",
        layouts=video_layouts,
        pixels=video_pixels,
        frame=frame_video,
        sample=smolvlm_video.spread,
    ),
)
