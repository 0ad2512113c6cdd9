"""Shapes in annotations, which hold in the tests: `Float[Array, "B R T"]` is checked at every call
of the packages below, also while JAX traces. Other annotations are mypy's."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

CHECKED = tuple(
    f"mmpo_jax.{package}"
    for package in ("generation", "models", "objectives", "scoring", "training")
)


LIBRARIES = ("flax.nnx", "grain", "optax", "orbax.checkpoint", "transformers.modeling_utils")
"""Libraries that the packages import. What is first imported by a checked module has its bytecode
looked up under another name, so that it would be compiled anew."""


def install() -> None:
    """Has the packages checked that are imported from now on."""
    for library in LIBRARIES:
        with contextlib.suppress(ImportError):  # some of it needs torch
            importlib.import_module(library)
    jaxtyping.install_import_hook(CHECKED, f"{__name__}.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arrays checked: arguments and result by one meaning of B, R, T, ..."""
    hints = {name: _any_array(hint) for name, hint in function.__annotations__.items()}
    function.__annotations__ = {name: hint for name, hint in hints.items() if hint is not None}
    return beartype.beartype(function) if function.__annotations__ else function


def _any_array(hint: Any) -> Any:
    """An annotation for whatever has a shape and a dtype, as NumPy's arrays do where JAX's are
    named; None where it names no array."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        kind = getattr(jaxtyping, hint.__name__.partition("[")[0])
        return kind[Any, hint.dim_str]
    parts = typing.get_args(hint)
    changed = [_any_array(part) for part in parts]
    if not any(part is not None for part in changed):
        return None
    whole = [part if new is None else new for part, new in zip(parts, changed, strict=True)]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, whole)
    return origin[tuple(whole)]
