"""Video frames: equal to what torch makes of them, and to transformers' own video processors."""

import importlib.util

import numpy as np
import pytest
from helpers import pictures

torch = pytest.importorskip("torch")
from helpers import checks, families  # noqa: E402
from PIL import Image  # noqa: E402

from mmpo_jax.data.records import ImageRef, VideoRef  # noqa: E402
from mmpo_jax.models.config import ModelError  # noqa: E402
from mmpo_jax.models.torch_resize import frame_pixels, resize  # noqa: E402

pytestmark = pytest.mark.parity

SETTINGS = {
    "size": {"height": 56, "width": 56},
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "do_center_crop": None,
    "num_frames": 8,
}


@pytest.fixture(scope="module")
def frames():
    return checks.load(pictures.clip(3).frames)


def interpolate(video, size, mode="bicubic"):
    """As transformers' video processors call it through torchvision, on uint8[F, C, H, W]."""
    return torch.nn.functional.interpolate(torch.tensor(video), size, mode=mode, antialias=True)


def as_video(frames):
    return np.stack([np.asarray(frame) for frame in frames]).transpose(0, 3, 1, 2)


@pytest.mark.parametrize(("resample", "mode"), [(1, "lanczos"), (2, "bilinear"), (3, "bicubic")])
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((50, 70), (364, 504)),
        ((70, 50), (420, 308)),
        ((150, 200), (140, 196)),
        ((480, 640), (252, 336)),
        ((300, 4000), (28, 28)),
        ((37, 41), (37, 90)),
        ((37, 41), (90, 41)),
        ((3, 2), (56, 56)),
        ((1, 1), (28, 28)),
    ],
)
def test_resizing_is_that_of_torch(old, new, resample, mode):
    """Of noise, where rounding shows most, and of black and white, where it overshoots."""
    rng = np.random.default_rng(0)
    for values in (256, 2):
        image = (rng.integers(0, values, (3, *old)) * (255 // (values - 1))).astype(np.uint8)
        expected = interpolate(image[None], new, mode)[0].numpy()
        np.testing.assert_array_equal(resize(image, new, resample), expected)


def test_frames(frames):
    resized = interpolate(as_video(frames), (56, 56)).numpy()
    mean, deviation = (
        np.array(SETTINGS[name])[:, None, None] for name in ("image_mean", "image_std")
    )
    actual = frame_pixels(SETTINGS, frames, (3, 56, 56))
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, (resized / 255 - mean) / deviation, rtol=0, atol=1e-5)


def test_defaults_and_shortest_edge(frames):
    """Of both LLaVA-OneVision's and InternVL's processors: CLIP's, at 384 pixels."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    (resized,) = interpolate(as_video(frames[:1]), (384, 384)).numpy()
    (pixels,) = frame_pixels({}, frames[:1], (3, 384, 384))
    np.testing.assert_allclose(pixels, (resized / 255 - mean) / deviation, rtol=0, atol=1e-5)
    cut = {"size": {"shortest_edge": 60}, "do_center_crop": True, "crop_size": {"height": 56}}
    cut["crop_size"]["width"] = 56
    (resized,) = interpolate(as_video(frames[:1]), (60, 80)).numpy()[..., 2:58, 12:68]
    (pixels,) = frame_pixels(cut, frames[:1], (3, 56, 56))
    np.testing.assert_allclose(pixels, (resized / 255 - mean) / deviation, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"shape \(3, 56, 56\), the vision tower takes \(3, 28"),
        ({"resample": 0}, "resample is 0, expected one of"),
        ({"size": {"max_height": 28, "max_width": 28}}, "expected height and width, or shortest"),
    ],
)
def test_settings_that_do_not_fit_are_refused(frames, settings, message):
    with pytest.raises(ModelError, match=message):
        frame_pixels(SETTINGS | settings, frames, (3, 28, 28))


@pytest.mark.skipif(not importlib.util.find_spec("torchvision"), reason="needs torchvision")
@pytest.mark.parametrize("size", [(50, 70), (70, 50), (200, 150), (640, 480)])
@pytest.mark.parametrize("name", families.VIDEO_SETTINGS)
def test_pixels_equal_the_video_processor(family_case, name, size):
    """transformers' own, from the same file."""
    import transformers

    case = family_case(name)
    processor = transformers.AutoVideoProcessor.from_pretrained(
        case.folder, video_processor_type=f"{FULL_NAMES[name]}VideoProcessor"
    )
    shown = [pictures.noise("RGB", *size), Image.new("RGB", size, (255, 0, 7))] * 2
    clip = VideoRef("clip", tuple(ImageRef("frame", pictures.encode(frame)) for frame in shown))
    made = processor([as_video(shown)], do_sample_frames=False, return_tensors="np")
    made = made["pixel_values" if name == "smolvlm" else "pixel_values_videos"]
    (ours,) = case.processor.pixels((), [clip])
    if name in families.GEMMA4:
        made = [made]  # the frames of all videos
    if name in families.QWEN:
        (layout,) = case.processor.layouts((), [clip])
        tokens = ours.reshape(layout.features, -1)[layout.index[:, 0]]
        ours, made = tokens.reshape(-1, ours.shape[-1]), [made]
    np.testing.assert_allclose(ours, made[0], rtol=0, atol=1e-5)


FULL_NAMES = {
    "llava_onevision": "LlavaOnevision",
    "internvl": "InternVL",
    "smolvlm": "SmolVLM",
    "qwen2_5_vl": "Qwen2VL",
    "qwen3_vl": "Qwen3VL",
    "qwen3_vl_moe": "Qwen3VL",
    "qwen3_5": "Qwen3VL",
    "qwen3_5_moe": "Qwen3VL",
    **dict.fromkeys(families.GEMMA4, "Gemma4"),
    "gemma4_unified": "Gemma4Unified",
}
