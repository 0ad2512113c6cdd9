"""A vision-language model over shared prompts: what all families have in common."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from mmpo_jax.models.attention import packed_attention, shared_prompt_attention
from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.models.config import ModelConfig, ModelError
from mmpo_jax.models.decoder import Decoder
from mmpo_jax.models.layers import constrain_batch, linear
from mmpo_jax.models.reward_head import TwoLayerHead, linear_reward

States = jax.Array | tuple[jax.Array, jax.Array]
"""Final hidden states of a batch: `hidden_states`, or `packed_states` of a packed one."""


class VisionLanguageModel(nnx.Module):
    """A decoder that reads image features in place of placeholder tokens.

    Families add a vision half to it. Use it through `model.Model`, which keeps parameters outside.
    """

    attention: str = "auto"
    """What computes attention over prompts and responses, see `attention.BACKENDS`."""

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

        Learned vectors come first, then the features of every slot in order. A family without
        images has none.
        """
        raise NotImplementedError(f"{self.config.family} has no images")

    def embed_prompt(self, batch: Batch, remat: str = "none") -> Float[Array, "B P D"]:
        """Prompt embeddings [B, P, D], image features in the places of the placeholders."""
        index, weight = batch.feature_index, batch.feature_weight
        return self.embed(batch.prompt_ids, index, weight, self.pool(batch, remat))

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
        image = jnp.zeros_like(text)
        for k in range(index.shape[-1]):
            chosen = jax.vmap(lambda rows, at: rows[at])(pool, jnp.maximum(index[..., k], 0))
            image += chosen * weight[..., k : k + 1].astype(chosen.dtype)
        return jnp.where(is_image, image, text)

    def embed_responses(
        self, batch: Batch, pool: Float[Array, "B F D"] | None
    ) -> tuple[Float[Array, "B S D"], Int[Array, "B A S"]]:
        """(embeddings [B, R * T, D], positions int32[B, A, R * T]) of the responses."""
        b, r, t = batch.response_ids.shape
        ids = batch.response_ids.reshape(b, r * t)
        if batch.shown is None:
            positions = response_positions(batch, jnp.tile(jnp.arange(t), r))
            return self.language_model.embed(ids), positions
        index, weight = (
            field.reshape(b, r * t, -1)
            for field in (batch.shown.feature_index, batch.shown.feature_weight)
        )
        positions = batch.shown.positions.reshape(b, -1, r * t)
        return self.embed(ids, index, weight, pool), positions

    def states(self, batch: Batch | PackedBatch, remat: str = "none") -> States:
        """The decoder's final hidden states of a batch, each prompt run once."""
        if isinstance(batch, PackedBatch):
            return self.packed_states(batch, remat)
        return self.hidden_states(batch, remat)

    def hidden_states(
        self, batch: Batch, remat: str = "none"
    ) -> tuple[Float[Array, "B D"], Float[Array, "B R T D"]]:
        """The decoder's final hidden states of a batch, each prompt run once.

        Returns:
          (last prompt token's [B, D], responses' [B, R, T, D]).
        """
        b, r, t = batch.response_ids.shape
        p = batch.prompt_ids.shape[1]
        pool = self.pool(batch, remat)
        prompts = self.embed(batch.prompt_ids, batch.feature_index, batch.feature_weight, pool)
        responses, own = self.embed_responses(batch, pool)
        x = jnp.concatenate([prompts, responses], axis=1)
        positions = jnp.concatenate([batch.positions, own], axis=2)

        def attend(made, stack, carry, inputs):
            del inputs
            query, key, value = made
            masks, scores = (batch.prompt_mask, batch.response_mask), stack.layer.mixer.scores
            attended = shared_prompt_attention(
                query, key, value, *masks, backend=self.attention, **scores
            )
            return attended, carry, None

        x, _, _ = self.language_model(x, positions, attend, remat=remat)
        last = jax.vmap(lambda rows, at: rows[at])(x, prompt_lengths(batch) - 1)
        return last, x[:, p:].reshape(b, r, t, -1)

    def packed_states(self, batch: PackedBatch, remat: str = "none") -> Float[Array, "Z X D"]:
        """The decoder's final hidden states of a packed batch, [Z, b * S, D]."""
        groups = batch.predictor.shape[0]
        pool, index = self.pool(batch, remat), batch.feature_index
        if pool is not None:
            rows = batch.token_ids.shape[0] // groups
            size = pool.shape[1]
            pool = pool.reshape(groups, -1, pool.shape[-1])
            index = jnp.where(index < 0, -1, index + size * batch.feature_row[..., None])
            ids, index, weight = (
                x.reshape(groups, rows * x.shape[1], *x.shape[2:])
                for x in (batch.token_ids, index, batch.feature_weight)
            )
            x = self.embed(ids, index, weight, pool)
            x = x.reshape(*batch.token_ids.shape, x.shape[-1])
        else:
            x = self.embed(batch.token_ids, index, batch.feature_weight, None)

        def attend(made, stack, carry, inputs):
            del inputs
            query, key, value = made
            scores = stack.layer.mixer.scores
            return packed_attention(query, key, value, batch, **scores), carry, None

        x, _, _ = self.language_model(x, batch.positions, attend, remat=remat)
        return x.reshape(groups, -1, x.shape[-1])


def prompt_lengths(batch: Batch) -> Int[Array, " B"]:
    """int32[B]: real tokens of each prompt."""
    return batch.prompt_mask.sum(axis=1, dtype=jnp.int32)


def response_positions(batch: Batch, steps: Int[Array, "*S"]) -> Int[Array, "B A T"]:
    """Positions [B, A, S] of response tokens that are `steps` [S] or [] after the prompt's end."""
    positions = batch.next_position[:, None, None] + jnp.atleast_1d(steps)
    return jnp.broadcast_to(positions, (*batch.positions.shape[:2], positions.shape[-1]))
