"""The models that judge benchmarks: a chat server's, or a checkpoint, by the `judge` of a recipe.

Apart from `judging.py`, as this takes seconds to import and judgements may be there already.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from mmpo_jax.benchmarks.judging import Judge, JudgePrompt, Question, Said
from mmpo_jax.feedback.judge import TooManyFailed, check_failed
from mmpo_jax.feedback.judges import text_model
from mmpo_jax.feedback.models import Models
from mmpo_jax.feedback.served import ServedTextModel, Servers
from mmpo_jax.feedback.text_model import Ask, TextModel
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.base import Devices
from mmpo_jax.recipes.feedback import Speaking
from mmpo_jax.recipes.judging import ChatJudging, CheckpointJudging

PART = 64
"""Questions after which the replies of a checkpoint are kept."""


class AskedModel:
    """A section's model, with a `TextModel` for every way in which it is asked."""

    def __init__(
        self,
        config: ChatJudging | CheckpointJudging,
        servers: Servers,
        models: Callable[[], Models],
    ):
        """
        Args:
          config: of the recipe.
          servers: chat clients of the run.
          models: what checkpoints run on, made where one is asked.
        """
        self.config, self._servers, self._models = config, servers, models
        self.name = config.model
        self.max_failed = config.max_failed
        self.part = None if isinstance(config, ChatJudging) else PART
        self._asked: dict[JudgePrompt, TextModel] = {}

    def settings(self, prompt: JudgePrompt) -> Mapping[str, Any]:
        """See `JudgeModel`."""
        own = {
            "temperature": self.config.temperature,
            "top_p": self.config.top_p,
            "max_new_tokens": self.config.max_new_tokens,
            "attempts": self.config.attempts,
        }
        return {
            name: getattr(prompt, name) if value is None else value for name, value in own.items()
        }

    def key(self, prompt: JudgePrompt) -> Any:
        """See `JudgeModel`; a server need not be there for it."""
        sampling = {k: value for k, value in self.settings(prompt).items() if k != "attempts"}
        if isinstance(self.config, ChatJudging):
            return [self.config.identity(), self.config.seed, sampling]
        return [self._models().fingerprint(self.config), self.config.seed, sampling]

    def say(self, prompt: JudgePrompt, questions: Sequence[Question], attempt: int) -> list[Said]:
        """See `JudgeModel`."""
        model = self._model(prompt)
        replies = model.say([self._ask(prompt, question, attempt) for question in questions])
        return [
            Said(
                reply.text,
                reply.failure if reply.text is None else None,
                reply.detail,
                reply.final or reply.text is not None,
                reply.model,
            )
            for reply in replies
        ]

    def forget(self, prompt: JudgePrompt, questions: Sequence[Question], attempt: int) -> None:
        """See `JudgeModel`."""
        model = self._model(prompt)
        model.reject([self._ask(prompt, question, attempt) for question in questions])

    def failed(self, reasons: Sequence[str | None]) -> None:
        """See `JudgeModel`."""
        check_failed(reasons, self.max_failed, f"asking {self.name}", "judge.max_failed")

    def stop(self, told: str) -> NoReturn:
        """See `JudgeModel`."""
        raise TooManyFailed(told)

    def release(self) -> None:
        """Lets go of what it holds on the devices."""
        for model in self._asked.values():
            model.release()

    def _ask(self, prompt: JudgePrompt, question: Question, attempt: int) -> Ask:
        settings = self.settings(prompt)
        return Ask(
            question.id,
            question.text,
            question.images,
            attempt=question.run * settings["attempts"] + attempt,
            max_new_tokens=settings["max_new_tokens"],
            system=prompt.system,
        )

    def _model(self, prompt: JudgePrompt) -> TextModel:
        """The model as it is asked here, once it is known to be there."""
        if prompt not in self._asked:
            speaking = Speaking(**self.settings(prompt))
            if isinstance(self.config, ChatJudging):
                client = self._servers.client(self.config)
                client.check()
                self._asked[prompt] = ServedTextModel(client, speaking, self.config.seed)
            else:
                self._asked[prompt], _, check = text_model(self.config, speaking, self._models())
                check()
        return self._asked[prompt]


@contextlib.contextmanager
def asked_judge(
    section: ChatJudging | CheckpointJudging, folder: str, given: str | None = None
) -> Iterator[Judge]:
    """The judge of a command that runs no other model.

    Args:
      section: of the judge.
      folder: where replies are kept, and the journals of servers.
      given: file of judgements that are there, see `Judge`.
    """
    with Servers(folder) as servers:

        @functools.cache
        def models() -> Models:
            mesh = make_mesh(**Devices().model_dump())
            return Models(mesh, "auto", servers, base="", template="auto", seed=section.seed)

        model = AskedModel(section, servers, models)
        try:
            yield Judge(model, folder, given)
        finally:
            model.release()
