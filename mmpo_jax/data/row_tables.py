"""Tokenised records as an Arrow table: what training reads of them, a row a record.

Texts are not kept: of a response there remain its tokens and what else the data say of it. Images
in files stay there; those that rows hold themselves are in the table.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from etils import epath

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.core.known_files import state_of
from mmpo_jax.data.contexts import all_contexts
from mmpo_jax.data.images import image_size
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import (
    Edit,
    ImageRef,
    Medium,
    Record,
    Response,
    Span,
    Turn,
    VideoFacts,
    VideoRef,
)
from mmpo_jax.data.tokenization import TokenizedRecord, TokenizedResponse, content_of, prompt_digest
from mmpo_jax.data.videos import video_facts

SIZES = ("prompt", "response", "responses", "tokens", "targets", "slots", "truncated")
"""Columns of whole numbers, see `row_sizes`."""
DIGESTS = ("content", "prompt_digest")
"""Columns with SHA-256: of all that a model sees but for the id; of the prompt with its media."""

OPEN_TABLES = 128
"""Files that are open at once."""

_TOKENS = {
    "id": pa.string(),
    "token_ids": pa.large_list(pa.int32()),
    "lengths": pa.list_(pa.int32()),
    "mask": pa.large_binary(),
    "more": pa.large_string(),
    "encoded": pa.list_(pa.large_binary()),
}
_COLUMNS = {
    **{name: pa.int32() for name in SIZES},
    "shows_later": pa.bool_(),
    "contexts": pa.string(),
    **{name: pa.string() for name in DIGESTS},
}


def row_sizes(record: TokenizedRecord) -> dict[str, int]:
    """How large a record is: the longest `prompt` and `response` of its contexts; the number of
    `responses`; of all contexts, the `tokens`, those that a loss counts (`targets`), the most
    `slots` of pixels, and how many responses were `truncated`."""
    contexts = [context for _, context in all_contexts(record)]
    responses = [response for context in contexts for response in context.responses]
    prompts = [len(context.prompt_ids) for context in contexts]
    lengths = [len(response.ids) for response in responses]
    return {
        "prompt": max(prompts),
        "response": max(lengths, default=0),
        "responses": len(record.responses),
        "tokens": sum(prompts) + sum(lengths),
        "targets": sum(int(response.loss_mask.sum()) for response in responses),
        "slots": max(context.num_slots for context in contexts),
        "truncated": sum(response.truncated > 0 for response in responses),
    }


def context_names_of(record: TokenizedRecord) -> list[str]:
    """The names of a record's contexts, the first included."""
    return [name for name, _ in all_contexts(record)]


def shows_later(record: TokenizedRecord) -> bool:
    """Whether images stand in responses, in any context."""
    return any(context.shows_later for _, context in all_contexts(record))


def encode_rows(
    records: Iterable[TokenizedRecord], told: Sequence[Mapping[str, str]], names: Sequence[str]
) -> pa.Table:
    """The table of records.

    Args:
      records: tokenised.
      told: more columns of each.
      names: of these.
    """
    columns: dict[str, list[Any]] = {name: [] for name in (*_TOKENS, *_COLUMNS)}
    for record in records:
        for name, value in _encode(record).items():
            columns[name].append(value)
    made = {name: pa.array(columns[name], kind) for name, kind in {**_TOKENS, **_COLUMNS}.items()}
    made |= {name: pa.array([row[name] for row in told], pa.string()) for name in names}
    return pa.table(made)


def decode_row(
    table: pa.Table, row: int, file: str, prefix: str, processor: Processor
) -> TokenizedRecord:
    """The record of a row.

    Args:
      table: of `encode_rows`.
      row: number in it.
      file: that has the table, for images that are read later.
      prefix: put in front of its ids.
      processor: lays its images out.
    """
    more = json.loads(table["more"][row].as_py())
    tokens = table["token_ids"][row].values.to_numpy()
    lengths = table["lengths"][row].as_py()
    spoken = np.unpackbits(
        np.frombuffer(table["mask"][row].as_py(), np.uint8), count=len(tokens)
    ).astype(bool)
    sources = [_decode_source(source) for source in more["sources"]]
    starts = np.cumsum([0, *lengths])
    pieces = [slice(start, end) for start, end in itertools.pairwise(starts)]
    contexts = []
    for number, context in enumerate(more["contexts"]):
        prompt, *responses = pieces[number * (1 + len(sources)) :][: 1 + len(sources)]
        made = _decode_context(context, prefix, EncodedImage(file, row, 0), processor)
        rows = zip(responses, sources, context["responses"], strict=True)
        spoken_responses = tuple(
            TokenizedResponse(
                tokens[piece],
                spoken[piece],
                truncated,
                source,
                tuple(map(tuple, spans)),
                criticised=bool(more),
            )
            for piece, source, (truncated, spans, *more) in rows
        )
        contexts.append(
            dataclasses.replace(
                made,
                prompt_ids=tokens[prompt],
                responses=spoken_responses,
                solution=more["solution"],
                question=more["question"],
                asked=_decode_asked(more["asked"], made) if "asked" in more else None,
            )
        )
    first, *others = contexts
    return dataclasses.replace(first, others=tuple(zip(more["others"], others, strict=True)))


@dataclasses.dataclass(frozen=True)
class EncodedImage:
    """An image in a table."""

    file: str
    """File of the table."""
    row: int
    place: int
    """Place among the row's images."""

    def read(self) -> bytes:
        """The encoded image."""
        return open_table(self.file)["encoded"][self.row].values[self.place].as_py()


def open_table(file: str) -> pa.Table:
    """A table in a file, mapped into memory: only what is looked at is read.

    Raises:
      DataError: it cannot be read.
    """
    state = state_of(file)
    return _open(file, None if state is None else tuple(state))


@functools.lru_cache(OPEN_TABLES)
def _open(file: str, state: tuple[int, ...] | None) -> pa.Table:
    """The table in a file that is in this state."""
    try:
        with pa.memory_map(file) as mapped:
            return pa.ipc.open_file(mapped).read_all()
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def table_bytes(table: pa.Table) -> bytes:
    """A file of a table, the same for the same rows."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def _encode(record: TokenizedRecord) -> dict[str, Any]:
    contexts = [context for _, context in all_contexts(record)]
    pieces = [
        piece
        for context in contexts
        for piece in (context.prompt_ids, *(response.ids for response in context.responses))
    ]
    masks = [
        mask
        for context in contexts
        for mask in (
            np.zeros(len(context.prompt_ids), bool),
            *(response.loss_mask for response in context.responses),
        )
    ]
    encoded: list[bytes] = []
    more = {
        "solution": record.solution,
        "question": record.question,
        "others": [name for name, _ in record.others],
        "sources": [_encode_source(response.source) for response in record.responses],
        "contexts": [_encode_context(context, encoded) for context in contexts],
    }
    if record.asked is not None:
        more["asked"] = _encode_asked(record.asked)
    return {
        "id": record.id,
        "token_ids": np.concatenate(pieces),
        "lengths": [len(piece) for piece in pieces],
        "mask": np.packbits(np.concatenate(masks)).tobytes(),
        "more": json.dumps(more, ensure_ascii=False, separators=(",", ":"), default=repr),
        "encoded": encoded,
        **row_sizes(record),
        "shows_later": shows_later(record),
        "contexts": json.dumps(context_names_of(record)),
        "content": fingerprint_json(content_of(record)),
        "prompt_digest": prompt_digest(record),
    }


def _encode_asked(asked: Record) -> dict[str, Any]:
    """The texts of a prompt, without its media."""
    return {
        "turns": [
            [turn.role, _encode_content(turn), turn.keys, turn.tagged] for turn in asked.prompt
        ],
        "template": asked.template,
        "plain_text": asked.plain_text,
    }


def _encode_content(turn: Turn) -> str | list[str | list[str]]:
    """A text, or texts and, each in a list of its own, the names of media."""
    if isinstance(turn.content, str):
        return turn.content
    return [piece if isinstance(piece, str) else [piece.value] for piece in turn.content]


def _decode_asked(said: dict[str, Any], made: TokenizedRecord) -> Record:
    """The prompt that `_encode_asked` describes, with a record's media."""
    turns = tuple(
        Turn(
            role,
            content
            if isinstance(content, str)
            else tuple(piece if isinstance(piece, str) else Medium(piece[0]) for piece in content),
            keys,
            tagged=tagged,
        )
        for role, content, keys, tagged in said["turns"]
    )
    template, plain = said["template"], said["plain_text"]
    return Record(made.id, made.images, turns, (), made.videos, template=template, plain_text=plain)


def _encode_source(source: Response) -> dict[str, Any]:
    """What the data say of a response, but for its texts."""
    said = {
        "finished": source.finished,
        "rank": source.rank,
        "scores": dict(source.scores),
        "desirable": source.desirable,
        "log_prob": source.log_prob,
        "spans": [dataclasses.astuple(span) for span in source.spans],
    }
    return {name: value for name, value in said.items() if value not in (None, {}, [])}


def _decode_source(said: dict[str, Any]) -> Response:
    spans = tuple(Span(*span) for span in said.pop("spans", ()))
    return Response((), spans=spans, **said)


def _encode_context(context: TokenizedRecord, encoded: list[bytes]) -> dict[str, Any]:
    return {
        "id": context.id,
        "images": [_encode_image(image, encoded) for image in context.images],
        "videos": [
            [
                video.name,
                video.fps,
                [_encode_image(frame, encoded) for frame in video.frames],
                *([] if video.file is None else [_encode_file(video, encoded)]),
            ]
            for video in context.videos
        ],
        "order": context.order,
        "ranked": context.ranked,
        "left_out": context.left_out,
        "shows_later": context.shows_later,
        "responses": [_encode_response(response) for response in context.responses],
    }


def _encode_response(response: TokenizedResponse) -> list[Any]:
    """[truncated, span_tokens], and true where it is criticised."""
    criticised = [True] if response.criticised else []
    return [response.truncated, response.span_tokens, *criticised]


def _decode_context(
    context: dict[str, Any], prefix: str, held: EncodedImage, processor: Processor
) -> TokenizedRecord:
    """The media of a context, without its tokens."""
    images = tuple(_decode_image(image, held) for image in context["images"])
    videos = tuple(
        _decode_file(name, fps, file[0], held)
        if file
        else VideoRef(name, tuple(_decode_image(frame, held) for frame in frames), fps)
        for name, fps, frames, *file in context["videos"]
    )
    layouts = processor.layouts(images, videos)
    return TokenizedRecord(
        id=prefix + context["id"],
        prompt_ids=np.zeros(0, np.int32),
        responses=(),
        images=images,
        layouts=tuple(layouts[place] for place in context["order"]),
        videos=videos,
        order=tuple(context["order"]),
        ranked=context["ranked"],
        left_out=tuple(context["left_out"]),
        shows_later=context["shows_later"],
    )


def _encode_image(image: ImageRef, encoded: list[bytes]) -> list[Any]:
    """[name, path or place in `encoded`, SHA-256 of the file, size, edit] of an image."""
    return _encode_ref(image, image_size(image), encoded)


def _encode_file(video: VideoRef, encoded: list[bytes]) -> list[Any]:
    """`_encode_image` of a video file, its frames, their rate, and the seconds that are shown."""
    assert video.file is not None
    facts = video_facts(video)
    image = _encode_ref(video.file, facts.size, encoded)
    return [*image, facts.frames, facts.rate, video.seconds]


def _decode_file(name: str, fps: float | None, fields: list[Any], held: EncodedImage) -> VideoRef:
    *image, frames, rate, seconds = fields
    file = _decode_image(image, held)
    assert file.size is not None
    facts = VideoFacts(frames, rate, file.size)
    return VideoRef(name, fps=fps, file=file, facts=facts, seconds=seconds and tuple(seconds))


def _encode_ref(image: ImageRef, size: tuple[int, int], encoded: list[bytes]) -> list[Any]:
    plain = dataclasses.replace(image, edit=None)
    place: str | int
    if image.path is not None:
        place = str(image.path)
    else:
        data = image.read()
        if data not in encoded:
            encoded.append(data)
        place = encoded.index(data)
    edit = None if image.edit is None else dataclasses.astuple(image.edit)
    return [image.name, place, plain.fingerprint(), size, edit]


def _decode_image(fields: list[Any], held: EncodedImage) -> ImageRef:
    """The image that `_encode_image` describes, if it is in the table at a place of the row."""
    name, place, digest, (height, width), edit = fields
    in_table = isinstance(place, int)
    return ImageRef(
        name,
        path=None if in_table else epath.Path(place),
        stored=dataclasses.replace(held, place=place) if in_table else None,
        edit=None if edit is None else Edit(*edit),
        digest=digest,
        size=(height, width),
    )
