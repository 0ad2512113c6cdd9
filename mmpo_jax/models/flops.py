"""Floating-point operations (FLOPs) that a model needs, by its parameter tree and its config.

Counted are products of matrices: dense layers, by the kernels in the tree, whatever the family, and
attention, by the pairs of a query and a key that it sees. What is done to single numbers between
them is a few per cent, and left out. Every product counts once, however often it is computed again
for a backward pass: this is what model FLOP utilisation is told by (Chowdhery et al. 2022, arXiv
2204.02311, appendix B).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, Literal

from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.models.lora import EXPERTS
from mmpo_jax.models.model import Model
from mmpo_jax.models.reward_head import is_reward_head
from mmpo_jax.models.vision import VisionConfig
from mmpo_jax.models.vision_gemma import SOFT_TOKENS, GemmaVisionConfig
from mmpo_jax.models.vision_qwen import QwenVisionConfig
from mmpo_jax.models.vision_squares import SquaresConfig

HEAD = "language_model/lm_head/kernel"
EMBEDDING = "language_model/embed_tokens/embedding"
PROJECTOR, TOWER, LAYERS = "multi_modal_projector/", "vision_tower/", "language_model/layers/"
PER_LAYER = "language_model/per_layer_model_projection/"
"""What all tokens pass in front of the layers (Gemma 3n)."""

Part = Literal["decoder", "head", "projector", "tower", "patches"]
"""What passes a dense layer: the decoder's tokens, those that are predicted, a picture's features,
what the layers of its tower see of it, or its patches."""


@dataclasses.dataclass(frozen=True)
class Dense:
    """A dense layer, or a stack of them; each takes 2 `size` FLOPs for what passes it."""

    path: str
    part: Part
    layers: int
    """Those that are run."""
    experts: int
    """Of a layer; 1 for what is no expert's."""
    active: int
    """Those that a token passes."""
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        return self.layers * self.active * self.inputs * self.outputs


@dataclasses.dataclass(frozen=True)
class Tower:
    """What one slot of a vision tower computes."""

    tokens: int
    patches: int
    features: int
    """Rows that the projector makes of it."""
    layers: int
    """Those that are run."""
    width: int
    heads: int
    scores: Callable[[int], float]
    """Slots of a row -> query-key pairs of all layers and one head, over the row."""


def tower_of(config: Any) -> Tower | None:
    """The tower of a model's config; None of a text model."""
    tower = getattr(config, "vision", None)
    if isinstance(tower, VisionConfig):
        chosen = getattr(config, "feature_layers", None) or (config.feature_layer,)
        layers = max(chosen)
        pairs = layers * tower.num_tokens**2
        return Tower(
            tower.num_tokens,
            tower.side**2,
            config.num_image_tokens,
            layers,
            tower.hidden_size,
            tower.num_heads,
            lambda slots: slots * pairs,
        )
    if isinstance(tower, QwenVisionConfig):
        full = len(tower.full_layers)
        patches = tower.slot_patches

        def scores(slots: int) -> float:
            return (tower.num_layers - full) * slots * patches**2 + full * (slots * patches) ** 2

        return Tower(
            patches,
            patches,
            tower.slot_tokens,
            tower.num_layers,
            tower.hidden_size,
            tower.num_heads,
            scores,
        )
    if isinstance(tower, GemmaVisionConfig):
        patches, layers = tower.slot_patches, tower.num_layers
        return Tower(
            patches,
            patches,
            patches // tower.pool**2,
            layers,
            tower.num_heads * tower.head_dim,
            tower.num_heads,
            lambda slots: slots * layers * patches**2,
        )
    if isinstance(tower, SquaresConfig):
        tokens = SOFT_TOKENS
        return Tower(tokens, tokens, tokens, 0, 0, 0, lambda slots: 0.0)
    return None


def dense_layers(model: Model, params: Mapping[str, Any]) -> list[Dense]:
    """The dense layers of a model, in the order of its tree; a tied embedding is the head.

    Those of a reward head, which one token of a response passes, are left out.

    Args:
      model: the architecture.
      params: path -> anything with a shape; adapters among them.
    """
    tower = tower_of(model.config)
    found = []
    for path, leaf in params.items():
        tied = path == EMBEDDING and model.config.decoder.tie_word_embeddings
        is_dense = path.endswith(("/kernel", "/lora_a", "/lora_b", "_projection_weight")) or tied
        if not is_dense or is_reward_head(path):
            continue
        *stack, inputs, outputs = leaf.shape
        part: Part
        layers, experts, active = math.prod(stack), 1, 1
        if tied:
            inputs, outputs = outputs, inputs
        if path == HEAD or tied:
            part = "head"
        elif path.startswith((LAYERS, PER_LAYER)):
            part = "decoder"
            if EXPERTS in path:
                (layers, experts), active = stack, model.config.decoder.experts[0].top_k
        elif path.startswith(PROJECTOR):
            part = "projector"
        elif stack:
            assert tower is not None
            part, layers = "tower", tower.layers
        else:
            part = "patches"
        found.append(Dense(path, part, layers, experts, active, inputs, outputs))
    return found


def passing(tower: Tower | None, decoder: float, head: float, slots: float) -> dict[Part, float]:
    """How many rows are multiplied in each part.

    Args:
      tower: of the model, if it has one.
      decoder: tokens that pass the decoder's layers.
      head: tokens that are predicted.
      slots: slots of pictures.
    """
    of_slot = (tower.features, tower.tokens, tower.patches) if tower is not None else (0, 0, 0)
    features, tokens, patches = (slots * count for count in of_slot)
    return {
        "decoder": decoder,
        "head": head,
        "projector": features,
        "tower": tokens,
        "patches": patches,
    }


def input_gradients(trained: Collection[str]) -> dict[str, bool]:
    """Where a training takes gradients by the inputs of layers, by the beginning of their paths:
    where something is trained there or below.

    Args:
      trained: paths of what is trained.
    """
    tower = any(path.startswith(TOWER) for path in trained)
    projector = tower or any(path.startswith(PROJECTOR) for path in trained)
    decoder = any(
        not path.startswith((TOWER, PROJECTOR, HEAD)) and not is_reward_head(path)
        for path in trained
    )
    return {TOWER: tower, PROJECTOR: projector, LAYERS: projector or decoder}


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """FLOPs that a model needs for each of what a batch has."""

    token: float
    """Of the decoder's layers, for a token."""
    target: float
    """Of the language-model head, for a token that is predicted."""
    pair: float
    """Of the decoder's attention, for a query and a key that it sees."""
    slot: float
    """Of the dense layers for pictures, for a slot."""
    score: float
    """Of the tower's attention, for a query and a key of one layer."""
    scores: Callable[[int], float] = dataclasses.field(compare=False)
    """See `Tower.scores`."""

    def of(self, tokens: float, targets: float, pairs: float, slots: Iterable[int]) -> float:
        """FLOPs of a batch.

        Args:
          tokens: of the decoder; those of a shared prompt once, and without padding.
          targets: tokens that are predicted.
          pairs: of queries and keys that they see.
          slots: slots of every row's pictures.
        """
        of_pictures = sum(n * self.slot + self.scores(n) * self.score for n in slots)
        return tokens * self.token + targets * self.target + pairs * self.pair + of_pictures

    def __add__(self, other: ModelFlops) -> ModelFlops:
        return ModelFlops(
            self.token + other.token,
            self.target + other.target,
            self.pair + other.pair,
            self.slot + other.slot,
            self.score + other.score,
            self.scores,
        )


def model_flops(
    model: Model, params: Mapping[str, Any], trained: Collection[str] = ()
) -> ModelFlops:
    """What a model needs for a forward pass, and for the gradients of what is trained: as much
    again for those by the inputs of a layer, and by its kernel.

    Layers whose attention has a window count as if they had none.

    Args:
      model: the architecture.
      params: path -> anything with a shape; adapters among them.
      trained: paths of what is trained; nothing for a forward pass alone.
    """
    below = input_gradients(trained)
    tower = tower_of(model.config)
    needed: dict[Part, float] = collections.defaultdict(float)
    for dense in dense_layers(model, params):
        part = next((part for part in below if dense.path.startswith(part)), LAYERS)
        products = 1 + below[part] + (dense.path in trained)
        needed[dense.part] += 2.0 * dense.size * products
    of_slot = passing(tower, decoder=0, head=0, slots=1)
    of_states = delta_flops(model.config.decoder) * (1 + 2 * below[LAYERS])
    return ModelFlops(
        token=needed["decoder"] + of_states,
        target=needed["head"],
        pair=4.0 * model.config.decoder.query_channels * (1 + 2 * below[LAYERS]),
        slot=sum(of_slot[part] * flops for part, flops in needed.items()),
        score=4.0 * tower.width * (1 + 2 * below[TOWER]) if tower is not None else 0.0,
        scores=tower.scores if tower is not None else _no_scores,
    )


def delta_flops(decoder: DecoderConfig) -> float:
    """Of a token in all delta nets, whose states it reads, corrects and is read from."""
    return 6.0 * sum(net.state_size for net in decoder.delta_nets)


def _no_scores(slots: int) -> float:
    return 0.0
