"""The pixels a model sees: equal to transformers' processor and to a sum done by hand."""

import numpy as np
import pictures
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


IMAGES = pictures.IMAGES | {"exact-size": pictures.encode(pictures.noise("RGB", SIZE, SIZE))}


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
