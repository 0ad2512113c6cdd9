"""The pixels a model sees: equal to transformers' processor and to a sum done by hand."""

import json

import numpy as np
import pytest
from helpers import pictures, tiny
from PIL import Image

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef

pytest.importorskip("torch")
from transformers import (
    AutoTokenizer,
    CLIPImageProcessorPil,
    LlavaImageProcessorPil,
    LlavaProcessor,
)
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


SQUARES = IMAGES | {
    name: pictures.encode(pictures.noise("RGB", *size))
    for name, size in {"a-row": (60, 1), "a-column": (1, 47), "large": (2400, 1801)}.items()
}


@pytest.fixture(scope="module")
def padding(tmp_path_factory):
    """(our processor, transformers') of a folder whose pictures are padded to squares."""
    folder = tmp_path_factory.mktemp("padding") / "llava"
    tiny.make_folder(folder, tiny.make_config({"image_size": SIZE}))
    size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    theirs = LlavaImageProcessorPil(do_pad=True, **size)
    for file in ("processor_config.json", "preprocessor_config.json"):
        (folder / file).unlink(missing_ok=True)
    theirs.save_pretrained(folder)
    path = folder / "preprocessor_config.json"
    settings = json.loads(path.read_text()) | {"image_processor_type": "LlavaImageProcessor"}
    path.write_text(json.dumps(settings))
    return Processor(folder, load_config(folder)), theirs


@pytest.mark.parametrize("name", SQUARES)
def test_pixels_of_padded_squares(padding, tmp_path, name):
    ours, theirs = padding
    path = tmp_path / name
    path.write_bytes(SQUARES[name])
    image = load_image(str(path))
    ((actual,),) = ours.pixels([ImageRef(name, SQUARES[name])])
    expected = theirs(images=image, return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(actual, expected)
    np.testing.assert_allclose(actual, by_hand(square(image)), rtol=0, atol=1e-5)


def square(image):
    """In the middle of a square of CLIP's mean colour, as LLaVA's own code has it."""
    edge = max(image.size)
    around = Image.new("RGB", (edge, edge), (122, 116, 104))
    around.paste(image, tuple((edge - length) // 2 for length in image.size))
    return around
