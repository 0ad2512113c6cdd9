"""`mmpo objectives`: every objective with its formula, options and needs; the rewards come after,
from `rewards/listing.py`."""

from __future__ import annotations

import textwrap
from collections.abc import Collection, Mapping
from typing import Any

from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.registry import (
    FIELDS,
    HEADS,
    REFERENCES,
    SHARED,
    STATISTICS,
    TEACHERS,
    VIEWS,
    Objective,
)

MEANINGS = {**FIELDS, **REFERENCES, **VIEWS, **HEADS, **TEACHERS}
WIDTH = 100


def render_objectives(names: Collection[str] = ()) -> str:
    """The registry, or those of these names, as text by what the objectives compare."""
    kinds: dict[str, list[Objective]] = {}
    for objective in OBJECTIVES.values():
        if names and objective.name not in names:
            continue
        kinds.setdefault(objective.kind, []).append(objective)
    blocks = []
    for kind, members in kinds.items():
        blocks.append(f"## of {kind}")
        blocks += [_render(member) for member in members]
    options, needs = (
        "\n".join(_wrap(f"{name}: {meaning}") for name, meaning in legend.items())
        for legend in (SHARED, MEANINGS)
    )
    legends = [f"Options of many objectives:\n{options}", f"What objectives need:\n{needs}"]
    return "\n\n".join([*blocks, *legends])


def render_entry(
    name: str, formula: str, source: str, options: Mapping[str, tuple[Any, Any]], more: str
) -> str:
    """The block of one name of a registry: what is computed, the source, the options, and more."""
    given = ", ".join(
        f"{option} (required)" if default is ... else f"{option}={default}"
        for option, (_, default) in options.items()
    )
    parts = [formula, source, f"options: {given or 'none'}", more]
    return "\n".join([name, *(_wrap(part) for part in parts if part)])


def _render(objective: Objective) -> str:
    needs = _names(objective.needs | objective.rows(objective.defaults).views) or "nothing"
    conditional = [
        f"{_names(more)} with {option}"
        for option, more in objective.option_needs.items()
        if _names(more)
    ]
    return render_entry(
        objective.name,
        objective.formula,
        objective.source,
        objective.options,
        "needs: " + "; ".join([needs, *conditional]),
    )


def _names(needs: Collection[str]) -> str:
    """The needs by name, without what the policy says itself."""
    return ", ".join(sorted(set(needs) - STATISTICS.keys()))


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
