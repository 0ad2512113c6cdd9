"""The records every method works on: one prompt about some images, and R responses to it."""

import enum
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Protocol

from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_bytes, fingerprint_json
from mmpo_jax.core.known_files import recall, remember, state_of
from mmpo_jax.data.skipped import SkipReason

Role = Literal["system", "developer", "user", "assistant", "tool"]


class Medium(enum.Enum):
    """The place of an image or a video in what somebody says."""

    IMAGE = "image"
    VIDEO = "video"


IMAGE, VIDEO = Medium.IMAGE, Medium.VIDEO

Piece = str | Medium


@dataclass(frozen=True)
class Turn:
    """What one speaker says."""

    role: Role
    content: str | tuple[Piece, ...]
    """A text; or texts and places of media, in order. Texts are kept to the letter."""
    keys: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """What else the message has that a chat template may read, such as ``tool_calls``."""
    learned: bool = True
    """Whether it is to be learned, where it is an answer."""
    tagged: bool = field(default=False, compare=False)
    """Whether the places were written as tags in a text, where a line break behind the tag is one
    with that which a template writes behind an image."""

    @property
    def text(self) -> str:
        """The texts without the media."""
        if isinstance(self.content, str):
            return self.content
        return "".join(piece for piece in self.content if isinstance(piece, str))

    @property
    def media(self) -> tuple[Medium, ...]:
        """The media in it, in order."""
        if isinstance(self.content, str):  # whose characters are many
            return ()
        return tuple(piece for piece in self.content if isinstance(piece, Medium))


EditKind = Literal["crop", "rotate", "black", "blank", "noise", "masked"]


MASK_RULES = 2
"""Part of the fingerprint of masked images: changes with how they are masked."""


@dataclass(frozen=True)
class Edit:
    """A change of an image that is made whenever it is read, see `data.edits`."""

    kind: EditKind
    """Kind of change."""
    seed: int = 0
    """Seed of what is random in it."""
    step: int = 0
    """Steps of diffusion, of `noise`."""
    share: float = 0.0
    """Share of the patches that are hidden, of `masked`."""


class StoredImage(Protocol):
    """An encoded image in a place of its own kind, hashable."""

    def read(self) -> bytes:
        """Bytes of the encoded image.

        Raises:
          DataError: it cannot be read.
        """


@dataclass(frozen=True)
class ImageRef:
    """An image that is not decoded yet: its encoded bytes, or where these are."""

    name: str
    """How messages call the image, such as the path written in the row."""
    data: bytes | None = field(default=None, repr=False)
    """The encoded image (JPEG, PNG, ...), or None where `path` or `stored` is given."""
    path: epath.Path | None = None
    """The file, resolved, or None where the image is elsewhere."""
    edit: Edit | None = None
    """Change after decoding; None for none."""
    stored: StoredImage | None = None
    """Another place of the encoded image, or None where `data` or `path` is given."""
    digest: str | None = field(default=None, compare=False, repr=False)
    """SHA-256 of the encoded image, where it is known."""
    size: tuple[int, int] | None = field(default=None, compare=False, repr=False)
    """Height and width of the upright image, where they are known."""

    def __post_init__(self) -> None:
        places = (self.data, self.path, self.stored)
        if sum(place is not None for place in places) != 1:
            raise ValueError(f"image {self.name!r} needs either data or a path")

    @property
    def place(self) -> bytes | epath.Path | StoredImage:
        """Where the encoded image is, or it itself: equal for the same image."""
        place = next(place for place in (self.data, self.path, self.stored) if place is not None)
        return place

    def read(self) -> bytes:
        """The encoded image.

        Raises:
          DataError: the file is missing or cannot be read.
        """
        if self.data is not None:
            return self.data
        if self.stored is not None:
            return self.stored.read()
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
        encoded = self._digest()
        if self.edit is None:
            return encoded
        rules = [MASK_RULES] if self.edit.kind == "masked" else []
        return fingerprint_json([encoded, asdict(self.edit), *rules])

    def _digest(self) -> str:
        """SHA-256 of the encoded image; a file that is known is not read again."""
        if self.digest is not None:
            return self.digest
        if self.path is None:
            return fingerprint_bytes(self.read())
        known = recall(self.path)
        if "sha256" not in known:
            before = state_of(self.path)
            known = {"sha256": fingerprint_bytes(self.read())}
            remember(self.path, before, known)
        return known["sha256"]


@dataclass(frozen=True)
class VideoFacts:
    """What decoding a video file tells."""

    frames: int
    rate: float | None
    """Frames per second, where the file says so."""
    size: tuple[int, int]
    """Height and width of the frames."""


@dataclass(frozen=True)
class VideoRef:
    """A video as its frames, in order; or as a file of which frames are chosen by a checkpoint's
    video processor."""

    name: str
    """How messages call the video."""
    frames: tuple[ImageRef, ...] = ()
    """None where there is a file."""
    fps: float | None = None
    """Frames per second: of these frames, where known; of a file those to be chosen, where the row
    says so in place of the video processor."""
    file: ImageRef | None = None
    """The encoded video, MP4 or WebM, which is where an image may be."""
    facts: VideoFacts | None = field(default=None, compare=False, repr=False)
    """What is known of the file."""
    seconds: tuple[float | None, float | None] | None = None
    """Beginning and end of what is shown of the file, None for the file's own; None for all."""

    def __post_init__(self) -> None:
        if bool(self.frames) == (self.file is not None):
            raise ValueError(f"video {self.name!r} needs either frames or a file")

    @property
    def parts(self) -> tuple[ImageRef, ...]:
        """What is read: the frames, or the file."""
        return self.frames if self.file is None else (self.file,)

    def with_parts(self, parts: Iterable[ImageRef]) -> "VideoRef":
        """The video with others in place of its `parts`."""
        if self.file is None:
            return replace(self, frames=tuple(parts))
        (file,) = parts
        return replace(self, file=file)

    def fingerprint(self) -> str:
        """SHA-256 of the encoded frames or the file, their rate and what is shown of it.

        Raises:
          DataError: a file is missing or cannot be read.
        """
        whole = [] if self.file is None else ["file"]
        cut = [] if self.seconds is None else [self.seconds]
        parts = [part.fingerprint() for part in self.parts]
        return fingerprint_json([self.fps, parts, *whole, *cut])


MediaRef = ImageRef | VideoRef
"""What a prompt shows."""


SOLUTIONS = ("answer", "solution")
"""Columns with what rewards compare sampled responses with."""

SCORE = "score"
"""What a response's score is called where it has only one."""

LOG_PROB = "log_prob/"
"""What names of scores begin with that are log-probs per token under other models."""


@dataclass(frozen=True)
class Span:
    """A part of a response that counts otherwise than the rest."""

    start: int
    end: int
    """Characters [start, end) of the text of the response's last assistant turn."""
    weight: float | None = None
    """Weight of its tokens' log-probs, such as RLHF-V's for corrected segments; None for 1."""
    phrase: int | None = None
    """Number of its phrase; those of one number in the responses of a record belong together, as
    RRPO's do."""


@dataclass(frozen=True)
class Response:
    """Turns that continue a prompt: usually one of the assistant, several in a dialogue."""

    turns: tuple[Turn, ...]
    finished: bool = True
    """Whether it ends here; one that generation cut at its limit has no EOS."""
    rank: int | None = None
    """Rank: 1 is the best of the record, equal ones are a tie; None where nothing ranks it."""
    scores: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Scores by dimension, such as "helpfulness"; an only one is called `SCORE`. More is better."""
    critique: str | None = None
    """What a judge wrote about it."""
    spans: tuple[Span, ...] = ()
    """Parts that count otherwise, in order."""
    desirable: bool | None = None
    """The verdict of unpaired data."""
    images: tuple[ImageRef, ...] | None = None
    """Images that it answers in place of the record's; None for those."""
    prompt: tuple[Turn, ...] | None = None
    """Prompt that it answers in place of the record's; None for that."""
    log_prob: float | None = None
    """Log-prob under the reference, summed over its tokens, as the data give it."""
    token_ids: tuple[int, ...] | None = None
    """The tokens that were sampled, EOS included, where they are known."""

    @classmethod
    def of(cls, text: str, rank: int | None = None, **fields: Any) -> "Response":
        """The response that is one assistant turn."""
        return cls((Turn("assistant", text),), rank=rank, **fields)

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

    Images and videos stand where the turns of prompt + response have their places, each kind in
    order; where no turn has any, before the text of the first user turn, see `placed`. The prompt
    may be empty: then every response is a whole dialogue about the same images, as in supervised
    data or in k yes/no questions about one image. It may end with the beginning of an answer,
    which the responses go on from.
    """

    id: str
    """Name that no other record of its file has."""
    images: tuple[ImageRef, ...]
    prompt: tuple[Turn, ...]
    responses: tuple[Response, ...]
    """Responses in the order of the data, whatever their ranks; none where they are still to be
    generated."""
    videos: tuple[VideoRef, ...] = ()
    other_images: tuple[ImageRef, ...] | None = None
    """Images that objectives compare the images with, where they take those of the data; None where
    the data give none, or each response's own."""
    source: str | None = None
    """What the data say of where the row comes from, such as a data set's name."""
    row: int | None = None
    """Number in its file from 1; None where it is from no file."""
    own_id: str | None = None
    """The row's id, where the record has another since that one is taken."""
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Columns of the row that nothing here stands for; kept where a file is converted."""
    template: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Arguments of the chat template beside the messages, such as ``tools``."""
    plain_text: bool = False
    """Whether control tokens that are typed in the texts are text like any other."""
    left_out: tuple[tuple[int, SkipReason, str], ...] = ()
    """(place in the row from 0, reason, detail) of responses that could not be used."""

    @property
    def media(self) -> tuple[MediaRef, ...]:
        """The images, then the videos."""
        return *self.images, *self.videos

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns: the prompt's, and those of the responses and of prompts of theirs."""
        own = (turn for r in self.responses for turn in (*(r.prompt or ()), *r.turns))
        return *self.prompt, *own

    @property
    def texts(self) -> list[str]:
        """What a chat template is given to write: the turns' texts, and as JSON their keys and its
        arguments."""
        given = [self.template, *(turn.keys for turn in self.turns)]
        texts = [json.dumps(value, ensure_ascii=False, default=str) for value in given if value]
        return [*texts, *(turn.text for turn in self.turns)]

    @property
    def solution(self) -> Any:
        """What rewards compare sampled responses with; None where the data have nothing."""
        return next((self.extra[name] for name in SOLUTIONS if name in self.extra), None)

    @property
    def ranked(self) -> bool:
        """Whether some of several responses is better than another, or as good: all have a rank.

        Otherwise they are alternatives or dialogues of equal standing.
        """
        ranks = [response.rank for response in self.responses]
        return len(ranks) > 1 and None not in ranks


def last_question(turns: Sequence[Turn]) -> str:
    """The text of the last user turn; empty where there is none."""
    return next((turn.text for turn in reversed(turns) if turn.role == "user"), "")


def question_with_beginning(turns: Sequence[Turn]) -> str:
    """`last_question`, and what an answer says already where the prompt ends with its beginning."""
    question = last_question(turns)
    if not turns or turns[-1].role != "assistant":
        return question
    return f"{question}\n(What was said before: {turns[-1].text.strip()})"


def placed(turns: Sequence[Turn], images: int, videos: int) -> tuple[Turn, ...]:
    """A dialogue with its media in the turns.

    Args:
      turns: the dialogue; where no turn has a place, images, then videos go before the text of the
        first user turn, which is where TRL puts them.
      images, videos: how many there are.
    """
    first = next((place for place, turn in enumerate(turns) if turn.role == "user"), None)
    if first is None or not (images or videos) or any(turn.media for turn in turns):
        return tuple(turns)
    said = turns[first].content
    texts = (said,) if isinstance(said, str) else said
    content = (*[IMAGE] * images, *[VIDEO] * videos, *texts)
    return (*turns[:first], replace(turns[first], content=content), *turns[first + 1 :])
