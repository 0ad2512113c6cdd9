"""Drawings: sizes, determinism, things in their cells, and kinds that look different."""

import io

import numpy as np
import pytest
from PIL import Image

from mmpo_jax.picture_world.render import MIN_IMAGE_SIZE, png_bytes, render
from mmpo_jax.picture_world.world import KINDS, Scene, Thing, sample_scene


def pixels(scene, size=48):
    return np.asarray(render(scene, size)).astype(int)


def inked(scene, size):
    """Where the image differs from its background, which is its most frequent colour."""
    image = pixels(scene, size)
    colours, counts = np.unique(image.reshape(-1, 3), axis=0, return_counts=True)
    return np.abs(image - colours[counts.argmax()]).max(axis=-1) > 16


@pytest.mark.parametrize("size", [24, 48, 336])
def test_size_and_mode(size):
    image = render(sample_scene("train", 0, 0), size)
    assert image.size == (size, size)
    assert image.mode == "RGB"


def test_too_small_is_refused():
    with pytest.raises(ValueError, match="at least 24"):
        render(sample_scene("train", 0, 0), MIN_IMAGE_SIZE - 1)


def test_drawing_is_deterministic_and_jittered():
    things = sample_scene("train", 0, 0).things
    assert np.array_equal(pixels(Scene(things, 1)), pixels(Scene(things, 1)))
    assert not np.array_equal(pixels(Scene(things, 1)), pixels(Scene(things, 2)))


@pytest.mark.parametrize("size", [24, 48, 336])
def test_things_are_in_their_cells_and_nothing_is_elsewhere(size):
    for i in range(5):
        scene = sample_scene("test", 0, i)
        ink = inked(scene, size)
        cells = ink.reshape(3, size // 3, 3, size // 3).mean(axis=(1, 3))
        occupied = np.zeros((3, 3), bool)
        for thing in scene.things:
            occupied[thing.row, thing.column] = True
        assert (cells[occupied] > 0.1).all()
        assert (cells[~occupied] == 0).all()


@pytest.mark.parametrize("size", [24, 48, 336])
def test_kinds_are_pairwise_distinguishable(size):
    images = [pixels(Scene((Thing(1, 1, k.shape, k.colour),), 7), size) for k in KINDS]
    cell = (size // 3) ** 2
    for i, a in enumerate(images):
        for b in images[:i]:
            differing = (np.abs(a - b).max(axis=-1) > 60).sum()
            assert differing > 0.08 * cell


def test_png_decodes_to_the_drawing():
    scene = sample_scene("train", 0, 3)
    decoded = Image.open(io.BytesIO(png_bytes(scene, 30)))
    assert decoded.format == "PNG"
    assert np.array_equal(np.asarray(decoded), pixels(scene, 30))
