"""The records every method works on: one prompt about some images, and R responses to it."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from etils import epath

from mmpo_jax.errors import DataError
from mmpo_jax.files import fingerprint_bytes, fingerprint_json

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one speaker says."""

    role: Role
    text: str


EditKind = Literal["crop", "rotate", "black", "blank", "noise"]


@dataclass(frozen=True)
class Edit:
    """A change of an image that is made whenever it is read, see `data.edits`.

    Attributes:
      kind: what is done.
      seed: of what is random in it.
      step: of `noise`, how many steps of diffusion.
    """

    kind: EditKind
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class ImageRef:
    """An image that is not decoded yet: its encoded bytes, or the file that holds them.

    Attributes:
      name: how messages call the image, such as the path written in the row.
      data: the encoded image (JPEG, PNG, ...), or None where `path` is given.
      path: the file, resolved, or None where `data` is given.
      edit: how it is changed after decoding; None for not at all.
    """

    name: str
    data: bytes | None = field(default=None, repr=False)
    path: epath.Path | None = None
    edit: Edit | None = None

    def __post_init__(self) -> None:
        if (self.data is None) == (self.path is None):
            raise ValueError(f"image {self.name!r} needs either data or a path")

    def read(self) -> bytes:
        """The encoded image.

        Raises:
          DataError: the file is missing or cannot be read.
        """
        if self.data is not None:
            return self.data
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"cannot read image {os.fspath(self.path)}: {reason}") from error

    def fingerprint(self) -> str:
        """SHA-256 of the encoded image, and of what is changed.

        Raises:
          DataError: the file is missing or cannot be read.
        """
        encoded = fingerprint_bytes(self.read())
        if self.edit is None:
            return encoded
        return fingerprint_json([encoded, asdict(self.edit)])


@dataclass(frozen=True)
class VideoRef:
    """A video as its frames, in order.

    Attributes:
      name: how messages call the video.
      fps: frames per second of these frames, where known.
    """

    name: str
    frames: tuple[ImageRef, ...]
    fps: float | None = None

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError(f"video {self.name!r} has no frames")

    def fingerprint(self) -> str:
        """SHA-256 of the encoded frames and their rate.

        Raises:
          DataError: a file is missing or cannot be read.
        """
        return fingerprint_json([self.fps, [frame.fingerprint() for frame in self.frames]])


ANSWERS = ("answer", "solution")
"""Columns with what rewards compare sampled responses with."""

SCORE = "score"
"""What a response's score is called where it has only one."""

LOG_PROB = "log_prob/"
"""What names of scores begin with that are log-probs per token under other models."""


@dataclass(frozen=True)
class Span:
    """A part of a response that counts otherwise than the rest.

    Attributes:
      start, end: characters [start, end) of the text of the response's last assistant turn.
      weight: of its tokens' log-probs, such as RLHF-V's for corrected segments; None for 1.
      phrase: phrases of this number in the responses of a record belong together, as RRPO's do.
    """

    start: int
    end: int
    weight: float | None = None
    phrase: int | None = None


@dataclass(frozen=True)
class Response:
    """Turns that continue a prompt: usually one of the assistant, several in a dialogue.

    Attributes:
      finished: whether it ends here; one that generation cut at its limit has no EOS.
      rank: 1 is the best of the record, equal ranks are a tie; None where nothing ranks it.
      scores: by dimension, such as "helpfulness"; the only one is called `SCORE`. More is better.
      critique: what a judge wrote about it.
      spans: parts that count otherwise, in order.
      desirable: the verdict of unpaired data.
      images: what it is an answer to in place of the record's images; None for those.
      prompt: the same of the prompt.
      log_prob: the reference's sum over its tokens, as the data give it.
    """

    turns: tuple[Turn, ...]
    finished: bool = True
    rank: int | None = None
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    critique: str | None = None
    spans: tuple[Span, ...] = ()
    desirable: bool | None = None
    images: tuple[ImageRef, ...] | None = None
    prompt: tuple[Turn, ...] | None = None
    log_prob: float | None = None

    @classmethod
    def of(cls, text: str, rank: int | None = None) -> "Response":
        """The response that is one assistant turn."""
        return cls((Turn("assistant", text),), rank=rank)

    @property
    def text(self) -> str:
        """The text of the last assistant turn; empty where there is none."""
        for turn in reversed(self.turns):
            if turn.role == "assistant":
                return turn.text
        return ""


@dataclass(frozen=True)
class Record:
    """One prompt and R responses to it.

    The images, then the videos, belong before the text of the first user turn of prompt +
    response. The prompt may be empty: then every response is a whole dialogue about the same
    images, as in supervised data or in k yes/no questions about one image.

    Attributes:
      id: unique in its file.
      responses: in the order of the data, whatever their ranks; empty where they are still to be
        generated.
      other_images: what objectives compare the images with where they take those of the data; None
        where the data give none, or each response's own.
      source: what the data say of where the row comes from, such as a data set's name.
      row: number in its file from 1; None where it is from no file.
      extra: columns of the row that nothing here stands for; kept where a file is converted.
    """

    id: str
    images: tuple[ImageRef, ...]
    prompt: tuple[Turn, ...]
    responses: tuple[Response, ...]
    videos: tuple[VideoRef, ...] = ()
    other_images: tuple[ImageRef, ...] | None = None
    source: str | None = None
    row: int | None = None
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def answer(self) -> Any:
        """What rewards compare sampled responses with; None where the data have nothing."""
        return next((self.extra[name] for name in ANSWERS if name in self.extra), None)

    @property
    def ranked(self) -> bool:
        """Whether some of several responses is better than another, or as good: all have a rank.

        Otherwise they are alternatives or dialogues of equal standing.
        """
        ranks = [response.rank for response in self.responses]
        return len(ranks) > 1 and None not in ranks
