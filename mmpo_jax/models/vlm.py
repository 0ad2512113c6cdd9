"""A vision-language model over shared prompts: what all families have in common."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from mmpo_jax.models.attention import shared_prompt_attention
from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.models.config import ModelConfig, ModelError
from mmpo_jax.models.decoder import Added, Decoder
from mmpo_jax.models.decoder_layer import Observer
from mmpo_jax.models.delta_net import DeltaTokens, shared_prompt_delta
from mmpo_jax.models.layers import constrain_batch
from mmpo_jax.models.linear import linear
from mmpo_jax.models.mixing import mixed
from mmpo_jax.models.packed_attention import packed_attention
from mmpo_jax.models.reward_head import TwoLayerHead, linear_reward
from mmpo_jax.models.routing import loads_of
from mmpo_jax.models.sight import Images, image_numbers

States = jax.Array | tuple[jax.Array, jax.Array]
"""Final hidden states of a batch: `hidden_states`, or `packed_states` of a packed one."""


class Embedded(NamedTuple):
    """What the decoder reads, see `Decoder`."""

    x: Float[Array, "B S D"]
    positions: Int[Array, "B A S"]
    added: Added | None
    per_layer: Float[Array, "B S L p"] | None


class VisionLanguageModel(nnx.Module):
    """A decoder that reads image features in place of placeholder tokens.

    Families add a vision half to it. Use it through `model.Model`, which keeps parameters outside.
    """

    attention: str = "auto"
    """What computes attention over prompts and responses, see `attention.BACKENDS`."""
    levels: int = 0
    """L: of how many early layers of the tower the pool has features too."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.language_model = Decoder(config.decoder, rngs)
        if config.reward_head is not None:
            width = config.decoder.hidden_size
            if config.reward_head.kind == "linear":
                self.score = linear(width, 1, False, rngs)
            else:
                self.rm_head = TwoLayerHead(width, rngs)

    def rewards(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b"]:
        """What the reward head says of final hidden states [..., D], float32[...].

        Raises:
          ModelError: the model has no such head.
        """
        if self.config.reward_head is None:
            raise ModelError("this model has no reward head")
        if self.config.reward_head.kind == "linear":
            return linear_reward(self.score, hidden)
        return self.rm_head(hidden)

    def image_features(self, batch: Batch | PackedBatch, remat: str) -> Float[Array, "B F D"]:
        """The pool of vectors that `feature_index` points into, [B, F, D] in the decoder's width.

        Learned vectors come first, then the features of every slot in order; where early layers of
        the tower have features too, F is 1 + L times as many, level after level. A family without
        images has none.
        """
        raise NotImplementedError(f"{self.config.family} has no images")

    def pool_rows(self, index: Int[Array, "B *S K"]) -> Int[Array, "B *S K"]:
        """Where the vectors of `feature_index` are in the pool of `image_features`, where these
        are padded; what is negative stays."""
        return index

    def image_tokens(self, batch: Batch | PackedBatch) -> int:
        """How many tokens an image has at most, in families where it sees all of itself."""
        raise NotImplementedError(f"{self.config.family} has no such images")

    def shown_images(self, batch: Batch) -> Images | None:
        """What a batch shows where, for layers in which an image sees all of itself; None where
        there are none."""
        if not self.config.decoder.sees_images or not batch.pixel_values.shape[1]:
            return None
        responses = None
        if batch.shown is not None:
            responses = image_numbers(batch.shown.feature_index[..., 0] >= 0)
        prompts = image_numbers(batch.feature_index[..., 0] >= 0)
        return Images(prompts, self.image_tokens(batch), responses)

    def packed_images(self, batch: PackedBatch) -> Images | None:
        """`shown_images` of packed rows."""
        if not self.config.decoder.sees_images or not batch.pixel_values.shape[1]:
            return None
        begins = jnp.diff(batch.record, axis=1, prepend=-1) != 0
        begins |= jnp.diff(batch.response, axis=1, prepend=0) != 0
        numbers = image_numbers(batch.feature_index[..., 0] >= 0, begins)
        return Images(numbers, self.image_tokens(batch))

    def pool(self, batch: Batch | PackedBatch, remat: str) -> Float[Array, "B F D"] | None:
        """`image_features` [B, F, D]; None where the batch has no images."""
        if not batch.pixel_values.shape[1]:
            return None
        return constrain_batch(self.image_features(batch, remat))

    def embed(
        self,
        ids: Int[Array, "B S"],
        index: Int[Array, "B S K"],
        weight: Float[Array, "B S K"],
        pool: Float[Array, "B F D"] | None,
    ) -> Float[Array, "B S D"]:
        """Embeddings [B, S, D] of tokens.

        Args:
          ids: int32[B, S].
          index, weight: [B, S, K], see `Batch.feature_index`.
          pool: [B, F, D], what they choose from.
        """
        is_image = index[..., :1] >= 0
        text = self.language_model.embed(jnp.where(is_image[..., 0], 0, ids))
        if pool is None:
            return text
        return jnp.where(is_image, mixed(pool, index, weight), text)

    def per_layer_inputs(
        self,
        ids: Int[Array, "B S"],
        index: Int[Array, "B S K"],
        x: Float[Array, "B S D"],
    ) -> Float[Array, "B S L p"] | None:
        """`Decoder.per_layer_inputs` of tokens with these embeddings, see `embed`."""
        config = self.config.decoder.per_layer
        if config is None:
            return None
        ids = jnp.where(index[..., 0] >= 0, config.pad_id, ids)
        return self.language_model.per_layer_inputs(ids, x)

    def embed_batch(self, batch: Batch, remat: str = "none", responses: bool = True) -> Embedded:
        """What the decoder reads of a batch: the prompts, and behind them their responses, if these
        are wanted, S = P + R * T tokens."""
        pool, ids, positions = self.pool(batch, remat), batch.prompt_ids, batch.positions
        index, weight = self.pool_rows(batch.feature_index), batch.feature_weight
        if responses:
            # In one piece with the prompts: looked up apart, the embedding's gradient is two.
            said, own, read, share = self._responses(batch)
            ids = jnp.concatenate([ids, said], axis=1)
            positions = jnp.concatenate([positions, own], axis=2)
            index = jnp.concatenate([index, read], axis=1)
            weight = jnp.concatenate([weight, share], axis=1)
        x = self.embed(ids, index, weight, pool)
        per_layer = self.per_layer_inputs(ids, index, x)
        return Embedded(x, positions, self.added(pool, index, weight), per_layer)

    def _responses(self, batch: Batch) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        """(ids [B, S], positions [B, A, S], which vectors they read [B, S, K], their weights) of
        all response tokens of a row, S = R * T."""
        b, r, t = batch.response_ids.shape
        ids, shown = batch.response_ids.reshape(b, r * t), batch.shown
        if shown is None:
            own = response_positions(batch, jnp.tile(jnp.arange(t), r))
            vectors = b, r * t, batch.feature_index.shape[-1]
            read = jnp.full(vectors, -1, batch.feature_index.dtype)
            return ids, own, read, jnp.zeros(vectors, batch.feature_weight.dtype)
        read = self.pool_rows(shown.feature_index).reshape(b, r * t, -1)
        share = shown.feature_weight.reshape(b, r * t, -1)
        return ids, shown.positions.reshape(b, -1, r * t), read, share

    def added(
        self,
        pool: Float[Array, "B F D"] | None,
        index: Int[Array, "B *S K"],
        weight: Float[Array, "B *S K"],
        size: int | None = None,
    ) -> Added | None:
        """What the decoder's first layers add to tokens that read the pool: the same features on
        its further levels. None where there are none.

        Args:
          pool: [B, (1 + L) * F, D], or several of them as one.
          index, weight: [B, ..., K], see `Batch.feature_index`.
          size: vectors of one; None for all of them.
        """
        if pool is None or not self.levels:
            return None
        features = (size or pool.shape[1]) // (1 + self.levels)

        def of(number: Int[Array, ""]) -> Float[Array, "B S D"]:
            found = mixed(pool, index + (1 + number) * features, weight)
            found = jnp.where(index[..., :1] >= 0, found, 0)
            return found.reshape(-1, *found.shape[-2:])

        return Added(self.levels, of)

    def states(self, batch: Batch | PackedBatch, remat: str = "none") -> States:
        """The decoder's final hidden states of a batch, each prompt run once."""
        if isinstance(batch, PackedBatch):
            return self.packed_states(batch, remat)
        return self.hidden_states(batch, remat)

    def states_and_loads(
        self, batch: Batch | PackedBatch, remat: str = "none"
    ) -> tuple[States, Float[Array, "B 2 E"]]:
        """`states`, and how the layers' tokens spread over experts, see `routing.loads_of`; the
        sums over layers, of every row.

        Raises:
          ModelError: the model has no experts.
        """
        experts = self.config.decoder.experts
        if not experts:
            raise ModelError("this model has no experts")
        dtype = jnp.promote_types(self.language_model.embed_tokens.embedding.dtype, jnp.float32)
        loads = jnp.zeros((len(real_tokens(batch)), 2, experts[0].num_experts), dtype)
        if isinstance(batch, PackedBatch):
            return self._packed_states(batch, remat, constrain_batch(loads))
        return self._hidden_states(batch, remat, constrain_batch(loads))

    def hidden_states(
        self, batch: Batch, remat: str = "none"
    ) -> tuple[Float[Array, "B D"], Float[Array, "B R T D"]]:
        """The decoder's final hidden states of a batch, each prompt run once.

        Returns:
          (last prompt token's [B, D], responses' [B, R, T, D]).
        """
        return self._hidden_states(batch, remat, None)[0]

    def _hidden_states(
        self, batch: Batch, remat: str, loads: jax.Array | None
    ) -> tuple[tuple[jax.Array, jax.Array], Any]:
        """(`hidden_states`, `loads` with those of the layers added, if there are any)."""
        b, r, t = batch.response_ids.shape
        p = batch.prompt_ids.shape[1]
        embedded = self.embed_batch(batch, remat)
        images = self.shown_images(batch)

        def attend(made, stack, carry, inputs):
            del inputs
            masks = batch.prompt_mask, batch.response_mask
            if isinstance(made, DeltaTokens):
                read, _, _ = shared_prompt_delta(made, stack.layer.mixer, *masks)
                return read, carry, None
            (query, key, value), scores = made, stack.layer.mixer.scores
            attended = shared_prompt_attention(
                query, key, value, *masks, backend=self.attention, images=images, **scores
            )
            return attended, carry, None

        x, loads, _ = self.language_model(
            embedded.x,
            embedded.positions,
            attend,
            carry=loads,
            remat=remat,
            added=embedded.added,
            per_layer=embedded.per_layer,
            observe=_observer(batch, loads),
        )
        last = jax.vmap(lambda rows, at: rows[at])(x, prompt_lengths(batch) - 1)
        return (last, x[:, p:].reshape(b, r, t, -1)), loads

    def packed_states(self, batch: PackedBatch, remat: str = "none") -> Float[Array, "Z X D"]:
        """The decoder's final hidden states of a packed batch, [Z, b * S, D]."""
        return self._packed_states(batch, remat, None)[0]

    def _packed_states(
        self, batch: PackedBatch, remat: str, loads: jax.Array | None
    ) -> tuple[jax.Array, Any]:
        """(`packed_states`, `loads` with those of the layers added, if there are any)."""
        groups = batch.predictor.shape[0]
        assert not self.config.decoder.delta_nets, "states are not forked in packed rows"
        pool, index, added = self.pool(batch, remat), self.pool_rows(batch.feature_index), None
        if pool is not None:
            rows = batch.token_ids.shape[0] // groups
            size = pool.shape[1]
            pool = pool.reshape(groups, -1, pool.shape[-1])
            index = jnp.where(index < 0, -1, index + size * batch.feature_row[..., None])
            in_rows = groups, rows, *index.shape[1:]
            added = self.added(
                pool, index.reshape(in_rows), batch.feature_weight.reshape(in_rows), size
            )
            ids, index, weight = (
                x.reshape(groups, rows * x.shape[1], *x.shape[2:])
                for x in (batch.token_ids, index, batch.feature_weight)
            )
            x = self.embed(ids, index, weight, pool)
            x = x.reshape(*batch.token_ids.shape, x.shape[-1])
        else:
            x = self.embed(batch.token_ids, index, batch.feature_weight, None)
        per_layer = self.per_layer_inputs(batch.token_ids, batch.feature_index, x)

        images = self.packed_images(batch)

        def attend(made, stack, carry, inputs):
            del inputs
            query, key, value = made
            scores = stack.layer.mixer.scores
            return packed_attention(query, key, value, batch, images=images, **scores), carry, None

        x, loads, _ = self.language_model(
            x,
            batch.positions,
            attend,
            carry=loads,
            remat=remat,
            added=added,
            per_layer=per_layer,
            observe=_observer(batch, loads),
        )
        return x.reshape(groups, -1, x.shape[-1]), loads


def _observer(batch: Batch | PackedBatch, loads: jax.Array | None) -> Observer | None:
    """Adds up how a batch's tokens spread over experts; None where that is not wanted."""
    if loads is None:
        return None
    counted = real_tokens(batch)
    return lambda routing, loads: loads + loads_of(routing, counted)


def real_tokens(batch: Batch | PackedBatch) -> Bool[Array, "B S"]:
    """bool[B, S]: which tokens that the decoder reads are some record's, in the order of
    `hidden_states` or of a packed batch's rows."""
    if isinstance(batch, PackedBatch):
        return batch.record >= 0
    rows = len(batch.prompt_mask)
    tokens = jnp.concatenate([batch.prompt_mask, batch.response_mask.reshape(rows, -1)], axis=1)
    return tokens & (batch.weights > 0)[:, None]


def prompt_lengths(batch: Batch) -> Int[Array, " B"]:
    """int32[B]: real tokens of each prompt."""
    return batch.prompt_mask.sum(axis=1, dtype=jnp.int32)


def response_positions(batch: Batch, steps: Int[Array, "*S"]) -> Int[Array, "B A T"]:
    """Positions [B, A, S] of response tokens that are `steps` [S] or [] after the prompt's end."""
    positions = batch.next_position[:, None, None] + jnp.atleast_1d(steps)
    return jnp.broadcast_to(positions, (*batch.positions.shape[:2], positions.shape[-1]))
