"""What PEFT's files call what an adapter is beside, and how strong it is."""

from __future__ import annotations

import re
from typing import Any

from mmpo_jax.checkpoints.tensor_names import key_of
from mmpo_jax.models.model import Model


def module_name(path: str, layer: int | None, model: Model) -> str:
    """What transformers calls a dense layer."""
    key = key_of(f"{path}/kernel", layer, model, model.family.module_keys)
    return key.removesuffix(".weight")


def is_target(config: dict[str, Any], module: str, layer: int | None) -> bool:
    """Whether the config names a module, by PEFT's rules."""

    def among(names: Any) -> bool:
        if isinstance(names, str):
            return names == "all-linear" or re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    if among(config.get("exclude_modules") or ()) or not among(config["target_modules"]):
        return False
    chosen = config.get("layers_to_transform")
    if chosen is None or chosen == []:
        return True
    return layer in (chosen if isinstance(chosen, list) else [chosen])


def rank_of(config: dict[str, Any], name: str) -> int:
    """The rank of the adapter beside a module or a parameter, by an adapter's config."""
    return _by_pattern(config.get("rank_pattern"), name, config["r"])


def scale_of(config: dict[str, Any], name: str) -> float:
    """alpha / r, or with rank stabilisation alpha / sqrt(r) (Kalajdzievski 2023)."""
    alpha, rank = (
        _by_pattern(config.get("alpha_pattern"), name, config["lora_alpha"]),
        rank_of(config, name),
    )
    return alpha / (rank**0.5 if config["use_rslora"] else rank)


def alpha_of(scale: Any, rank: int) -> float:
    """The alpha that gives a scale with this rank, as it was before the division."""
    alpha = float(f"{float(scale) * rank:.7g}")
    return int(alpha) if alpha.is_integer() else alpha


def _by_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default
