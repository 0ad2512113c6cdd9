"""Find and decode images the way Hugging Face does, with errors that name the file."""

import contextlib
import io
import os
import posixpath
from collections.abc import Iterator
from typing import Any

from etils import epath
from PIL import ExifTags, Image, ImageOps

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_bytes, is_local
from mmpo_jax.core.known_files import recall, remember, state_of
from mmpo_jax.data.edits import edit_image
from mmpo_jax.data.records import ImageRef
from mmpo_jax.data.rows import brief
from mmpo_jax.data.skipped import Problem

# Where Pillow begins to warn of decompression bombs; 256 MiB in RGB. Stated here because Pillow's
# limit is a global that other libraries switch off.
MAX_PIXELS = 89_478_485
PROGRAMS = ("EPS",)
"""Formats for which Pillow starts another program, here Ghostscript, on bytes of anybody."""


class ImageTooLarge(DataError):
    """An image with more than `MAX_PIXELS`, which is not decoded."""


def image_size(ref: ImageRef) -> tuple[int, int]:
    """(height, width) of the upright image, from its header; a file that is known is not read.

    Raises:
      DataError: as `open_image`, as far as the header tells.
    """
    if ref.size is not None:
        return ref.size
    known = {} if ref.path is None else recall(ref.path)
    if "size" in known:
        height, width = known["size"]
        return height, width
    with _opened(ref) as image:
        return _upright_size(image)


def image_problem(ref: ImageRef) -> Problem | None:
    """Why an image does not open; None where it does.

    It is read and decoded once. What is found out about a file, its digest and its size too, is
    kept while the file stays as it is.
    """
    known = {} if ref.path is None else recall(ref.path)
    if "problem" not in known:
        before = None if ref.path is None else state_of(ref.path)
        known = _examine(ref)
        if ref.path is not None and "sha256" in known:
            remember(ref.path, before, known)
    problem = known["problem"]
    return None if problem is None else (problem[0], problem[1])


def _examine(ref: ImageRef) -> dict[str, Any]:
    """What reading an image once tells: `problem`, and where it has them `sha256` and `size`."""
    found: dict[str, Any] = {"problem": None}
    try:
        data = ref.read()
        found["sha256"] = fingerprint_bytes(data)
        with _opened(ref, data) as image:
            found["size"] = _upright_size(image)
            ImageOps.exif_transpose(image).convert("RGB")
    except ImageTooLarge as error:
        found["problem"] = "image_too_large", str(error)
    except DataError as error:
        found["problem"] = "image_broken", str(error)
    return found


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
    return (width, height) if turned else (height, width)


def image_format(ref: ImageRef) -> str:
    """The format in small letters (png, jpeg, ...), from the header; the name is not trusted.

    Raises:
      DataError: as `open_image`, as far as the header tells.
    """
    with _opened(ref) as image:
        return str(image.format).lower()


def open_image(ref: ImageRef) -> Image.Image:
    """Decode an image to RGB, equal to `transformers.image_utils.load_image`.

    That function turns the picture upright by its EXIF orientation and then calls
    `convert("RGB")`; so do we. Hence a grey image is repeated in three channels, transparency is
    dropped and not blended, palettes are looked up, CMYK is converted, and 16-bit grey is what
    Pillow makes of it. (A Hugging Face *processor* given a `PIL.Image` that was opened elsewhere
    does not apply the orientation; `load_image` is what one gets by passing a path.) What the
    reference says to change is changed then.

    Raises:
      DataError: the file is missing, empty, truncated or not an image.
      ImageTooLarge: it has more than `MAX_PIXELS` pixels.
    """
    with _opened(ref) as image:
        return edit_image(ImageOps.exif_transpose(image).convert("RGB"), ref.edit)


@contextlib.contextmanager
def _opened(ref: ImageRef, data: bytes | None = None) -> Iterator[Image.Image]:
    """The undecoded image; whatever goes wrong with it inside becomes a `DataError`.

    Args:
      data: the encoded image, where it has been read.
    """
    name = os.fspath(ref.path) if ref.path is not None else ref.name
    data = ref.read() if data is None else data
    if not data:
        raise DataError(f"image {name} is empty (0 bytes)")
    try:
        image = Image.open(io.BytesIO(data))
        if image.format in PROGRAMS:
            raise DataError(f"image {name} is {image.format}, which another program would decode")
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageTooLarge(_too_large(name, f"{width} x {height} pixels"))
        yield image
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLarge(_too_large(name, str(error))) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(f"image {name} is not an image of a known format") from error
    except Exception as error:  # A decoder that is given damaged bytes raises nearly anything.
        raise DataError(f"image {name} is damaged: {error}") from error


def _too_large(name: str, size: str) -> str:
    return f"image {name} is too large to decode safely ({size}, at most {MAX_PIXELS})"


def resolve_image(root: epath.PathLike, relative: str) -> epath.Path:
    """The file that a row's `relative` path means, certain to lie below the folder `root`.

    An absolute path is taken when it leads below `root`; so is a path with ``..`` or through a
    link. A data set from elsewhere can thus not name a file outside its own folder. Whether the
    file exists is not checked.

    Raises:
      DataError: the path is empty or leaves `root`.
    """
    if not relative or "\0" in relative:
        raise DataError(f"image path {brief(relative)} is not a path")
    try:
        folder = _resolved(epath.Path(root))
        in_bucket = not is_local(root) and not is_local(relative)
        # Of a folder in a bucket and "/a", `/` makes one or the other: it depends on the Python.
        whole = in_bucket or os.path.isabs(relative)
        path = _resolved(epath.Path(relative) if whole else epath.Path(root) / relative)
    except (OSError, ValueError) as error:
        raise DataError(f"image path {brief(relative)} cannot be followed: {error}") from error
    if is_local(folder) != is_local(path) or not path.is_relative_to(folder):
        raise DataError(
            f"image path {brief(relative)} leaves the image folder {os.fspath(root)}; "
            "image_root may name a folder above it"
        )
    return path


def name_below(root: epath.PathLike, path: epath.PathLike) -> str | None:
    """The relative path with which `resolve_image` finds `path`; None where it is not in `root`."""
    folder, file = _resolved(epath.Path(root)), _resolved(epath.Path(path))
    if is_local(folder) != is_local(file) or not file.is_relative_to(folder):
        return None
    return file.relative_to(folder).as_posix()


def _resolved(path: epath.Path) -> epath.Path:
    # `epath.Path.resolve` follows no links and turns a bucket path into a local one.
    if is_local(path):
        return epath.Path(os.path.realpath(path))
    scheme, tail = os.fspath(path).split("://", 1)
    return epath.Path(f"{scheme}://{posixpath.normpath('/' + tail).lstrip('/')}")
