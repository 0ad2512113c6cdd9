"""A teacher of distillation: its parameters on the devices, and what it sees of a batch."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence

from jax.sharding import Mesh

from mmpo_jax.checkpoints.checkpoint import (
    Checkpoint,
    check_speaker,
    load_processor,
    open_checkpoint,
)
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.examples import Example
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record, Turn
from mmpo_jax.data.same_tokens import check_same_tokenizer
from mmpo_jax.data.skipped import UnusableRow
from mmpo_jax.data.tokenization import UNLIMITED, TokenizedRecord, tokenize
from mmpo_jax.data.train_batch import HostBatch, batch_maker
from mmpo_jax.data.usable import unsupported
from mmpo_jax.models.model import Model, Params
from mmpo_jax.parallel.mesh import Share
from mmpo_jax.recipes.teacher import ModelTeacher, Teacher
from mmpo_jax.recipes.training import Training

TEACHER = "teacher"
"""Name of the context that has what a teacher sees."""


@dataclasses.dataclass(frozen=True)
class LoadedTeacher:
    """Who teaches, and how prompts are shown to it."""

    asked: Teacher
    """The recipe's section."""
    processor: Processor
    model: Model | None = None
    """Its architecture; None where it is the policy's reference."""
    params: Params | None = None
    """On the mesh, by the model's rules; they are nobody else's."""

    @classmethod
    def load(cls, config: Training, start: Checkpoint, mesh: Mesh) -> LoadedTeacher | None:
        """The teacher of a recipe; None without one.

        Raises:
          MmpoError: see `open_teacher`.
        """
        asked = config.teacher
        if asked is None:
            return None
        opened = open_teacher(asked, start)
        if opened is None:
            return cls(asked, start.processor)
        opened = dataclasses.replace(opened, dtype=config.compute_dtype).reloaded(mesh)
        return cls(asked, opened.processor, opened.model, opened.params)

    def batch(
        self,
        records: Sequence[TokenizedRecord],
        lengths: Lengths,
        batch_size: int,
        micro_batch_size: int,
        share: Share,
    ) -> HostBatch:
        """What it sees of prompts that are a batch of the policy's.

        Args:
          records: with their responses, as `with_teacher` has prompts.
          lengths, batch_size, micro_batch_size, share: of the policy's batch.
        """
        if self.asked.prompt_lengths is not None:
            lengths = lengths.model_copy(update={"prompt": self.asked.prompt_lengths})
        examples = [Example((self._seen(record, lengths),), {}) for record in records]
        make = batch_maker(
            examples, self.processor, lengths, batch_size, micro_batch_size, share=share
        )
        return make(list(range(len(examples))))

    def _seen(self, record: TokenizedRecord, lengths: Lengths) -> TokenizedRecord:
        """The responses of a record after the prompt that the teacher sees, which fits, see
        `with_teacher`."""
        prompt = dict(record.others)[TEACHER]
        if self.model is not None:  # which may have another template, and other image tokens
            assert prompt.asked is not None
            prompt = tokenize(
                prompt.asked, self.processor, lengths.prompt[-1], lengths.response[-1]
            )
        return dataclasses.replace(prompt, id=record.id, responses=record.responses)


def open_teacher(asked: Teacher, start: Checkpoint) -> Checkpoint | None:
    """A teacher that is another checkpoint, without its parameters; None for one that is the
    policy's reference.

    Args:
      asked: the recipe's section.
      start: what the policy starts from.

    Raises:
      ModelError, ProcessorError, CheckpointError: it is not there, is wrong, or says nothing.
      MmpoError: its tokenizer is not the policy's.
    """
    if not isinstance(asked, ModelTeacher):
        return None
    check_speaker(asked.model, "training.teacher")
    opened = open_checkpoint(asked.model, start.model.attention, asked.template)
    check_same_tokenizer(
        start.processor,
        opened.processor,
        other="teacher",
        why="a teacher is asked about the tokens that the policy says",
    )
    return opened


@dataclasses.dataclass(frozen=True)
class TeacherProcessor:
    """The processor of a teacher that is another checkpoint, for processes that make rows."""

    folder: str
    template: str
    fingerprint: str

    @classmethod
    def of(cls, teacher: Teacher | None) -> TeacherProcessor | None:
        """That of a recipe's section; None of a teacher that is the policy's reference."""
        if not isinstance(teacher, ModelTeacher):
            return None
        processor = load_processor(teacher.model, teacher.template)
        fingerprint = fingerprint_json(processor.fingerprints())
        return cls(processor.folder, teacher.template, fingerprint)

    def open(self) -> Processor:
        return _opened(self.folder, self.template)


@functools.lru_cache(2)
def _opened(folder: str, template: str) -> Processor:
    return Processor(folder, load_config(folder), template)


def with_teacher(
    row: TokenizedRecord,
    record: Record,
    teacher: Teacher,
    processor: Processor,
    their_processor: Processor | None,
    max_prompt: int,
    max_response: int,
) -> TokenizedRecord:
    """A tokenised prompt with what its teacher sees as a context beside it.

    Args:
      row: of the record.
      record: that it was made of.
      teacher: the recipe's section.
      processor: the policy's.
      their_processor: the teacher's, where it is another checkpoint.
      max_prompt, max_response: see `tokenize`; where the teacher has limits of its own, these.

    Raises:
      UnusableRow: the row has not what the teacher sees, or it is too long for it, or shows what it
        does not take.
    """
    shown = shown_to(teacher, record)
    longest = max_prompt if teacher.prompt_lengths is None else teacher.prompt_lengths[-1]
    if their_processor is not None:
        _check_fits(shown, their_processor, longest, max_response)
        longest = UNLIMITED  # of the policy's own tokens, which the teacher never sees
    view = tokenize(shown, processor, longest, max_response)
    view = dataclasses.replace(view, id=record.id, asked=shown)
    return dataclasses.replace(row, others=((TEACHER, view),), asked=shown)


def _check_fits(shown: Record, processor: Processor, max_prompt: int, max_response: int) -> None:
    """
    Raises:
      UnusableRow: what a teacher is shown is too long for it, or it does not take it.
    """
    problem = unsupported(shown, processor)
    try:
        if problem is not None:
            raise UnusableRow(*problem)
        tokenize(shown, processor, max_prompt, max_response)
    except UnusableRow as error:
        raise UnusableRow(error.reason, f"as the teacher sees it: {error.detail}") from error


def shown_to(teacher: Teacher, record: Record) -> Record:
    """A record without its responses as a teacher sees it.

    Raises:
      UnusableRow: it has no answer for the hint, or no other image.
    """
    shown = dataclasses.replace(record, responses=())
    if teacher.image == "data":
        if record.other_images is None:
            raise UnusableRow("no_other_image", "the data give none, which the teacher sees")
        shown = dataclasses.replace(shown, images=record.other_images)
    if teacher.hint is None:
        return shown
    if record.solution is None:
        raise UnusableRow("no_answer", "none that the teacher could be told")
    answer = record.solution
    told = teacher.hint.replace(
        "{answer}", answer if isinstance(answer, str) else json.dumps(answer)
    )
    *before, last = shown.prompt
    return dataclasses.replace(shown, prompt=(*before, _ending_in(last, told)))


def _ending_in(turn: Turn, text: str) -> Turn:
    content = turn.content
    more = content + text if isinstance(content, str) else (*content, text)
    return dataclasses.replace(turn, content=more)
