"""The central data structure: B prompts with R responses each."""

from __future__ import annotations

import dataclasses

import jax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """B prompts (with images) and R responses to each, padded to static sizes.

    Prompts and responses are padded on the right. Padding is never attended and never scored.
    """

    prompt_ids: jax.Array
    """int32[B, P]; every image feature has its placeholder token."""
    prompt_mask: jax.Array
    """bool[B, P]; True at real tokens."""
    positions: jax.Array
    """int32[B, A, P]; rotary positions, A = 3 axes in some families and else 1."""
    next_position: jax.Array
    """int32[B]; where the first token of every response stands, on all axes."""
    pixel_values: jax.Array
    """float32[B, I, ...]; the prompts' images as slots, tiles [C, H, W] or groups of patches
    [S, C*t*h*w], in the order of the prompt, rows with fewer padded with zeros."""
    patches: dict[str, jax.Array]
    """What the vision half needs to know of them, each [B, I, ...]; empty in most families."""
    feature_index: jax.Array
    """int32[B, P, K]; which vectors of the row's image features a token reads, -1 at text."""
    feature_weight: jax.Array
    """float32[B, P, K]; how much of each."""
    response_ids: jax.Array
    """int32[B, R, T]; the first token is predicted from the prompt's last one."""
    response_mask: jax.Array
    """bool[B, R, T]; True at real tokens."""
    loss_mask: jax.Array
    """bool[B, R, T]; True at the tokens a loss counts: the assistant's, with the final EOS."""
    weights: jax.Array
    """float32[B]; 1 for a real row, 0 for one that only fills the batch."""
    shown: Shown | None = None
    """What responses show that go on with turns of the user; None where none shows anything."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Shown:
    """Images in responses: the same fields of their tokens as `Batch` has of the prompt's."""

    positions: jax.Array
    """int32[B, A, R, T]."""
    feature_index: jax.Array
    """int32[B, R, T, K]."""
    feature_weight: jax.Array
    """float32[B, R, T, K]."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """Prompts and responses of several records one behind the other in rows of tokens.

    Where lengths differ, a `Batch` is mostly padding; here only the ends of rows are. A record is
    its prompt and, behind it, all of its responses; what sees what follows from `record` and
    `response`, and the rest of the arrays says the same of every record as a `Batch` does.

    Rows come in Z groups, one for every device that batches are split over, of b rows each. What
    tokens refer to lies in their group: C records, V of them with images, M tokens to predict.
    """

    token_ids: jax.Array
    """int32[Z * b, S]."""
    record: jax.Array
    """int32[Z * b, S]; number of the token's record in its row, -1 at padding."""
    response: jax.Array
    """int32[Z * b, S]; 0 in a prompt, 1 + r in the response r."""
    place: jax.Array
    """int32[Z * b, S]; how many tokens the token's prompt and response have before it."""
    positions: jax.Array
    """int32[Z * b, A, S]; rotary positions."""
    pixel_values: jax.Array
    """float32[Z * V, I, ...]; see `Batch.pixel_values`, a row for every record with images."""
    patches: dict[str, jax.Array]
    """See `Batch.patches`, each [Z * V, I, ...]."""
    feature_row: jax.Array
    """int32[Z * b, S]; which of the group's V rows of images a token reads."""
    feature_index: jax.Array
    """int32[Z * b, S, K]; see `Batch.feature_index`."""
    feature_weight: jax.Array
    """float32[Z * b, S, K]."""
    predictor: jax.Array
    """int32[Z, M]; where in the group's b * S tokens the one stands that predicts a response's."""
    target: jax.Array
    """int32[Z, M]; the token to predict; of those that a loss counts, and no others."""
    target_place: jax.Array
    """int32[Z, M]; where in the group's [C, R, T] it belongs; C * R * T at padding."""
    last: jax.Array
    """int32[Z * C, R]; where in the group's b * S tokens a response ends."""
    loss_mask: jax.Array
    """bool[Z * C, R, T]; see `Batch.loss_mask`."""
    weights: jax.Array
    """float32[Z * C]; 1 for a record, 0 for a place that none takes."""
    reach: int = dataclasses.field(metadata={"static": True})
    """No record has more tokens."""
    prompt: int = dataclasses.field(default=0, metadata={"static": True})
    """Where every row holds one record, with many responses: no prompt has more tokens. 0 where
    rows hold what they may."""
