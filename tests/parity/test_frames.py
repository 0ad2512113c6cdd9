"""Video frames: what torchvision would make of them, up to its rounding, and a sum done by hand."""

import numpy as np
import pictures
import pytest

torch = pytest.importorskip("torch")
import checks  # noqa: E402

from mmpo_jax.models.config import ModelError  # noqa: E402
from mmpo_jax.models.frames import frame_pixels  # noqa: E402

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


def test_frames(frames):
    """transformers' video processors call torchvision, which calls this function of torch."""
    video = torch.tensor(np.stack([np.asarray(frame) for frame in frames])).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(video, (56, 56), mode="bicubic", antialias=True)
    mean, deviation = (
        np.array(SETTINGS[name])[:, None, None] for name in ("image_mean", "image_std")
    )
    expected = (resized.numpy() / 255 - mean) / deviation
    actual = frame_pixels(SETTINGS, frames, (3, 56, 56))
    assert actual.dtype == np.float32
    levels = np.abs(actual - expected) * deviation * 255
    assert levels.max() < 1.01  # torch rounds between the two passes as Pillow does, nearly
    assert levels.mean() < 0.01


def test_defaults(frames):
    """Of both LLaVA-OneVision's and InternVL's processors: CLIP's, at 384 pixels."""
    pixels = frame_pixels({}, frames[:1], (3, 384, 384))
    resized = np.asarray(frames[0].resize((384, 384), 3), np.float64) / 255
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    expected = ((resized - mean) / deviation).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels[0], expected, rtol=0, atol=1e-5)


def test_frames_of_another_shape_are_refused(frames):
    with pytest.raises(ModelError, match=r"shape \(3, 56, 56\), the vision tower takes \(3, 28"):
        frame_pixels(SETTINGS, frames, (3, 28, 28))
