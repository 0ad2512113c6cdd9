"""ms-swift's rows.

``messages`` that end with the chosen answer, with ``<image>`` and ``<video>`` in the texts. What
it is compared with: ``rejected_response``, another last answer; ``rejected_messages``, a whole
dialogue; ``rejected_images``, the rejected side's own images, whose answer is the chosen one where
nothing else is said. ``label`` is KTO's verdict.
"""

import dataclasses
from typing import Any

from mmpo_jax.data.formats.format import Draft, DraftResponse, Format, draft_of, read_flag
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.places import place_media
from mmpo_jax.data.formats.trl import supervised
from mmpo_jax.data.formats.turns import Turns, parse_turns, split_last_answer, with_system
from mmpo_jax.data.formats.writing import (
    MESSAGES,
    CannotHold,
    Writer,
    chosen_and_rejected,
    messages,
    template_columns,
    with_extra,
)
from mmpo_jax.data.records import Record, Response
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import UnusableRow

_REJECTED = ("rejected_response", "rejected_messages", "rejected_images")


def _claims(row: Row) -> bool:
    return "messages" in row and any(name in row for name in (*_REJECTED, "label"))


def _read(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    turns = with_system(row, parse_turns(row.get("messages"), "user"))
    if any(name in row for name in _REJECTED):
        prompt, chosen = split_last_answer(turns)
        rejected = _rejected(row, media, prompt, chosen)
        responses: tuple[DraftResponse, ...] = (DraftResponse(chosen, fields={"rank": 1}), rejected)
    elif "label" in row:
        prompt, chosen = split_last_answer(turns)
        responses = (DraftResponse(chosen, fields={"desirable": read_flag(row["label"], "label")}),)
    else:
        prompt, responses = supervised(turns, messages_as)
    used = ["messages", "label", "system", *_REJECTED]
    return draft_of(row, media, prompt, responses, used)


def _rejected(row: Row, media: MediaFolder, prompt: Turns, chosen: Turns) -> DraftResponse:
    answer, own_prompt = chosen, None
    if "rejected_messages" in row:
        dialogue = parse_turns(row["rejected_messages"], "user")
    else:
        dialogue = parse_turns(row.get("rejected_response", []), "assistant")
    if "rejected_messages" in row or (dialogue and dialogue[0].role != "assistant"):
        theirs, answer = split_last_answer(with_system(row, dialogue))
        asked_alike = _said(theirs) == _said(prompt) or _shown_alike(row, media, prompt, theirs)
        own_prompt = None if asked_alike else theirs
    elif "rejected_response" in row:
        answer = dialogue
    fields: dict[str, Any] = {"rank": 2}
    if "rejected_images" in row:
        fields["images"] = media.images({"images": row["rejected_images"]})
    return DraftResponse(answer, own_prompt, fields)


def _shown_alike(row: Row, media: MediaFolder, *prompts: Turns) -> bool:
    """Whether prompts are the same with their media in place, those of the row's columns."""
    column = {"images": row["rejected_images"]} if "rejected_images" in row else row
    shown = media.images(column), media.videos(row)
    try:
        one, other = (place_media(prompt, *shown, media) for prompt in prompts)
    except UnusableRow:  # which the row is left out for
        return False
    return one == other


def _said(turns: Turns) -> list[Any]:
    """What turns say and show; a text alone is what it is as a part."""
    return [(turn.role, turn.pieces, turn.keys) for turn in turns]


def _write(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **writer.media(record, rates=False)}
    row |= template_columns(record, as_text=writer.embed == "bytes")
    if record.source is not None:
        row["source"] = record.source
    if record.ranked:
        chosen, rejected = chosen_and_rejected(record)
        row |= _write_rejected(record, rejected, writer)
    elif len(record.responses) == 1:
        (chosen,) = record.responses
        if chosen.desirable is not None:
            row["label"] = chosen.desirable
    else:
        detail = f"{len(record.responses)} without ranks; a row holds one, or a pair"
        raise CannotHold("responses", detail=detail)
    if chosen.images is not None or chosen.prompt is not None:
        raise CannotHold(
            "response.images", detail="the chosen response has its own images or prompt"
        )
    said = (*record.prompt, *chosen.turns)
    columns = writer.embed == "bytes"
    row["messages"] = messages(said, record, tags=True, front=True, by_column=columns)
    return with_extra(row, record.extra, writer)


def _write_rejected(record: Record, rejected: Response, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {}
    shown = record.images if rejected.images is None else rejected.images
    if rejected.images is not None:
        row["rejected_images"] = [writer.image(image) for image in rejected.images]
    if rejected.prompt is None and len(rejected.turns) == 1:
        return row | {"rejected_response": rejected.text}
    prompt = record.prompt if rejected.prompt is None else rejected.prompt
    theirs = dataclasses.replace(record, images=shown)
    dialogue, columns = (*prompt, *rejected.turns), writer.embed == "bytes"
    said = messages(dialogue, theirs, tags=True, front=True, by_column=columns)
    return row | {"rejected_messages": said}


FORMAT = Format(
    name="ms_swift",
    claims=_claims,
    read=_read,
    write=_write,
    holds=MESSAGES
    | {"source", "videos", "extra", "rank", "desirable", "response.images", "response.prompt"},
)
