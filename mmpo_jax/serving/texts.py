"""Tokens as texts, as they come: where an answer ends, and what of it can be said already."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence

import numpy as np

from mmpo_jax.data.processor import Processor

UNFINISHED = "�"
"""What a decoder writes for bytes that are no whole character yet."""
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
"""A byte as a piece of SentencePiece."""


class AnswerText:
    """The text of one answer as its tokens come."""

    def __init__(self, processor: Processor, stops: Sequence[str], is_streamed: bool = True):
        """
        Args:
          processor: decodes tokens.
          stops: texts that end the answer; it has none of them.
          is_streamed: whether what is new is said as it comes, and not the whole at the end.
        """
        self.processor, self.stops, self.is_streamed = processor, stops, is_streamed
        self.ids: list[int] = []
        self.text = ""
        """The answer so far; of a stopped one what stands before the stop."""
        self.is_stopped = False
        self._said = 0

    def add(self, ids: np.ndarray, is_last: bool) -> str:
        """What can be said now that was not said before.

        An end that may be half a character or the beginning of a stop is kept back until more is
        known. Tokens behind that with which a stop is whole do not belong to the answer.

        Args:
          ids: the next tokens.
          is_last: whether there will be none behind them.
        """
        before = list(self.ids)
        self.ids += ids.tolist()
        if not (is_last or self.stops or self.is_streamed):  # nobody reads it before it ends
            return ""
        self.text, self.is_stopped = self._cut(self.processor.decode(self.ids))
        if self.is_stopped:  # by which of the tokens: the texts of all before it have no stop
            self.ids = before
            for token in ids.tolist():
                self.ids.append(token)
                self.text, is_whole = self._cut(self.processor.decode(self.ids))
                if is_whole:
                    break
        whole = len(self.text)
        if not (is_last or self.is_stopped):
            known = self.text.rstrip(UNFINISHED)
            whole = len(known) - self._begun_stop(known)
        new = self.text[self._said : max(whole, self._said)]
        self._said += len(new)
        return new

    def _cut(self, text: str) -> tuple[str, bool]:
        """(what stands before the first stop, whether there is one)."""
        at = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        return text[: min(at, default=None)], bool(at)

    def _begun_stop(self, text: str) -> int:
        """How many characters at the end of a text may be the beginning of a stop."""
        most = 0
        for stop in self.stops:
            for length in range(min(len(stop) - 1, len(text)), most, -1):
                if text.endswith(stop[:length]):
                    most = length
                    break
        return most


class TokenTexts:
    """The text and the bytes of single tokens, with the space in front of them."""

    def __init__(self, processor: Processor):
        self.tokenizer = processor.tokenizer
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decoder = (
            json.dumps(json.loads(backend.to_str())["decoder"], ensure_ascii=False)
            if backend
            else ""
        )
        self._in_bytes = _bytes_of_characters() if '"ByteLevel"' in decoder else None
        self._marks_spaces = "▁" in decoder
        self.bytes_of = functools.lru_cache(2**16)(self._bytes_of)

    def text_of(self, token: int) -> str:
        """The text of a token; bytes that are no character alone are `UNFINISHED`."""
        return self.bytes_of(token).decode(errors="replace")

    def _bytes_of(self, token: int) -> bytes:
        piece = self.tokenizer.convert_ids_to_tokens(int(token))
        if piece is None:  # the vocabulary of the model may have more than the tokenizer's
            return b""
        if token in self.tokenizer.added_tokens_decoder:
            return piece.encode()
        if self._in_bytes is not None:
            known = [self._in_bytes.get(character) for character in piece]
            return b"" if None in known else bytes(known)  # type: ignore[arg-type]
        byte = BYTE.fullmatch(piece)
        if byte:
            return bytes([int(byte[1], 16)])
        return (piece.replace("▁", " ") if self._marks_spaces else piece).encode()


def _bytes_of_characters() -> dict[str, int]:
    """Character -> the byte that byte-level tokenizers write it for (openai/gpt-2, encoder.py):
    printable ones stand for themselves, and the others for characters from 256 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {
        chr(256 + number): byte for number, byte in enumerate(others)
    }
