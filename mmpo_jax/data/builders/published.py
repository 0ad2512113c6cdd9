"""What builders of published data share: rows are read, checked and counted as everywhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from mmpo_jax.core.files import check_reachable
from mmpo_jax.data.files import file_rows
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.media_check import media_problem
from mmpo_jax.data.parsing import parse_rows
from mmpo_jax.data.records import Record
from mmpo_jax.data.skipped import SkippedRow, check_skipped

log = logging.getLogger(__name__)

MAX_SKIPPED = 0.1
"""Share of unusable rows above which a data set is not written."""
IMAGE = tfds.features.Image
TEXT = tfds.features.Text


class PublishedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """A data set with one split, `train`, without TensorFlow."""

    def __init__(self, **kwargs: Any) -> None:
        # TFDS's own default, TFRecord, needs TensorFlow.
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _generate_examples(
        self,
        path: epath.PathLike,
        root: epath.PathLike,
        format: str,
        make: Callable[[Record], dict[str, Any]],
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """The examples of the usable rows of a file, by row number.

        Raises:
          DataError: the file cannot be read, or more than `MAX_SKIPPED` of its rows cannot be used.
        """
        skipped: list[SkippedRow] = []
        written = 0
        check_reachable(path)
        rows = file_rows(path)
        for item in parse_rows(rows, os.fspath(path), MediaFolder(root), format=format):
            problem = media_problem(item) if isinstance(item, Record) else None
            if isinstance(item, SkippedRow):
                skipped.append(item)
            elif problem is not None:
                skipped.append(SkippedRow(os.fspath(path), item.row, item.id, *problem))
            else:
                written += 1
                yield item.row or 0, make(item)
        for row in skipped[:10]:
            log.warning("%s: skipped %s", row.file, row)
        check_skipped(skipped, written + len(skipped), MAX_SKIPPED)
