"""Qwen3-VL against transformers: logits, greedy decoding, folders, positions, times and pixels."""

import functools
import json
import re
import types

import numpy as np
import pytest

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from helpers import checks, qwen_media  # noqa: E402
from helpers.deep_media import IDS, make_case, their_inputs, their_videos  # noqa: E402
from helpers.pictures import encode, noise  # noqa: E402
from helpers.qwen_media import (  # noqa: E402
    IMAGES,
    RECORDS,
    TIMED,
    VIDEOS,
    in_their_order,
    row,
    their_images,
    video,
)
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize  # noqa: E402

from mmpo_jax.data.media_pixels import MediaError  # noqa: E402
from mmpo_jax.data.processor import Processor  # noqa: E402
from mmpo_jax.data.records import ImageRef, VideoRef  # noqa: E402
from mmpo_jax.data.skipped import UnusableRow  # noqa: E402
from mmpo_jax.data.tokenization import tokenize  # noqa: E402
from mmpo_jax.models.config import ModelError  # noqa: E402
from mmpo_jax.models.family import Clip  # noqa: E402
from mmpo_jax.models.model import read_config  # noqa: E402

pytestmark = pytest.mark.parity

TEXT = checks.TEXT | {
    "vocab_size": len(IDS) + 2,
    "num_hidden_layers": 3,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [4, 2, 2]},
}
VISION = {
    "depth": 4,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 16,
    "num_position_embeddings": 25,
    "deepstack_visual_indexes": [0, 2],
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "mrope_section": [3, 2, 3],
}


def make_config(text=(), vision=(), kind=transformers.Qwen3VLConfig, **switches):
    return qwen_media.make_config(kind, IDS, TEXT | dict(text), VISION | dict(vision), **switches)


def make_mixture(text=(), vision=(), **switches):
    kind = transformers.Qwen3VLMoeConfig
    untied = {"tie_word_embeddings": False}
    return make_config(untied | checks.EXPERTS | dict(text), vision, kind, **switches)


CASES = {
    # The published sizes of patches, and as many levels as layers of the decoder.
    "published-patches": make_config((), {"deepstack_visual_indexes": [0, 1, 3]}),
    "small-patches-tied-biases": make_config(
        {"attention_bias": True, "num_key_value_heads": 1},
        {"patch_size": 6, "num_heads": 4, "num_position_embeddings": 9, "hidden_act": "gelu"}
        | {"deepstack_visual_indexes": [2], "intermediate_size": 24},
        tie_word_embeddings=True,
    ),
    "merge-of-three-yarn": make_config(
        {"rope_parameters": YARN, "num_attention_heads": 2},
        {"patch_size": 4, "spatial_merge_size": 3, "num_heads": 1, "temporal_patch_size": 3}
        | {"num_position_embeddings": 144, "deepstack_visual_indexes": [1, 2]},
    ),
    "no-levels-one-position": make_config(
        {"num_hidden_layers": 2, "num_key_value_heads": 4, "hidden_act": "gelu"},
        {"patch_size": 4, "depth": 2, "num_position_embeddings": 1}
        | {"deepstack_visual_indexes": []},
    ),
    "mixture": make_mixture(),
    "mixture-dense-layer-biases": make_mixture(
        {"mlp_only_layers": [1], "attention_bias": True, "num_experts_per_tok": 3},
        {"patch_size": 6, "deepstack_visual_indexes": [1, 2]},
    ),
    # 2 F is D: transformers takes the axes of such tensors to be as they are in memory.
    "mixture-every-other-layer": make_mixture(
        {"decoder_sparse_step": 2, "num_experts": 4, "moe_intermediate_size": 16},
        {"patch_size": 4, "deepstack_visual_indexes": []},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("qwen") / request.param, CASES[request.param])


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("qwen") / "one", CASES["published-patches"])


def test_logits(case):
    videos = [*VIDEOS, *TIMED]
    if case.theirs.config.vision_config.temporal_patch_size > 2:
        videos = [VIDEOS[0], TIMED[0]]  # one of the others is of two frames
    checks.check_logits(case, [*RECORDS, *videos], their_inputs(case))


def test_text_only(published):
    checks.check_logits(published, [RECORDS[2]], their_inputs(published))


@pytest.mark.slow
def test_greedy_decoding(case):
    records = [*RECORDS, *TIMED]
    checks.check_greedy(case, records, their_inputs(case))


def test_greedy_decoding_of_a_few_tokens(published):
    checks.check_greedy(published, [RECORDS[0], VIDEOS[0]], their_inputs(published), length=6)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_equal_the_hugging_face_processor(published, name):
    qwen_media.check_image_pixels(published, name)


def test_a_large_image(published):
    """Through the published processor's limits: 4000 x 3000 pixels, 125 x 94 tokens."""
    processor = transformers.Qwen2VLImageProcessorPil(
        patch_size=16, size={"shortest_edge": 2**16, "longest_edge": 2**24}
    )
    config = published.model.config
    (layout,) = published.processor.images.layouts(config, processor, [(3000, 4000)])
    assert len(layout.ids) == processor.get_number_of_image_patches(3000, 4000) // 4 == 94 * 125
    assert layout.slots == -(-94 * 125 // config.vision.slot_tokens)


def test_frames_equal_torch_resizing(case):
    """As transformers' video processor resizes."""
    clips = [video("clip", 150, 170, 3, 2.0), video("odd", 50, 70, 4, None)]
    record = row("0", "", (), clips)
    expected = their_videos(case, record)[0]
    layouts = case.processor.layouts((), record.videos)
    made = case.processor.pixels((), record.videos)
    actual = np.concatenate([in_their_order(*both) for both in zip(made, layouts, strict=True)])
    np.testing.assert_allclose(actual, expected.numpy(), rtol=0, atol=1e-5)


def test_positions(published):
    for record in [*RECORDS, *VIDEOS, *TIMED]:
        ids = tokenize(record, published.processor, 2**20, 2**20).prompt_ids
        qwen_media.check_positions(published, record, their_inputs(published)(record, ids))


def their_text(case, record):
    """The prompt as transformers' own processor expands the rendered one."""
    theirs = transformers.Qwen3VLProcessor
    tower = case.theirs.config.vision_config
    settings = types.SimpleNamespace(
        merge_size=tower.spatial_merge_size, temporal_patch_size=tower.temporal_patch_size
    )
    processor = types.SimpleNamespace(
        image_token="<image>",
        video_token="<video>",
        vision_start_token="<vision>",
        vision_end_token="</vision>",
        image_processor=settings,
        video_processor=settings,
        _calculate_timestamps=functools.partial(theirs._calculate_timestamps, None),
    )
    made = {}
    if record.images:
        made["image_grid_thw"] = their_images(case, record)["image_grid_thw"]
    if record.videos:
        made["video_grid_thw"] = their_videos(case, record)[1]
        made["video_metadata"] = [
            types.SimpleNamespace(fps=clip.fps, frames_indices=list(range(len(clip.frames))))
            for clip in record.videos
        ]
    images = (theirs.replace_image_token(processor, made, i) for i in range(len(record.images)))
    videos = (theirs.replace_video_token(processor, made, i) for i in range(len(record.videos)))
    return re.sub(
        "<(image|video)>",
        lambda found: next({"image": images, "video": videos}[found[1]]),
        checks.rendered(case, record),
    )


def test_tokens(case):
    records = [*RECORDS, *TIMED, VIDEOS[0]]
    for record in records:
        text = their_text(case, record)
        checks.check_tokens(case, record, text)
    assert text.startswith("<s> USER: <vision> <0.") and text.count(" seconds>") >= 2


def test_nothing_sees_the_padding(published):
    qwen_media.check_padding(published)


def test_too_narrow_an_image_is_named(published):
    narrow = ImageRef("narrow.png", encode(noise("RGB", 402, 2)))
    with pytest.raises(MediaError, match=r"narrow\.png: 402 x 2 pixels.*200"):
        published.processor.layouts([narrow])


@pytest.mark.parametrize(
    ("clip", "reason", "message"),
    [
        (
            video("still.mp4", 40, 40, 1, None),
            "video_length",
            r"still\.mp4: a video of 1 frames.* 2 or more",
        ),
        (
            video("narrow.mp4", 8200, 32, 2, None),
            "image_size",
            r"narrow\.mp4: 8200 x 32 pixels.*200 times",
        ),
    ],
)
def test_videos_that_the_model_cannot_take_are_named(published, clip, reason, message):
    with pytest.raises(MediaError, match=message):
        published.processor.layouts((), [clip])
    with pytest.raises(UnusableRow, match=message.partition(":")[0]) as caught:
        tokenize(row("0", "what", (), [clip]), published.processor, 2**20, 2**20)
    assert caught.value.reason == reason


def test_frames_of_different_sizes_are_refused(published):
    clip = VideoRef("clip.mp4", (IMAGES["grey"], IMAGES["odd-size"]))
    with pytest.raises(MediaError, match=r"clip\.mp4: .*different sizes"):
        published.processor.pixels((), [clip])


SIZES = [(20, 30), (31, 33), (64, 64), (37, 900), (480, 640), (1080, 1920), (3000, 200)]
LIMITS = [(4096, 25165824), (128 * 1024, 768 * 1024), (2**22, 2**23)]


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("frames", [2, 3, 8, 33])
def test_frame_sizes(published, frames, limits):
    """Tokens of a frame are those of the video processor, over many sizes."""
    least, most = limits
    settings = {"size": {"shortest_edge": least, "longest_edge": most}}
    config = published.model.config
    for size in SIZES:
        expected = smart_resize(frames, *size, 2, 32, least, most)
        (layout,) = published.processor.videos.layouts(config, settings, [Clip(frames, size)])
        tokens = expected[0] * expected[1] // 32**2
        assert len(layout.ids) == tokens * -(-frames // 2), size
        assert layout.span == max(expected) // 32


def video_tokens(published, folder, **files):
    """How many tokens a video of 8 frames of 320 x 320 takes where these files are."""
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).write_bytes((published.folder / name).read_bytes())
    for name, settings in files.items():
        (folder / f"{name}.json").write_text(json.dumps(settings))
    processor = Processor(folder, published.model.config)
    (layout,) = processor.videos.layouts(
        processor.config, processor.video_settings, [Clip(8, (320, 320))]
    )
    return len(layout.ids)


def test_video_settings(published, tmp_path):
    area = 32**2
    image = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": 16}
    image["size"] = {"shortest_edge": 4 * area, "longest_edge": 8 * 9 * area}
    clip = {"size": {"shortest_edge": 4 * area, "longest_edge": 8 * 16 * area}}
    capped = clip | {"cap_pixels_per_frame": True, "max_video_tokens": 4}
    tokens = functools.partial(video_tokens, published, tmp_path)
    assert tokens(preprocessor_config=image) == 4 * 9
    assert tokens(video_preprocessor_config={}) == 4 * 81  # 768 of all 8 frames
    assert tokens(video_preprocessor_config=clip) == 4 * 16
    assert tokens(video_preprocessor_config=capped) == 4 * 4
    shared = clip | {"cap_pixels_per_frame": True}
    assert tokens(video_preprocessor_config=shared) == 4 * 16
    floored = {"shortest_edge": 25 * area, "longest_edge": 2**24}
    assert tokens(processor_config={"video_processor": capped | {"size": floored}}) == 4 * 25


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"text": {"rope_parameters": YARN | {"mrope_section": [4, 2]}}}, r"is \[4, 2\]"),
        ({"text": {"rope_parameters": {"rope_theta": 1e4}}}, r"mrope_section is \[24, 20, 20\]"),
        ({"text": {"sliding_window": 7}}, "sliding_window is 7"),
        ({"vision": {"out_hidden_size": 64}}, "out_hidden_size is 64"),
        ({"vision": {"patch_size": [16, 16]}}, r"vision_config.patch_size is \[16, 16\]"),
        ({"vision": {"hidden_act": "tanh"}}, "vision_config.hidden_act is 'tanh'"),
        ({"vision": {"num_position_embeddings": 24}}, "num_position_embeddings is 24"),
        ({"vision": {"deepstack_visual_indexes": [2, 1]}}, r"indexes is \[2, 1\].*ascending"),
        ({"vision": {"deepstack_visual_indexes": [1, 4]}}, r"indexes is \[1, 4\].* 4 layers"),
    ],
)
def test_configs_that_do_not_fit(switches, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config(**switches))


def test_video_processors_that_do_not_fit(published):
    config = published.model.config
    for settings in ({"patch_size": 14}, {"do_resize": False}):
        with pytest.raises(ModelError, match=next(iter(settings))):
            published.processor.videos.pixels(config, settings, [])
