"""The picture world as a source of records that a recipe can name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmpo_jax.core.sections import PositiveInt, Seed
from mmpo_jax.data.rows import MessagesAs
from mmpo_jax.data.sources import RecordSet, RecordSource
from mmpo_jax.picture_world.records import prompt_records, supervised_records


class PictureWorldData(RecordSource):
    """Scenes of the built-in picture world."""

    source: Literal["picture_world"] = "picture_world"
    split: Literal["train", "align", "validation", "test"] = "train"
    size: PositiveInt = 1000
    seed: Seed = 0
    image_size: int = Field(48, ge=24)  # below, shapes could not be told apart
    questions: int = Field(3, ge=0)
    """Yes/no questions per scene in supervised data."""
    hallucination_rate: float = Field(0.5, ge=0, le=1)
    """Share of supervised captions with one invented thing."""

    def load(self, *, supervised: bool, messages_as: MessagesAs = "last_turn") -> RecordSet:
        """Supervised dialogues of scenes, or prompts to caption them."""
        world = (self.split, self.seed, self.size, self.image_size)
        if supervised:
            records = supervised_records(*world, self.questions, self.hallucination_rate)
        else:
            records = prompt_records(*world)
        return RecordSet(f"picture_world/{self.split}", records, [], 0.0)
