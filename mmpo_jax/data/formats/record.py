"""Our own rows, which keep every field of a record.

``prompt`` is a list of messages and ``responses`` a list of objects with ``turns`` and whatever of
`Response` says something. ``extra`` holds other columns; in files of columns it is JSON text, as
its values may be of any type.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

from mmpo_jax.data.formats.format import (
    Draft,
    DraftResponse,
    Format,
    read_flag,
    read_number,
    read_rank,
    read_text,
    rest,
    source_of,
)
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.trl import read_tokens
from mmpo_jax.data.formats.turns import (
    ARGUMENTS,
    parse_turns,
    split_last_answer,
    template_arguments,
    with_system,
)
from mmpo_jax.data.formats.writing import STRIP, CannotHold, Writer, messages, template_columns
from mmpo_jax.data.records import Record, Response, Span
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import UnusableRow


def _claims(row: Row) -> bool:
    responses = row.get("responses")
    return (
        isinstance(row.get("prompt"), list)
        and isinstance(responses, list)
        and all(isinstance(response, dict) and "turns" in response for response in responses)
    )


def _read(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    rows = row.get("responses")
    if not isinstance(rows, list):
        raise UnusableRow("bad_message", "responses is not a list")
    prompt = with_system(row, parse_turns(row.get("prompt"), "user"))
    responses = tuple(_usable(response, media) for response in rows)
    if not prompt and len(responses) == 1 and messages_as == "last_turn":
        prompt, last = split_last_answer(responses[0].turns)
        responses = (dataclasses.replace(responses[0], turns=last),)
    others = row.get("other_images")
    return Draft(
        prompt=prompt,
        responses=responses,
        images=media.images(row),
        videos=media.videos(row),
        other_images=media.images({"images": others}) if others is not None else None,
        source=source_of(row),
        extra=rest(row, "prompt", "responses", "other_images", "extra", *ARGUMENTS, "system")
        | _extra(row.get("extra")),
        template=template_arguments(row),
        samples=len(responses) > 1 and not any("rank" in response.fields for response in responses),
    )


def _extra(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UnusableRow("bad_json", f"extra: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise UnusableRow("bad_json", f"extra is a {type(value).__name__} and not an object")
    return value or {}


def _usable(response: Any, media: MediaFolder) -> DraftResponse:
    try:
        return _answer(response, media)
    except UnusableRow as problem:
        return DraftResponse((), problem=problem)


def _answer(response: Any, media: MediaFolder) -> DraftResponse:
    if not isinstance(response, dict):
        raise UnusableRow("bad_message", f"{str(response)[:80]!r} is no response")
    given = {name: value for name, value in response.items() if value is not None}
    unknown = given.keys() - {field.name for field in dataclasses.fields(Response)}
    if unknown:
        raise UnusableRow("bad_message", f"a response with {', '.join(sorted(unknown))}")
    fields: dict[str, Any] = {}
    if "rank" in given:
        fields["rank"] = read_rank(given["rank"])
    if "scores" in given:
        fields["scores"] = _scores(given["scores"])
    if "critique" in given:
        fields["critique"] = read_text(given["critique"], "critique")
    if "spans" in given:
        fields["spans"] = _spans(given["spans"])
    for name in ("finished", "desirable"):
        if name in given:
            fields[name] = read_flag(given[name], name)
    if "log_prob" in given:
        fields["log_prob"] = read_number(given["log_prob"], "log_prob", "bad_log_prob")
    if "token_ids" in given:
        fields["token_ids"] = read_tokens(given["token_ids"])
    if "images" in given:
        fields["images"] = media.images({"images": given["images"]})
    prompt = parse_turns(given["prompt"], "user") if "prompt" in given else None
    return DraftResponse(parse_turns(given.get("turns"), "assistant"), prompt, fields)


def _scores(value: Any) -> Mapping[str, float]:
    if not isinstance(value, dict):
        raise UnusableRow("bad_score", f"scores {str(value)[:80]!r} are no object")
    return {name: read_number(score, name) for name, score in value.items() if score is not None}


def _spans(value: Any) -> tuple[Span, ...]:
    spans = []
    for entry in value if isinstance(value, list) else [value]:
        given = entry if isinstance(entry, dict) else {}
        places = [given.get(name) for name in ("start", "end")]
        phrase = given.get("phrase")
        whole = [n for n in (*places, 0 if phrase is None else phrase) if type(n) is int]
        if len(whole) != 3:
            raise UnusableRow("bad_span", f"{str(entry)[:80]!r} has no start and end")
        weight = given.get("weight")
        if weight is not None:
            weight = read_number(weight, "weight", "bad_span")
        spans.append(Span(whole[0], whole[1], weight, phrase))
    return tuple(spans)


def _write(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **writer.media(record)}
    if record.other_images is not None:
        row["other_images"] = [writer.image(image) for image in record.other_images]
    row |= template_columns(record, as_text=writer.embed == "bytes")
    columns = writer.embed == "bytes"
    row["prompt"] = messages(record.prompt, record, tags=columns, by_column=columns)
    row["responses"] = [_write_response(one, record, writer) for one in record.responses]
    if record.source is not None:
        row["source"] = record.source
    if record.extra:
        try:
            text = json.dumps(record.extra, ensure_ascii=False)
        except TypeError as error:
            raise CannotHold("extra", detail=f"{', '.join(record.extra)}: {error}") from error
        row["extra"] = text if writer.embed == "bytes" else record.extra
    return row


def _write_response(response: Response, record: Record, writer: Writer) -> dict[str, Any]:
    if response.images is not None:
        record = dataclasses.replace(record, images=response.images)
    columns = writer.embed == "bytes"
    said = functools.partial(messages, record=record, tags=columns, by_column=columns)
    before = record.prompt if response.prompt is None else response.prompt
    written: dict[str, Any] = {"turns": said(response.turns, behind=before)}
    if not response.finished:
        written["finished"] = False
    for name in ("rank", "critique", "desirable", "log_prob"):
        if getattr(response, name) is not None:
            written[name] = getattr(response, name)
    if response.token_ids is not None:
        written["token_ids"] = list(response.token_ids)
    if response.scores:
        written["scores"] = dict(response.scores)
    if response.spans:
        written["spans"] = [dataclasses.asdict(span) for span in response.spans]
    if response.images is not None:
        written["images"] = [writer.image(image) for image in response.images]
    if response.prompt is not None:
        written["prompt"] = said(response.prompt)
    return written


FORMAT = Format(name="record", claims=_claims, read=_read, write=_write, holds=frozenset(STRIP))
