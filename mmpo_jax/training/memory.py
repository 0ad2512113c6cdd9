"""What a training holds on each device between steps, for the log."""

from __future__ import annotations

import logging
import math
from typing import Any

import jax

from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.models.quantized import itemsize
from mmpo_jax.training.offload import is_on_host

log = logging.getLogger(__name__)


def bytes_per_device(tree: Any) -> float:
    """Bytes of the largest part that a device holds of these arrays."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * itemsize(leaf.dtype)
        for leaf in jax.tree.leaves(tree)
    )


def log_memory(state: TrainState) -> None:
    """Says in the log what parameters, optimizer and reference take, and the bytes of a trained
    parameter."""
    waits = any(map(is_on_host, jax.tree.leaves(state.optimizer)))
    parts = {
        "trained parameters": state.params,
        "frozen ones": state.frozen,
        f"optimizer{' (on the host)' if waits else ''}": state.optimizer,
        "reference": state.reference,
    }
    held = {name: bytes_per_device(tree) for name, tree in parts.items() if jax.tree.leaves(tree)}
    text = ", ".join(f"{name} {size / 2**30:.3g} GiB" for name, size in held.items())
    count = sum(leaf.size for leaf in state.params.values())
    each = [
        sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / count
        for tree in (state.params, state.optimizer)
    ]
    log.info(
        "each device holds: %s; of a trained parameter %.3g bytes and %.3g of the optimizer's",
        text,
        *each,
    )
