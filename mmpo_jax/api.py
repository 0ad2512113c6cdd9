"""The library behind `import mmpo_jax as mm`: checkpoints, samples, log-probs, a training loop."""

from __future__ import annotations

import dataclasses
import difflib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import PIL.Image
from jax.sharding import Mesh
from jaxtyping import Array, Float

from mmpo_jax.checkpoints.checkpoint import Checkpoint, load_checkpoint
from mmpo_jax.checkpoints.huggingface import save_model
from mmpo_jax.checkpoints.train_state import TrainState
from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.data import pipeline
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.records import ImageRef, Record, Response, Turn, VideoRef
from mmpo_jax.data.same_tokens import check_same_tokenizer
from mmpo_jax.data.tokenization import Tokenize, TokenizedRecord, tokenize, tokenize_records
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.feedback.implicit import (
    reward_records,
    tokenizer_for_both,
)
from mmpo_jax.generation.responses import generate_responses
from mmpo_jax.inference.plan import packed_over
from mmpo_jax.models.precision import inference_dtype
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.objectives.sums import WeightedSum
from mmpo_jax.objectives.terms import Term, needs
from mmpo_jax.objectives.terms import make_term as objective_term
from mmpo_jax.parallel.mesh import batch_shards, batch_share, make_mesh, put_batch
from mmpo_jax.recipes.methods import spelling
from mmpo_jax.recipes.sampling import Decoding
from mmpo_jax.scoring.log_probs import score_records
from mmpo_jax.training.examples import make_examples, tokenizer_for
from mmpo_jax.training.losses import make_loss, needs_reference
from mmpo_jax.training.step import create_state, make_step, whole_params

Step = Callable[[TrainState, TrainBatch], tuple[TrainState, dict[str, jax.Array]]]
"""(state, batch) -> (state, metrics by TRL's names, float32[] each); the state is donated."""


def load(
    name: str, *, mesh: Mesh | None = None, attention: str = "auto", template: str = "auto"
) -> Checkpoint:
    """A checkpoint with its parameters on the devices.

    Args:
      name: a Hugging Face folder, a bucket, a hub id, a run of `mmpo train`, an adapter's
        folder, or `builtin:picture_world`.
      mesh: the devices, see `make_mesh`; all of them, fully sharded, by default.
      attention: what computes it, see `models.attention.BACKENDS`.
      template: how dialogues become text: the checkpoint's own, or `vicuna_v1`.

    Raises:
      MmpoError: naming the file that is missing or wrong.
    """
    return load_checkpoint(name, make_mesh() if mesh is None else mesh, attention, template)


def record(
    prompt: str,
    *,
    images: Sequence[str | os.PathLike[str] | bytes | PIL.Image.Image] = (),
    videos: Sequence[str | os.PathLike[str] | bytes | Sequence[Any]] = (),
    responses: Sequence[str] = (),
    id: str = "",
) -> Record:
    """A question with its images and videos, and responses to it from the best to the worst.

    Args:
      prompt: what the user says; images stand before it.
      images: files, encoded images (PNG, JPEG, ...), or Pillow's.
      videos: files or encoded videos (MP4, WebM), which need PyAV; or each a list of its frames, as
        images are. They stand behind the images.
      responses: of the assistant; of two the first is chosen and the second rejected.
      id: of the record; samples are drawn by it, so records of one call need different ones.

    Raises:
      DataError: one text, image or video stands where a list should, or an image is none of these.
    """
    for name, several in (("images", images), ("videos", videos), ("responses", responses)):
        if isinstance(several, str | bytes | os.PathLike):
            raise DataError(f"{name}: give a list, also of one")
    refs = tuple(_image(image, number) for number, image in enumerate(images, start=1))
    ranked = tuple(Response.of(text, rank=rank) for rank, text in enumerate(responses, start=1))
    clips = tuple(_video(video, number) for number, video in enumerate(videos, start=1))
    return Record(id, refs, (Turn("user", prompt),), ranked, clips)


def _video(video: Any, number: int) -> VideoRef:
    name = f"video {number}"
    if isinstance(video, bytes):
        return VideoRef(name, file=ImageRef(name, data=video))
    if isinstance(video, str | os.PathLike):
        path = os.fspath(video)
        return VideoRef(path, file=ImageRef(path, path=Path(path)))
    if not isinstance(video, Sequence) or not video:
        detail = "give a file, bytes or a list of frames"
        raise DataError(f"{name} is {type(video).__name__}: {detail}")
    return VideoRef(name, tuple(_image(frame, place) for place, frame in enumerate(video, start=1)))


def _image(image: Any, number: int) -> ImageRef:
    if isinstance(image, bytes):
        return ImageRef(f"image {number}", data=image)
    if isinstance(image, str | os.PathLike):
        return ImageRef(os.fspath(image), path=Path(image))
    if isinstance(image, PIL.Image.Image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return ImageRef(f"image {number}", data=file.getvalue())
    raise DataError(f"image {number} is a {type(image).__name__}: give a file, bytes or Pillow's")


def make_term(name: str, weight: float = 1.0, **options: Any) -> Term:
    """An objective by its name with its options, the defaults where none is given.

    Args:
      name: as `mmpo objectives` lists it, or of a function under `pairwise`.
      weight: how much it counts beside the others.
      **options: its keyword arguments.

    Raises:
      MmpoError: there is no such objective or option.
    """
    if name not in OBJECTIVES:
        near = difflib.get_close_matches(name, OBJECTIVES, n=3)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        method = spelling(name)
        hint = f"; in a recipe {method}" if method else hint
        raise MmpoError(f"there is no objective {name!r}{hint}")
    try:
        return objective_term(name, weight, **options)
    except TypeError as error:
        known = ", ".join(OBJECTIVES[name].options) or "none"
        raise MmpoError(f"{error}; its options: {known}") from error


def generate(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    *,
    batch_size: int = 16,
    seed: int = 0,
    **decoding: Any,
) -> list[list[str]]:
    """Samples responses to prompts; those that records have are not read.

    Args:
      checkpoint: as `load` gives it.
      records: N of them.
      batch_size: prompts at a time.
      seed: of the samples; one depends on it, on its prompt's id and on its number only.
      **decoding: `num_samples`, `temperature` (0 is greedy), `top_p`, `top_k`, `max_new_tokens`,
        see `recipes.sampling.Decoding`.

    Returns:
      N lists of `num_samples` texts.

    Raises:
      DataError: a record cannot be tokenized, with the reason.
    """
    if not records:
        return []
    tokenized = _tokenized(checkpoint, _with_ids(records))
    generated = generate_responses(
        checkpoint,
        tokenized,
        chosen := Decoding(**decoding),
        fitting_lengths(tokenized),
        _mesh(checkpoint),
        batch_size=batch_size,
        seed=seed,
    )
    count = chosen.num_samples
    texts = [response.text for response in generated]
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def log_probs(
    checkpoint: Checkpoint,
    records: Sequence[Record],
    *,
    batch_size: int = 8,
    per_token: bool = False,
    compute_dtype: str | None = None,
) -> list[list[Any]]:
    """The log-prob of every response after its prompt, EOS included.

    Args:
      checkpoint: as `load` gives it.
      records: N of them, with responses; a prompt and its images are encoded once for all of them.
      batch_size: records at a time.
      per_token: gives a list of the tokens' instead of their sum.
      compute_dtype: `float32` or `bfloat16`; that of the weights by default.

    Returns:
      N lists with a number for every response, or a list of numbers.

    Raises:
      DataError: a record cannot be tokenized, with the reason.
    """
    if not records:
        return []
    tokenized = _tokenized(checkpoint, _with_ids(records))
    dtype = compute_dtype or inference_dtype(checkpoint.params).name
    mesh, lengths = _mesh(checkpoint), fitting_lengths(tokenized)
    return score_records(checkpoint, tokenized, lengths, mesh, batch_size, dtype, per_token)


def implicit_rewards(
    policy: Checkpoint,
    reference: Checkpoint,
    records: Sequence[Record],
    *,
    beta: float = 0.1,
    per_token: bool = True,
    batch_size: int = 8,
    compute_dtype: str | None = None,
) -> list[list[float]]:
    """DPO's own reward of every response: `beta` times the log-ratio of policy and reference.

    Args:
      policy: what was trained, as `load` gives it.
      reference: what it was trained from, on the same devices.
      records: N of them, with responses.
      beta: factor of the rewards.
      per_token: whether the log-ratio is divided by the response's number of tokens.
      batch_size: records at a time.
      compute_dtype: `float32` or `bfloat16`, of both; that of the policy's weights by default.

    Returns:
      N lists with a number for every response.

    Raises:
      MmpoError: the two have other tokenizers, which are named.
      DataError: a record cannot be tokenized, with the reason.
    """
    check_same_tokenizer(policy.processor, reference.processor)
    both = tokenizer_for_both(reference.processor)
    rewards = reward_records(
        policy,
        reference,
        _tokenized(policy, _with_ids(records), both),
        _mesh(policy),
        beta=beta,
        batch_size=batch_size,
        compute_dtype=compute_dtype or inference_dtype(policy.params).name,
    )
    return [(row.per_token if per_token else row.summed).tolist() for row in rewards]


def start_training(
    start: Checkpoint,
    terms: Sequence[Term],
    optimizer: optax.GradientTransformation,
    *,
    freeze: tuple[str, ...] = (),
    compute_dtype: str = "float32",
) -> tuple[TrainState, Step]:
    """The state of step 0, and the jitted step of a training loop.

    Args:
      start: what training starts from; its parameters stay as they are.
      terms: objectives with weights and options, see `make_term`; their losses are added up.
      optimizer: any of optax, clipping included.
      freeze: regular expressions over whole parameter paths; what they match is not trained.
      compute_dtype: of the forward and the backward pass; parameters and sums are float32.
    """
    mesh = _mesh(start)
    with jax.set_mesh(mesh):
        loss = make_loss(start.model, terms)
        state = create_state(start.params, start.model, optimizer, freeze, mesh, keeps=loss.state)
        step = make_step(
            loss, optimizer, optax.constant_schedule(np.nan), state, jnp.dtype(compute_dtype)
        )

    def on_mesh(
        state: TrainState, batch: TrainBatch
    ) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
        with jax.set_mesh(mesh):
            state, metrics = step(state, batch)
        del metrics["learning_rate"]  # which the optimizer alone knows
        return state, {name: _mean(value) for name, value in metrics.items()}

    return state, on_mesh


def _mean(value: WeightedSum | jax.Array) -> jax.Array:
    """A metric as a number; NaN where nothing counts in it."""
    return value.total / value.weight if isinstance(value, WeightedSum) else value


def training_batches(
    start: Checkpoint,
    records: Sequence[Record],
    terms: Sequence[Term],
    *,
    batch_size: int,
    epochs: int = 1,
    seed: int = 0,
) -> Iterator[TrainBatch]:
    """Batches for the step of `start_training`, on the devices, shuffled anew in every epoch.

    Where a term compares with a reference, it is `start`: its log-probs are computed here, once.

    Args:
      start: what training starts from.
      records: ranked responses, as `record` makes them or `read_records` reads them.
      terms: the same as of the step.
      batch_size: records at a time, a multiple of the devices that batches are split over.
      epochs: how often every record is seen.
      seed: of the order.

    Raises:
      DataError: a record cannot be tokenized, or lacks what a term needs.
    """
    mesh, needed = _mesh(start), needs(terms)
    if batch_size % batch_shards(mesh):
        raise DataError(f"batch_size {batch_size} is no multiple of {batch_shards(mesh)} devices")
    rows = _tokenized(start, _with_ids(records), tokenizer_for(terms, seed))
    lengths = fitting_lengths(rows)
    reference = None
    if needs_reference(terms):
        per_token = "reference_tokens" in needed
        sums = score_records(start, rows, lengths, mesh, batch_size, per_token=per_token)
        reference = {
            row.id: _padded(values) if per_token else np.array(values, np.float32)
            for row, values in zip(rows, sums, strict=True)
        }
    batches = pipeline.training_batches(
        make_examples(rows, needed, reference),
        start.processor,
        lengths,
        seed=seed,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch_size=batch_size,
        packed_over=packed_over(start.model, mesh),
        share=batch_share(mesh),
    )
    return (put_batch(host.arrays, mesh, leading=1) for host in batches)


def save(folder: str, start: Checkpoint, state: TrainState) -> None:
    """Writes what was trained as a Hugging Face folder, in float32.

    Args:
      folder: a new one, or one whose contents are replaced.
      start: whose config, tokenizer and processor it gets.
      state: of the training.
    """
    processor = start.processor
    save_model(
        folder,
        start.model,
        whole_params(state),
        processor.folder,
        dtype="float32",
        chat_template=processor.chat_template,
        quantized_base=start.quantized_base,
    )


def _with_ids(records: Sequence[Record]) -> list[Record]:
    """Records without an id are called by their place."""
    return [
        item if item.id else dataclasses.replace(item, id=f"record {number}")
        for number, item in enumerate(records)
    ]


def _tokenized(
    checkpoint: Checkpoint, records: Sequence[Record], function: Tokenize = tokenize
) -> list[TokenizedRecord]:
    """
    Raises:
      DataError: naming the first record that cannot be tokenized.
    """
    rows, skipped = tokenize_records(records, checkpoint.processor, None, function=function)
    if skipped:
        raise DataError(str(skipped[0]))
    return rows


def _padded(values: Sequence[Sequence[float]]) -> np.ndarray:
    """float32[R, t] of lists of different lengths."""
    longest = max(map(len, values))
    return np.array([[*row, *[0.0] * (longest - len(row))] for row in values], np.float32)


def _mesh(checkpoint: Checkpoint) -> Mesh:
    """The devices that a checkpoint's parameters lie on."""
    return jax.tree.leaves(checkpoint.params)[0].sharding.mesh
