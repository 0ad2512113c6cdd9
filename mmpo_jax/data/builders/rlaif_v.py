"""RLAIF-V's pairs as a TFDS data set, from the Parquet files of openbmb/RLAIF-V-Dataset.

Put them in TFDS's manual folder (`<data_dir>/downloads/manual`, or what `manual_dir` says), then

    RlaifV(data_dir=folder).download_and_prepare()

and read it by index, or as ``tfds:rlaif_v`` wherever a recipe names data. The columns are the
published ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from mmpo_jax.data.builders.published import IMAGE, TEXT, PublishedBuilder
from mmpo_jax.data.formats.writing import question_of
from mmpo_jax.data.records import Record

_KEPT = ("origin_dataset", "origin_split", "image_path")
"""Columns that are copied."""


class RlaifV(PublishedBuilder):
    """Pairs of responses to questions about images, by AI feedback."""

    name = "rlaif_v"
    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The .parquet files of openbmb/RLAIF-V-Dataset on the hub."

    def _info(self) -> tfds.core.DatasetInfo:
        texts = ("idx", "ds_name", "question", "chosen", "rejected", *_KEPT)
        features = {"image": IMAGE(shape=(None, None, 3)), **{name: TEXT() for name in texts}}
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=None
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        folder = dl_manager.manual_dir
        return {"train": self._generate_examples(folder, folder, "rlaif_v", _example)}


def _example(record: Record) -> dict[str, Any]:
    chosen, rejected = record.responses
    return {
        "idx": record.id,
        "ds_name": record.source or "",
        "image": record.images[0].read(),
        "question": question_of(record),
        "chosen": chosen.text,
        "rejected": rejected.text,
        **{name: str(record.extra.get(name) or "") for name in _KEPT},
    }
