"""What every section of a recipe is, and the types of its options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field


class Section(pydantic.BaseModel):
    """A frozen group of options; unknown keys are refused."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# Strict, or `true` would be taken for 1.
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
MeshSize = PositiveInt | Literal[-1]


def as_list(value: Any) -> Any:
    """One entry may stand without the brackets of a list."""
    return value if isinstance(value, list | tuple) else [value]


def keyword_options(function: Callable[..., Any]) -> dict[str, tuple[Any, Any]]:
    """Name -> (type, default) of a function's keyword-only arguments: its options in a recipe.

    The default is `...` where one has to be given.
    """
    hints = typing.get_type_hints(function, include_extras=True)
    return {
        name: (hints[name], ... if parameter.default is parameter.empty else parameter.default)
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY
    }
