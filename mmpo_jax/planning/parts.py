"""What a model multiplies: dense layers by its parameter tree, and the pairs attention sees."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.generation.refill import pool_sizes
from mmpo_jax.models.attention import MAX_QUERY_BLOCKS, MIN_QUERY_BLOCK
from mmpo_jax.models.flops import EMBEDDING, Dense, dense_layers, passing, tower_of
from mmpo_jax.models.model import Model
from mmpo_jax.models.splash import SharedPromptMask, block_size
from mmpo_jax.parallel.mesh import param_shardings
from mmpo_jax.planning.abstract import Sizes


@dataclasses.dataclass(frozen=True)
class Product(Dense):
    """Tokens times the kernel of a dense layer, or of a stack of them."""

    tokens: float
    """Rows that are multiplied, over all devices."""
    split: tuple[Any, Any]
    """Axes of the mesh that inputs and outputs are split over."""
    expert: int
    """Over how many devices experts are split; 1 for what is no expert's."""

    @property
    def flops(self) -> float:
        return 2.0 * self.size * self.tokens


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
    shardings = flatten(param_shardings(shape_tree(params), model.rules, mesh))
    tokens = passing(tower_of(model.config), decoder, head, slots)
    found = []
    for dense in dense_layers(model, params):
        size = len(params[dense.path].shape)
        whole = (*shardings[dense.path].spec, *[None] * size)[:size]
        spec = whole[-2:]
        expert = mesh.shape["expert"] if "expert" in whole[:-2] else 1
        if dense.path == EMBEDDING:
            spec = spec[::-1]
        if tokens[dense.part]:
            found.append(
                Product(**vars(dense), tokens=tokens[dense.part], split=tuple(spec), expert=expert)
            )
    return found


def shape_tree(flat: Mapping[str, Any]) -> Any:
    """Shapes by path as a tree of `ShapeDtypeStruct`s."""
    return unflatten(
        {path: jax.ShapeDtypeStruct(leaf.shape, np.float32) for path, leaf in flat.items()}
    )


@functools.lru_cache(maxsize=64)
def computed_pairs(sizes: Sizes, backend: str, window: int | None = None) -> float:
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
    reach = p if window is None else window
    prompt = sum(
        (stop - start) * (stop - max(0, start + 1 - reach)) for start, stop in stops.items()
    )
    return float(prompt + r * t * (p + t))


def mean_pool(limit: int) -> float:
    """Tokens that pools hold room for per place, in the mean over samples of `limit` tokens."""
    done, total = 0, 0.0
    for size in pool_sizes(limit):
        total += size * (size - done)
        done = size
    return total / limit
