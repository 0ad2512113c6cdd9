"""Places that are refilled: which prompts stand in which rows, and when they get new ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.core import progress
from mmpo_jax.generation.decoding import compact, decode
from mmpo_jax.generation.places import Prompts, empty_pool, empty_rows, give, prefill
from mmpo_jax.inference.loop import made_ahead
from mmpo_jax.inference.plan import PlannedBatch
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.model import Model, Params
from mmpo_jax.parallel.mesh import batch_shards, batch_share, gathered, put_batch
from mmpo_jax.recipes.sampling import Decoding

PROMPTS = 2
"""Prompts of a row where there are more than are sampled at once. With one, most of its places wait
for the longest sample; with more, places read more prompts than their own."""
PLACES = 0.6
"""Places of a row for every sample of a prompt. With more, they wait for samples longer; with
fewer, keys and values of a prompt are read for fewer samples at once."""
MEMBERS = 5
"""At most so many places share a pool: whatever a pool holds is multiplied with all of them."""
FIRST_POOL = 128
"""Tokens for every place of a pool that begins."""
FREE = 1 / 8
"""The share of a pool that is free when it has been compacted, at least."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """What is computed together."""

    rows: int
    """B, a multiple of the devices that batches are split over."""
    width: int
    """Q, prompts of a row."""
    groups: int
    """G, of places of a row."""
    members: int
    """M, places of a group."""
    batch: int
    """Prompts that are run at once; a multiple of the devices, at most `rows`."""

    @property
    def places(self) -> int:
        return self.groups * self.members


def choose_layout(
    prompts: int,
    prompt_tokens: int,
    decoding: Decoding,
    batch_size: int,
    shards: int,
    state_tokens: int = 0,
) -> Layout:
    """A layout whose caches take no more memory than all samples of `batch_size` prompts at once.

    Where there are no more prompts than that, all of their samples are decoded at once. Where even
    the longest samples are short beside their prompt, it is prompts that take time and memory, and
    a row has one.

    Args:
      prompts: how many there are.
      prompt_tokens: of the longest.
      decoding: how many samples of each, and their limit.
      batch_size: prompts at a time.
      shards: devices that batches are split over.
      state_tokens: what a prompt and a place take beside their tokens, see `caches.state_tokens`.
    """
    n, limit = decoding.num_samples, decoding.max_new_tokens
    batch_size = _round_up(batch_size, shards)
    members = max(size for size in range(1, MEMBERS + 1) if n % size == 0)
    if prompts <= batch_size:
        return Layout(batch_size, 1, n // members, members, batch_size)
    if n == 1:
        return Layout(batch_size, 1, 1, 1, _part(batch_size, 8, shards))
    if n * limit <= prompt_tokens:
        return Layout(batch_size, 1, n // members, members, _part(batch_size, 4, shards))
    places = round(PLACES * n)
    groups = -(-places // MEMBERS)
    members = places // groups
    prompt, sample = prompt_tokens + state_tokens, limit + state_tokens
    budget = batch_size * (prompt + n * sample)
    row = PROMPTS * prompt + groups * members * sample
    most = _round_up(-(-prompts // PROMPTS), shards)
    rows = min(most, max(1, budget // row // shards) * shards)
    return Layout(rows, PROMPTS, groups, members, _part(rows, 4, shards))


def _part(rows: int, share: int, shards: int) -> int:
    """One of so many parts of some rows, in whole rows of every shard."""
    return max(1, rows // shards // share) * shards


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def pool_sizes(limit: int) -> list[int]:
    """Tokens for every place that pools are made for, ascending; each size is compiled.

    Args:
      limit: T, as many as a place ever reads.
    """
    sizes, size = [], FIRST_POOL
    while size < limit:
        sizes += [size, size * 3 // 2]
        size *= 2
    return [*(size for size in sizes if size < limit), limit]


@dataclasses.dataclass
class Work:
    """How many tokens places have decoded, those of places without a sample included."""

    computed: int = 0

    def add(self, steps: int, places: int) -> None:
        self.computed += steps * places


def sample_batches(
    model: Model,
    params: Params,
    batches: Sequence[PlannedBatch],
    layout: Layout,
    mesh: Mesh,
    *,
    decoding: Decoding,
    eos_ids: tuple[int, ...],
    pad_id: int,
    begun: bool = False,
    work: Work | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """Samples responses to all prompts of some batches.

    Every sample has a key of its own and a key per token is folded from it, so a sample does not
    depend on its place or on what is decoded beside it.

    Args:
      model: the architecture.
      params: its parameters on the mesh, cast to their `inference_dtype`.
      batches: they make (`Batch`, PRNG keys [F, n]), F = `layout.batch`.
      layout: what is computed together.
      mesh: the devices.
      decoding: temperature, truncation and length.
      eos_ids: tokens that end a sample.
      pad_id: what follows the end.
      begun: whether samples go on from the batches' responses, see `places.Prompts`.
      work: is told what was computed.

    Yields:
      (number of a record, its samples int32[n, T]) as prompts are done, EOS included where it was
      sampled. A sample whose logits are NaN or infinite ends with `NOT_FINITE`.
    """
    state = _State(model, params, layout, mesh, decoding, eos_ids, pad_id, begun)
    share = batch_share(mesh)
    made = made_ahead(batch.make(share) for batch in batches)
    for planned, (prompts, keys) in zip(batches, made, strict=True):
        wanted = state.shares(planned)
        while not state.has_room(wanted):
            yield from state.decode(wanted)
        state.give(planned, prompts, keys)
    while state.works():
        yield from state.decode(np.full(state.shards, layout.rows + 1, np.int32))
    if work is not None:
        work.add(state.steps(), layout.rows * layout.places)


class _State:
    """The arrays on the devices, and which record's prompt stands where."""

    def __init__(
        self,
        model: Model,
        params: Params,
        layout: Layout,
        mesh: Mesh,
        decoding: Decoding,
        eos_ids: tuple[int, ...],
        pad_id: int,
        begun: bool,
    ):
        self.begun = begun
        self.model, self.params, self.layout, self.mesh = model, params, layout, mesh
        self.shards = batch_shards(mesh)
        self.decoding, self.eos_ids, self.pad_id = decoding, eos_ids, pad_id
        self.prompts: tuple[Prompts, ...] = ()
        self.samples: Any = None
        self.pool: Any = None
        self.sizes = [size * layout.members for size in pool_sizes(decoding.max_new_tokens)]
        self.given = np.zeros(layout.rows, np.int32)
        """Prompts that every row has been given."""
        self.records = np.full((layout.rows, layout.width), -1)
        """Records whose prompts are not done, -1 for none."""

    def shares(self, planned: PlannedBatch) -> np.ndarray:
        """int32[Z]: how many prompts of a batch every shard has."""
        size = self.layout.batch // self.shards
        shards = [place // size for _, place in planned.places]
        return np.bincount(shards, minlength=self.shards).astype(np.int32)

    def free(self) -> np.ndarray:
        """bool[Z, B / Z]: rows whose next prompt has a place."""
        following = self.given % self.layout.width
        return (self.records[np.arange(self.layout.rows), following] < 0).reshape(self.shards, -1)

    def has_room(self, wanted: np.ndarray) -> bool:
        return bool((self.free().sum(axis=1) >= wanted).all())

    def works(self) -> bool:
        return bool((self.records >= 0).any())

    def steps(self) -> int:
        return int(gathered(self.samples.steps, self.mesh)) if self.prompts else 0

    def give(self, planned: PlannedBatch, prompts: Batch, keys: jax.Array) -> None:
        """Runs the prompts of a batch and gives them to free rows."""
        to, which = self._seat(planned)
        with jax.set_mesh(self.mesh):
            batch = put_batch(prompts, self.mesh)
            new = prefill(self.model, self.params, batch, keys, self.begun)
            if not self.prompts:
                self._begin(new)
            self.prompts, self.samples = give(
                self.prompts, self.samples, new, to, which, pad_id=self.pad_id
            )

    def _seat(self, planned: PlannedBatch) -> tuple[np.ndarray, np.ndarray]:
        """Which row of its shard every prompt of a batch gets, B / Z for none, and which of the
        row's prompts it will be: int32[Z, F] each."""
        size, own = self.layout.batch // self.shards, self.layout.rows // self.shards
        free = [np.flatnonzero(shard) for shard in self.free()]
        to, which = np.full((2, self.shards, size), own, np.int32)
        for number, place in planned.places:
            shard, column = divmod(place, size)
            to[shard, column] = free[shard][column]
            row = shard * own + to[shard, column]
            which[shard, column] = self.given[row] % self.layout.width
            self.records[row, which[shard, column]] = number
            self.given[row] += 1
        return to, which

    def _begin(self, like: Prompts) -> None:
        """Makes arrays for prompts like some."""
        layout = self.layout
        self.prompts, self.samples = empty_rows(
            like,
            rows=layout.rows,
            width=layout.width,
            places=layout.places,
            length=self.decoding.max_new_tokens,
            pad_id=self.pad_id,
        )
        self.pool = empty_pool(
            self.prompts[0], groups=layout.groups, members=layout.members, size=self.sizes[0]
        )

    def decode(self, wanted: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Decodes until every shard has so many free rows, or nothing is left to decode; may end
        before that, to be called again. Gives the samples of prompts that are done."""
        with jax.set_mesh(self.mesh):
            self.samples, self.pool, report = decode(
                self.model,
                self.params,
                self.prompts,
                self.samples,
                self.pool,
                self.given,
                wanted,
                decoding=self.decoding,
                eos_ids=self.eos_ids,
                pad_id=self.pad_id,
            )
            report = gathered(report, self.mesh)  # so that all processes decide alike
            complete = np.asarray(report.complete) & (self.records >= 0)
            if int(report.used) + self.layout.members > self.pool.owner.shape[2]:
                self.pool = compact(self.pool, size=self._pool_size(int(report.live)))
        if not complete.any():
            return []
        tokens = np.asarray(gathered(self.samples.tokens, self.mesh))
        tokens = tokens.reshape(*self.records.shape, -1, tokens.shape[-1])
        done = list(zip(*np.nonzero(complete), strict=True))
        found = [(int(self.records[at]), tokens[at].copy()) for at in done]
        self.records[complete] = -1
        progress.advance(len(found))
        return found

    def _pool_size(self, live: int) -> int:
        """The smallest size of a pool that leaves room behind so many tokens."""
        for size in self.sizes:
            if live + max(self.layout.members, FREE * size) <= size:
                return size
        return self.sizes[-1]
