"""Which frames of a file are shown: those that transformers' video processors choose."""

import importlib
import importlib.util
import types

import numpy as np
import pytest

from mmpo_jax.core.errors import DataError
from mmpo_jax.models import frame_sampling
from mmpo_jax.models.config import ModelError

LENGTHS = [(2, 30.0), (7, 1.0), (25, 10.0), (100, 29.97), (301, 24.0), (1000, 60.0), (5000, 25.0)]
SETTINGS = [
    {"num_frames": 2},
    {"num_frames": 6},
    {"num_frames": 7},
    {"num_frames": 32},
    {"fps": 1},
    {"fps": 2},
    {"fps": 0.3},
    {"fps": 2, "max_frames": 9, "min_frames": 3},
]
THEIRS = {
    "evenly": ("transformers.video_processing_utils", "BaseVideoProcessor"),
    "from_end_to_end": (
        "transformers.models.qwen3_vl.video_processing_qwen3_vl",
        "Qwen3VLVideoProcessor",
    ),
    "centred": ("transformers.models.internvl.video_processing_internvl", "InternVLVideoProcessor"),
    "whole_patches": (
        "transformers.models.qwen2_vl.video_processing_qwen2_vl",
        "Qwen2VLVideoProcessor",
    ),
}
"""Class of transformers; the last two are in modules that import torchvision."""


def theirs(name, settings, total, rate):
    """The indices of transformers' method, or the error that it raises."""
    from transformers.video_utils import VideoMetadata

    module, kind = THEIRS[name]
    method = getattr(importlib.import_module(module), kind).sample_frames
    own = {"num_frames": None, "fps": None, "initial_shift": True, "temporal_patch_size": 2}
    own |= {"min_frames": 4, "max_frames": 768} | settings
    asked = dict(own)
    if name == "from_end_to_end":  # which knows these from itself
        asked = {key: own[key] for key in ("num_frames", "fps")}
    if name == "evenly":
        asked = {key: own[key] for key in ("num_frames", "fps")}
    metadata = VideoMetadata(total_num_frames=total, fps=rate)
    try:
        return np.asarray(method(types.SimpleNamespace(**own), metadata=metadata, **asked))
    except (ValueError, RuntimeError, ZeroDivisionError) as error:
        return error


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", THEIRS)
def test_frames_are_those_of_transformers(name, settings):
    pytest.importorskip("torch")
    if name in ("centred", "whole_patches") and not importlib.util.find_spec("torchvision"):
        pytest.skip("its module needs torchvision")
    for total, rate in LENGTHS:
        expected = theirs(name, settings, total, rate)
        if name == "from_end_to_end" and "num_frames" in settings:
            settings = settings | {"fps": None}
        if isinstance(expected, Exception):
            with pytest.raises(DataError):
                getattr(frame_sampling, name)(settings, total, rate)
        else:
            found = getattr(frame_sampling, name)(settings, total, rate)
            np.testing.assert_array_equal(found, expected, err_msg=f"{total} {rate}")


def test_steps_are_those_of_torch():
    torch = pytest.importorskip("torch")
    for total in (1, 2, 7, 97, 301, 1000, 4999, 16_777):
        for count in {1, 2, 3, 8, 32, 33, 768} & set(range(1, total + 1)):
            for start in (0.0, total / count / 2):
                expected = torch.arange(start, total, total / count).int().numpy()
                found = frame_sampling._steps(start, total, count)
                np.testing.assert_array_equal(found, expected, err_msg=f"{total} {count}")


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("evenly", {}, range(10)),
        ("evenly", {"num_frames": 4}, [0, 2, 5, 7]),
        ("evenly", {"num_frames": 4, "do_sample_frames": False}, range(10)),
        ("evenly", {"fps": 1}, [0, 5]),
        ("centred", {}, range(10)),
        ("centred", {"num_frames": 4}, [1, 3, 6, 8]),
        ("centred", {"num_frames": 4, "initial_shift": 0}, [0, 2, 5, 7]),
        ("centred", {"fps": 1}, [2, 7]),
        ("whole_patches", {}, range(10)),
        ("whole_patches", {"num_frames": 5}, [0, 2, 5, 7]),
        ("whole_patches", {"fps": 1}, [0, 2, 5, 7]),
        ("whole_patches", {"fps": 3, "max_frames": 5}, [0, 2, 5, 7]),
        ("whole_patches", {"fps": 1, "temporal_patch_size": 3}, [0, 3, 6]),
        ("from_end_to_end", {}, [0, 3, 6, 9]),
        ("from_end_to_end", {"fps": None, "num_frames": 3}, [0, 4, 9]),
        ("from_end_to_end", {"fps": 5}, range(10)),
        ("from_end_to_end", {"do_sample_frames": False}, range(10)),
    ],
)
def test_ten_frames_at_five_a_second(name, settings, expected):
    found = getattr(frame_sampling, name)(settings, 10, 5.0)
    np.testing.assert_array_equal(found, list(expected))


@pytest.mark.parametrize("name", THEIRS)
def test_settings_that_contradict_each_other(name):
    with pytest.raises(ModelError, match="num_frames is 3 and its fps 2; one has to be null"):
        getattr(frame_sampling, name)({"num_frames": 3, "fps": 2}, 10, 5.0)


def test_too_few_frames():
    for name in ("evenly", "centred", "whole_patches"):
        with pytest.raises(DataError, match="12 frames are to be shown of a video of 10"):
            getattr(frame_sampling, name)({"num_frames": 12}, 10, 5.0)
