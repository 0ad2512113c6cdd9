"""Shapes in annotations, which hold in the tests: `Float[Array, "B R T"]` is checked at every call
of the packages below, also while JAX traces. Other annotations are mypy's."""

from __future__ import annotations

import functools
import inspect
import operator
import types
import typing
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping
import numpy as np

CHECKED = ("mmpo_jax.objectives",)
_check: Any = beartype.beartype(conf=beartype.BeartypeConf())


def install() -> None:
    """Has the packages checked that are imported from now on."""
    jaxtyping.install_import_hook(CHECKED, f"{__name__}.checked")


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its arrays checked: arguments and result by one meaning of B, R, T, ...

    NumPy's will do where JAX's are named, as they do for JAX.
    """
    hints = {name: _with_numpy(hint) for name, hint in function.__annotations__.items()}
    function.__annotations__ = {name: hint for name, hint in hints.items() if hint is not None}
    return _check(function) if function.__annotations__ else function


def _with_numpy(hint: Any) -> Any:
    """An annotation that takes NumPy's arrays too; None where it names no array."""
    if inspect.isclass(hint) and issubclass(hint, jaxtyping.AbstractArray):
        kind = getattr(jaxtyping, hint.__name__.partition("[")[0])
        return hint | kind[np.ndarray, hint.dim_str]
    parts = typing.get_args(hint)
    changed = [_with_numpy(part) for part in parts]
    if not any(part is not None for part in changed):
        return None
    whole = [part if new is None else new for part, new in zip(parts, changed, strict=True)]
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return functools.reduce(operator.or_, whole)
    return origin[tuple(whole)]
