"""The picture world as a TFDS data set, written and read without TensorFlow.

Write it once, then read it by index, for instance from grain:

    builder = PictureWorld(data_dir=folder, config=PictureWorldConfig(name="small", train=100))
    builder.download_and_prepare()
    dataset = grain.MapDataset.source(builder.as_data_source(split="train"))

Images are read as uint8[H, W, 3] and texts as bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import tensorflow_datasets as tfds

from mmpo_jax.picture_world.records import supervised_texts
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import SPLITS


@dataclass(eq=False)
class PictureWorldConfig(tfds.core.BuilderConfig):
    """What to generate; two configurations need two names, as the name is the folder on disk."""

    train: int = 8000
    align: int = 2000
    validation: int = 500
    test: int = 500
    """Number of scenes in this split, as of those above; 0 for no split."""
    image_size: int = 48
    """Height and width in pixels."""
    questions_per_scene: int = 8
    """Questions that `language.questions` asks of a scene."""
    hallucination_rate: float = 0.5
    """Share of captions with an error in the train split; captions of the other splits are true."""
    seed: int = 0
    """Seed of the whole data set, in [0, 2**32)."""


class PictureWorld(tfds.core.GeneratorBasedBuilder):
    """Coloured shapes on a grid, with captions and yes/no questions."""

    VERSION = tfds.core.Version("1.3.0")
    BUILDER_CONFIGS = (
        PictureWorldConfig(
            name="default", description="Scenes in four splits, enough to train on."
        ),
        PictureWorldConfig(name="tiny", train=32, align=16, validation=8, test=8),
    )

    def __init__(self, **kwargs: Any) -> None:
        # TFDS's own default, TFRecord, needs TensorFlow.
        kwargs.setdefault("file_format", "array_record")
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        size = self.builder_config.image_size
        text = tfds.features.Text
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(
                {
                    "id": text(),
                    "image": tfds.features.Image(shape=(size, size, 3), encoding_format="png"),
                    "scene": text(doc="JSON of Scene.to_dict()"),
                    "caption_prompt": text(),
                    "caption": text(),
                    "questions": tfds.features.Sequence(text()),
                    "answers": tfds.features.Sequence(text()),
                }
            ),
            supervised_keys=None,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        sizes = {split: getattr(self.builder_config, split) for split in SPLITS}
        return {split: self._generate_examples(split, n) for split, n in sizes.items() if n}

    def _generate_examples(self, split: str, n: int) -> Iterator[tuple[int, dict[str, Any]]]:
        for index in range(n):
            yield index, make_example(split, index, self.builder_config)


def make_example(split: str, index: int, config: PictureWorldConfig) -> dict[str, Any]:
    """Example `index` of a split, its image encoded as PNG; all other fields are text.

    Raises:
      ValueError: see `world.generator`, `render.render` and `language.supervised_caption`.
    """
    rate = config.hallucination_rate if split == "train" else 0.0
    scene, (prompt, caption), asked = supervised_texts(
        split, config.seed, index, config.questions_per_scene, rate
    )
    return {
        "id": f"{split}-{config.seed}-{index}",
        # TFDS takes encoded bytes as they are; an array it would encode with TensorFlow.
        "image": png_bytes(scene, config.image_size),
        "scene": json.dumps(scene.to_dict()),
        "caption_prompt": prompt,
        "caption": caption,
        "questions": [question for question, _ in asked],
        "answers": [answer for _, answer in asked],
    }
