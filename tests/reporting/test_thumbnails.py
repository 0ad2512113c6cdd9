"""Small pictures: never above their size, upright, the same bytes again."""

import io

import numpy as np
import pytest
from helpers.report_runs import picture
from PIL import Image

from mmpo_jax.data.records import ImageRef, VideoRef
from mmpo_jax.reporting.thumbnails import EDGE, MAX_BYTES, make_thumbnail


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("size", [(1200, 900), (300, 3000), (97, 97)])
def test_noise_is_small_enough(size):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    written = io.BytesIO()
    Image.fromarray(pixels).save(written, "PNG")
    data = make_thumbnail(ImageRef("noise", data=written.getvalue()))
    assert len(data) <= MAX_BYTES
    assert max(opened(data).size) <= EDGE
    width, height = opened(data).size
    assert width / height == pytest.approx(size[0] / size[1], rel=0.1)
    assert make_thumbnail(ImageRef("noise", data=written.getvalue())) == data


def test_a_small_picture_is_kept_as_it_is():
    data = picture(3, 40)
    kept = np.asarray(opened(make_thumbnail(ImageRef("a", data=data))).convert("RGB"))
    np.testing.assert_array_equal(kept, np.asarray(opened(data)))


def test_a_video_is_its_middle_frame():
    frames = tuple(ImageRef(f"{number}", data=picture(number, 40)) for number in range(5))
    assert make_thumbnail(VideoRef("clip", frames)) == make_thumbnail(frames[2])


def test_a_broken_picture_is_none():
    broken = ImageRef("a", data=b"no picture")
    assert make_thumbnail(broken) is None
    assert make_thumbnail(VideoRef("clip", (broken,))) is None
