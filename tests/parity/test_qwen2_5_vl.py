"""Qwen2.5-VL against transformers: logits, greedy decoding, folders, positions and pixels."""

import dataclasses
import io
import json

import numpy as np
import pytest
from matplotlib import cbook
from PIL import Image

torch = pytest.importorskip("torch")
import checks  # noqa: E402
import safetensors.torch  # noqa: E402
import transformers  # noqa: E402
from transformers.image_utils import load_image  # noqa: E402

from mmpo_jax.data.processor import MediaError  # noqa: E402
from mmpo_jax.data.records import ImageRef, VideoRef  # noqa: E402
from mmpo_jax.data.tokenization import RowRejected, tokenize  # noqa: E402
from mmpo_jax.models.config import ModelError  # noqa: E402
from mmpo_jax.models.huggingface import flatten, load_model  # noqa: E402
from mmpo_jax.models.layout import place  # noqa: E402
from mmpo_jax.models.model import read_config  # noqa: E402

pytestmark = pytest.mark.parity

MEDIA = ("<vision>", "</vision>", "<image>", "<video>")
IDS = checks.token_ids(*MEDIA)
TEXT = {
    "vocab_size": len(IDS) + 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": checks.PAD_ID,
    "bos_token_id": checks.BOS_ID,
    "eos_token_id": checks.EOS_ID,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 14,
    "window_size": 112,
    "fullatt_block_indexes": [1, 3],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mrope_section": [4, 2, 2],
}


def make_config(text=(), vision=(), **switches):
    return transformers.Qwen2_5_VLConfig(
        text_config=TEXT | dict(text),
        vision_config=VISION | dict(vision),
        image_token_id=IDS["<image>"],
        video_token_id=IDS["<video>"],
        vision_start_token_id=IDS["<vision>"],
        vision_end_token_id=IDS["</vision>"],
        **switches,
    )


CASES = {
    # The published sizes of patches and windows.
    "published-windows": make_config(),
    "small-windows-tied": make_config(
        {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1, 2, 1]}},
        {"patch_size": 6, "window_size": 24, "fullatt_block_indexes": [2], "num_heads": 4}
        | {"tokens_per_second": 3},
        tie_word_embeddings=True,
    ),
    "merge-of-three-windows-only-yarn": make_config(
        {"num_attention_heads": 2, "rope_parameters": YARN},
        {"patch_size": 4, "window_size": 24, "spatial_merge_size": 3, "num_heads": 1}
        | {"fullatt_block_indexes": [], "depth": 2},
    ),
    "whole-images-one-key-head-text-window": make_config(
        {"num_key_value_heads": 1, "num_hidden_layers": 3}
        | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
        {"patch_size": 4, "window_size": 16, "fullatt_block_indexes": [0, 1], "depth": 2}
        | {"temporal_patch_size": 3, "hidden_act": "gelu"},
    ),
}


def noise(mode, width, height):
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    rng = np.random.default_rng(width + height)
    # Smooth enough that resizing keeps something.
    small = rng.integers(0, 256, (max(1, height // 7), max(1, width // 7), *bands), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BILINEAR)


def encode(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn a quarter clockwise
    return encode(noise("RGB", 90, 50), "JPEG", exif=exif, quality=95)


IMAGES = {
    name: ImageRef(name, data)
    for name, data in {
        "photo": cbook.get_sample_data("grace_hopper.jpg").read(),
        "one-pixel": encode(noise("RGB", 1, 1)),
        "wide": encode(noise("RGB", 4000, 300)),
        "tall": encode(noise("RGB", 300, 4000)),
        "grey": encode(noise("L", 70, 90)),
        "transparent": encode(noise("RGBA", 83, 61)),
        "palette": encode(noise("RGB", 70, 90).quantize(37), "GIF"),
        "cmyk": encode(noise("RGB", 120, 90).convert("CMYK"), "JPEG"),
        "sixteen-bit": encode(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80))),
        "turned-by-exif": rotated_jpeg(),
    }.items()
}


def video(name, width, height, frames, fps):
    rng = np.random.default_rng(frames)
    shades = rng.integers(0, 256, (frames, 1, 1, 3)) + np.asarray(noise("RGB", width, height))
    pictures = [encode(Image.fromarray((shade % 256).astype(np.uint8))) for shade in shades]
    refs = tuple(ImageRef(f"{name}-{i}", data) for i, data in enumerate(pictures))
    return VideoRef(name, refs, fps)


def row(name, text, images=(), videos=(), responses=("a red star", "two blue ring and a")):
    record = checks.record(name, text, [IMAGES[image] for image in images], *responses)
    return dataclasses.replace(record, videos=tuple(videos))


RECORDS = [
    row("0", "what is this ?", ["photo"]),
    row("1", "a ring and a star ?", ["wide", "one-pixel", "tall"]),
    row("2", "red green blue what is a ?"),
    row("3", "is this a ring ?", ["grey", "turned-by-exif"]),
]
VIDEOS = [
    row("4", "what is this ?", (), [video("odd", 50, 70, 5, 4.0)]),
    row("5", "is this a", ["cmyk"], [video("a", 40, 30, 4, None), video("b", 30, 60, 2, 2.0)]),
]


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("qwen") / request.param, CASES[request.param])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("qwen") / "one", CASES["published-windows"])


def make_case(folder, config):
    written = {kind: f"<vision> <{kind}> </vision>" for kind in ("image", "video")}
    checks.save_tokenizer(folder, *MEDIA, **written)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration(config)
    tower = config.vision_config
    area = (tower.patch_size * tower.spatial_merge_size) ** 2
    settings = {
        "patch_size": tower.patch_size,
        "temporal_patch_size": tower.temporal_patch_size,
        "merge_size": tower.spatial_merge_size,
        "min_pixels": 4 * area,
        "max_pixels": 40 * area,
    }
    return checks.make_case(folder, theirs, transformers.Qwen2VLImageProcessorPil(**settings))


def their_images(case, record):
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(case.folder)
    opened = [load_image(Image.open(io.BytesIO(image.data))) for image in record.images]
    return processor(images=opened, return_tensors="pt")


def their_video(case, record):
    """What the video processor makes, which cannot be built without torchvision."""
    tower = case.theirs.config.vision_config
    depth, edge, merge = tower.temporal_patch_size, tower.patch_size, tower.spatial_merge_size
    values, grids, seconds = [], [], []
    for clip in record.videos:
        frames = dataclasses.replace(record, images=clip.frames, videos=())
        made = their_images(case, frames)
        _, height, width = made["image_grid_thw"][0].tolist()
        steps = -(-len(clip.frames) // depth)
        frames = made["pixel_values"].view(len(clip.frames), height * width, 3, depth, edge, edge)
        for step in range(steps):
            at = [min(step * depth + i, len(frames) - 1) for i in range(depth)]
            values.append(torch.stack([frames[i, :, :, 0] for i in at], dim=2).flatten(1))
        grids.append([steps, height, width])
        seconds.append(depth / (clip.fps or 24))
        assert height % merge == width % merge == 0
    return torch.cat(values), torch.tensor(grids), torch.tensor(seconds)


def their_inputs(case):
    def inputs(record, ids):
        kinds = (ids == IDS["<image>"]) + 2 * (ids == IDS["<video>"])
        made = {"mm_token_type_ids": torch.tensor(kinds[None])}
        if record.images:
            made |= dict(their_images(case, record))
        if record.videos:
            names = "pixel_values_videos", "video_grid_thw", "second_per_grid_ts"
            made |= dict(zip(names, their_video(case, record), strict=True))
        return made

    return inputs


def test_logits(case):
    checks.check_logits(case, [*RECORDS, *VIDEOS], their_inputs(case))


def test_greedy_decoding(case):
    checks.check_greedy(case, [RECORDS[0], RECORDS[1], VIDEOS[0]], their_inputs(case))


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
