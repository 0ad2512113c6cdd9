"""Qwen2.5-VL against transformers: logits, greedy decoding, folders, positions and pixels."""

import dataclasses
import functools
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import safetensors.torch  # noqa: E402
import transformers  # noqa: E402
from helpers import checks, qwen_media  # noqa: E402
from helpers.pictures import encode, noise  # noqa: E402
from helpers.qwen_media import (  # noqa: E402
    IMAGES,
    MEDIA,
    RECORDS,
    TIMED,
    VIDEOS,
    in_their_order,
    row,
    their_images,
    video,
)

from mmpo_jax.checkpoints.huggingface import load_model, save_model  # noqa: E402
from mmpo_jax.core.trees import flatten  # noqa: E402
from mmpo_jax.data.media_pixels import MediaError  # noqa: E402
from mmpo_jax.data.processor import Processor  # noqa: E402
from mmpo_jax.data.records import ImageRef, VideoRef  # noqa: E402
from mmpo_jax.data.skipped import UnusableRow  # noqa: E402
from mmpo_jax.data.tokenization import tokenize  # noqa: E402
from mmpo_jax.models.config import ModelError  # noqa: E402
from mmpo_jax.models.family import Clip  # noqa: E402
from mmpo_jax.models.model import read_config  # noqa: E402

pytestmark = pytest.mark.parity

IDS = checks.token_ids(*MEDIA)
TEXT = checks.TEXT | {
    "vocab_size": len(IDS) + 2,
    "max_position_embeddings": 512,
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
    return qwen_media.make_config(
        transformers.Qwen2_5_VLConfig, IDS, TEXT | dict(text), VISION | dict(vision), **switches
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


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("qwen") / request.param, CASES[request.param])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("qwen") / "one", CASES["published-windows"])


def make_case(folder, config):
    qwen_media.save_tokenizer(folder, MEDIA)
    theirs = transformers.Qwen2_5_VLForConditionalGeneration(config)
    return checks.make_case(folder, theirs, qwen_media.image_processor(config.vision_config))


def their_video(case, record):
    """(pixels, [time steps, rows, columns], seconds of a time step) of a record's videos."""
    tower = case.theirs.config.vision_config
    values, grids, seconds = [], [], []
    for clip in record.videos:
        # Frames are as large as images.
        images = dataclasses.replace(RECORDS[2], images=clip.frames[:1])
        _, rows, columns = their_images(case, images)["image_grid_thw"][0].tolist()
        made, grid = qwen_media.their_video(
            case, clip, (rows * tower.patch_size, columns * tower.patch_size)
        )
        values.append(made)
        grids.append(grid)
        seconds.append(tower.temporal_patch_size / (clip.fps or 24))
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


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_equal_the_hugging_face_processor(published, name):
    qwen_media.check_image_pixels(published, name)


def test_frames_equal_torch_resizing(case):
    """As transformers' video processor resizes."""
    record = row("0", "", (), [video("clip", 150, 170, 3, 2.0), video("odd", 50, 70, 4, None)])
    expected = their_video(case, record)[0]
    layouts = case.processor.layouts((), record.videos)
    made = case.processor.pixels((), record.videos)
    actual = np.concatenate([in_their_order(*both) for both in zip(made, layouts, strict=True)])
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5)


def test_positions(published):
    for record in [*RECORDS, *VIDEOS, *TIMED]:
        ids = tokenize(record, published.processor, 2**20, 2**20).prompt_ids
        qwen_media.check_positions(published, record, their_inputs(published)(record, ids))


def test_nothing_sees_the_padding(published):
    qwen_media.check_padding(published)


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
    with pytest.raises(UnusableRow, match=r"narrow\.png") as caught:
        tokenize(record, published.processor, 2**20, 2**20)
    assert caught.value.reason == "image_size"


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
        processor.config, processor.video_settings, [Clip(8, (280, 280))]
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
