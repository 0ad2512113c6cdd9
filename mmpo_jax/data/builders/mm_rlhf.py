"""MM-RLHF as TFDS data sets, from the published files.

Put `data.jsonl`, `dpo_pairs.jsonl` and the unpacked archives in TFDS's manual folder
(`<data_dir>/downloads/manual`, or what `manual_dir` says), then

    MmRlhf(data_dir=folder, config="rankings").download_and_prepare()

and read it by index, or as ``tfds:mm_rlhf/rankings`` wherever a recipe names data. The columns are
the published ones; `images` and `video` hold the image, or the frames. Scores are float32, and NaN
where they are null.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.builders.published import IMAGE, TEXT, PublishedBuilder
from mmpo_jax.data.formats.mm_rlhf import DIMENSIONS
from mmpo_jax.data.formats.writing import question_of
from mmpo_jax.data.records import Record

_FILES = {"rankings": ("data.jsonl", "mm_rlhf"), "pairs": ("dpo_pairs.jsonl", "mm_rlhf_pairs")}
"""Configuration -> (file, format of its rows)."""
_PAIR = ("prompt", "chosen", "rejected", "chosen_reason", "rejected_reason")


class MmRlhf(PublishedBuilder):
    """Responses to questions about images and videos, ranked by people."""

    name = "mm_rlhf"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        tfds.core.BuilderConfig(name="rankings", description="3 to 5 responses to a prompt."),
        tfds.core.BuilderConfig(name="pairs", description="What DPO learns from."),
    )
    MANUAL_DOWNLOAD_INSTRUCTIONS = "The files of yifanzhang114/MM-RLHF on the hub, unpacked."

    def _info(self) -> tfds.core.DatasetInfo:
        several = tfds.features.Sequence
        image = IMAGE(shape=(None, None, 3))
        features: dict[str, Any] = {"id": TEXT(), "images": several(image), "video": several(image)}
        if self.builder_config.name == "pairs":
            features |= {name: TEXT() for name in _PAIR}
        else:
            features |= {name: TEXT() for name in ("question", "answer", "ranking_reason")}
            features |= {name: several(TEXT()) for name in ("models_output", "score_reasons")}
            features |= {name: several(np.float32) for name in DIMENSIONS}
            features["final_ranking"] = several(np.int32)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), supervised_keys=None
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        folder = dl_manager.manual_dir
        file, format = _FILES[self.builder_config.name]
        make = _pair if self.builder_config.name == "pairs" else _ranking
        return {"train": self._generate_examples(folder / file, folder, format, make)}


def _media(record: Record) -> dict[str, Any]:
    if any(video.file is not None for video in record.videos):
        raise DataError(f"row {record.row}: this set holds frames of videos, and not their files")
    frames = [frame for video in record.videos for frame in video.frames]
    return {
        "images": [image.read() for image in record.images],
        "video": [frame.read() for frame in frames],
    }


def _ranking(record: Record) -> dict[str, Any]:
    responses = record.responses
    named = {name for response in responses for name in response.scores}
    critiques = [response.critique for response in responses]
    return {
        "id": record.id,
        **_media(record),
        "question": question_of(record),
        "answer": str(record.extra.get("answer") or ""),
        "ranking_reason": str(record.extra.get("ranking_reason") or ""),
        "models_output": [response.text for response in responses],
        "score_reasons": [critique or "" for critique in critiques] if any(critiques) else [],
        "final_ranking": [response.rank for response in responses] if record.ranked else [],
        **{
            name: [r.scores.get(name, math.nan) for r in responses] if name in named else []
            for name in DIMENSIONS
        },
    }


def _pair(record: Record) -> dict[str, Any]:
    chosen, rejected = record.responses
    return {
        "id": record.id if record.own_id is None else record.own_id,
        **_media(record),
        "prompt": question_of(record),
        "chosen": chosen.text,
        "rejected": rejected.text,
        "chosen_reason": chosen.critique or "",
        "rejected_reason": rejected.critique or "",
    }
