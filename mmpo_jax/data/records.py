"""The records every method works on: one prompt about some images, and R responses to it."""

import os
from dataclasses import dataclass, field
from typing import Literal

from etils import epath

from mmpo_jax.errors import DataError
from mmpo_jax.files import fingerprint_bytes, fingerprint_json

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """What one speaker says."""

    role: Role
    text: str


@dataclass(frozen=True)
class ImageRef:
    """An image that is not decoded yet: its encoded bytes, or the file that holds them.

    Attributes:
      name: how messages call the image, such as the path written in the row.
      data: the encoded image (JPEG, PNG, ...), or None where `path` is given.
      path: the file, resolved, or None where `data` is given.
    """

    name: str
    data: bytes | None = field(default=None, repr=False)
    path: epath.Path | None = None

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
        """SHA-256 of the encoded image.

        Raises:
          DataError: the file is missing or cannot be read.
        """
        return fingerprint_bytes(self.read())


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


@dataclass(frozen=True)
class Response:
    """Turns that continue a prompt: usually one of the assistant, several in a dialogue."""

    turns: tuple[Turn, ...]
    finished: bool = True
    """Whether it ends here; one that generation cut at its limit has no EOS."""

    @classmethod
    def of(cls, text: str) -> "Response":
        """The response that is one assistant turn."""
        return cls((Turn("assistant", text),))

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
    response. The prompt may
    be empty: then every response is a whole dialogue about the same images, as in supervised data
    or in k yes/no questions about one image.

    Attributes:
      id: unique in its file.
      responses: empty where responses are still to be generated.
      ranked: the responses stand from best to worst, the chosen one before the rejected one;
        otherwise they are alternatives or dialogues of equal standing.
    """

    id: str
    images: tuple[ImageRef, ...]
    prompt: tuple[Turn, ...]
    responses: tuple[Response, ...]
    ranked: bool = False
    videos: tuple[VideoRef, ...] = ()
