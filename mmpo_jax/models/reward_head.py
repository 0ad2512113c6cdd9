"""Heads that say what a response is worth, read from the decoder's last state of it.

    linear      score.weight, as in transformers' `*ForSequenceClassification`
    two_layer   rm_head.dense, tanh, rm_head.out_proj, as in MM-RLHF's code (arXiv 2502.10391)

A head is data of a model's config and leaves of its parameters, so checkpoints, meshes and
optimizers treat it as any other layer. Its names in files are its paths here.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from mmpo_jax.core.sections import CritiqueLayout
from mmpo_jax.models.config import (
    HeadKind,
    ModelConfig,
    ModelError,
    RewardHead,
    expect,
)
from mmpo_jax.models.linear import Linear, linear, matmul

KEY = "reward_head"
"""Key of config.json: `{"type": ..., "critique_prompt": ...}`, and `critique_layout` where it is
`one_turn`."""

MODULES: dict[HeadKind, str] = {"linear": "score", "two_layer": "rm_head"}
"""What the head's parameters are called, which PEFT knows as modules to save."""

LAYERS = r"score|rm_head/(dense|out_proj)"
"""Regular expression of the paths of its dense layers."""

SHARDING_RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"score/kernel|rm_head/out_proj/kernel", PartitionSpec("fsdp")),
    (r"rm_head/dense/kernel", PartitionSpec("fsdp", "tensor")),
    (r"rm_head/(dense|out_proj)/bias", PartitionSpec()),
)


class TwoLayerHead(nnx.Module):
    """out_proj(tanh(dense(h))), both with a bias.

    MM-RLHF's code has dropout around `dense`, of a rate that is 0 in the models it is made for.
    """

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.dense = linear(width, width, True, rngs)
        self.out_proj = linear(width, 1, True, rngs)

    def __call__(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
        return linear_reward(self.out_proj, jnp.tanh(self.dense(hidden)))


def linear_reward(layer: Linear, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
    """The one output of a dense layer, in float32 at least: margins are small beside rewards."""
    dtype = jnp.promote_types(hidden.dtype, jnp.float32)
    reward = matmul(hidden, layer.kernel[...], dtype)[..., 0]
    return reward if layer.bias is None else reward + layer.bias[...][0].astype(dtype)


def is_reward_head(path: str) -> bool:
    """Whether a parameter is one of a reward head."""
    return re.fullmatch(rf"({LAYERS})/.*", path) is not None


def new_head(config: ModelConfig, seed: int) -> dict[str, jax.Array]:
    """Path -> float32 of a head that nobody trained; of variance 1 / inputs, biases 0."""
    assert config.reward_head is not None
    width, rngs = config.decoder.hidden_size, nnx.Rngs(seed)
    layers: dict[str, Any] = {}
    if config.reward_head.kind == "linear":
        layers["score"] = linear(width, 1, False, rngs)
    else:
        head = TwoLayerHead(width, rngs)
        layers |= {"rm_head/dense": head.dense, "rm_head/out_proj": head.out_proj}
    return {
        f"{path}/{name}": leaf
        for path, layer in layers.items()
        for name, leaf in nnx.to_pure_dict(nnx.state(layer)).items()
    }


def with_reward_head(
    config: ModelConfig,
    kind: HeadKind | None,
    critique_prompt: str | None,
    critique_layout: CritiqueLayout = "turns",
) -> ModelConfig:
    """The config of what a reward model is trained from.

    Args:
      config: of the checkpoint.
      kind: of a new head; None for the one that is there, if there is one.
      critique_prompt: what critiques are asked for with from now on; None for none.
      critique_layout: where the response stands then.

    Raises:
      ModelError: a new head would take the place of one that is there.
    """
    head = config.reward_head
    if kind is not None and head is not None:
        raise ModelError(
            f"reward_head: there is a head of type {head.kind}, which training goes on with where "
            "the recipe makes no new one"
        )
    if kind is None and head is None:
        return config
    kind = kind if head is None else head.kind
    assert kind is not None
    return dataclasses.replace(
        config, reward_head=RewardHead(kind, critique_prompt, critique_layout)
    )


def without_reward_head(config: ModelConfig) -> ModelConfig:
    """The config of the model below the head."""
    return dataclasses.replace(config, reward_head=None)


def read_reward_head(config: Any) -> RewardHead | None:
    """The head of a `transformers` config; None for a model that has none.

    Raises:
      ModelError: it has several outputs, or the key says something else than a head.
    """
    names: list[str] = getattr(config, "architectures", None) or []
    classifies = any(name.endswith("ForSequenceClassification") for name in names)
    if classifies and config.num_labels != 1:
        raise ModelError(
            f"{names[0]} with num_labels {config.num_labels}: a reward model has one output"
        )
    said = getattr(config, KEY, None)
    if said is None:
        return RewardHead("linear") if classifies else None
    return parse_reward_head(said)


def parse_reward_head(said: Any) -> RewardHead:
    """The head that an entry `KEY` of a config says.

    Raises:
      ModelError: it says something else.
    """
    known = {"type", "critique_prompt", "critique_layout"}
    if not isinstance(said, dict) or not said.keys() <= known:
        raise ModelError(f"{KEY} is {said!r:.200}; it has the keys {', '.join(sorted(known))}")
    expect(said.get("type"), typing.get_args(HeadKind), f"{KEY}.type")
    prompt = said.get("critique_prompt")
    if not isinstance(prompt, str | None):
        raise ModelError(f"{KEY}.critique_prompt is {prompt!r:.80}; it is a text, or null")
    layout = said.get("critique_layout", "turns")
    expect(layout, typing.get_args(CritiqueLayout), f"{KEY}.critique_layout")
    return RewardHead(said["type"], prompt, layout)


def reward_head_entries(head: RewardHead, reward_class: str | None) -> dict[str, Any]:
    """The keys of config.json that say what head a folder has.

    Args:
      head: of the model.
      reward_class: transformers' class that loads such a folder; None where it has none.
    """
    said = {"type": head.kind, "critique_prompt": head.critique_prompt}
    if head.critique_layout != "turns":
        said["critique_layout"] = head.critique_layout
    entries: dict[str, Any] = {KEY: said}
    if head.kind == "linear" and reward_class is not None:
        labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
        entries |= {"architectures": [reward_class], **labels}
    return entries
