"""The data of a recipe: every source that there is, alone or in a mixture."""

from __future__ import annotations

from typing import Annotated

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import as_list
from mmpo_jax.data.sources import FileData, LearnedFile
from mmpo_jax.picture_world.source import PictureWorldData

Data = Annotated[PictureWorldData | FileData, Field(discriminator="source")]


class PictureWorldEntry(PictureWorldData):
    """The picture world in a mixture."""

    weight: float = Field(1.0, gt=0)
    """How often a row is seen in an epoch; of 0.5 every other row."""


class FileEntry(LearnedFile):
    """A file in a mixture."""

    weight: float = Field(1.0, gt=0)
    """How often a row is seen in an epoch; of 0.5 every other row."""


Mixture = Annotated[
    tuple[Annotated[PictureWorldEntry | FileEntry, Field(discriminator="source")], ...],
    pydantic.BeforeValidator(as_list),
    Field(min_length=1),
]
"""Data, or a list of them."""
