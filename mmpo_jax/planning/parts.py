"""What a model multiplies: dense layers by its parameter tree, and the pairs attention sees."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.generation.refill import pool_sizes
from mmpo_jax.models.attention import MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK
from mmpo_jax.models.model import Model
from mmpo_jax.models.splash import SharedPromptMask, block_size
from mmpo_jax.models.vision import VisionConfig
from mmpo_jax.models.vision_qwen import QwenVisionConfig
from mmpo_jax.parallel.mesh import param_shardings
from mmpo_jax.planning.abstract import Sizes

HEAD = "language_model/lm_head/kernel"
EMBEDDING = "language_model/embed_tokens/embedding"
PROJECTOR, TOWER, LAYERS = "multi_modal_projector/", "vision_tower/", "language_model/layers/"


@dataclasses.dataclass(frozen=True)
class Product:
    """Tokens times the kernel of a dense layer, or of a stack of them."""

    path: str
    layers: int
    inputs: int
    outputs: int
    tokens: float
    """Rows that are multiplied, over all devices."""
    split: tuple[Any, Any]
    """Axes of the mesh that inputs and outputs are split over."""

    @property
    def size(self) -> int:
        return self.layers * self.inputs * self.outputs

    @property
    def flops(self) -> float:
        return 2.0 * self.size * self.tokens


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
    return None


def products(
    model: Model,
    params: Mapping[str, Any],
    mesh: Mesh,
    *,
    decoder: float,
    head: float,
    slots: float,
) -> list[Product]:
    """The dense layers of a model, by its parameter tree.

    Args:
      model: the architecture.
      params: path -> anything with a shape; adapters among them.
      mesh: the devices.
      decoder: tokens that pass the decoder's layers, over all devices.
      head: tokens that pass the language-model head.
      slots: slots of pictures.
    """
    tower = tower_of(model.config)
    shardings = flatten(param_shardings(shape_tree(params), model.rules, mesh))
    found = []
    for path, leaf in params.items():
        tied = path == EMBEDDING and HEAD not in params
        if not (path.endswith(("/kernel", "/lora_a", "/lora_b")) or tied):
            continue
        *stack, inputs, outputs = leaf.shape
        spec = (*shardings[path].spec, *[None] * leaf.ndim)[: leaf.ndim][-2:]
        layers = math.prod(stack)
        if tied:
            inputs, outputs, spec = outputs, inputs, spec[::-1]
        if path == HEAD or tied:
            tokens = head
        elif path.startswith(LAYERS):
            tokens = decoder
        else:
            assert tower is not None
            if path.startswith(PROJECTOR):
                tokens = slots * tower.features
            elif stack:
                tokens, layers = slots * tower.tokens, tower.layers
            else:
                tokens = slots * tower.patches
        if tokens:
            found.append(Product(path, layers, inputs, outputs, tokens, tuple(spec)))
    return found


def shape_tree(flat: Mapping[str, Any]) -> Any:
    """Shapes by path as a tree of `ShapeDtypeStruct`s."""
    return unflatten(
        {path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for path, leaf in flat.items()}
    )


def seen_pairs(sizes: Sizes) -> float:
    """Query-key pairs of a row in which the query sees the key: causal in the prompt; every
    response token sees the whole prompt and its own response so far."""
    p, r, t = sizes.prompt, sizes.responses, sizes.response
    return p * (p + 1) / 2 + r * (t * p + t * (t + 1) / 2)


@functools.lru_cache(maxsize=64)
def computed_pairs(sizes: Sizes, backend: str) -> float:
    """Pairs of a row that attention computes: whole blocks of those that are seen."""
    p, r, t = sizes.prompt, sizes.responses, sizes.response
    if backend == "splash":
        length = p + r * t
        block = block_size(length)
        size = -(-length // block) * block
        mask = SharedPromptMask(size, p, t)
        cuts = [slice(start, start + block) for start in range(0, size, block)]
        visited = sum(bool(mask[q, k].any()) for q in cuts for k in cuts)
        return float(visited * block**2)
    block = max(MIN_QUERY_BLOCK, -(-p // MAX_QUERY_BLOCKS))
    stops = {start: min(start + block, p) for start in range(0, p, block)}
    prompt = sum((stop - start) * stop for start, stop in stops.items())
    return float(prompt + r * t * (p + t))


def mean_pool(limit: int) -> float:
    """Tokens that pools hold room for per place, in the mean over samples of `limit` tokens."""
    done, total = 0, 0.0
    for size in pool_sizes(limit):
        total += size * (size - done)
        done = size
    return total / limit
