"""Checkpoints of the families with Qwen3-VL's media, and what transformers' models take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from helpers import checks, qwen_media
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize

from mmpo_jax.data.records import Record

# Times are tokens here, digit by digit.
MEDIA = (*qwen_media.MEDIA, "<", ".", "seconds>", *map(str, range(10)))
IDS = checks.token_ids(*MEDIA)


def make_case(folder: Path, config: Any, **options: Any) -> checks.Case:
    """A random checkpoint of this config."""
    qwen_media.save_tokenizer(folder, MEDIA)
    named = {"vision_start_token": "<vision>", "vision_end_token": "</vision>"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=named)
    tokenizer.save_pretrained(folder)
    tower = config.vision_config
    area = (tower.patch_size * tower.spatial_merge_size) ** 2
    sizes = {"size": {"shortest_edge": 8 * area, "longest_edge": 80 * area}}
    patches = {"patch_size": tower.patch_size, "merge_size": tower.spatial_merge_size}
    checks.write_json(folder / "video_preprocessor_config.json", sizes | patches)
    theirs = transformers.AutoModelForImageTextToText.from_config(config)
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    processor = qwen_media.image_processor(tower, **halves)
    return checks.make_case(folder, theirs, processor, **options)


def their_videos(case: checks.Case, record: Record) -> tuple[torch.Tensor, torch.Tensor]:
    """(pixels, [time steps, rows, columns] of patches) of a record's videos."""
    tower = case.theirs.config.vision_config
    edge = tower.patch_size * tower.spatial_merge_size
    values, grids = [], []
    for clip in record.videos:
        shown = checks.load(clip.frames[:1])[0]
        size = smart_resize(
            len(clip.frames),
            shown.height,
            shown.width,
            temporal_factor=tower.temporal_patch_size,
            factor=edge,
            min_pixels=8 * edge**2,
            max_pixels=80 * edge**2,
        )
        made, grid = qwen_media.their_video(case, clip, size)
        values.append(made)
        grids.append(grid)
    return torch.cat(values), torch.tensor(grids)


def their_inputs(case: checks.Case) -> checks.Inputs:
    """What transformers' model takes beside `input_ids`."""

    def inputs(record: Record, ids: np.ndarray) -> dict[str, Any]:
        kinds = (ids == IDS["<image>"]) + 2 * (ids == IDS["<video>"])
        made = {"mm_token_type_ids": torch.tensor(kinds[None])}
        if record.images:
            made |= dict(qwen_media.their_images(case, record))
        if record.videos:
            names = "pixel_values_videos", "video_grid_thw"
            made |= dict(zip(names, their_videos(case, record), strict=True))
        return made

    return inputs
