"""A checkpoint's chat template: turns to text, as the template itself writes them."""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.processor_files import ProcessorError
from mmpo_jax.data.records import Medium, Turn

PROBE = "is there a star ?"
"""What a chat template is tried with."""
REMEMBERED = 16
"""Dialogues whose texts, and texts whose tokens, are remembered."""


class TemplateRefusal(DataError):
    """A dialogue that the chat template does not take, such as one of two user turns in a row."""


class ChatTemplate:
    """The template of a tokenizer, and what trying it tells of it."""

    def __init__(self, folder: str, tokenizer: Any, shows_images: bool):
        """
        Args:
          folder: of the checkpoint, for messages.
          tokenizer: has the template.
          shows_images: whether turns may have images.
        """
        self.folder = folder
        self.tokenizer = tokenizer
        self.shows_images = shows_images
        # Responses go on from one prompt, which would be rendered for each of them again.
        self._plain = functools.lru_cache(REMEMBERED)(self._render_plain)

    def render(
        self, turns: Sequence[Turn], for_answer: bool, arguments: Mapping[str, Any] | None = None
    ) -> str:
        """The text of a dialogue, with a placeholder for each of its media.

        Args:
          turns: the dialogue so far.
          for_answer: end with the header of the assistant's next turn.
          arguments: of the template beside the messages, such as `tools`.

        Raises:
          TemplateRefusal: it does not take such a dialogue.
          ProcessorError: it writes no text as it is.
        """
        if arguments:
            return self._apply(turns, for_answer, self._takes_parts, arguments)
        return self._plain(tuple(turns), for_answer)

    def _render_plain(self, turns: tuple[Turn, ...], for_answer: bool) -> str:
        return self._apply(turns, for_answer, self._takes_parts, {})

    @functools.cached_property
    def ending(self) -> str | None:
        """What it writes behind the last answer of a dialogue; None where it does not write the
        answer as it is."""
        question, answer = Turn("user", "a"), Turn("assistant", PROBE)
        _, written, ending = self.render([question, answer], False).rpartition(PROBE)
        return ending if written else None

    def reads_key(self, key: str) -> bool:
        """Whether it may read a key of messages, or an argument, of this name."""
        return key in self._template_names

    def _apply(
        self,
        turns: Sequence[Turn],
        for_answer: bool,
        in_parts: bool,
        arguments: Mapping[str, Any],
    ) -> str:
        messages = [self._message(turn, in_parts) for turn in turns]
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=for_answer, **arguments
            )
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, LookupError) as error:
            roles = ", ".join(turn.role for turn in turns) or "nobody"
            raise TemplateRefusal(
                f"{self.folder}: the chat template refuses turns of {roles}: {error}"
            ) from error

    def _message(self, turn: Turn, in_parts: bool) -> dict[str, Any]:
        if not in_parts:
            return {"role": turn.role, "content": turn.text, **turn.keys}
        pieces = [turn.content] if isinstance(turn.content, str) else turn.content
        parts: list[dict[str, str]] = []
        for place, piece in enumerate(pieces):
            if isinstance(piece, Medium):
                parts.append({"type": piece.value})
                continue
            behind = place > 0 and isinstance(pieces[place - 1], Medium)
            if turn.tagged and behind and self._breaks_behind_images:
                piece = piece.removeprefix("\n")
            parts.append({"type": "text", "text": piece})
        return {"role": turn.role, "content": parts, **turn.keys}

    @functools.cached_property
    def _breaks_behind_images(self) -> bool:
        """Whether it begins a new line behind an image."""
        shown, said = (
            self._apply([Turn("user", content)], True, True, {}).partition(PROBE)[0]
            for content in ((Medium.IMAGE, PROBE), (PROBE,))
        )
        return shown.removeprefix(common_start(shown, said)).endswith("\n")

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether it reads a turn as a list of parts, as those with images have to, or as plain
        text, as most of text models do.

        Raises:
          ProcessorError: it writes neither as it is.
        """
        choices = (True, False) if self.shows_images else (False, True)
        refusal = "it does not write a user's text"
        for in_parts in choices:
            try:
                written = self._apply([Turn("user", PROBE)], True, in_parts, {})
            except TemplateRefusal as error:
                refusal = str(error)
                continue
            if PROBE in written and "'type'" not in written:
                return in_parts
        raise ProcessorError(f"{self.folder}: the chat template cannot be used: {refusal}")

    @functools.cached_property
    def _template_names(self) -> frozenset[str]:
        """All names and texts in the template."""
        return frozenset(re.findall(r"\w+", self.tokenizer.chat_template))


def common_start(first: str, second: str) -> str:
    """What two texts begin with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return "".join(character for character, _ in same)
