"""`mmpo objectives`: the registries of objectives and rewards as text."""

from __future__ import annotations

import argparse
import difflib

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.listing import render_objectives
from mmpo_jax.rewards.listing import render_rewards


def main(options: argparse.Namespace) -> None:
    """
    Raises:
      MmpoError: there is no objective of a name.
    """
    names = options.names
    unknown = sorted(set(names) - OBJECTIVES.keys())
    if unknown:
        near = difflib.get_close_matches(unknown[0], OBJECTIVES, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise MmpoError(f"there is no objective {unknown[0]!r}{hint}")
    print(render_objectives(names), *([] if names else [render_rewards()]), sep="\n\n")
