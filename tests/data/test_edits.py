"""Changed images: what each change does, that it is the same every time, and what it is part of."""

import collections
import copy
import dataclasses
import io
import itertools
import math

import numpy as np
import pytest
from PIL import Image

from mmpo_jax.data.edits import edit_image, edit_pixels
from mmpo_jax.data.images import open_image
from mmpo_jax.data.pixel_cache import PixelCache
from mmpo_jax.data.records import Edit, ImageRef

SIZE = (120, 90)


@pytest.fixture(scope="module")
def gradient():
    """Red says how far right a pixel is, green how far down."""
    x, y = np.meshgrid(np.arange(SIZE[0]), np.arange(SIZE[1]))
    return Image.fromarray(np.stack([2 * x, 2 * y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_a_crop_is_a_small_part_at_full_size(gradient):
    areas = []
    for seed in range(60):
        cropped = edit_image(gradient, Edit("crop", seed))
        assert cropped.size == gradient.size
        values = np.asarray(cropped).astype(float)
        # What is left of the gradient says which box it was.
        spread = [(values[..., i].max() - values[..., i].min()) / 2 + 1 for i in (0, 1)]
        areas.append(spread[0] * spread[1] / (SIZE[0] * SIZE[1]))
        assert 0.6 < spread[0] / spread[1] < 1.7
    assert 0.005 < min(areas) < 0.05 and 0.15 < max(areas) < 0.25
    assert np.std(areas) > 0.03


def test_a_crop_of_any_shape():
    for size in ((1, 1), (400, 2), (2, 400)):
        assert edit_image(Image.new("RGB", size, "red"), Edit("crop", 3)).size == size


def test_no_colour_and_another_angle(gradient):
    assert not np.asarray(edit_image(gradient, Edit("black"))).any()
    turned = edit_image(gradient, Edit("rotate", 1))
    assert turned.size == gradient.size
    assert np.abs(np.asarray(turned).astype(int) - np.asarray(gradient)).mean() > 10


def test_noise_is_that_of_the_diffusion_schedule():
    def remaining(step):
        kept = 1.0
        for i in range(step + 1):
            x = -6 + 12 * i / 999
            kept *= 1 - ((1 / (1 + math.exp(-x))) * (0.5e-2 - 1e-5) + 1e-5)
        return kept

    for step in (0, 500, 999):
        noisy = edit_pixels(np.full((3, 200, 200), 2.0, np.float32), Edit("noise", 5, step))
        assert noisy.dtype == np.float32
        kept = remaining(step)
        assert noisy.mean() == pytest.approx(2 * math.sqrt(kept), abs=0.02)
        assert noisy.std() == pytest.approx(math.sqrt(1 - kept), rel=0.02)
    assert not edit_pixels(np.ones((2, 3), np.float32), Edit("blank")).any()


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0])
def test_masked_patches_have_the_mean_colour_and_the_others_are_as_they_are(share):
    """Of two frames of 3 by 2 patches of 14 pixels, the last ones cut."""
    pixels = np.random.default_rng(0).standard_normal((2, 3, 40, 28)).astype(np.float32)
    masked = edit_pixels(pixels, Edit("masked", 4, share=share), 14)
    assert masked.dtype == np.float32 and masked.shape == pixels.shape
    hidden = 0
    for view, top, left in itertools.product(range(2), (0, 14, 28), (0, 14)):
        patch = np.s_[view, :, top : top + 14, left : left + 14]
        same, gone = np.array_equal(masked[patch], pixels[patch]), not masked[patch].any()
        assert same != gone
        hidden += gone
    assert hidden == 2 * round(6 * share)
    np.testing.assert_array_equal(masked[0] != 0, masked[1] != 0)  # the same in both


def test_masked_patches_of_a_model_that_is_given_patches():
    pixels = np.random.default_rng(0).standard_normal((3, 4, 24)).astype(np.float32)
    pixels[2, 2:] = 0  # no patches, but what fills the slot up
    masked = edit_pixels(pixels, Edit("masked", 1, share=0.5), 2)
    gone = ~masked.any(axis=2)
    assert gone.sum() == 5 + 2
    np.testing.assert_array_equal(masked[~gone], pixels[~gone])
    other = edit_pixels(pixels, Edit("masked", 2, share=0.5), 2)
    assert (gone != ~other.any(axis=2)).any()


def test_what_is_masked_in_the_whole_view_is_masked_in_the_tiles(gradient, tiny_processor):
    """Of a family whose views are the whole picture and its halves."""
    processor = copy.copy(tiny_processor)
    processor._pixels = collections.OrderedDict()
    _, height, width = processor.slot_shape
    boxes = ((0, 0, *SIZE), (0, 0, SIZE[0] // 2, SIZE[1]), (SIZE[0] // 2, 0, *SIZE))
    mean = np.array(processor.image_processor.image_mean)[:, None, None]

    def views(config, image_processor, images):
        made = [
            [np.asarray(image.resize((width, height), 0, box)) / 255 for box in boxes]
            for image in images
        ]
        return [(np.moveaxis(np.stack(one), 3, 1) - mean).astype(np.float32) for one in made]

    processor.images = dataclasses.replace(processor.images, pixels=views)
    plain = ImageRef("a", png(gradient))
    masked = dataclasses.replace(plain, edit=Edit("masked", 2, share=0.5))
    before, other, after = processor.pixels([plain, plain, masked])
    np.testing.assert_array_equal(before, other)
    gone = (np.abs(after) < 0.01).all(axis=1)
    assert gone[0].mean() == pytest.approx(0.5, abs=0.1)
    np.testing.assert_array_equal(
        after[~gone[:, None].repeat(3, 1)], before[~gone[:, None].repeat(3, 1)]
    )
    whole = np.concatenate([gone[1], gone[2]], axis=1)[:, ::2]
    assert (whole == gone[0]).mean() > 0.9  # but for pixels on the edges


@pytest.mark.parametrize("kind", ["crop", "rotate", "noise", "masked"])
def test_the_same_every_time_and_another_for_another_seed(gradient, tiny_processor, kind):
    plain = ImageRef("a", png(gradient))

    def pixels(seed):
        tiny_processor._kept_pixels = PixelCache()  # what is made again, not what was kept
        (made,) = tiny_processor.pixels(
            [dataclasses.replace(plain, edit=Edit(kind, seed, 500, 0.5))]
        )
        return made

    np.testing.assert_array_equal(pixels(1), pixels(1))
    assert np.abs(pixels(1) - pixels(2)).max() > 0.1


def test_an_edit_is_part_of_an_image(gradient, tiny_processor):
    """Of its fingerprint, of what is decoded, and of what is kept of its pixels."""
    images = [ImageRef("a", png(gradient))]
    kinds = ("black", "blank", "crop", "rotate", "noise", "masked")
    images += [dataclasses.replace(images[0], edit=Edit(kind, 1, 500, 0.3)) for kind in kinds]
    images.append(dataclasses.replace(images[0], edit=Edit("masked", 1, 500, 0.6)))
    images.append(dataclasses.replace(images[0], edit=Edit("noise", 1, 501)))
    assert len({image.fingerprint() for image in images}) == len(images)
    made = [tiny_processor.pixels([image])[0].tobytes() for image in images]
    assert len(set(made)) == len(images)
    assert [tiny_processor.pixels([image])[0].tobytes() for image in images] == made
    assert not np.asarray(open_image(images[1])).any()
    np.testing.assert_array_equal(open_image(images[-1]), gradient)  # changed later


def test_one_fingerprint_for_what_is_not_changed(gradient):
    """Caches of runs without changed images stay valid."""
    data = png(gradient)
    import hashlib

    assert ImageRef("a", data).fingerprint() == hashlib.sha256(data).hexdigest()
