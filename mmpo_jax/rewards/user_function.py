"""A function of the user's own as a reward."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.core.files import fingerprint_file, fingerprint_json
from mmpo_jax.rewards.registry import Question, reward_of_texts


@reward_of_texts("whatever the function reads of it")
def python(
    question: Question,
    texts: Sequence[str],
    *,
    function: str,
    arguments: dict[str, Any] | None = None,
) -> Any:
    """What `function(question, texts, **arguments)` gives: a number for every text, None for no
    verdict, or a mapping with `score` and whatever else the report should show.

    The user's own; `function` is `FILE.py:name` or `module.name` (docs/feedback.md).
    """
    called = load_function(function)
    try:
        given = called(question, texts, **(arguments or {}))
        return list(given) if isinstance(given, Iterator) else given
    except Exception as error:  # whatever the user's code raises
        raise DataError(
            f"function {function}, prompt {question.id!r}: {type(error).__name__}: {error}"
            f"{_place(error, called)}"
        ) from error


def _place(error: Exception, called: Callable[..., Any]) -> str:
    """Where in the function's file an error was raised, or what the file called last."""
    file = _source(called)
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == file]
    return f" ({file}, line {lines[-1]})" if lines else ""


@functools.cache
def load_function(name: str) -> Callable[..., Any]:
    """A function by `FILE.py:name`, or `module.name` as Python imports it from this folder.

    Raises:
      MmpoError: there is none, or importing it fails.
    """
    place, separator, attribute = name.rpartition(":")
    if not separator:
        place, _, attribute = name.rpartition(".")
    if not place or not attribute:
        raise MmpoError(f"{name!r} is no function: write FILE.py:name or module.name")
    try:
        module = _import_file(place) if place.endswith(".py") else _import_module(place)
    except Exception as error:  # whatever the user's code raises
        raise MmpoError(f"function {name}: {type(error).__name__}: {error}") from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise MmpoError(f"function {name}: {place} has no function {attribute!r}")
    return function


def check_function(name: str, arguments: dict[str, Any] | None) -> None:
    """Whether a function takes a question, texts and these arguments.

    Raises:
      MmpoError: naming what it does not take.
    """
    function = load_function(name)
    try:
        inspect.signature(function).bind(None, [], **(arguments or {}))
    except TypeError as error:
        raise MmpoError(f"function {name} is called with (question, texts): {error}") from error
    except ValueError:  # of some built-in functions nobody knows what they take
        return


def fingerprint_function(name: str) -> str:
    """Digest of the function's name and of the file that has it, as far as there is one."""
    source = _source(load_function(name))
    return fingerprint_json([name, None if source is None else fingerprint_file(source)])


def _source(function: Callable[..., Any]) -> str | None:
    """The file of a function, or of the class of an object that is called; None of what is
    built in."""
    function = inspect.unwrap(function)
    if isinstance(function, functools.partial):
        return _source(function.func)
    try:
        return inspect.getsourcefile(function)
    except TypeError:  # an object
        return inspect.getsourcefile(type(function))


def _import_file(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"mmpo_user_{abs(hash(path)):x}", path)
    if spec is None or spec.loader is None or not os.path.isfile(path):
        raise FileNotFoundError(f"there is no file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses of the file look for it there
    spec.loader.exec_module(module)
    return module


def _import_module(name: str) -> Any:
    """A module, also of the folder that the command was started in, as `python -m` finds it."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)
