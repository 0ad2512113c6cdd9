"""Records and references for the families with Qwen's images of any size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers
from helpers import checks, pictures
from helpers.pictures import encode, noise, refs
from PIL import Image

from mmpo_jax.data.records import ImageRef, Record, VideoRef
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.models.layout import Layout, place

MEDIA = ("<vision>", "</vision>", "<image>", "<video>")
IMAGES = {name: refs(name)[0] for name in pictures.IMAGES}


def video(name: str, width: int, height: int, frames: int, fps: float | None) -> VideoRef:
    rng = np.random.default_rng(frames)
    shades = rng.integers(0, 256, (frames, 1, 1, 3)) + np.asarray(noise("RGB", width, height))
    encoded = [encode(Image.fromarray((shade % 256).astype(np.uint8))) for shade in shades]
    return VideoRef(
        name, tuple(ImageRef(f"{name}-{i}", data) for i, data in enumerate(encoded)), fps
    )


def row(
    name: str,
    text: str,
    images: Sequence[str] = (),
    videos: Sequence[VideoRef] = (),
    responses: Sequence[str] = ("a red star", "two blue ring and a"),
) -> Record:
    record = checks.record(name, text, [IMAGES[image] for image in images], *responses)
    return dataclasses.replace(record, videos=tuple(videos))


RECORDS = [
    row("0", "what is this ?", ["photograph"]),
    row("1", "a ring and a star ?", ["wide", "one-pixel", "tall"]),
    row("2", "red green blue what is a ?"),
    row("3", "is this a ring ?", ["grey", "turned-by-exif"]),
    row("4", "two", ["transparent", "palette", "sixteen-bits", "cmyk"]),
]
VIDEOS = [
    row("5", "what is this ?", (), [video("odd", 50, 70, 5, 4.0)]),
    row("6", "is this a", ["cmyk"], [video("a", 40, 30, 4, None), video("b", 30, 60, 2, 2.0)]),
]
TIMED = [
    row(
        "7",
        "is this",
        ["grey", "cmyk"],
        [video("slow", 84, 56, 8, 0.5), video("quick", 56, 84, 3, 30.0)],
    )
]


def make_config(kind: Any, ids: dict[str, int], text: Any, vision: Any, **switches: Any) -> Any:
    return kind(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<image>"],
        video_token_id=ids["<video>"],
        vision_start_token_id=ids["<vision>"],
        vision_end_token_id=ids["</vision>"],
        **switches,
    )


def save_tokenizer(folder: Any, media: Sequence[str]) -> None:
    written = {kind: f"<vision> <{kind}> </vision>" for kind in ("image", "video")}
    checks.save_tokenizer(folder, *media, **written)


def image_processor(tower: Any, **settings: Any) -> Any:
    """Pictures of 4 to 40 tokens, for a transformers tower's config."""
    area = (tower.patch_size * tower.spatial_merge_size) ** 2
    return transformers.Qwen2VLImageProcessorPil(
        patch_size=tower.patch_size,
        temporal_patch_size=tower.temporal_patch_size,
        merge_size=tower.spatial_merge_size,
        min_pixels=4 * area,
        max_pixels=40 * area,
        **settings,
    )


def their_images(case: checks.Case, record: Record) -> Any:
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(case.folder)
    return processor(images=checks.load(record.images), return_tensors="pt")


def their_video(
    case: checks.Case, clip: VideoRef, size: tuple[int, int]
) -> tuple[torch.Tensor, list[int]]:
    """(pixels, [time steps, rows, columns] of patches) of a video whose frames are resized by torch
    to these heights and widths.

    This is what the video processors make, which cannot be built without torchvision; where they
    can, `test_frames.py` compares with them.
    """
    tower = case.theirs.config.vision_config
    depth, edge, merge = tower.temporal_patch_size, tower.patch_size, tower.spatial_merge_size
    shown = np.stack([np.asarray(frame) for frame in checks.load(clip.frames)])
    resized = torch.nn.functional.interpolate(
        torch.tensor(shown).permute(0, 3, 1, 2), size, mode="bicubic", antialias=True
    )
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(case.folder)
    options = {"do_resize": False, "input_data_format": "channels_first"}
    made = processor(images=list(resized.numpy()), return_tensors="pt", **options)
    _, height, width = made["image_grid_thw"][0].tolist()
    assert height % merge == width % merge == 0
    count = len(clip.frames)
    frames = made["pixel_values"].view(count, height * width, 3, depth, edge, edge)
    values = []
    for step in range(-(-count // depth)):
        at = [min(step * depth + i, count - 1) for i in range(depth)]
        values.append(torch.stack([frames[i, :, :, 0] for i in at], dim=2).flatten(1))
    return torch.cat(values), [len(values), height, width]


def in_their_order(pixels: np.ndarray, layout: Layout) -> np.ndarray:
    """Patches out of their slots: [tokens * patches, numbers]."""
    tokens = pixels.reshape(layout.features, -1)[layout.index[:, 0]]
    return tokens.reshape(-1, pixels.shape[-1])


def check_image_pixels(case: checks.Case, name: str) -> None:
    """Bit for bit those of the Hugging Face processor, and nothing else in the slots."""
    record = row("0", "", [name])
    expected = their_images(case, record)
    (layout,) = case.processor.layouts(record.images)
    (pixels,) = case.processor.pixels(record.images)
    assert pixels.shape == (layout.slots, *case.processor.slot_shape)
    merged = case.theirs.config.vision_config.spatial_merge_size**2
    assert len(layout.ids) == expected["image_grid_thw"].prod() // merged
    actual = in_their_order(pixels, layout)
    np.testing.assert_array_equal(actual, expected["pixel_values"].numpy())
    assert np.isclose(np.abs(pixels).sum(), np.abs(actual).sum(), rtol=1e-4)


def check_positions(case: checks.Case, record: Record, made: dict[str, Any]) -> None:
    """Positions of a prompt are those of transformers, and so is where answers go on.

    Args:
      case: the checkpoint.
      record: whose prompt it is.
      made: what transformers' model takes beside `input_ids`.
    """
    tokens = tokenize(record, case.processor, 2**20, 2**20)
    ids = tokens.prompt_ids
    placed = place(ids, tokens.layouts, case.processor.placeholders, axes=3)
    if not record.images and not record.videos:
        np.testing.assert_array_equal(placed.positions, np.tile(np.arange(len(ids)), (3, 1)))
        assert placed.next_position == len(ids)
        return
    grids = {name: made.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    timed = (
        {"second_per_grid_ts": made["second_per_grid_ts"]} if "second_per_grid_ts" in made else {}
    )
    expected, delta = case.theirs.model.get_rope_index(
        torch.tensor(ids[None]), made["mm_token_type_ids"], **timed, **grids
    )
    np.testing.assert_array_equal(placed.positions, expected[:, 0].numpy())
    assert placed.next_position == len(ids) + delta.item()


def check_padding(case: checks.Case) -> None:
    """Whatever the padding of slots holds, logits are the same to the bit."""
    _, batch = checks.batch_of(case, RECORDS[:3])
    padding = batch.patches["frames"] == 0
    assert padding.mean() > 0.2
    other = np.where(padding[..., None], np.float32(1e3), batch.pixel_values)
    logits = [
        checks.response_logits(
            case.model, case.params, dataclasses.replace(batch, pixel_values=pixels)
        )
        for pixels in (batch.pixel_values, other)
    ]
    np.testing.assert_array_equal(*logits)
