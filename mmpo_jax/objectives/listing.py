"""`mmpo objectives`: every objective with its formula, options and needs."""

from __future__ import annotations

import textwrap

from mmpo_jax.objectives import catalog  # noqa: F401 (fills the registry)
from mmpo_jax.objectives.registry import (
    FIELDS,
    OBJECTIVES,
    REFERENCES,
    STATISTICS,
    VIEWS,
    Objective,
)

MEANINGS = {**FIELDS, **REFERENCES, **VIEWS}
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
    needs = ", ".join(sorted(objective.needs - STATISTICS.keys())) or "nothing"
    lines = [
        f"{objective.name}",
        _wrap(objective.formula),
        _wrap(objective.source),
        _wrap(f"options: {options or 'none'}"),
        _wrap(f"needs: {needs}"),
    ]
    return "\n".join(line for line in lines if line.strip())


def _wrap(text: str) -> str:
    return textwrap.fill(text, WIDTH, initial_indent="  ", subsequent_indent="    ")
