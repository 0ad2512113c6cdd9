"""What lies on the devices when a training takes its first step."""

import contextlib
from collections import Counter

import jax
import pytest

from mmpo_jax.training import loop


@contextlib.contextmanager
def first_steps():
    """A list that gets an entry for every training within: arrays of the start model that are on
    the devices at its first step and not part of the state, as (shape, dtype) -> how many."""
    found = []
    # Kept alive, so that no later array has one of these buffers.
    before = jax.live_arrays()
    make_step = loop.make_step

    def made(loss, optimizer, schedule, state, *args):
        step = make_step(loss, optimizer, schedule, state, *args)
        shapes = {leaf.shape for leaf in (*state.params.values(), *state.frozen.values())}
        taken = []

        def counting(state, batch):
            if not taken:
                known = _buffers([*before, *jax.tree.leaves((state, batch))])
                beside = _buffers(jax.live_arrays())
                found.append(
                    Counter(
                        (array.shape, array.dtype.name)
                        for pointer, array in beside.items()
                        if pointer not in known and array.shape in shapes and array.ndim > 1
                    )
                )
                taken.append(None)
            return step(state, batch)

        return counting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", made)
        yield found


def _buffers(arrays):
    """Arrays by where they lie: several may be the same memory."""
    return {
        shard.data.unsafe_buffer_pointer(): array
        for array in arrays
        for shard in array.addressable_shards
        if not array.is_deleted() and shard.data.size
    }
