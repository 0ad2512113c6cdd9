"""Recipes from YAML files and `key=value` overrides, and what is wrong with them for people."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import pydantic
import yaml

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.sections import SECRET, Section
from mmpo_jax.data.readers import TFDS
from mmpo_jax.data.sources import FileData, LearnedFile
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.recipes.methods import spelling

SectionType = TypeVar("SectionType", bound=Section)
Kind = type[pydantic.BaseModel]

MOST_TAGS = 6
"""Types of a choice that are named; there are dozens of objectives."""

MESSAGES = {
    "tuple_type": "a list is wanted",
    "too_short": "must not be empty",
    "model_attributes_type": "a group of keys is wanted",
    "model_type": "a group of keys is wanted",
    "union_tag_not_found": "`type` is missing, or `source` in data",
}
"""Errors by pydantic's names, in words for people; those of others speak of Python."""


class RecipeError(MmpoError):
    """A recipe that cannot be read or holds an unknown key or an impossible value."""


def load_recipe(
    kind: type[SectionType],
    path: str | os.PathLike[str] | None,
    overrides: Sequence[str] = (),
    told: str = "this recipe cannot be run",
) -> SectionType:
    """Reads a YAML file if there is one, applies `a.b=value` overrides, checks everything.

    Args:
      kind: of the recipe, or of another file that is checked in the same way.
      path: of the file.
      overrides: of its values.
      told: what is said in front of the keys at fault.

    Raises:
      RecipeError: naming the file and every key at fault.
    """
    values = read_values(path, overrides)
    try:
        return kind.model_validate(values)
    except pydantic.ValidationError as error:
        lines = "\n".join(f"  {_explain(kind, problem, values)}" for problem in error.errors())
        name = "the options" if path is None else path
        raise RecipeError(f"{name}: {told}:\n{lines}") from error


def check_files(recipe: Section) -> None:
    """
    Raises:
      RecipeError: naming the key of a data file that is not there.
    """
    for key, path in _data_files(recipe, ""):
        # URLs are told of where they are read.
        if "://" not in path and not path.startswith(TFDS) and not os.path.exists(path):
            here = "" if os.path.isabs(path) else f" in {os.getcwd()}"
            raise RecipeError(f"{key}: there is no {path}{here}")


def _data_files(section: Section, where: str) -> Iterator[tuple[str, str]]:
    """(key, path) of the files that sections of data name."""
    if isinstance(section, FileData):
        yield f"{where}path", section.path
    if isinstance(section, LearnedFile) and section.rewards is not None:
        yield f"{where}rewards", section.rewards
    for name, value in section:
        if isinstance(value, Section):
            yield from _data_files(value, f"{where}{name}.")
        elif isinstance(value, tuple | list):
            for number, each in enumerate(value):
                if isinstance(each, Section):
                    yield from _data_files(each, f"{where}{name}.{number}.")


def read_values(
    path: str | os.PathLike[str] | None, overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """What a YAML file says, with `a.b=value` overrides, before it is checked.

    Raises:
      RecipeError: it cannot be read.
    """
    values = {} if path is None else _read(path)
    for override in overrides:
        _apply(values, override)
    return values


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:  # so that PyYAML decodes it, and says so if it cannot
            values = _parse(file, f"{path}") or {}
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values")
    return values


def _parse(text: Any, name: str) -> Any:
    """The values of one YAML document, which PyYAML alone would read with the last of equal keys.

    Raises:
      RecipeError: a group has a key twice.
      yaml.YAMLError: it is no YAML.
    """
    loader = yaml.SafeLoader(text)
    try:
        document = loader.get_single_node()
        if document is None:
            return None
        _refuse_repeated(document, name)
        return loader.construct_document(document)
    finally:
        loader.dispose()


def _refuse_repeated(document: yaml.Node, name: str) -> None:
    waiting: list[tuple[yaml.Node, str]] = [(document, "")]
    seen: set[int] = set()  # an alias is the node it stands for, and may stand in itself
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(entry, f"{path}{place}.") for place, entry in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            known, line = (key.tag, str(key.value)), key.start_mark.line + 1
            if known in lines:
                raise RecipeError(
                    f"{name}, line {line}: {path}{key.value} stands a second time, first in line "
                    f"{lines[known]}, and only one could count; make them one"
                )
            lines[known] = line
            waiting.append((value, f"{path}{key.value}."))


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write key=value")
    try:
        value = _parse(text, f"override {override!r}")
    except yaml.YAMLError as error:
        raise RecipeError(f"override {override!r}: {error}") from error
    *parents, name = key.split(".")
    node: Any = values
    for parent in parents:
        if isinstance(node, dict):
            node.setdefault(parent, {})
        node = node[_place(node, parent, override)]
        if not isinstance(node, dict | list):
            raise RecipeError(f"override {override!r}: {parent} is no group of keys")
    node[_place(node, name, override)] = value


def _place(node: dict[str, Any] | list[Any], part: str, override: str) -> Any:
    """Where a part of an override's path leads: a key, or the number of a list's entry from 0.

    Raises:
      RecipeError: the list has no such entry.
    """
    if isinstance(node, dict):
        return part
    if not part.isdigit() or int(part) >= len(node):
        raise RecipeError(
            f"override {override!r}: {part} is none of the numbers 0 to {len(node) - 1} of a list"
        )
    return int(part)


def _explain(kind: Kind, problem: Any, values: Any) -> str:
    """One line for one problem: the key's path, what is wrong, what would be right."""
    sections, path, choice = _follow(kind, _as_written(problem["loc"], values))
    where = ".".join(path) or "the recipe"
    if problem["type"] == "extra_forbidden":
        return f"{where}: {_unknown_key(path[-1], sections, choice)}"
    if problem["type"] == "union_tag_invalid":
        return f"{where}: {_unknown_tag(problem['ctx'])}"
    message = MESSAGES.get(problem["type"], problem["msg"].removeprefix("Value error, "))
    told_of = problem["type"] in ("missing", SECRET) or isinstance(problem["input"], dict)
    given = "" if told_of else f" (got {problem['input']!r})"
    return f"{where}: {message}{given}"


def _unknown_key(key: str, sections: Sequence[Kind], choice: Mapping[str, Kind]) -> str:
    """What could be meant: a key of another type of the same choice, or one that is spelled alike.

    Args:
      key: that is unknown.
      sections: where it stands.
      choice: types that could stand there, by tag; empty where there is one alone.
    """
    having = [tag for tag, section in choice.items() if key in section.model_fields]
    if having:
        own = next(tag for tag, section in choice.items() if section in sections)
        more = f" and {len(having) - MOST_TAGS} more" if len(having) > MOST_TAGS else ""
        told = f"{', '.join(having[:MOST_TAGS])}{more} {'has' if len(having) == 1 else 'have'} it"
        return f"unknown key of {own}; {told}"
    names = [name for section in sections for name in section.model_fields]
    nearest = difflib.get_close_matches(key, names, n=1, cutoff=0.5)
    hint = f"did you mean {nearest[0]}?" if nearest else f"known here: {', '.join(names)}"
    return f"unknown key; {hint}"


def _unknown_tag(context: Mapping[str, Any]) -> str:
    """What `type` may be, the nearest if there is one: there are dozens of objectives."""
    given, key = str(context["tag"]), context["discriminator"].strip("'")
    known = [name.strip(" '") for name in context["expected_tags"].split(",")]
    of_options = spelling(given)
    if of_options is not None and known == [*OBJECTIVES]:
        return f"{key}: there is no {given!r}; {of_options}"
    nearest = difflib.get_close_matches(given, known, n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(nearest)}?" if nearest else f"known: {', '.join(known)}"
    return f"{key}: there is no {given!r}; {hint}"


def _as_written(location: tuple[str | int, ...], node: Any) -> tuple[str | int, ...]:
    """The location without the place in a list, where the file has no list but its only entry."""
    kept: list[str | int] = []
    for part in location:
        in_file = isinstance(node, list) or (isinstance(node, dict) and part in node)
        if isinstance(part, int) and not in_file:
            continue
        kept.append(part)
        if isinstance(node, dict):
            node = node.get(part, node)  # what is no key is the tag of a tagged choice
        elif isinstance(part, int):
            node = node[part]
    return tuple(kept)


def _follow(
    kind: Kind, location: tuple[str | int, ...]
) -> tuple[list[Kind], list[str], dict[str, Kind]]:
    """The section that holds the last key of a pydantic location, the path as YAML has it, and the
    sections that could stand there by their tags, where it is one of a tagged choice.

    pydantic puts the tag of a tagged choice ("file", "dpo") into the location; the file does not.
    """
    sections: list[Kind] = [kind]
    path: list[str] = []
    choice: dict[str, Kind] = {}
    for index, part in enumerate(location):
        tagged = [s for s in sections if part in _tags(s)]
        if tagged and index < len(location) - 1:
            choice = {tag: section for section in sections for tag in _tags(section)}
            sections = tagged
            continue
        path.append(str(part))
        if index < len(location) - 1:
            choice = {}
            fields = [s.model_fields[part] for s in sections if part in s.model_fields]
            if fields:
                sections = [s for field in fields for s in _sections(field.annotation)] or sections
    return sections, path, choice


def _sections(annotation: Any) -> list[Kind]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    arguments = getattr(annotation, "__args__", ())
    return [section for argument in arguments for section in _sections(argument)]


def _tags(section: Kind) -> set[str]:
    fields = (section.model_fields.get(name) for name in ("source", "type"))
    return {str(field.default) for field in fields if field is not None}
