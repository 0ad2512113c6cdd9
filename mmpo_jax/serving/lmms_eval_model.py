"""A checkpoint as a model of lmms-eval, in its process; see `lmms_eval_plugin`.

All requests of a task are there at once, so they are sampled as `mmpo generate` does.
"""

from __future__ import annotations

import collections
import io
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import PIL.Image
from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from mmpo_jax.checkpoints.checkpoint import check_speaker, load_checkpoint
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.records import IMAGE, ImageRef, Piece, Record, Turn
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.generation.responses import Generated, generate_responses
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.sampling import Decoding

log = logging.getLogger(__name__)

UNTIL = ["\n\n"]
"""What lmms-eval has for `until` where a task says nothing. It would cut descriptions at their
first empty line, and lmms-eval's own models behind APIs do not read it either."""
MAX_NEW_TOKENS = 1024
"""Where a task says nothing; that of lmms-eval's models behind APIs."""


class Mmpo(lmms):
    """A checkpoint of ours; `--batch_size` is prompts at a time."""

    is_simple = False

    def __init__(
        self,
        model: str,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        template: str = "auto",
        attention: str = "auto",
        system_prompt: str | None = None,
        seed: int = 0,
    ):
        """
        Args:
          model: checkpoint, by any name that recipes may give it.
          batch_size: prompts at a time.
          device, max_batch_size: of lmms-eval; not read, as JAX takes the devices that it finds.
          template, attention: see `recipes.base.Base`.
          system_prompt: what the system says first in every dialogue.
          seed: of the samples.

        Raises:
          MmpoError: the checkpoint cannot be used, or `batch_size` is no number.
        """
        super().__init__()
        if not str(batch_size).isdigit():
            raise MmpoError(f"--batch_size {batch_size}: give a number of prompts at a time")
        check_speaker(model, "lmms-eval")
        self.mesh = make_mesh()
        self.checkpoint = load_checkpoint(model, self.mesh, attention, template)
        self.batch_size = max(1, int(batch_size))
        self.system_prompt, self.seed = system_prompt, int(seed)

    def generate_until(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The answers to requests, in their order.

        One that the model cannot take, such as one with a video, is answered by an empty text, and
        the log says how many are.
        """
        groups: dict[Decoding, list[int]] = collections.defaultdict(list)
        for number, request in enumerate(requests):
            groups[_decoding(request.args[2])].append(number)
        answers = [GenerationResult("", TokenCounts(0, 0)) for _ in requests]
        for decoding, numbers in groups.items():
            for number, answer in self._answers(requests, numbers, decoding).items():
                answers[number] = answer
        return answers

    def _answers(
        self, requests: Sequence[Any], numbers: Sequence[int], decoding: Decoding
    ) -> dict[int, GenerationResult]:
        """Number of a request -> its answer, of those that the model can take."""
        records, refused = [], collections.Counter[str]()
        for number in numbers:
            try:
                records.append(self._record(str(number), requests[number]))
            except MmpoError as error:
                refused[str(error)] += 1
        kept, skipped = tokenize_records(records, self.checkpoint.processor, None)
        refused.update(f"{row.reason}: {row.detail}" for row in skipped)
        for reason, count in refused.most_common(5):
            log.warning("%d requests are answered by an empty text: %s", count, reason)
        if not kept:
            return {}
        generated = generate_responses(
            self.checkpoint,
            kept,
            decoding,
            fitting_lengths(kept),
            self.mesh,
            batch_size=self.batch_size,
            seed=self.seed,
        )
        return {
            int(record.id): _result(one, len(record.prompt_ids), requests[int(record.id)].args[2])
            for record, one in zip(kept, generated, strict=True)
        }

    def _record(self, name: str, request: Any) -> Record:
        """
        Raises:
          MmpoError: it shows something other than images.
        """
        _, doc_to_messages, _, doc_id, task, split = request.args
        messages = doc_to_messages(self.task_dict[task][split][doc_id])
        turns, images = [], []
        if self.system_prompt:
            turns.append(Turn("system", self.system_prompt))
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            pieces: list[Piece] = []
            for part in parts:
                if part["type"] == "text":
                    pieces.append(part["text"])
                elif part["type"] == "image":
                    images.append(_image(part["url"], f"{task} {doc_id}"))
                    pieces.append(IMAGE)
                else:
                    raise MmpoError(f"{task}: {part['type']} is not taken")
            turns.append(Turn(message["role"], tuple(pieces)))
        return Record(name, tuple(images), tuple(turns), ())

    def loglikelihood(self, requests: Sequence[Any]) -> Any:
        raise NotImplementedError("mmpo_jax answers with texts; `mmpo score` has log-probs")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> Any:
        raise NotImplementedError("mmpo_jax takes tasks of one round")


def _decoding(options: Mapping[str, Any]) -> Decoding:
    """How a task wants its answers sampled; beams are not searched."""
    temperature = float(options.get("temperature") or 0)
    if not options.get("do_sample", temperature > 0):
        temperature = 0.0
    return Decoding(
        temperature=temperature,
        top_p=float(options.get("top_p") or 1),
        top_k=int(options.get("top_k") or 0),
        max_new_tokens=int(options.get("max_new_tokens") or MAX_NEW_TOKENS),
    )


def _result(generated: Generated, prompt: int, options: Mapping[str, Any]) -> GenerationResult:
    """An answer up to the first text that a task says answers end before."""
    until = options.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    places = [generated.text.find(stop) for stop in (until if until != UNTIL else []) if stop]
    text = generated.text[: min((at for at in places if at >= 0), default=None)]
    return GenerationResult(text, TokenCounts(prompt, generated.num_tokens))


def _image(image: Any, name: str) -> ImageRef:
    if isinstance(image, str | os.PathLike):
        with open(image, "rb") as file:
            return ImageRef(os.fspath(image), data=file.read())
    if not isinstance(image, PIL.Image.Image):
        raise MmpoError(f"{name}: {type(image).__name__} is no picture")
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    return ImageRef(name, data=buffer.getvalue())
