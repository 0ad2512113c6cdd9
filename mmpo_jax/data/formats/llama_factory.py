"""LLaMA-Factory's sharegpt rows.

``conversations`` of ``from`` and ``value``, with ``<image>`` and ``<video>`` in the texts, and
``system``; a preference has ``chosen`` and ``rejected``, each one message, beside a conversation
that ends with the human; ``kto_tag`` is the verdict on a conversation that ends with an answer.
"""

from typing import Any, cast

from mmpo_jax.data.formats.format import (
    Answer,
    Draft,
    Format,
    read_flag,
    read_text,
    rest,
    source_of,
)
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.trl import pair, supervised
from mmpo_jax.data.formats.turns import Turns, parse_turn, split_last_answer
from mmpo_jax.data.formats.writing import (
    CannotHold,
    Writer,
    chosen_and_rejected,
    image_tags,
    messages,
    with_extra,
)
from mmpo_jax.data.records import Record, Turn
from mmpo_jax.data.rows import MessagesAs, Row, UnusableRow

_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
_SPEAKERS = {role: speaker for speaker, role in _ROLES.items()}


def _claims(row: Row) -> bool:
    return "conversations" in row


def _read(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    turns = _turns(row.get("conversations"))
    if "system" in row:
        turns = ((Turn("system", read_text(row["system"], "system")), ()), *turns)
    prompt, answers = turns, cast(tuple[Answer, ...], ())
    if ("chosen" in row) != ("rejected" in row):
        raise UnusableRow("incomplete_pair", "chosen and rejected belong together")
    if "chosen" in row:
        answers = pair(_turns([row["chosen"]]), _turns([row["rejected"]]))
    elif "kto_tag" in row:
        prompt, answer = split_last_answer(turns)
        answers = (Answer(answer, fields={"desirable": read_flag(row["kto_tag"], "kto_tag")}),)
    elif turns and turns[-1][0].role == "assistant":
        prompt, answers = supervised(turns, messages_as)
    return Draft(
        prompt=prompt,
        answers=answers,
        images=media.images(row),
        videos=media.videos(row),
        source=source_of(row),
        extra=rest(row, "conversations", "system", "chosen", "rejected", "kto_tag"),
    )


def _turns(value: Any) -> Turns:
    if not isinstance(value, list):
        raise UnusableRow("bad_message", f"a {type(value).__name__} is no conversation")
    return tuple(parse_turn(_message(message)) for message in value)


def _message(message: Any) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise UnusableRow("bad_message", f"{str(message)[:80]!r} has no from and value")
    speaker = message.get("from")
    return {"role": _ROLES.get(str(speaker), speaker), "content": message.get("value")}


def _write(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **writer.media(record, rates=False)}
    if record.source is not None:
        row["source"] = record.source
    turns, responses = record.prompt, record.responses
    if turns and turns[0].role == "system":
        row["system"], turns = turns[0].text, turns[1:]
    if record.ranked:
        chosen, rejected = chosen_and_rejected(record)
        row["chosen"], row["rejected"] = (_one(answer.turns) for answer in (chosen, rejected))
    elif len(responses) == 1:
        turns = (*turns, *responses[0].turns)
        if responses[0].desirable is not None:
            row["kto_tag"] = responses[0].desirable
    elif responses:
        raise CannotHold("responses", detail=f"{len(responses)} of them without ranks")
    row["conversations"] = _conversation(turns, image_tags(record))
    return with_extra(row, record.extra)


def _conversation(turns: tuple[Turn, ...], tags: str) -> list[dict[str, str]]:
    return [
        {"from": _SPEAKERS[message["role"]], "value": message["content"]}
        for message in messages(turns, tags)
    ]


def _one(turns: tuple[Turn, ...]) -> dict[str, str]:
    if len(turns) != 1:
        raise CannotHold(
            "responses", detail=f"{len(turns)} turns; chosen and rejected are one message"
        )
    return _conversation(turns, "")[0]


FORMAT = Format(
    name="llama_factory",
    claims=_claims,
    read=_read,
    write=_write,
    holds=frozenset({"source", "videos", "system", "extra", "rank", "desirable"}),
)
