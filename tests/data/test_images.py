"""Images decode as `transformers.image_utils.load_image` does, and errors name the file."""

import io
import os

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_bytes
from mmpo_jax.data import images
from mmpo_jax.data.images import image_problem, image_size, open_image, resolve_image
from mmpo_jax.data.records import ImageRef

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 4), dtype=np.uint8)


def save(path, mode, **options):
    if mode == "I;16":
        image = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 256)
    elif mode == "CMYK":
        image = Image.fromarray(PIXELS, "CMYK")
    else:
        image = Image.fromarray(PIXELS).convert(mode)
    image.save(path, **options)
    return path


def ref(path):
    return ImageRef(path.name, path=path)


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize(
    ("name", "mode"),
    [
        ("a.png", "RGB"),
        ("a.jpg", "RGB"),
        ("a.png", "L"),
        ("a.png", "1"),
        ("a.png", "LA"),
        ("a.png", "RGBA"),
        ("a.png", "P"),
        ("a.png", "I;16"),
        ("a.tif", "CMYK"),
        ("a.jpg", "CMYK"),
        ("a.webp", "RGBA"),
        ("a.gif", "P"),
    ],
)
def test_modes_equal_load_image(tmp_path, name, mode):
    path = save(tmp_path / name, mode)
    ours = open_image(ref(path))
    assert ours.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_equals_load_image(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "a.jpg", "RGB", exif=exif)
    ours = open_image(ref(path))
    assert ours.size == ((6, 9) if orientation >= 5 else (9, 6))
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(load_image(str(path))))


def test_bytes_and_file_are_the_same(tmp_path):
    path = save(tmp_path / "a.jpg", "RGB")
    from_bytes = open_image(ImageRef("row 1", data=path.read_bytes()))
    assert from_bytes.tobytes() == open_image(ref(path)).tobytes()


def truncated(path):
    save(path, "RGB")
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_truncated(tmp_path, name):
    truncated(tmp_path / name)
    with pytest.raises(DataError, match=f"{name} is damaged"):
        open_image(ref(tmp_path / name))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_is_a_data_error(tmp_path):
    rng = np.random.default_rng(1)
    failures = 0
    for name in ("a.png", "a.gif", "a.tif", "a.webp", "a.jpg"):
        whole = save(tmp_path / name, "RGB").read_bytes()
        for _ in range(60):
            data = bytearray(whole)
            for place in rng.integers(0, len(data), 3):
                data[place] = rng.integers(0, 256)
            try:
                open_image(ImageRef(name, data=bytes(data)))
            except DataError:
                failures += 1
    assert failures > 20


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "is empty"), (b"<html></html>", "not an image")]
)
def test_not_an_image(tmp_path, content, message):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_image(ref(tmp_path / "a.jpg"))
    assert str(tmp_path / "a.jpg") in str(caught.value)


def test_no_other_program_decodes(tmp_path):
    path = save(tmp_path / "a.eps", "RGB")
    with pytest.raises(DataError, match=r"a\.eps is EPS, which another program would decode"):
        open_image(ref(path))


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jpg: No such file"):
        open_image(ref(tmp_path / "gone.jpg"))


def test_decompression_bomb(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", "RGB")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
        with pytest.raises(DataError, match=r"a\.png is too large"):
            open_image(ref(path))
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", None)
        patch.setattr(images, "MAX_PIXELS", 53)
        with pytest.raises(DataError, match=r"a\.png is too large.*9 x 6 pixels"):
            open_image(ref(path))
        patch.setattr(images, "MAX_PIXELS", 54)
        open_image(ref(path))


def test_a_bomb_is_not_decoded(monkeypatch):
    """25,000 x 25,000 black pixels in some 100 kB, refused before they take memory."""
    buffer = io.BytesIO()
    Image.new("1", (25_000, 25_000)).save(buffer, "png")
    with pytest.raises(DataError, match="bomb is too large"):
        open_image(ImageRef("bomb", data=buffer.getvalue()))


def test_image_ref_holds_one_source(tmp_path):
    with pytest.raises(ValueError, match="either data or a path"):
        ImageRef("a")
    with pytest.raises(ValueError, match="either data or a path"):
        ImageRef("a", data=b"x", path=tmp_path)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(b"")
    return tmp_path / "root"


@pytest.mark.parametrize("path", ["a.jpg", "sub/a.jpg", "./a.jpg", "sub/../a.jpg", "gone/a.jpg"])
def test_paths_below_the_root(root, path):
    assert os.fspath(resolve_image(root, path)) == os.path.normpath(root / path)


def test_absolute_path_below_the_root(root):
    assert os.fspath(resolve_image(root, str(root / "a.jpg"))) == str(root / "a.jpg")


@pytest.mark.parametrize("path", ["../secret.jpg", "sub/../../secret.jpg", "/etc/hostname", ".."])
def test_paths_that_leave_the_root(root, path):
    with pytest.raises(DataError, match="leaves the image folder") as caught:
        resolve_image(root, path)
    assert repr(path) in str(caught.value)


def test_a_folder_with_a_longer_name_is_outside(root):
    (root.parent / "root2").mkdir()
    with pytest.raises(DataError, match="leaves"):
        resolve_image(root, "../root2/a.jpg")


def test_links(root):
    (root / "out.jpg").symlink_to(root.parent / "secret.jpg")
    (root / "up").symlink_to(root.parent)
    (root / "in.jpg").symlink_to(root / "sub" / "a.jpg")
    for path in ("out.jpg", "up/secret.jpg"):
        with pytest.raises(DataError, match="leaves"):
            resolve_image(root, path)
    assert os.fspath(resolve_image(root, "in.jpg")) == str(root / "sub" / "a.jpg")
    (root.parent / "link").symlink_to(root)
    assert os.fspath(resolve_image(root.parent / "link", "a.jpg")) == str(root / "a.jpg")


def test_loop_of_links(root):
    (root / "loop").symlink_to(root / "loop")
    resolve_image(root, "loop/a.jpg")  # Inside, and no file: reading finds that out.


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_no_path_at_all(root, path):
    with pytest.raises(DataError, match="is not a path"):
        resolve_image(root, path)


def test_bucket_paths():
    assert os.fspath(resolve_image("gs://b/data", "x/../a.jpg")) == "gs://b/data/a.jpg"
    assert os.fspath(resolve_image("gs://b/data", "gs://b/data/a.jpg")) == "gs://b/data/a.jpg"
    for path in ("../a.jpg", "gs://b/other/a.jpg", "gs://c/data/a.jpg", "/etc"):
        with pytest.raises(DataError, match="leaves"):
            resolve_image("gs://b/data", path)


def test_a_file_is_read_once_for_all_that_is_asked_before_training(tmp_path, monkeypatch):
    monkeypatch.setenv("MMPO_CACHE", str(tmp_path / "cache"))
    path = save(tmp_path / "a.png", "RGB")
    (tmp_path / "b.png").write_bytes(path.read_bytes()[:60])
    reads = []
    plain = ImageRef.read
    monkeypatch.setattr(ImageRef, "read", lambda self: reads.append(self.name) or plain(self))
    for _ in range(2):
        assert image_problem(ref(path)) is None
        assert image_size(ref(path)) == (6, 9)
        assert ref(path).fingerprint() == fingerprint_bytes(path.read_bytes())
        reason, detail = image_problem(ref(tmp_path / "b.png"))
        assert reason == "image_broken"
        assert "b.png is damaged" in detail
    assert len(reads) == 2
