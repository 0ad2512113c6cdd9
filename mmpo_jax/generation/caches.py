"""What layers keep of the tokens before, by their kind: of prompts, and of what places sample.

A kind is a class whose arrays have the layers of a stack in front and rows behind them. Prefill
makes one of every prompt, `pool` the one that places write to, and `advance` takes a token of every
place through a layer. Prompts and pools hold one for every stack of the decoder, by its path.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from mmpo_jax.models.attention import CachedPart, cached_attention
from mmpo_jax.models.config import DecoderConfig
from mmpo_jax.models.delta_net import DeltaState, DeltaTokens, run
from mmpo_jax.models.layer_kinds import AttentionConfig, DeltaNetConfig
from mmpo_jax.models.sight import in_window


@dataclasses.dataclass(frozen=True)
class PromptSeen:
    """What a token of every place sees of one of its row's prompts."""

    mine: Bool[Array, "B G M"]
    """Whether the place goes on from this prompt."""
    length: Int[Array, " B"]
    """Tokens of the prompt."""
    start: Int[Array, "B G M"]
    """Where the beginning stands that the place goes on from."""
    begun: Int[Array, "B G M"]
    """Tokens of it."""
    beginning: Int[Array, "B G M"]
    """Its number; 0 where places go on from the prompt."""
    has_beginnings: bool
    is_read: Bool[Array, ""] | None
    """Whether any place goes on from it; None where it is the only one."""


@dataclasses.dataclass(frozen=True)
class Step:
    """A token of every place: B rows of G pools, each read by M places."""

    position: Int[Array, "B G M"]
    """The token's index in its sample."""
    owned: Bool[Array, "B G M C"]
    """Whether a token of a pool is the place's own."""
    written: Int[Array, "B G C"]
    """The index of that token in its sample."""
    used: Int[Array, ""]
    """Where in the pools the token is written."""
    prompts: tuple[PromptSeen, ...]

    def grouped(self, x: Float[Array, "B N *d"]) -> Float[Array, "B G M *d"]:
        return x.reshape(*self.position.shape, *x.shape[2:])

    def sees_own(self, window: int | None) -> Bool[Array, "B G M C"]:
        return self.owned & in_window(self.position[..., None] - self.written[:, :, None], window)

    def sees(self, prompt: PromptSeen, size: int, window: int | None) -> Bool[Array, "B G M P"]:
        """Which of the `size` tokens kept of a prompt are seen."""
        place, length = jnp.arange(size), prompt.length[:, None, None, None]
        behind = (prompt.begun + self.position)[..., None]
        seen = (place < length) & in_window(length + behind - place, window)
        if prompt.has_beginnings:
            at = place - prompt.start[..., None]
            own = (at >= 0) & (at < prompt.begun[..., None])
            seen |= own & in_window(behind - at, window)
        return seen & prompt.mine[..., None]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValues:
    """Keys and values of attention, as `cached_attention` multiplies them."""

    key: jax.Array
    """[L, B, K, d, P] of prompts, of each and then of its beginnings; [L, B, G, K, d, C] of pools
    of C tokens."""
    value: jax.Array
    """[L, B, K, P, d] or [L, B, G, K, C, d]."""

    @classmethod
    def of_prompt(
        cls, key: Float[Array, "B P K d"], value: Float[Array, "B P K d"]
    ) -> tuple[KeyValues, Bool[Array, "B P"]]:
        """(those of one layer, whether a token's are finite)."""
        (key, value), whole = only_finite(key, value)
        return cls(key.transpose(0, 2, 3, 1), value.swapaxes(1, 2)), whole

    def widened(self, length: int) -> KeyValues:
        """Of prompts, with room for so many tokens."""
        padding = (0, length - self.value.shape[3])
        key = jnp.pad(self.key, [(0, 0)] * 4 + [padding])
        return KeyValues(key, jnp.pad(self.value, [(0, 0)] * 3 + [padding, (0, 0)]))

    def pool(self, groups: int, members: int, size: int) -> KeyValues:
        """Empty pools of `size` tokens, `groups` of them for every row of these prompts, each with
        so many places."""
        del members
        depth, rows, heads, _, d = self.value.shape
        value = jnp.zeros((depth, rows, groups, heads, size, d), self.value.dtype)
        return KeyValues(value.swapaxes(4, 5), value)

    def advance(
        self,
        made: tuple[jax.Array, jax.Array, jax.Array],
        attention: AttentionConfig,
        step: Step,
        layer: Int[Array, ""],
        prompts: Sequence[KeyValues],
    ) -> tuple[Float[Array, "B N H d"], KeyValues, Bool[Array, "B N"]]:
        """A token of every place through a layer.

        Args:
          made: (query [B, G * M, H, d], key and value [B, G * M, K, d]).
          attention: of the layer.
          step: who sees what.
          layer: its number in the stack.
          prompts: what the stack has kept of each.

        Returns:
          (what is read, the pools with these tokens, whether key and value are finite).
        """
        query, key, value = made
        (key, value), whole = only_finite(key, value)
        new_key = step.grouped(key).transpose(0, 1, 3, 4, 2)[None]
        new_value = step.grouped(value).swapaxes(2, 3)[None]
        start = layer, 0, 0, 0
        pools = KeyValues(
            jax.lax.dynamic_update_slice(self.key, new_key, (*start, 0, step.used)),
            jax.lax.dynamic_update_slice(self.value, new_value, (*start, step.used, 0)),
        )
        return pools.read(query, attention, step, layer, prompts), pools, whole

    def read(
        self,
        query: Float[Array, "B N H d"],
        attention: AttentionConfig,
        step: Step,
        layer: Int[Array, ""],
        prompts: Sequence[KeyValues],
    ) -> Float[Array, "B N H d"]:
        """What queries of a token of every place read of a layer, into whose pools it is written;
        see `advance`."""
        window, heads = attention.window or None, self.key.shape[3]
        parts = [CachedPart(heads, lambda: self.at(layer), step.sees_own(window))]
        for prompt, kept in zip(step.prompts, prompts, strict=True):
            seen = step.sees(prompt, kept.value.shape[3], window)
            load = functools.partial(kept.at, layer)
            parts.append(CachedPart(heads, load, seen, prompt.is_read))
        out = cached_attention(step.grouped(query), parts, attention.scale, attention.softcap)
        return out.reshape(query.shape)

    def at(self, layer: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
        """Keys and values of one layer."""
        key, value = (
            jax.lax.dynamic_index_in_dim(cache, layer, keepdims=False)
            for cache in (self.key, self.value)
        )
        return key, value

    def compacted(self, order: Int[Array, "B G S"], size: int) -> KeyValues:
        """Of pools, tokens in another order and with room for `size`."""
        return KeyValues(chosen(self.key, order, size, 5), chosen(self.value, order, size, 4))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaStates:
    """States of delta nets: behind prompts, or their E beginnings, and of every place."""

    recent: jax.Array
    """[L, B, max(1, E), 1, v, c] of prompts and [L, B, G, M, 1, v, c] of places, see `DeltaState`,
    with an axis of one where others have heads, see `places.row_spec`."""
    memory: jax.Array
    """float32[L, B, max(1, E), H, e, f] or [L, B, G, M, H, e, f]."""

    @classmethod
    def of_prompt(cls, prompt: DeltaState, beginnings: DeltaState) -> DeltaStates:
        """Those of one layer: of the beginnings [B, E, ...] where there are any, else of prompts
        [B, ...]."""
        ends = beginnings
        if not beginnings.memory.shape[1]:
            ends = jax.tree.map(lambda x: x[:, None], prompt)
        return cls(jnp.expand_dims(ends.recent, -3), ends.memory)

    def widened(self, length: int) -> DeltaStates:
        """As they are: states do not grow with tokens."""
        del length
        return self

    def pool(self, groups: int, members: int, size: int) -> DeltaStates:
        """States of the `members` places of each of `groups` in every row of these prompts."""
        del size

        def empty(x: jax.Array) -> jax.Array:
            return jnp.zeros((*x.shape[:2], groups, members, *x.shape[3:]), x.dtype)

        return DeltaStates(empty(self.recent), empty(self.memory))

    def advance(
        self,
        made: DeltaTokens,
        config: DeltaNetConfig,
        step: Step,
        layer: Int[Array, ""],
        prompts: Sequence[DeltaStates],
    ) -> tuple[Float[Array, "B N H f"], DeltaStates, Bool[Array, "B N"]]:
        """A token of every place through a layer, see `KeyValues.advance`.

        Places at the first token of a sample begin with the state of its prompt. Each has a state
        of its own, so numbers that are not finite stay with their sample.
        """
        own = self.at(layer)
        own = jax.lax.cond(
            (step.position == 0).any(),
            lambda: _forked(own, step, [kept.at(layer) for kept in prompts]),
            lambda: own,
        )
        rows = step.position.size

        def flat(x: jax.Array, axes: int) -> jax.Array:
            return x.reshape(rows, *x.shape[axes:])

        tokens = jax.tree.map(lambda x: x if x.ndim < 3 else flat(x, 2)[:, None], made)
        state = DeltaState(flat(own.recent, 4), flat(own.memory, 3))
        read, state = run(tokens, config, jnp.ones((rows, 1), bool), state)

        def written(states: jax.Array, new: jax.Array) -> jax.Array:
            new = new.reshape(states.shape[1:])
            return jax.lax.dynamic_update_index_in_dim(states, new, layer, 0)

        states = DeltaStates(written(self.recent, state.recent), written(self.memory, state.memory))
        read = read.reshape(*made.channels.shape[:2], *read.shape[2:])
        return read, states, jnp.ones(made.channels.shape[:2], bool)

    def at(self, layer: Int[Array, ""]) -> DeltaStates:
        """Those of one layer."""
        return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False), self)

    def compacted(self, order: Int[Array, "B G S"], size: int) -> DeltaStates:
        """As they are: they are places', and not tokens'."""
        del order, size
        return self


def _forked(own: DeltaStates, step: Step, prompts: Sequence[DeltaStates]) -> DeltaStates:
    """States of places [B, G, M, ...] of a layer, those that begin a sample having its prompt's."""
    for seen, kept in zip(step.prompts, prompts, strict=True):
        begins = seen.mine & (step.position == 0)

        def begun(mine: jax.Array, of_prompt: jax.Array, begins=begins, seen=seen) -> jax.Array:
            first = jax.vmap(lambda states, at: states[at])(of_prompt, seen.beginning)
            return jnp.where(begins.reshape(*begins.shape, *[1] * (mine.ndim - 3)), first, mine)

        own = jax.tree.map(begun, own, kept)
    return own


Kept = KeyValues | DeltaStates
"""What a kind of layers keeps."""


def state_tokens(decoder: DecoderConfig, dtype: np.dtype) -> int:
    """How many tokens' keys and values take as much memory as the states behind one prompt, or of
    one place, in all layers; 0 of a decoder without delta nets.

    Args:
      decoder: the architecture.
      dtype: of keys and values; states are float32.
    """
    states = 4 * sum(net.state_size for net in decoder.delta_nets)
    heads = sum(attention.num_kv_heads * attention.head_dim for attention in decoder.attentions)
    return -(-states // (2 * heads * dtype.itemsize))


def only_finite(
    key: Float[Array, "B S K d"], value: Float[Array, "B S K d"]
) -> tuple[tuple[Float[Array, "B S K d"], Float[Array, "B S K d"]], Bool[Array, "B S"]]:
    """((key, value), whether they are finite bool[B, S]), 0 where they are not.

    In a cache that several samples have in sight, NaN spoils all of them: it stays NaN times
    weight 0.
    """
    both = jnp.isfinite(key), jnp.isfinite(value)
    whole = both[0].all(axis=(2, 3)) & both[1].all(axis=(2, 3))
    return (jnp.where(both[0], key, 0), jnp.where(both[1], value, 0)), whole


def chosen(x: Any, order: Int[Array, "B G S"], size: int, axis: int) -> jax.Array:
    """The chosen tokens of pools, which lie along this axis, with room for `size`."""
    at = order
    if x.ndim > order.ndim:
        at = jnp.expand_dims(order, (0, 3, 9 - axis))
    taken = jnp.take_along_axis(x, at, axis=axis)
    padding = size - order.shape[2]
    return jnp.pad(taken, [(0, padding if a == axis else 0) for a in range(x.ndim)])
