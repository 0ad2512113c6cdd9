"""Control tokens that are typed in a text, and how they stay text.

A tokenizer reads ``<|im_end|>`` as one control token wherever it stands, in an answer about chat
templates too. Texts that are to stay texts are rendered with a stand-in character in its place,
and what lies between the template's own control tokens is tokenized without any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import tokenizers

FIRST_STAND_IN = 0x10F000
"""First of the private characters that stand for control tokens; the last plane of Unicode has no
characters of its own."""
_STAND_IN = re.compile(f"[{chr(FIRST_STAND_IN)}-{chr(0x10FFFD)}]")
_ESCAPED = re.compile(r"\\U0010f[0-9a-f]{3}|\\udbf[c-f]\\ud[c-f][0-9a-f]{2}", re.IGNORECASE)

_NEVER = -1e6
"""Score of a piece that is among no text's best pieces."""

Tokens = tuple[list[int], list[tuple[int, int]]]
"""Token ids, and the characters [start, end) that each stands for."""


class ControlTokens:
    """The control tokens of one tokenizer."""

    def __init__(self, tokenizer: Any, placeholders: Collection[int]):
        """
        Args:
          tokenizer: of transformers, with a `tokenizers` backend.
          placeholders: ids that stand for media.
        """
        added = tokenizer.added_tokens_decoder
        self.ids = {
            token.content: number
            for number, token in sorted(added.items())
            if token.special or number in placeholders
        }
        self.placeholders = tuple(
            name for name, number in self.ids.items() if number in placeholders
        )
        self._names = list(self.ids)
        longest = sorted(self.ids, key=len, reverse=True)
        self._typed = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        tokens = {token.content: token for token in added.values() if token.content in self.ids}
        patterns = [
            r"\s*" * tokens[name].lstrip + re.escape(name) + r"\s*" * tokens[name].rstrip
            for name in longest
        ]
        self._split = re.compile("(" + ("|".join(patterns) or "(?!)") + ")")
        self._tokenizer = tokenizer
        self._plain: dict[bool, tokenizers.Tokenizer] = {}

    def found_in(self, text: str) -> list[str]:
        """The control tokens that are typed in a text, in order."""
        return self._typed.findall(text)

    def stand_in(self, text: str, names: Collection[str] | None = None) -> str:
        """The text with a character in place of each control token.

        Args:
          text: what somebody says.
          names: of the tokens; None for all.
        """
        if not self._typed.search(text):
            return text

        def character(match: re.Match[str]) -> str:
            name = match[0]
            if names is not None and name not in names:
                return name
            return chr(FIRST_STAND_IN + self._names.index(name))

        return self._typed.sub(character, text)

    def written(self, text: str) -> str:
        """The text with the control tokens themselves for the characters of `stand_in`."""
        return _STAND_IN.sub(lambda m: self._names[ord(m[0]) - FIRST_STAND_IN], text)

    def encode(self, text: str) -> Tokens:
        """Tokens of a text with stand-ins, as offsets in the text that is `written`."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        done = 0
        for piece in self._split.split(text):
            if not piece:
                continue
            name = piece.strip()
            if self._split.fullmatch(piece) and name in self.ids:
                ids.append(self.ids[name])
                offsets.append((done, done + len(piece)))
                done += len(piece)
                continue
            real = self.written(piece)
            made = self._between(done == 0).encode(real, add_special_tokens=False)
            ids += made.ids
            offsets += [(start + done, end + done) for start, end in made.offsets]
            done += len(real)
        return ids, offsets

    def _between(self, first: bool) -> tokenizers.Tokenizer:
        """The tokenizer without control tokens, for the beginning of a text or for later pieces."""
        if first not in self._plain:
            settings = json.loads(self._tokenizer.backend_tokenizer.to_str())
            kept = [t for t in settings["added_tokens"] if t["content"] not in self.ids]
            settings |= {"added_tokens": kept, "post_processor": None}
            settings |= {"truncation": None, "padding": None}
            _unlearn(settings["model"], self.ids)
            if not first:
                _never_prepend(settings["pre_tokenizer"])
            self._plain[first] = tokenizers.Tokenizer.from_str(json.dumps(settings))
        return self._plain[first]


def in_texts(value: Any, change: Callable[[str], str]) -> Any:
    """A value of JSON with every text in it changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {in_texts(name, change): in_texts(one, change) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [in_texts(one, change) for one in value]
    return value


def has_stand_ins(text: str) -> bool:
    """Whether a text has characters of `ControlTokens.stand_in`."""
    return _STAND_IN.search(text) is not None


def has_written_out(text: str) -> bool:
    r"""Whether a text has such a character as Python's or JSON's escape (``\U0010f000``,
    ``\udbfc\udc00``), which is none any more: what a template makes of an object that it writes as
    it is."""
    return _ESCAPED.search(text) is not None


def _unlearn(model: dict[str, Any], names: Collection[str]) -> None:
    """A model of words, or one that takes whole words first, knows these as words of its own too;
    what it takes for unknown words stays."""
    kind, vocabulary = model.get("type"), model.get("vocab")
    if kind == "Unigram":
        unknown = model.get("unk_id")
        model["vocab"] = [
            [piece, _NEVER if piece in names and place != unknown else score]
            for place, (piece, score) in enumerate(vocabulary or [])
        ]
    elif kind == "WordLevel" or (kind == "BPE" and model.get("ignore_merges")):
        merges = model.get("merges", ())
        made = (pair.split(" ") if isinstance(pair, str) else pair for pair in merges)
        kept = {"".join(pair) for pair in made} | {model.get("unk_token")}
        model["vocab"] = {
            name: number
            for name, number in (vocabulary or {}).items()
            if name not in names or name in kept
        }


def _never_prepend(pre_tokenizer: dict[str, Any] | None) -> None:
    """Space is put in front of the first piece of a text only, where it is put in front at all."""
    if pre_tokenizer is None:
        return
    steps: Sequence[dict[str, Any]] = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for step in steps:
        if step.get("prepend_scheme") == "first":
            step["prepend_scheme"] = "never"
