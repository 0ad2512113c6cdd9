"""Methods that are options of an objective here, by the names that papers and TRL give them."""

from __future__ import annotations

from typing import Any

import yaml

Recipe = dict[str, dict[str, Any]]
"""The keys of a recipe's sections that a method consists of."""


def _with(objective: dict[str, Any], rollout: dict[str, Any] | None = None) -> Recipe:
    """A method of one objective, and of how its responses are sampled."""
    training = {"training": {"objective": objective}}
    return training if rollout is None else {**training, "rollout": rollout}


_REINFORCE_PLUS_PLUS = _with({"type": "grpo"}, {"baseline": "none", "scale": "whiten"})
_REINFORCE_PLUS_PLUS_BASELINE: Recipe = {
    "training": {
        "objective": {"type": "grpo", "beta": 0.01, "kl": "k2", "bias_corrected_kl": False},
        "reference": {"type": "online"},
    },
    "rollout": {"scale": "whiten"},
}

METHODS: dict[str, Recipe] = {
    "rloo": _with(
        {"type": "grpo", "ratio": "trajectory", "normalization": "grpo"},
        {"baseline": "leave_one_out", "scale": "none"},
    ),
    "gspo": _with({"type": "grpo", "ratio": "sequence", "normalization": "grpo"}),
    "gspo_token": _with({"type": "grpo", "ratio": "sequence_token", "normalization": "grpo"}),
    "dapo": _with(
        {"type": "grpo", "epsilon_high": 0.28}, {"dynamic_sampling": 3, "mask_truncated": True}
    ),
    "dr_grpo": _with({"type": "grpo", "normalization": "dr_grpo"}, {"scale": "none"}),
    "bnpo": _with({"type": "grpo", "normalization": "bnpo"}),
    "gdpo": _with({"type": "grpo"}, {"aggregation": "normalize_then_sum"}),
    "reinforce++": _REINFORCE_PLUS_PLUS,
    "reinforce_plus_plus": _REINFORCE_PLUS_PLUS,
    "reinforce_pp": _REINFORCE_PLUS_PLUS,
    "reinforce++_baseline": _REINFORCE_PLUS_PLUS_BASELINE,
    "reinforce_plus_plus_baseline": _REINFORCE_PLUS_PLUS_BASELINE,
    "gkd": {
        "training": {
            "objective": {"type": "distillation", "beta": 0.5},
            "teacher": {"type": "model", "model": "DIR"},
        },
        "rollout": {"on_policy": 0.5},
    },
    "sigmoid": _with({"type": "dpo"}),
    "tr_dpo": {"training": {"objective": {"type": "dpo"}, "reference": {"type": "ema"}}},
    "ld_dpo": _with({"type": "dpo", "ld_alpha": 0.5}),
    "wpo": _with({"type": "dpo", "wpo": True}),
}
"""Name -> what a recipe says for it, in the order of docs/training.md. Numbers are the paper's, or
where it tries several one of them."""


def spelling(name: str) -> str | None:
    """How a recipe spells a method that is no objective of its own, for an error; None of others.

    Args:
      name: as somebody wrote it, with `-` or capitals too.
    """
    method = METHODS.get(name.lower().replace("-", "_"))
    if method is None:
        return None
    parts = [f"`{section}: {_in_one_line(keys)}`" for section, keys in method.items()]
    return f"write {' and '.join(parts)} (docs/training.md)"


def _in_one_line(keys: dict[str, Any]) -> str:
    return yaml.safe_dump(keys, default_flow_style=True, sort_keys=False, width=1000).strip()
