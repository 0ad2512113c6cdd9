"""The objectives of a recipe: a section for every one in the registry, made from its options."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field

from mmpo_jax.objectives.registry import OBJECTIVES
from mmpo_jax.objectives.registry import Objective as Registered
from mmpo_jax.objectives.terms import Term
from mmpo_jax.section import Section, as_list


class ObjectiveSection(Section):
    """One objective, with its options beside these."""

    type: str
    weight: float = Field(1.0, gt=0)
    """How much it counts beside the others of the list."""

    def term(self) -> Term:
        """What `training.losses` makes a loss of."""
        options = {name: getattr(self, name) for name in OBJECTIVES[self.type].options}
        return Term(OBJECTIVES[self.type], self.weight, options)


def _section(objective: Registered) -> type[ObjectiveSection]:
    fields: dict[str, Any] = {"type": (Literal[objective.name], objective.name)}
    fields |= objective.options
    name = "".join(word.capitalize() for word in objective.name.split("_"))
    return pydantic.create_model(
        name,
        __base__=ObjectiveSection,
        __doc__=objective.formula,
        **fields,
    )


SECTIONS = {name: _section(objective) for name, objective in OBJECTIVES.items()}


if TYPE_CHECKING:
    Objectives = tuple[ObjectiveSection, ...]
else:
    _ANY = functools.reduce(operator.or_, SECTIONS.values())
    Objectives = Annotated[
        tuple[Annotated[_ANY, Field(discriminator="type")], ...],
        pydantic.BeforeValidator(as_list),
        Field(min_length=1),
    ]
    """A list of objectives, or one of them, by `type`."""
