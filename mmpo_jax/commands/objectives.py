"""`mmpo objectives`: the registries of objectives and rewards as text."""

from __future__ import annotations

import argparse
import difflib

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.listing import render_objectives
from mmpo_jax.recipes.methods import spelling
from mmpo_jax.rewards import REWARDS
from mmpo_jax.rewards.listing import render_rewards


def main(options: argparse.Namespace) -> None:
    """
    Raises:
      MmpoError: there is no objective or reward of a name.
    """
    names = options.names
    known = {**OBJECTIVES, **REWARDS}
    unknown = sorted(set(names) - known.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=3)
        hint = spelling(unknown[0]) or (f"did you mean {', '.join(near)}?" if near else "")
        told = f"; {hint}" if hint else ""
        raise MmpoError(f"there is no objective or reward {unknown[0]!r}{told}")
    if not names or set(names) & OBJECTIVES.keys():
        print(render_objectives(names), end="\n\n")
    if not names or set(names) & REWARDS.keys():
        print(render_rewards(names))
