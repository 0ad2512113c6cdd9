"""Qwen2.5-VL against transformers: logits, greedy decoding, folders, positions and pixels."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from helpers import pictures
from helpers.pictures import encode, noise, refs
from PIL import Image

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402
import transformers  # noqa: E402
from helpers import checks  # noqa: E402

from mmpo_jax.checkpoints.huggingface import load_model, save_model  # noqa: E402
from mmpo_jax.core.trees import flatten  # noqa: E402
from mmpo_jax.data.processor import MediaError, Processor  # noqa: E402
from mmpo_jax.data.records import ImageRef, VideoRef  # noqa: E402
from mmpo_jax.data.tokenization import RowRejected, tokenize  # noqa: E402
from mmpo_jax.models.config import ModelError  # noqa: E402
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


IMAGES = {name: refs(name)[0] for name in pictures.IMAGES}


def video(name, width, height, frames, fps):
    rng = np.random.default_rng(frames)
    shades = rng.integers(0, 256, (frames, 1, 1, 3)) + np.asarray(noise("RGB", width, height))
    encoded = [encode(Image.fromarray((shade % 256).astype(np.uint8))) for shade in shades]
    frames = tuple(ImageRef(f"{name}-{i}", data) for i, data in enumerate(encoded))
    return VideoRef(name, frames, fps)


def row(name, text, images=(), videos=(), responses=("a red star", "two blue ring and a")):
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
    return processor(images=checks.load(record.images), return_tensors="pt")


def their_frames(case, clip):
    """(pixels, [1, rows, columns] of patches) of each frame, resized by torch."""
    record = dataclasses.replace(RECORDS[2], images=clip.frames)
    grids = their_images(case, record)["image_grid_thw"]
    size = (grids[0, 1:] * case.theirs.config.vision_config.patch_size).tolist()
    shown = np.stack([np.asarray(frame) for frame in checks.load(clip.frames)])
    resized = torch.nn.functional.interpolate(
        torch.tensor(shown).permute(0, 3, 1, 2), size, mode="bicubic", antialias=True
    )
    processor = transformers.Qwen2VLImageProcessorPil.from_pretrained(case.folder)
    options = {"do_resize": False, "input_data_format": "channels_first"}
    made = processor(images=list(resized.numpy()), return_tensors="pt", **options)
    assert torch.equal(made["image_grid_thw"], grids)
    return made


def their_video(case, record):
    """What the video processor makes, which cannot be built without torchvision; where it can,
    `test_frames.py` compares with it."""
    tower = case.theirs.config.vision_config
    depth, edge, merge = tower.temporal_patch_size, tower.patch_size, tower.spatial_merge_size
    values, grids, seconds = [], [], []
    for clip in record.videos:
        made = their_frames(case, clip)
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


def test_text_only(published):
    checks.check_logits(published, [RECORDS[2]], their_inputs(published))


@pytest.mark.slow
def test_greedy_decoding(case):
    checks.check_greedy(case, [*RECORDS, *VIDEOS], their_inputs(case))


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")


def in_their_order(case, pixels, layout):
    """Patches out of their slots: [tokens * patches, numbers]."""
    tokens = pixels.reshape(layout.features, -1)[layout.index[:, 0]]
    return tokens.reshape(-1, pixels.shape[-1])


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_equal_the_hugging_face_processor(published, name):
    record = row("0", "", [name])
    expected = their_images(published, record)
    (layout,) = published.processor.layouts(record.images)
    (pixels,) = published.processor.pixels(record.images)
    assert pixels.shape == (layout.slots, *published.processor.slot_shape)
    assert len(layout.ids) == expected["image_grid_thw"].prod() // 4
    actual = in_their_order(published, pixels, layout)
    np.testing.assert_array_equal(actual, expected["pixel_values"].numpy())
    # Nothing but the image is in the slots.
    assert np.abs(pixels).sum() == pytest.approx(np.abs(actual).sum(), rel=1e-4)


def test_frames_equal_torch_resizing(case):
    """As transformers' video processor resizes."""
    record = row("0", "", (), [video("clip", 150, 170, 3, 2.0), video("odd", 50, 70, 4, None)])
    expected = their_video(case, record)[0]
    layouts = case.processor.layouts((), record.videos)
    made = case.processor.pixels((), record.videos)
    actual = np.concatenate(
        [in_their_order(case, *both) for both in zip(made, layouts, strict=True)]
    )
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5)


def test_positions(published):
    slow = video("slow", 84, 56, 8, 0.5)
    quick = video("quick", 56, 84, 3, 30.0)
    records = [*RECORDS, *VIDEOS, row("7", "is this", ["grey", "cmyk"], [slow, quick])]
    for record in records:
        tokens = tokenize(record, published.processor, 2**20, 2**20)
        ids = tokens.prompt_ids
        placeholders = published.processor.placeholders
        placed = place(ids, tokens.layouts, placeholders, axes=3)
        made = their_inputs(published)(record, ids)
        if record.images or record.videos:
            grids = {name: made.get(name) for name in ("image_grid_thw", "video_grid_thw")}
            expected, delta = published.theirs.model.get_rope_index(
                torch.tensor(ids[None]),
                made["mm_token_type_ids"],
                second_per_grid_ts=made.get("second_per_grid_ts"),
                **grids,
            )
            np.testing.assert_array_equal(placed.positions, expected[:, 0].numpy())
            assert placed.next_position == len(ids) + delta.item()
        else:
            np.testing.assert_array_equal(placed.positions, np.tile(np.arange(len(ids)), (3, 1)))
            assert placed.next_position == len(ids)


def test_nothing_sees_the_padding(published):
    _, batch = checks.batch_of(published, RECORDS[:3])
    padding = batch.patches["frames"] == 0
    assert padding.mean() > 0.2
    other = np.where(padding[..., None], np.float32(1e3), batch.pixel_values)
    logits = [
        checks.response_logits(
            published.model, published.params, dataclasses.replace(batch, pixel_values=pixels)
        )
        for pixels in (batch.pixel_values, other)
    ]
    np.testing.assert_array_equal(*logits)


def test_cut_windows_share_slots(published):
    """33 x 33 tokens: 64 whole windows, and 17 cut ones of 4 tokens or 1 in 5 slots."""
    config = published.model.config
    images = published.processor.images
    processor = transformers.Qwen2VLImageProcessorPil()
    (layout,) = images.layouts(config, processor, [(33 * 28, 33 * 28)])
    assert len(layout.ids) == 33**2
    assert layout.slots == 64 + 5
    assert len(np.unique(layout.index)) == 33**2


# The published layout, from the state dict of transformers 5.
KEY_LAYOUTS = {
    "published": lambda key: key.replace("model.visual.", "visual.").replace(
        "model.language_model.", "model."
    ),
    "saved from 4.52 on": lambda key: key,
}


@pytest.mark.parametrize("layout", KEY_LAYOUTS)
def test_key_layouts(published, tmp_path, layout):
    (tmp_path / "config.json").write_bytes((published.folder / "config.json").read_bytes())
    tensors = {
        KEY_LAYOUTS[layout](key): tensor.contiguous()
        for key, tensor in published.theirs.state_dict().items()
    }
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    model, params = load_model(tmp_path)
    expected = flatten(published.params)
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(leaf, expected.pop(path), err_msg=path)
    assert not expected
    if layout == "published":
        save_model(tmp_path / "out", model, params, tmp_path)
        written = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
        assert {key: x.shape for key, x in written.items()} == {
            key: x.shape for key, x in tensors.items()
        }


def test_too_narrow_an_image_is_named(published):
    narrow = ImageRef("narrow.png", encode(noise("RGB", 402, 2)))
    with pytest.raises(MediaError, match=r"narrow\.png: 402 x 2 pixels.*200"):
        published.processor.layouts([narrow])
    record = dataclasses.replace(RECORDS[0], images=(narrow,))
    with pytest.raises(RowRejected, match=r"narrow\.png") as caught:
        tokenize(record, published.processor, 2**20, 2**20)
    assert caught.value.reason == "image_broken"


def test_frames_of_different_sizes_are_refused(published):
    clip = VideoRef("clip.mp4", (IMAGES["grey"], IMAGES["odd-size"]))
    with pytest.raises(MediaError, match=r"clip\.mp4: .*different sizes"):
        published.processor.pixels((), [clip])


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"text": {"rope_parameters": YARN}}, r"mrope_section is \[4, 2, 2\]"),
        ({"text": {"rope_parameters": {"rope_theta": 1e4}}}, r"mrope_section is \[16, 24, 24\]"),
        ({"vision": {"out_hidden_size": 64}}, "out_hidden_size is 64"),
        ({"vision": {"patch_size": [14, 14]}}, r"vision_config.patch_size is \[14, 14\]"),
        ({"vision": {"hidden_act": "tanh"}}, "vision_config.hidden_act is 'tanh'"),
    ],
)
def test_configs_that_do_not_fit(switches, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config(**switches))


@pytest.mark.parametrize("settings", [{"merge_size": 3}, {"patch_size": 16}, {"do_resize": False}])
def test_image_processors_that_do_not_fit(published, settings):
    processor = transformers.Qwen2VLImageProcessorPil(**settings)
    with pytest.raises(ModelError, match=next(iter(settings))):
        published.processor.images.layouts(published.model.config, processor, [(50, 50)])


def video_tokens(published, folder, **files):
    """How many tokens a video of 8 frames of 280 x 280 takes where these files are."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((published.folder / name).read_bytes())
    for name, settings in files.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    processor = Processor(folder, published.model.config)
    (layout,) = processor.videos.layouts(
        processor.config, processor.video_settings, [(8, 280, 280, None)]
    )
    return len(layout.ids)


def test_video_settings(published, tmp_path):
    area = 28**2
    image = {"image_processor_type": "Qwen2VLImageProcessor", "max_pixels": 9 * area}
    frame = {"size": {"shortest_edge": 4 * area, "longest_edge": 16 * area}}
    capped = frame | {"cap_pixels_per_frame": True, "max_video_tokens": 30}
    tokens = functools.partial(video_tokens, published, tmp_path)
    assert tokens(preprocessor_config=image) == 4 * 9
    assert tokens(video_preprocessor_config={"min_pixels": 4 * area}) == 4 * 10 * 10
    assert tokens(video_preprocessor_config=frame) == 4 * 16
    # 0.9 * 30 tokens over 4 steps, but a bit more than the least a frame may have.
    assert tokens(video_preprocessor_config=capped) == 4 * 4
    assert tokens(processor_config={"video_processor": frame | {"max_pixels": 25 * area}}) == 4 * 25
