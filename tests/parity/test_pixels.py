"""The pixels a model sees: equal to transformers' processor and to a sum done by hand."""

import io

import numpy as np
import pytest
import tiny
from PIL import Image

from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef
from mmpo_jax.models.model import load_config

pytest.importorskip("torch")
from transformers import AutoTokenizer, CLIPImageProcessorPil, LlavaProcessor
from transformers.image_utils import load_image

pytestmark = pytest.mark.parity

SIZE = 48


def noise(mode, width, height):
    bands = {"L": (), "RGB": (3,), "RGBA": (4,)}[mode]
    rng = np.random.default_rng(0)
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
    "one-pixel": encode(noise("RGB", 1, 1)),
    "wide": encode(noise("RGB", 4000, 300)),
    "tall": encode(noise("RGB", 300, 4000)),
    "odd-size": encode(noise("RGB", 83, 61)),
    "exact-size": encode(noise("RGB", SIZE, SIZE)),
    "grey": encode(noise("L", 70, 90)),
    "transparent": encode(noise("RGBA", 70, 90)),
    "palette": encode(noise("RGB", 70, 90).quantize(37), "GIF"),
    "cmyk": encode(noise("RGB", 70, 90).convert("CMYK"), "JPEG"),
    "turned-by-exif": rotated_jpeg(),
}


@pytest.fixture(scope="module")
def processors(tmp_path_factory):
    config = tiny.make_config({"image_size": SIZE})
    folder = tiny.make_folder(tmp_path_factory.mktemp("pixels") / "llava", config)
    theirs = LlavaProcessor(
        image_processor=CLIPImageProcessorPil.from_pretrained(folder),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return Processor(folder, load_config(folder)), theirs


@pytest.mark.parametrize("name", IMAGES)
def test_pixels_equal_the_hugging_face_processor(processors, tmp_path, name):
    ours, theirs = processors
    path = tmp_path / name
    path.write_bytes(IMAGES[name])
    image = load_image(str(path))
    expected = theirs(images=image, text="<image>", return_tensors="np")["pixel_values"][0]
    ((actual,),) = ours.pixels([ImageRef(name, IMAGES[name])])
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_allclose(actual, by_hand(image), rtol=0, atol=1e-5)
    cached = ours.pixels([ImageRef(name, IMAGES[name])])
    np.testing.assert_array_equal(cached[0][0], expected)


def by_hand(image):
    """Shortest edge to SIZE, the middle of it, CLIP's mean and deviation: [C, H, W]."""
    width, height = image.size
    short = min(width, height)
    size = tuple(int(SIZE * edge / short) for edge in (width, height))
    resized = np.asarray(image.resize(size, Image.Resampling.BICUBIC), np.float64) / 255
    top, left = ((edge - SIZE) // 2 for edge in resized.shape[:2])
    cut = resized[top : top + SIZE, left : left + SIZE]
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    return ((cut - mean) / deviation).transpose(2, 0, 1)
