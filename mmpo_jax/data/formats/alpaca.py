"""Alpaca's rows, as LLaMA-Factory reads them, and ms-swift's older rows of query and response.

``instruction`` and ``input``, joined by a line break, are what is asked; so is ``query``. The
answer is ``output`` or ``response``; ``chosen`` and ``rejected``, or ``rejected_response``, make a
pair, and ``kto_tag`` or ``label`` is the verdict on an answer. ``history`` has earlier turns, pairs
of what the user and the assistant said, and ``system`` goes in front. Without an answer the row is
a prompt.
"""

from typing import Any

from mmpo_jax.data.formats.format import (
    Draft,
    DraftResponse,
    Format,
    draft_of,
    read_flag,
    read_text,
)
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.trl import SCORES, scored_pair, supervised
from mmpo_jax.data.formats.turns import (
    Message,
    Turns,
    parse_turns,
    with_system,
)
from mmpo_jax.data.formats.whole_dialogues import split_answer, split_pair
from mmpo_jax.data.formats.writing import (
    CannotHold,
    Writer,
    answer_of,
    chosen_and_rejected,
    messages,
    with_extra,
)
from mmpo_jax.data.records import Record
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import UnusableRow

_ANSWERS = ("output", "response")
_LABELS = ("kto_tag", "label")
_COLUMNS = (
    *("instruction", "input", "query", "history", "system"),
    *(*_ANSWERS, *_LABELS, "chosen", "rejected", "rejected_response"),
)


def _claims(row: Row) -> bool:
    asked = "instruction" in row or "query" in row
    return asked and not any(name in row for name in ("messages", "conversations", "responses"))


def _read(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    prompt: Turns = (*_history(row.get("history", [])), Message("user", _asked(row)))
    used = [name for name in _COLUMNS if name in row]
    said = next((row[name] for name in _ANSWERS if name in row), None)
    better = row.get("chosen", said)
    worse = row.get("rejected", row.get("rejected_response"))
    if worse is not None and better is None:
        raise UnusableRow("incomplete_pair", "a rejected answer without another one")
    responses: tuple[DraftResponse, ...] = ()
    if worse is not None:
        chosen, rejected = (parse_turns(text, "assistant") for text in (better, worse))
        prompt, chosen, rejected = split_pair(prompt, chosen, rejected)
        responses = scored_pair(row, chosen, rejected)
        used += [name for name in SCORES if name in row]
    elif better is not None:
        prompt, answer = split_answer(prompt, parse_turns(better, "assistant"))
        label = next((name for name in _LABELS if name in row), None)
        if label is not None:
            verdict = {"desirable": read_flag(row[label], label)}
            responses = (DraftResponse(answer, fields=verdict),)
        else:
            turns = with_system(row, prompt) + answer
            return draft_of(row, media, *supervised(turns, messages_as), used)
    return draft_of(row, media, with_system(row, prompt), responses, used)


def _asked(row: Row) -> str:
    """The instruction with its input below it, or the query."""
    if "query" in row:
        return read_text(row["query"], "query")
    texts = [read_text(row[name], name) for name in ("instruction", "input") if name in row]
    return "\n".join(text for text in texts if text)


def _history(value: Any) -> Turns:
    """Earlier turns, ``[[question, answer], ...]``."""
    if not isinstance(value, list) or any(
        not isinstance(turns, list) or len(turns) != 2 for turns in value
    ):
        raise UnusableRow("bad_message", f"history {str(value)[:80]!r} is no list of pairs")
    turns: list[Message] = []
    for asked, said in value:
        turns.append(Message("user", read_text(asked, "history")))
        turns.append(Message("assistant", read_text(said, "history")))
    return tuple(turns)


def _write(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **writer.media(record, rates=False)}
    if record.source is not None:
        row["source"] = record.source
    responses = record.responses
    turns = messages(record.prompt, record, tags=True, front=True)
    if not record.prompt and len(responses) == 1:
        turns = messages(responses[0].turns, record, tags=True, front=True)[:-1]
    if turns and turns[0]["role"] == "system":
        row["system"] = turns.pop(0)["content"]
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise CannotHold("prompt", detail="a row holds questions and answers by turns")
    texts = [turn["content"] for turn in turns]
    row |= {"instruction": texts[-1], "input": ""}
    if len(texts) > 1:
        row["history"] = [list(pair) for pair in zip(texts[:-1:2], texts[1:-1:2], strict=True)]
    if record.ranked:
        row["chosen"], row["rejected"] = map(answer_of, chosen_and_rejected(record))
    elif len(responses) == 1:
        row["output"] = responses[0].text
        if responses[0].desirable is not None:
            row["kto_tag"] = responses[0].desirable
    elif responses:
        raise CannotHold("responses", detail=f"{len(responses)} of them without ranks")
    return with_extra(row, record.extra, writer)


FORMAT = Format(
    name="alpaca",
    claims=_claims,
    read=_read,
    write=_write,
    holds=frozenset({"source", "videos", "system", "places", "extra", "rank", "desirable"}),
)
