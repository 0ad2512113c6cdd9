"""`mmpo objectives`: every objective with its formula, options and needs."""

from __future__ import annotations

import textwrap
from collections.abc import Collection

from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.registry import FIELDS, HEADS, REFERENCES, STATISTICS, VIEWS, Objective

MEANINGS = {**FIELDS, **REFERENCES, **VIEWS, **HEADS}
WIDTH = 100


def render_objectives() -> str:
    """The registry as text, by what the objectives compare."""
    kinds: dict[str, list[Objective]] = {}
    for objective in OBJECTIVES.values():
        kinds.setdefault(objective.kind, []).append(objective)
    blocks = []
    for kind, members in kinds.items():
        blocks.append(f"## of {kind}")
        blocks += [_render(member) for member in members]
    needs = "\n".join(f"  {name}: {meaning}" for name, meaning in MEANINGS.items())
    return "\n\n".join([*blocks, f"What objectives need:\n{needs}"])


def _render(objective: Objective) -> str:
    options = ", ".join(f"{name}={default}" for name, (_, default) in objective.options.items())
    needs = _names(objective.needs) or "nothing"
    conditional = [
        f"{_names(more)} with {option}"
        for option, more in objective.option_needs.items()
        if _names(more)
    ]
    lines = [
        f"{objective.name}",
        _wrap(objective.formula),
        _wrap(objective.source),
        _wrap(f"options: {options or 'none'}"),
        _wrap("needs: " + "; ".join([needs, *conditional])),
    ]
    return "\n".join(line for line in lines if line.strip())


def _names(needs: Collection[str]) -> str:
    """Without what the policy says itself."""
    return ", ".join(sorted(set(needs) - STATISTICS.keys()))


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
