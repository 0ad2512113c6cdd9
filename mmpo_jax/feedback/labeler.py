"""Conquer: a labeler answers yes/no questions about images and videos by its next-token
probabilities."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core import progress
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.progress import counted
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.control_tokens import has_stand_ins
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.processor_files import ProcessorError
from mmpo_jax.data.records import ImageRef, MediaRef, Record, Response, Turn, VideoRef
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import UNLIMITED, TokenizedRecord, tokenize
from mmpo_jax.inference.loop import TokenCount, run_batches
from mmpo_jax.inference.plan import plan_responses
from mmpo_jax.models.batch import Batch, PackedBatch
from mmpo_jax.models.head import next_token_logits
from mmpo_jax.models.log_probs import states_at_ends
from mmpo_jax.models.lora import cast_params
from mmpo_jax.models.model import Model, Params
from mmpo_jax.models.precision import check_finite, inference_dtype

YES, NO = ("yes", "Yes"), ("no", "No")
PROBABILITIES = "probabilities"
QUESTIONS_AT_ONCE = 128
"""Questions that share one encoding of their image, at most: those of some ten responses."""
USUAL_QUESTIONS = 16
"""Questions up to which an image counts as one of `batch_size`; those of some two responses."""


class Answer(NamedTuple):
    """What a labeler says to one question."""

    p_yes: float
    """Probability of yes; NaN where there is no answer."""
    p_no: float
    """Probability of no; it need not be 1 - `p_yes`."""
    read: str = PROBABILITIES
    """Where it was read: the model's `probabilities`, a server's `logprobs`, the share among
    `samples`, or a `text`."""
    failure: str | None = None
    """Why there is no answer: a word that is counted."""


class Labeler(Protocol):
    """Answers yes/no questions about images and videos."""

    def answer(self, items: Sequence[QuestionSet]) -> list[list[Answer]]:
        """The answer to every question of every item, in order."""
        ...


QuestionSet = tuple[str, tuple[MediaRef, ...], tuple[str, ...]]
"""(id, images and videos behind them, questions about these)."""


REJECTED = Answer(0.0, 1.0)
"""The answer to a question that no tokenizer takes: what nobody can check must not pay."""


class CheckpointLabeler:
    """A VLM asked directly: p_yes = p(yes) + p(Yes) of the first answer token, p_no likewise.

    RLAIF-V, `utils/gpt_eval` autocheck: the probabilities are over the whole vocabulary. All
    questions about one image share its encoding and the start of the prompt.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        mesh: Mesh,
        lengths: Lengths | None,
        *,
        batch_size: int,
        questions_at_once: int = QUESTIONS_AT_ONCE,
    ):
        """
        Args:
          checkpoint: its parameters on the mesh.
          mesh: the devices.
          lengths: bucket sizes; questions count as responses. None for those that the questions
            need: then one that the model cannot take is answered by a failure.
          batch_size: images at a time that have up to `USUAL_QUESTIONS` questions. With more to
            an image, fewer go together, so that a batch has no more tokens; but always one.
          questions_at_once: R, questions that share one encoding of the image.

        Raises:
          ProcessorError: the tokenizer cannot tell yes from no.
        """
        self.checkpoint, self.mesh, self.lengths = checkpoint, mesh, lengths
        self.batch_size = batch_size
        self.questions_at_once = questions_at_once
        self.lead, self.yes_ids, self.no_ids = answer_tokens(checkpoint.processor)

    def answer(self, items: Sequence[QuestionSet]) -> list[list[Answer]]:
        """See `Labeler`.

        Raises:
          DataError: a question does not fit the bucket sizes that were given, an image or a
            video cannot be read, or a probability is not finite.
        """
        rows: list[tuple[int, list[int], TokenizedRecord]] = []
        answers = [[REJECTED] * len(questions) for _, _, questions in items]
        for index, item in enumerate(counted(items, "tokenising questions")):
            askable = [place for place, text in enumerate(item[2]) if not has_stand_ins(text)]
            for start in range(0, len(askable), self.questions_at_once):
                places = askable[start : start + self.questions_at_once]
                record, failures = self._askable(item, places)
                for place, reason in failures.items():
                    answers[index][place] = Answer(math.nan, math.nan, "", reason)
                if record is not None:
                    left = [place for place in places if place not in failures]
                    rows.append((index, left, record))
        with progress.doing("asking the labeler", len(rows), first="compiling"):
            records = [record for _, _, record in rows]
            probabilities = self._probabilities(records) if records else []
        for (index, places, _), pairs in zip(rows, probabilities, strict=True):
            for place, (yes, no) in zip(places, pairs.tolist(), strict=True):
                answers[index][place] = Answer(yes, no)
        return answers

    def _askable(
        self, item: QuestionSet, places: Sequence[int]
    ) -> tuple[TokenizedRecord | None, dict[int, str]]:
        """The questions at these places that the model can take, None where it can take none of
        them, and the reasons of the others.

        Raises:
          DataError: there are others, and the bucket sizes were given.
        """
        try:
            return self._tokenize(item, places), {}
        except UnusableRow as error:
            if self.lengths is not None:
                raise self._refusal(item[0], error) from error
            failures = self._failures(item, places)
            left = [place for place in places if place not in failures]
            if len(left) == len(places):  # each would do, but not together
                return None, dict.fromkeys(places, error.reason)
            return self._tokenize(item, left) if left else None, failures

    def _failures(self, item: QuestionSet, places: Sequence[int]) -> dict[int, str]:
        """The questions that the model cannot take by themselves, with the reasons."""
        failures: dict[int, str] = {}
        for place in places:
            try:
                self._tokenize(item, [place])
            except UnusableRow as error:
                failures[place] = error.reason
        return failures

    def _refusal(self, name: str, error: UnusableRow) -> DataError:
        sizes = "lengths.prompt" if error.reason == "prompt_too_long" else "lengths.response"
        is_long = error.reason.endswith("_too_long")
        advice = f"; give {sizes} a larger size" if is_long else ""
        return DataError(f"the labeler cannot be asked about {name}: {error}{advice}")

    def _tokenize(self, item: QuestionSet, places: Sequence[int]) -> TokenizedRecord:
        """Some of an item's questions as responses.

        Raises:
          UnusableRow: the model, or a bucket size, cannot take one of them.
        """
        name, media, questions = item
        images = tuple(one for one in media if isinstance(one, ImageRef))
        videos = tuple(one for one in media if isinstance(one, VideoRef))
        asked = tuple(Response((Turn("user", questions[place]),)) for place in places)
        limits = UNLIMITED, UNLIMITED
        if self.lengths is not None:
            limits = self.lengths.prompt[-1], self.lengths.response[-1] - len(self.lead)
        shown = Record(name, images, (), asked, videos)
        record = tokenize(shown, self.checkpoint.processor, *limits)
        lead = np.array(self.lead, np.int32)
        led = tuple(
            dataclasses.replace(
                response,
                ids=np.concatenate([response.ids, lead]),
                loss_mask=np.zeros(len(response.ids) + len(lead), bool),
            )
            for response in record.responses
        )
        return dataclasses.replace(record, responses=led)

    def _probabilities(self, records: Sequence[TokenizedRecord]) -> list[np.ndarray]:
        """float32[R, 2] of yes and no for the R questions of every record."""
        checkpoint, count = self.checkpoint, TokenCount()

        def compute(batch: Batch | PackedBatch) -> jax.Array:
            return answer_probabilities(
                checkpoint.model, checkpoint.params, batch, self.yes_ids, self.no_ids
            )

        size, usual = self.batch_size, USUAL_QUESTIONS
        lengths = self.lengths or fitting_lengths(records)
        (batches,) = plan_responses(
            checkpoint, records, lengths, self.mesh, size, usual_responses=usual
        ) or [[]]
        dtype = inference_dtype(checkpoint.params).name
        found: dict[int, np.ndarray] = {}
        for rows in run_batches(batches, compute, self.mesh, count):
            of_batch = {n: pairs[: len(records[n].responses)] for n, pairs in rows}
            finite = ((records[n].id, np.isfinite(x).all()) for n, x in of_batch.items())
            check_finite("labeler's probabilities", finite, dtype)
            found |= of_batch
        count.log_summary("the labeler's questions")
        return [found[number] for number in range(len(records))]


@functools.partial(jax.jit, static_argnames=("model", "yes_ids", "no_ids"))
def answer_probabilities(
    model: Model,
    params: Params,
    batch: Batch | PackedBatch,
    yes_ids: tuple[int, ...],
    no_ids: tuple[int, ...],
) -> jax.Array:
    """Probabilities of yes and no after every response (a question), float32[B, R, 2]; of a packed
    batch [Z * C, R, 2].

    Computed in the parameters' `inference_dtype`.
    """
    module = model.bind(cast_params(params, inference_dtype(params)))
    hidden = states_at_ends(module.states(batch), batch)
    probabilities = jax.nn.softmax(next_token_logits(module, hidden), axis=-1)
    sums = [probabilities[..., list(ids)].sum(axis=-1) for ids in (yes_ids, no_ids)]
    return jnp.stack(sums, axis=-1)


def answer_tokens(
    processor: Processor,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """How this tokenizer and template begin the answers yes and no.

    Returns:
      (tokens every answer starts with, such as a lone space; ids of yes; ids of no).

    Raises:
      ProcessorError: yes and no begin alike.
    """
    question = Turn("user", "?")
    spoken: dict[str, list[int]] = {}
    for word in (*YES, *NO):
        dialogue = Record("", (), (question,), (Response.of(word),))
        response = tokenize(dialogue, processor, 2**30, 2**30).responses[0]
        ids = response.ids[response.loss_mask].tolist()
        if processor.tokenizer.unk_token_id not in ids:
            spoken[word] = ids
    answers = list(spoken.values())
    columns = zip(*answers, strict=False)
    lead = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    yes, no = (
        tuple(sorted({token for word in words for token in spoken.get(word, [])[lead : lead + 1]}))
        for words in (YES, NO)
    )
    if not yes or not no or set(yes) & set(no):
        raise ProcessorError(
            f"{processor.folder}: the tokenizer cannot tell yes from no by one token"
        )
    return tuple(answers[0][:lead]), yes, no
