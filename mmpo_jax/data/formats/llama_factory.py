"""LLaMA-Factory's sharegpt rows.

``conversations`` of ``from`` and ``value``, with ``<image>`` and ``<video>`` in the texts, and
``system``; a preference has ``chosen`` and ``rejected``, each one message, beside a conversation
that ends with the human; ``kto_tag`` is the verdict on a conversation that ends with an answer.
"""

from typing import Any, cast

from mmpo_jax.data.formats.format import Draft, DraftResponse, Format, draft_of, read_flag
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.trl import SCORES, scored_pair, supervised
from mmpo_jax.data.formats.turns import (
    parse_turns,
    split_last_answer,
    with_system,
)
from mmpo_jax.data.formats.whole_dialogues import split_pair
from mmpo_jax.data.formats.writing import (
    MESSAGES,
    CannotHold,
    Writer,
    chosen_and_rejected,
    messages,
    template_columns,
    with_extra,
)
from mmpo_jax.data.records import Record, Response, Turn
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import UnusableRow

_SPEAKERS = {"user": "human", "assistant": "gpt", "tool": "observation"}
"""What these rows call the speakers that they do not call as everybody does."""


def _claims(row: Row) -> bool:
    return "conversations" in row


def _read(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    if isinstance(row.get("conversations"), str):
        raise UnusableRow("bad_message", "conversations is a text and not a list of messages")
    turns = parse_turns(row.get("conversations"), "user")
    if turns and turns[0].role == "system" and not turns[0].text:
        turns = turns[1:]  # as an empty column: the template's default
    turns = with_system(row, turns)
    prompt, responses = turns, cast(tuple[DraftResponse, ...], ())
    if ("chosen" in row) != ("rejected" in row):
        raise UnusableRow("incomplete_pair", "chosen and rejected belong together")
    if "chosen" in row:
        chosen, rejected = (parse_turns(row[side], "assistant") for side in ("chosen", "rejected"))
        prompt, chosen, rejected = split_pair(turns, chosen, rejected)
        responses = scored_pair(row, chosen, rejected)
    elif "kto_tag" in row:
        prompt, answer = split_last_answer(turns)
        responses = (
            DraftResponse(answer, fields={"desirable": read_flag(row["kto_tag"], "kto_tag")}),
        )
    elif turns and turns[-1].role == "assistant":
        prompt, responses = supervised(turns, messages_as)
    scores = SCORES if "chosen" in row else ()
    used = ["conversations", "system", "chosen", "rejected", "kto_tag", *scores]
    return draft_of(row, media, prompt, responses, used)


def _write(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **writer.media(record, rates=False)}
    columns = writer.embed == "bytes"
    row |= template_columns(record, as_text=columns)
    if record.source is not None:
        row["source"] = record.source
    turns, responses = record.prompt, record.responses
    if turns and turns[0].role == "system":
        row["system"], turns = turns[0].text, turns[1:]
    if record.ranked:
        chosen, rejected = chosen_and_rejected(record)
        row["chosen"], row["rejected"] = (
            _one(record, side, columns) for side in (chosen, rejected)
        )
    elif len(responses) == 1:
        turns = (*turns, *responses[0].turns)
        if responses[0].desirable is not None:
            row["kto_tag"] = responses[0].desirable
    elif responses:
        raise CannotHold("responses", detail=f"{len(responses)} of them without ranks")
    row["conversations"] = _conversation(record, turns, by_column=columns)
    return with_extra(row, record.extra, writer)


def _conversation(
    record: Record, turns: tuple[Turn, ...], *, by_column: bool, behind: tuple[Turn, ...] = ()
) -> list[dict[str, Any]]:
    written = []
    said = messages(turns, record, behind=behind, tags=True, front=True, by_column=by_column)
    for message in said:
        role, text = message.pop("role"), message.pop("content")
        written.append({"from": _SPEAKERS.get(role, role), "value": text, **message})
    return written


def _one(record: Record, response: Response, by_column: bool) -> dict[str, Any]:
    if len(response.turns) != 1:
        detail = f"{len(response.turns)} turns; chosen and rejected are one message"
        raise CannotHold("responses", detail=detail)
    return _conversation(record, response.turns, by_column=by_column, behind=record.prompt)[0]


FORMAT = Format(
    name="llama_factory",
    claims=_claims,
    read=_read,
    write=_write,
    holds=MESSAGES | {"source", "videos", "extra", "rank", "desirable"},
)
