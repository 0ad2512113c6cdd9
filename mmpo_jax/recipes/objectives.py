"""The objectives of a recipe: a section for every one in the registry, made from its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import pydantic
from pydantic import Field

from mmpo_jax.core.sections import Section, any_of, section_of
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.terms import Term


class ObjectiveSection(Section):
    """One objective, with its options beside these."""

    type: str
    weight: float = Field(1.0, gt=0)
    """How much it counts beside the others of the list."""

    @pydantic.model_validator(mode="after")
    def _fits(self) -> Self:
        OBJECTIVES[self.type].check(self.term().options)
        return self

    def term(self) -> Term:
        """What `training.losses` makes a loss of."""
        options = {name: getattr(self, name) for name in OBJECTIVES[self.type].options}
        return Term(OBJECTIVES[self.type], self.weight, options)

    def limited(self, tokens: int) -> Self:
        """The section with this limit of sampled tokens where its objective divides by one that is
        not given."""
        option = OBJECTIVES[self.type].token_limit
        if option is None or self.term().options[option] is not None:
            return self
        return self.model_copy(update={option: tokens})


SECTIONS = {
    name: section_of(ObjectiveSection, name, objective.formula, objective.options)
    for name, objective in OBJECTIVES.items()
}

if TYPE_CHECKING:
    Objectives = tuple[ObjectiveSection, ...]
else:
    Objectives = any_of(SECTIONS.values())
    """A list of objectives, or one of them, by `type`."""
