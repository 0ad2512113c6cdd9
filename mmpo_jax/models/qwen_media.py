"""Images and videos in Qwen's families: of any size, cut into patches that lie in slots.

Sizes follow the picture: it is resized to a whole number of tokens, each a square of patches, and
tokens stand at a time, a row and a column. What the families share is here; which frames a video
is resized to, and what stands between them, is in their own files.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import transformers
from jaxtyping import Int
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from mmpo_jax.models.config import DecoderConfig, ModelConfig, ModelError, with_rope
from mmpo_jax.models.family import Images, Size
from mmpo_jax.models.layout import Layout
from mmpo_jax.models.media_limits import PictureSizeError, size_text
from mmpo_jax.models.torch_resize import resize
from mmpo_jax.models.vision_qwen import QwenVisionConfig

Grid = tuple[int, int, int]
"""(time steps, rows, columns) of tokens."""

FRAME_SETTINGS = (
    "do_normalize",
    "do_rescale",
    "image_mean",
    "image_std",
    "merge_size",
    "patch_size",
    "resample",
    "rescale_factor",
)
"""Settings that a video processor shares with the image processor."""


@dataclasses.dataclass(frozen=True)
class PatchesConfig(ModelConfig):
    """Of a model whose tower takes patches in slots, squares of which become tokens."""

    vision: QwenVisionConfig
    image_token_id: int

    @property
    def edge(self) -> int:
        """Pixels along the square that becomes one token."""
        return self.vision.patch_size * self.vision.merge_size


@dataclasses.dataclass(frozen=True)
class QwenVLConfig(PatchesConfig):
    """What the families' configs have in common."""

    video_token_id: int


def with_sections(
    text: DecoderConfig, default: tuple[int, ...], interleaved: bool = False
) -> DecoderConfig:
    """The decoder with rotary sections for time, row and column.

    Args:
      text: as `read_decoder` gives it.
      default: transformers' sections where a config has none.
      interleaved: see `Rope`.

    Raises:
      ModelError: the config's sections are not those of a head.
    """
    attention = text.attentions[0]  # they are alike but for windows
    sections = attention.rope.sections or default
    if len(sections) != 3 or 2 * sum(sections) != attention.head_dim:
        raise ModelError(
            f"text_config.rope_parameters.mrope_section is {list(sections)}, expected three "
            f"numbers that add up to half of a head's {attention.head_dim} channels"
        )
    rope = dataclasses.replace(attention.rope, sections=sections, interleaved=interleaved)
    return with_rope(text, rope)


def check_width(config: Any) -> None:
    """
    Raises:
      ModelError: the merger of a transformers config writes vectors of another width than the
        decoder reads.
    """
    width, needed = config.vision_config.out_hidden_size, config.text_config.hidden_size
    if width != needed:
        raise ModelError(
            f"vision_config.out_hidden_size is {width}, text_config.hidden_size {needed}"
        )


def layouts(config: QwenVLConfig, processor: Any, sizes: Sequence[Size]) -> list[Layout]:
    grids = [_image_grid(config, processor, size) for size in sizes]
    return [layout(config, config.image_token_id, grid) for grid in grids]


def _image_grid(config: QwenVLConfig, processor: Any, size: Size) -> Grid:
    """The tokens of an image after resizing.

    Raises:
      ModelError: the image processor does not resize, or not to whole tokens.
      DataError: the image is too narrow.
    """
    if processor.do_resize is not True:
        raise ModelError(f"preprocessor_config.json: do_resize is {processor.do_resize}")
    check_patches(config, processor)
    limits = processor.size.shortest_edge, processor.size.longest_edge
    return grid_of(config, 1, fitted(config, size, *limits))


def check_patches(config: QwenVLConfig, processor: Any) -> None:
    """
    Raises:
      ModelError: a processor cuts images into other patches than the tower takes.
    """
    expected = {"merge_size": config.vision.merge_size, "patch_size": config.vision.patch_size}
    actual = {name: getattr(processor, name) for name in expected}
    if actual != expected:
        raise ModelError(f"preprocessor_config.json has {actual}, config.json needs {expected}")


def fitted(config: QwenVLConfig, size: Size, least: int, most: int) -> Size:
    """Height and width of whole tokens that are nearest to a picture's between two areas.

    Raises:
      DataError: the picture is too narrow.
    """
    try:
        return smart_resize(*size, config.edge, least, most)
    except ValueError as error:
        raise PictureSizeError(f"{size_text(size)}: {error}") from error


def grid_of(config: QwenVLConfig, frames: int, size: Size) -> Grid:
    """The tokens of so many frames that were resized to whole tokens."""
    steps = -(-frames // config.vision.temporal_patch_size)
    return steps, size[0] // config.edge, size[1] // config.edge


def layout(
    config: PatchesConfig, token: int, grid: Grid, times: Int[np.ndarray, " t"] | None = None
) -> Layout:
    """Tokens row by row, all features of a time step one after another.

    Args:
      config: of the model.
      token: stands for every feature.
      grid: t, h and w.
      times: int32[t], position of every time step; None for 0, 1, ...
    """
    places, slots = _pack(config.vision, grid)
    time, row, column = np.indices(grid, np.int32).reshape(3, -1)
    plain = Layout.plain(token, len(places), slots)
    return dataclasses.replace(
        plain,
        index=places[:, None],
        features=slots * config.vision.slot_tokens,
        steps=np.stack([time if times is None else times[time], row, column]),
        # As transformers has it since 5.3; before, and in the paper, time counted too.
        span=max(grid[1:]),
    )


@functools.lru_cache(maxsize=512)
def _pack(tower: QwenVisionConfig, grid: Grid) -> tuple[np.ndarray, int]:
    """Where each token of a grid goes among slots: in its order, or in whole windows.

    Returns:
      (int32[t*h*w], the number of slots); the tokens of a window are contiguous.
    """
    time, row, column = np.indices(grid, np.int32).reshape(3, -1)
    size = tower.slot_tokens
    if not tower.windowed:
        return np.arange(len(time), dtype=np.int32), -(-len(time) // size)
    _, height, width = grid
    windows = (time * -(-height // tower.window) + row // tower.window) * -(-width // tower.window)
    windows += column // tower.window
    sizes = np.bincount(windows)
    starts = np.zeros_like(sizes)
    # Whole windows fill a slot; the cut ones go, the largest first, where there is room.
    whole = np.flatnonzero(sizes == size)
    starts[whole] = np.arange(len(whole)) * size
    slots, room = len(whole), list[int]()
    for index in np.argsort(-sizes, kind="stable")[len(whole) :]:
        slot = next((s for s, left in enumerate(room) if left >= sizes[index]), len(room))
        if slot == len(room):
            room.append(size)
        starts[index] = (slots + slot + 1) * size - room[slot]
        room[slot] -= sizes[index]
    order = np.argsort(windows, kind="stable")
    within = np.empty_like(windows)
    within[order] = np.arange(len(windows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return (starts[windows] + within).astype(np.int32), slots + len(room)


def describe(config: PatchesConfig, media: Sequence[Layout], slots: int) -> dict[str, np.ndarray]:
    """What the tower wants to know of every patch, see `QwenVisionTower`."""
    tower = config.vision
    merge, tokens = tower.merge_size, tower.slot_tokens
    places = np.zeros((slots * tokens, merge, merge, 2), np.int32)
    sizes = np.ones((slots * tokens, 1, 1, 2), np.int32)
    frames = np.zeros(slots * tokens, np.int32)
    start = seen = 0
    for layout in media:
        assert layout.steps is not None
        at = start + layout.index[:, 0]
        row, column = layout.steps[1:]
        height, width = row.max() + 1, column.max() + 1
        number = np.arange(len(at)) // (height * width)
        frames[at] = seen + 1 + number
        places[at] = merge * layout.steps[1:].T[:, None, None]
        sizes[at] = merge * height, merge * width
        start, seen = start + layout.features, seen + number[-1] + 1
    places += np.moveaxis(np.indices((merge, merge)), 0, -1)
    described: dict[str, np.ndarray] = {
        "places": places.reshape(slots, tower.slot_patches, 2),
        "frames": np.repeat(frames, merge**2).reshape(slots, tower.slot_patches),
    }
    if tower.position_side:
        # In float32, as torch does.
        reach = np.float32(tower.position_side - 1) * places.astype(np.float32)
        grid = reach / np.maximum(sizes - 1, 1).astype(np.float32)
        described["grid"] = grid.reshape(slots, tower.slot_patches, 2)
    return described


def pixels(config: QwenVLConfig, processor: Any, images: Sequence[Any]) -> list[np.ndarray]:
    made = []
    for image in images:
        grid = _image_grid(config, processor, (image.height, image.width))
        values = processor(images=image, return_tensors="np")["pixel_values"]
        made.append(in_slots(config, values, grid))
    return made


def frame_processor(
    config: QwenVLConfig, settings: Mapping[str, Any], defaults: Mapping[str, Any]
) -> Any:
    """What cuts single frames, resized already, into patches as transformers' video processor does.

    Raises:
      ModelError: the video processor does not resize, or cuts into other patches.
    """
    known = {**defaults, **{key: x for key, x in settings.items() if x is not None}}
    if known.get("do_resize", True) is not True:
        raise ModelError("the video processor's do_resize is false")
    kept = {name: known[name] for name in FRAME_SETTINGS if name in known}
    processor = transformers.Qwen2VLImageProcessorPil(
        **kept, temporal_patch_size=1, do_resize=False
    )
    check_patches(config, processor)
    return processor


def clip_pixels(
    config: QwenVLConfig, processor: Any, clip: Sequence[Any], size: Size
) -> np.ndarray:
    """float32[slots, S, C*t*h*w] of a video's frames.

    Args:
      config: of the model.
      processor: of `frame_processor`.
      clip: RGB frames.
      size: height and width that they are resized to.
    """
    tower = config.vision
    depth = tower.temporal_patch_size
    grid = grid_of(config, len(clip), size)
    shown = [np.asarray(frame).transpose(2, 0, 1) for frame in clip]
    resized = [resize(frame, size, processor.resample) for frame in shown]
    padded = [*resized, *[resized[-1]] * (-len(clip) % depth)]
    made = processor(images=padded, return_tensors="np", input_data_format="channels_first")
    # A patch is cut from `depth` frames, after its channels and before its pixels.
    values = made["pixel_values"].reshape(
        grid[0], depth, -1, tower.num_channels, tower.patch_size**2
    )
    return in_slots(config, values.transpose(0, 2, 3, 1, 4), grid)


def in_slots(config: PatchesConfig, patches: np.ndarray, grid: Grid) -> np.ndarray:
    """float32[slots, S, C*t*h*w] of patches in the order of the tokens that they become.

    Raises:
      ModelError: the patches are of another size than the model's.
    """
    tower = config.vision
    places, slots = _pack(tower, grid)
    width = tower.merge_size**2 * tower.patch_inputs
    if patches.size != len(places) * width:
        raise ModelError(
            f"the image processor makes {patches.size // len(places)} numbers for a token, "
            f"config.json says {width}"
        )
    made = np.zeros((slots * tower.slot_tokens, width), np.float32)
    made[places] = patches.reshape(len(places), -1)
    return made.reshape(slots, tower.slot_patches, tower.patch_inputs)


READ_KEYS = (
    (r"^(model\.)?visual\.patch_embed\.proj\.", "vision_tower.patch_embedding."),
    (r"^(model\.)?visual\.blocks\.", "vision_tower.layers."),
    (r"^model\.(language_model\.)?", "language_model."),
    (r"^lm_head\.", "language_model.lm_head."),
)
"""Names of what the families share; their own come before."""

WRITE_KEYS = (
    (r"^vision_tower\.patch_embedding\.", "visual.patch_embed.proj."),
    (r"^vision_tower\.layers\.", "visual.blocks."),
    (r"^language_model\.lm_head\.", "lm_head."),
)


def patch_shape(tower: QwenVisionConfig) -> tuple[int, ...]:
    """Shape of the patch embedding in files, which is a convolution there."""
    patch = tower.temporal_patch_size, tower.patch_size, tower.patch_size
    return tower.hidden_size, tower.num_channels, *patch


IMAGES = Images(
    processors=("Qwen2VLImageProcessor",),
    placeholders=lambda config: (config.image_token_id,),
    slot_shape=lambda config: (config.vision.slot_patches, config.vision.patch_inputs),
    layouts=layouts,
    pixels=pixels,
    sized=True,
    describe=describe,
)
"""What all families with these pictures do to them."""
