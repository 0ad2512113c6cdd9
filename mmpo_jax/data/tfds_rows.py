"""Rows of data sets that TFDS prepared, without TensorFlow."""

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import is_local


class _Encoded(tfds.decode.SkipDecoding):
    """Leaves images as they are, in sequences too."""

    def decode_batch_example_np(self, images: Any) -> Any:
        return images


def tfds_rows(
    name: str, data_folder: epath.PathLike | None, builders: Iterable[str] = ()
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a split with their numbers from 1, texts decoded and images encoded.

    Args:
      name: ``NAME#SPLIT``, a name such as ``picture_world/tiny`` or the folder of a data set; split
        ``train`` where none is given.
      data_folder: where TFDS keeps its data; its own default for None.
      builders: modules that register builders with TFDS when they are imported.

    Raises:
      DataError: there is no such data set or split.
    """
    for module in builders:
        importlib.import_module(module)
    name, _, split = name.partition("#")
    try:
        if os.path.isabs(name) or not is_local(name):
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=data_folder, file_format="array_record")
        images = {
            column: _Encoded()
            for column, feature in builder.info.features.items()
            if isinstance(getattr(feature, "feature", feature), tfds.features.Image)
        }
        source = builder.as_data_source(split=split or "train", decoders=images)
    except Exception as error:  # TFDS raises nearly anything for a name it does not know.
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(f"cannot read tfds:{name}: {reason}") from error
    for number in range(len(source)):
        try:
            example = source[number]
            row = {column: _plain(value, column in images) for column, value in example.items()}
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read tfds:{name}: {error}") from error
        yield number + 1, {column: value for column, value in row.items() if value != []}


def _plain(value: Any, image: bool) -> Any:
    """What TFDS reads as JSON would have it: texts come as bytes and lists as arrays.

    TFDS has no null; its builders here write NaN and what is empty instead.
    """
    if isinstance(value, Mapping):
        return {name: _plain(entry, image) for name, entry in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(entry, image) for entry in value]
    if isinstance(value, bytes) and not image:
        value = value.decode()
    return None if value == "" or value != value else value
