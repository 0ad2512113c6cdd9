"""What the parity tests of Gemma 4's members share: words, sizes of decoders, records, frames."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from helpers import checks, pictures
from transformers.models.gemma4.image_processing_pil_gemma4 import (
    get_aspect_ratio_preserving_size,
)
from transformers.video_utils import VideoMetadata

from mmpo_jax.data.records import ImageRef, Record, VideoRef

NAMED = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
VIDEO = "<|video|>"
CLOCK = ("00:00", "00:02", "00:04", "01:05")
IDS = checks.token_ids(*NAMED.values(), VIDEO, *CLOCK)
SOFT_TOKENS = 70
TEXT = checks.TEXT | {
    "vocab_size": len(IDS),
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 30,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
}
RECORDS = [
    checks.record("0", "what is this ?", pictures.refs("photograph"), "a red star", "two ring"),
    checks.record("1", "a star", pictures.refs("wide", "cmyk"), "blue", "is this a star ?"),
    checks.record("2", "?", pictures.refs("tall", "transparent", "grey"), "a", "?"),
    checks.record("3", "is this a star ?", (), "green", "two blue"),
]


def clip(frames: int, fps: float | None = None) -> VideoRef:
    return dataclasses.replace(pictures.clip(frames), fps=fps)


def strip(frames: int, fps: float | None = None) -> VideoRef:
    """Of frames so wide that two of them have room where an image has."""
    (photograph,) = checks.load(pictures.refs("photograph"))
    steps = [(20 * step, 50 + 40 * step) for step in range(frames)]
    cut = [pictures.encode(photograph.crop((x, y, x + 352, y + 20))) for x, y in steps]
    return VideoRef("strip", tuple(ImageRef(f"strip {i}", data) for i, data in enumerate(cut)), fps)


def filmed(name: str, videos: tuple[VideoRef, ...], images: tuple[str, ...] = ()) -> Record:
    record = checks.record(name, "what is", pictures.refs(*images), "two", "a red star")
    return dataclasses.replace(record, videos=videos)


FILMED = [
    filmed("v", (clip(3, 0.5),)),
    filmed("w", (strip(5),), ("odd-size",)),
    filmed("x", (strip(2, 1 / 65), clip(2)), ("grey", "cmyk")),
    RECORDS[3],
]


def save_files(folder: Path, config: Any) -> None:
    """A tokenizer, and the video processor's settings."""
    media = (*NAMED.values(), VIDEO, *CLOCK)
    checks.save_tokenizer(folder, *media, image="<image>", video=VIDEO)
    named = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=NAMED)
    named.save_pretrained(folder)
    vision = config.vision_config
    settings = {
        "patch_size": vision.patch_size,
        "pooling_kernel_size": vision.pooling_kernel_size,
        "max_soft_tokens": SOFT_TOKENS,
    }
    checks.write_json(folder / "video_preprocessor_config.json", settings)


def cut(pixels: torch.Tensor, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(squares of pictures [F, N, 3 edge^2], column and row of each int64[F, N, 2]) of pixels
    [F, 3, H, W]."""
    found = pixels.unfold(2, edge, edge).unfold(3, edge, edge)  # [F, 3, rows, columns, edge, edge]
    rows, columns = found.shape[2:4]
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places = torch.stack([column, row], dim=-1).reshape(1, -1, 2).repeat(len(pixels), 1, 1)
    return found.permute(0, 2, 3, 4, 5, 1).reshape(len(pixels), rows * columns, -1), places


def resized(config: Any, pixels: torch.Tensor, tokens: int = SOFT_TOKENS) -> torch.Tensor:
    """uint8[F, 3, h, w] of uint8[F, 3, H, W] by torch."""
    vision = config.vision_config
    size = get_aspect_ratio_preserving_size(
        *pixels.shape[2:],
        patch_size=vision.patch_size,
        max_patches=tokens * vision.pooling_kernel_size**2,
        pooling_kernel_size=vision.pooling_kernel_size,
    )
    if pixels.shape[2:] == size:
        return pixels
    return torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)


def padded(found: torch.Tensor, count: int, value: float) -> torch.Tensor:
    """[F, count, n] of [F, N, n]."""
    return torch.nn.functional.pad(found, (0, 0, 0, count - found.shape[1]), value=value)


def their_video(config: Any, video: VideoRef, edge: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(squares of `edge` pixels, column and row of each) of every frame, as transformers' video
    processors make them, which need torchvision."""
    frames = np.stack([np.asarray(frame) for frame in checks.load(video.frames)])
    shown = resized(config, torch.tensor(frames).permute(0, 3, 1, 2))
    return cut(shown.float() / 255, edge)


def their_videos(config: Any, record: Record, edge: int) -> dict[str, torch.Tensor]:
    """What transformers' model takes of a record's videos."""
    vision = config.vision_config
    count = SOFT_TOKENS * (vision.pooling_kernel_size * vision.patch_size // edge) ** 2
    made = [their_video(config, video, edge) for video in record.videos]
    return {
        "pixel_values_videos": torch.cat([padded(values, count, 0) for values, _ in made]),
        "video_position_ids": torch.cat([padded(places, count, -1) for _, places in made]),
        "num_frames_per_video": torch.tensor([len(values) for values, _ in made]),
    }


def kinds(ids: np.ndarray) -> torch.Tensor:
    """`mm_token_type_ids` [1, P]."""
    return torch.tensor(((ids == IDS["<image>"]) + 2 * (ids == IDS[VIDEO]))[None]).long()


def expanded(
    processor: Any, text: str, images: list[int], videos: list[tuple[int, VideoMetadata]]
) -> str:
    """A prompt's text as transformers' processor expands it.

    Args:
      processor: its class, which cannot be built without torchvision, hence only its methods.
      text: rendered.
      images: tokens of each.
      videos: of each the tokens of a frame, and what is known of the frames.
    """
    theirs: Any = object.__new__(processor)
    theirs.boi_token, theirs.eoi_token = "<boi>", "<eoi>"
    theirs.image_token, theirs.video_token = "<image>", VIDEO
    made = {
        "num_soft_tokens_per_image": images,
        "num_soft_tokens_per_video": [tokens for tokens, _ in videos],
        "video_metadata": [metadata for _, metadata in videos],
    }
    replaced: dict[str, Callable[[int], str]] = {
        "<image>": lambda number: theirs.replace_image_token(made, number),
        VIDEO: lambda number: theirs.replace_video_token(made, number),
    }
    seen = dict.fromkeys(replaced, -1)

    def replace(found: re.Match[str]) -> str:
        seen[found[0]] += 1
        return replaced[found[0]](seen[found[0]])

    return re.sub("|".join(map(re.escape, replaced)), replace, text)


def only_in_prompts(case: checks.Case, monkeypatch: Any) -> None:
    """Makes placeholders that transformers samples text, which they are here."""
    inner = case.theirs.model
    shown = inner.get_placeholder_mask

    def in_prompts(input_ids: Any = None, inputs_embeds: Any = None) -> tuple[Any, ...]:
        masks = shown(input_ids, inputs_embeds)
        is_step = masks[0].shape[1] == 1
        return tuple(mask & (not is_step) for mask in masks)

    monkeypatch.setattr(inner, "get_placeholder_mask", in_prompts)
