"""Prompts that come one by one, of somebody who waits: they get places as these become free.

`refill` knows all prompts before it begins, and all are sampled alike. Here each has a number of
samples, a temperature, a seed and a length of its own, and comes when it comes. Rows of places and
prompts are the same: a prompt is run once, whatever the number of its samples, and prompts of one
row are read by all of its places.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.batching import fitting_sizes, pad_batch
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.generation.decoding import compact
from mmpo_jax.generation.places import Prompts, empty_pool, empty_prompts, prefill, replaced
from mmpo_jax.generation.sampler import NOT_FINITE, sample_keys
from mmpo_jax.generation.stepping import NO_TOKEN, TOP, Places, decode_steps
from mmpo_jax.models.layout import pad_size
from mmpo_jax.parallel.mesh import batch_shards, put_batch

ROW = 4
"""Places of a row, and prompts: each of four requests for one sample has one, or one for four has
all. Attention reads the prompts of a row once for all of its places, and masks the others'."""
STEPS = 8
"""Tokens of every place between two looks at who has come and who has gone."""
PREFILL = 4
"""Prompts of every shard that are run at once, where so many have come."""
POOL, POOL_GROWS = 128, 4
"""Tokens of the smallest pool for every place, and by how much the next is larger: few programs."""
FREE = 1 / 8
"""The share of a pool that is free when it has been compacted, at least."""
PROMPT_SIZES = 2
"""Bucket sizes of prompts from one power of two to the next."""


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """Samples that somebody waits for."""

    record: TokenizedRecord
    max_new_tokens: int
    num_samples: int = 1
    temperature: float = 0.0
    """0 is greedy."""
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    """From 0 to 2^64 - 1; a sample depends on it and on its own number only."""
    tells_top: bool = False
    """Whether the most likely tokens are told beside every token."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """What a sample goes on with, or why it does not."""

    asked: Asked
    number: int
    """Number of the sample among those of its request."""
    ids: np.ndarray
    """int32[t]; EOS included."""
    log_probs: np.ndarray
    """float32[t]; under the model, before temperature and truncation."""
    top_ids: np.ndarray
    """int32[t, 20]; the most likely tokens, where they are told; -1 beyond the vocabulary."""
    top_log_probs: np.ndarray
    """float32[t, 20]."""
    finish: Literal["stop", "length"] | None = None
    """`stop` after EOS, `length` at its limit; None where it goes on."""
    error: Exception | None = None
    """What ended it otherwise."""


@dataclasses.dataclass(eq=False)
class _Seat:
    """A prompt of a row, and what of it is decoded."""

    asked: Asked
    row: int
    which: int
    """Number of the prompt in its row."""
    left: collections.deque[int]
    """Numbers of samples that have not begun."""
    running: set[int] = dataclasses.field(default_factory=set)


class Engine:
    """Samples for whoever asks, while others are served.

    Nothing of it may be called by two threads at once.
    """

    def __init__(self, checkpoint: Checkpoint, mesh: Mesh, *, places: int, max_prompt: int):
        """
        Args:
          checkpoint: its parameters on the mesh.
          mesh: the devices, of this process alone.
          places: samples decoded at a time; rounded up to whole rows of every shard.
          max_prompt: tokens of the longest prompt.
        """
        self.checkpoint, self.mesh, self.max_prompt = checkpoint, mesh, max_prompt
        self.shards = batch_shards(mesh)
        self.rows = -(-places // (ROW * self.shards)) * self.shards
        self.waiting: collections.deque[Asked] = collections.deque()
        self.reset()

    def reset(self) -> None:
        """Lets go of everybody, and of what the devices hold for them."""
        self.waiting.clear()
        self.seats: list[list[_Seat | None]] = [[None] * ROW for _ in range(self.rows)]
        self.holders: list[list[tuple[_Seat, int] | None]] = [
            [None] * ROW for _ in range(self.rows)
        ]
        """(seat, number of the sample) of every place."""
        self.prompts: tuple[Prompts, ...] = ()
        self.hidden: Any = None
        self.pool: Any = None
        shape = self.rows, ROW
        whole, real = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        self.places = Places(
            prompt=np.full(shape, -1, np.int32),
            position=whole,
            limit=whole.copy(),
            temperature=real,
            top_k=whole.copy(),
            top_p=real.copy(),
            seed=np.zeros((*shape, 2), np.uint32),
            number=np.zeros(shape, np.uint32),
            tells_top=np.zeros(shape, bool),
            begins=np.zeros(shape, bool),
            dropped=np.zeros(shape, bool),
        )

    @property
    def works(self) -> bool:
        """Whether anybody waits or is served."""
        return bool(self.waiting) or any(seat for row in self.seats for seat in row)

    def add(self, asked: Asked) -> None:
        """Somebody waits for samples; the prompt has no more than `max_prompt` tokens."""
        self.waiting.append(asked)

    def drop(self, asked: Asked, number: int | None = None) -> None:
        """Nobody waits any more for a sample, or for all of a request; its place becomes free."""
        if number is None and asked in self.waiting:
            self.waiting.remove(asked)
            return
        for seat in self._taken():
            if seat.asked is not asked:
                continue
            gone = [*seat.left, *seat.running] if number is None else [number]
            for one in gone:
                if one in seat.left:
                    seat.left.remove(one)
                elif one in seat.running:
                    self._free(seat, one, dropped=True)
            self._leave(seat)

    def advance(self) -> list[Part]:
        """Seats who waits where there is room, and decodes a few tokens of every place.

        Returns:
          What there is of samples since the last call.
        """
        parts: list[Part] = []
        with jax.set_mesh(self.mesh):
            self._begin_samples()
            seated = self._seat(parts)
            for group in self._alike(seated):
                self._run_prompts(group)
            if any(holder for row in self.holders for holder in row):
                parts += self._decode()
        return parts

    def _taken(self) -> Iterator[_Seat]:
        return (seat for row in self.seats for seat in list(row) if seat is not None)

    def _begin_samples(self) -> None:
        """Samples of prompts that are there take the free places of their rows."""
        for seat in self._taken():
            for place in range(ROW):
                if seat.left and self.holders[seat.row][place] is None:
                    self._hold(seat, place, seat.left.popleft())

    def _hold(self, seat: _Seat, place: int, number: int) -> None:
        asked, at, places = seat.asked, (seat.row, place), self.places
        seat.running.add(number)
        self.holders[seat.row][place] = seat, number
        places.prompt[at], places.position[at] = seat.which, 0
        places.limit[at] = asked.max_new_tokens
        places.temperature[at], places.top_p[at] = asked.temperature, asked.top_p
        places.top_k[at], places.number[at] = asked.top_k, number
        places.seed[at] = asked.seed & 0xFFFFFFFF, asked.seed >> 32
        places.tells_top[at], places.begins[at] = asked.tells_top, True

    def _free(self, seat: _Seat, number: int, dropped: bool = False) -> None:
        """Frees the place of a sample.

        Args:
          dropped: whether it has not ended by itself, by which its tokens left the pool.
        """
        place = next(
            place
            for place, holder in enumerate(self.holders[seat.row])
            if holder is not None and holder[0] is seat and holder[1] == number
        )
        seat.running.remove(number)
        self.holders[seat.row][place] = None
        self.places.prompt[seat.row, place] = -1
        self.places.begins[seat.row, place] = False
        self.places.dropped[seat.row, place] |= dropped

    def _leave(self, seat: _Seat) -> None:
        """Frees the seat of a prompt that has no sample left."""
        if not seat.left and not seat.running and self.seats[seat.row][seat.which] is seat:
            self.seats[seat.row][seat.which] = None

    def _seat(self, parts: list[Part]) -> list[_Seat]:
        """Seats for those who have waited longest, as far as there are any.

        Args:
          parts: gets the errors of those whose images cannot be read.
        """
        seated: list[_Seat] = []
        counts = np.zeros(self.shards, int)
        while self.waiting:
            asked = self.waiting[0]
            row = self._row_for(asked, counts)
            if row is None:
                break
            self.waiting.popleft()
            record = asked.record
            try:
                self.checkpoint.processor.pixels(record.images, record.videos)
            except DataError as error:
                parts += [_failed(asked, number, error) for number in range(asked.num_samples)]
                continue
            seat = _Seat(
                asked, row, self.seats[row].index(None), collections.deque(range(asked.num_samples))
            )
            self.seats[row][seat.which] = seat
            counts[self._shard(row)] += 1
            seated.append(seat)
            for place in range(ROW):
                if seat.left and self.holders[row][place] is None:
                    self._hold(seat, place, seat.left.popleft())
        return seated

    def _row_for(self, asked: Asked, counts: np.ndarray) -> int | None:
        """The row that suits a request: of those with a place for every sample the fullest, else
        the emptiest; None where there is no place."""
        found: list[tuple[bool, int, int]] = []
        for row in range(self.rows):
            free = sum(holder is None for holder in self.holders[row])
            if free and None in self.seats[row] and counts[self._shard(row)] < PREFILL:
                fits = free >= min(asked.num_samples, ROW)
                found.append((not fits, free if fits else -free, row))
        return min(found)[2] if found else None

    def _shard(self, row: int) -> int:
        return row // (self.rows // self.shards)

    def _alike(self, seated: Sequence[_Seat]) -> list[list[_Seat]]:
        """Prompts that are run together: those with as many pictures."""
        kinds: dict[int, list[_Seat]] = {}
        for seat in seated:
            kinds.setdefault(pad_size(seat.asked.record.num_slots), []).append(seat)
        return list(kinds.values())

    def _run_prompts(self, seats: Sequence[_Seat]) -> None:
        """Runs prompts of a kind, and gives them to their rows."""
        by_shard: list[list[_Seat]] = [[] for _ in range(self.shards)]
        for seat in seats:
            by_shard[self._shard(seat.row)].append(seat)
        columns = 1 if max(map(len, by_shard)) == 1 else PREFILL
        none = self.rows // self.shards
        to, which = np.full((2, self.shards, columns), none, np.int32)
        records: list[TokenizedRecord | None] = [None] * (self.shards * columns)
        for shard, own in enumerate(by_shard):
            for column, seat in enumerate(own):
                to[shard, column], which[shard, column] = seat.row % none, seat.which
                records[shard * columns + column] = seat.asked.record
        longest = max(len(seat.asked.record.prompt_ids) for seat in seats)
        batch = pad_batch(
            records,
            self.checkpoint.processor,
            rows=len(records),
            prompt_sizes=(self._prompt_size(longest),),
            response_sizes=(1,),
            num_responses=0,
            num_slots=pad_size(seats[0].asked.record.num_slots),
            shown=False,
        )
        keys = sample_keys(0, 0, np.zeros(len(records), np.uint32), 1)
        model, params = self.checkpoint.model, self.checkpoint.params
        new = prefill(model, params, put_batch(batch, self.mesh), keys)
        is_alone = len(seats) == sum(1 for _ in self._taken())
        if is_alone and self.prompts and new.width < self.prompts[0].width:
            self.prompts = ()  # a longer prompt was here, and nobody reads it any more
        if not self.prompts:
            self.prompts = empty_prompts(new, rows=self.rows, width=ROW)
        if self.pool is None:
            sizes = {"groups": 1, "members": ROW, "size": self._pool_sizes()[0]}
            self.pool = empty_pool(self.prompts[0], **sizes)
            self.hidden = jax.numpy.zeros((self.rows, ROW, new.hidden.shape[-1]), new.hidden.dtype)
        self.prompts = replaced(self.prompts, new, to, which)

    def _prompt_size(self, length: int) -> int:
        (size,) = fitting_sizes([length], PROMPT_SIZES)
        return min(size, max(self.max_prompt, length))

    def _decode(self) -> list[Part]:
        self.hidden, self.pool, said = decode_steps(
            self.checkpoint.model,
            self.checkpoint.params,
            self.prompts,
            self.hidden,
            self.pool,
            # Copies: what is given to a device may be read after the call.
            jax.tree.map(np.copy, self.places),
            np.array(bool(self.waiting)),
            steps=STEPS,
            eos_ids=self.checkpoint.processor.eos_ids,
            pad_id=self.checkpoint.processor.pad_id,
        )
        said = jax.device_get(said)
        self.places.begins[:] = self.places.dropped[:] = False
        if int(said.used) + ROW > self.pool.owner.shape[2]:
            self.pool = compact(self.pool, size=self._pool_size(int(said.live)))
        return self._told(said)

    def _told(self, said: Any) -> list[Part]:
        """The parts that places said, of a `Said` in NumPy."""
        parts = []
        for row, place in zip(*np.nonzero(self.places.prompt >= 0), strict=True):
            holder = self.holders[row][place]
            assert holder is not None
            seat, number = holder
            tokens = said.tokens[:, row, place]
            count = int((tokens != NO_TOKEN).sum())
            if not count:
                continue
            self.places.position[row, place] += count
            finish, error = self._end(seat.asked, tokens[count - 1], row, place)
            real = slice(count - (error is not None))
            part = Part(
                seat.asked,
                number,
                tokens[real],
                said.log_probs[real, row, place],
                said.top_ids[real, row, place],
                said.top_log_probs[real, row, place],
                finish,
                error,
            )
            parts.append(part)
            if finish or error:
                self._free(seat, number)
                self._leave(seat)
        return parts

    def _end(
        self, asked: Asked, token: int, row: int, place: int
    ) -> tuple[Literal["stop", "length"] | None, Exception | None]:
        """By what a place ends whose last token this is."""
        if token == NOT_FINITE:
            return None, FloatingPointError("the model computes logits that are not finite")
        if token in self.checkpoint.processor.eos_ids:
            return "stop", None
        is_long = self.places.position[row, place] >= asked.max_new_tokens
        return "length" if is_long else None, None

    def _pool_sizes(self) -> list[int]:
        return [ROW * POOL * POOL_GROWS**power for power in range(8)]

    def _pool_size(self, live: int) -> int:
        """The smallest size of a pool that leaves room behind so many tokens."""
        sizes = self._pool_sizes()
        return next(size for size in sizes if live + max(ROW, FREE * size) <= size)


def _failed(asked: Asked, number: int, error: Exception) -> Part:
    ids, values = np.zeros((0, TOP), np.int32), np.zeros((0, TOP), np.float32)
    return Part(asked, number, ids[:, 0], values[:, 0], ids, values, error=error)
