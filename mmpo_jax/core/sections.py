"""What every section of a recipe is, and the types of its options."""

from __future__ import annotations

import functools
import inspect
import operator
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError


class Section(pydantic.BaseModel):
    """A frozen group of options; unknown keys are refused."""

    # Values are not repeated in errors: somebody may have written a key where it does not belong.
    # Recipes say them themselves, but those of type `SECRET`.
    model_config = pydantic.ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, hide_input_in_errors=True
    )


SectionType = TypeVar("SectionType", bound=Section)

# Strict, or `true` would be taken for 1.
PositiveInt = Annotated[int, Field(gt=0, strict=True)]
NonNegativeInt = Annotated[int, Field(ge=0, strict=True)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]
MeshSize = PositiveInt | Literal[-1]
CritiqueLayout = Literal["turns", "one_turn"]
"""Where a response stands that a critique is of: `turns`, before the question for the critique, as
the assistant's answer; `one_turn`, within that question."""


SECRET = "secret"
"""The type of a `PydanticCustomError` about a value that no message may repeat, as it could be a
key that was written in the wrong place."""


def _variable_name(name: str) -> str:
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
        told = "the name of an environment variable, in capitals, and not the key itself"
        raise PydanticCustomError(SECRET, told)
    return name


KeyVariable = Annotated[str, pydantic.AfterValidator(_variable_name)]
"""Name of an environment variable that has a key."""


def check_places(option: str, text: str | None, places: Iterable[str]) -> None:
    """
    Raises:
      ValueError: a text that is filled in, if it is given, lacks one of its places, such as
        `{question}`.
    """
    for place in places:
        if text is not None and place not in text:
            raise ValueError(f"{option}: it has no {place}")


def as_list(value: Any) -> Any:
    """A list, of one entry too that stands without brackets.

    Raises:
      PydanticCustomError: it is null, which would be taken for an entry.
    """
    if value is None:
        raise PydanticCustomError("no_list", "a list or a group of keys is wanted")
    return value if isinstance(value, list | tuple) else [value]


def type_by_default(name: str) -> Callable[[Any], Any]:
    """A validator in front of a tagged choice: options without a `type` are those of this one."""

    def tagged(value: Any) -> Any:
        return {"type": name, **value} if isinstance(value, dict) else value

    return tagged


def section_of(
    base: type[SectionType], name: str, doc: str, options: Mapping[str, tuple[Any, Any]]
) -> type[SectionType]:
    """A section for what a registry holds under a name: with that `type`, and its options.

    Args:
      base: what the section adds to.
      name: in the registry, such as `mm_dpo`, which makes the class `MmDpo`.
      doc: of the class.
      options: name -> (type, default), as `keyword_options` gives them.
    """
    fields: dict[str, Any] = {"type": (Literal[name], name), **options}
    title = "".join(word.capitalize() for word in name.split("_"))
    return pydantic.create_model(title, __base__=base, __doc__=doc, **fields)


def any_of(sections: Iterable[type[Section]], least: int = 1) -> Any:
    """The annotation of a list of `least` or more of these sections, told apart by `type`; one
    entry may stand without the brackets of a list."""
    one: Any = Annotated[functools.reduce(operator.or_, sections), Field(discriminator="type")]
    return Annotated[
        tuple[one, ...],
        pydantic.BeforeValidator(as_list),
        Field(min_length=least),
    ]


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
