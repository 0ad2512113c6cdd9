"""The published Parquet files of RLAIF-V and RLHF-V.

RLAIF-V's columns are ``question``, ``chosen``, ``rejected``, ``image`` (bytes and path),
``ds_name``, ``origin_dataset``, ``origin_split``, ``idx`` and ``image_path``. RLHF-V has the first
three in a JSON object in the column ``text``.

``logps``, which RLAIF-V's training adds, is JSON: a list of six, or an object that holds it as
``logps``: the chosen response's sum, its mean, its tokens' log-probs, then the rejected one's. We
read the sums. Tokens and means are kept where a file is converted; where a record has only sums,
the others are written as null and empty lists.
"""

import json
from collections.abc import Mapping
from typing import Any

from mmpo_jax.data.formats.format import (
    Draft,
    DraftResponse,
    Format,
    read_number,
    read_text,
    rest,
    source_of,
)
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.turns import parse_turns
from mmpo_jax.data.formats.writing import (
    CannotHold,
    Writer,
    answer_of,
    chosen_and_rejected,
    question_of,
    with_extra,
)
from mmpo_jax.data.records import Record
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import UnusableRow

_PAIR = ("question", "chosen", "rejected")
_SUMS = (0, 3)
"""Places of the sums in the list of six."""


def _claims_rlaif_v(row: Row) -> bool:
    own = ("ds_name", "origin_dataset", "origin_split", "image_path", "logps")
    return all(isinstance(row.get(name), str) for name in _PAIR) and any(
        name in row for name in own
    )


def _claims_rlhf_v(row: Row) -> bool:
    text = row.get("text")
    is_json = isinstance(text, str) and text.lstrip().startswith(("{", "["))
    return is_json and "image" in row and "chosen" not in row


def _read_rlaif_v(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    missing = [name for name in _PAIR if name not in row]
    if missing:
        raise UnusableRow("incomplete_pair", f"no {' and no '.join(missing)}")
    question, chosen, rejected = (read_text(row[name], name) for name in _PAIR)
    images, used = media.images(row), set(_PAIR)
    if not images and "image_path" in row:
        images, used = (media.image(row["image_path"]),), {*_PAIR, "image_path"}
    sums = _log_probs(row["logps"]) if "logps" in row else (None, None)
    return Draft(
        prompt=parse_turns(question, "user"),
        responses=tuple(
            DraftResponse(
                parse_turns(text, "assistant"), fields={"rank": rank, "log_prob": log_prob}
            )
            for rank, (text, log_prob) in enumerate(zip((chosen, rejected), sums, strict=True), 1)
        ),
        images=images,
        videos=media.videos(row),
        source=source_of(row, "ds_name"),
        extra=rest(row, *used, source="ds_name"),
    )


def _read_rlhf_v(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    try:
        pair = json.loads(read_text(row.get("text"), "text"))
    except ValueError as error:
        raise UnusableRow("bad_json", f"text: {error}") from error
    if not isinstance(pair, dict):
        raise UnusableRow("bad_json", f"text holds a {type(pair).__name__} and not an object")
    known = {name: value for name, value in pair.items() if value is not None}
    more = {name: value for name, value in known.items() if name not in (*_PAIR, "logps")}
    columns = {name: value for name, value in row.items() if name != "text"}
    if more:
        columns["text"] = more
    inner = {name: value for name, value in known.items() if name not in more}
    return _read_rlaif_v(columns | inner, media, messages_as)


def _six(value: Any) -> Any:
    """The list of six in what a row has for it."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UnusableRow("bad_log_prob", f"logps: {error}") from error
    if isinstance(value, Mapping):
        value = value.get("logps")
    return value


def _log_probs(value: Any) -> tuple[float, float]:
    six = _six(value)
    if not isinstance(six, list) or len(six) != 6:
        raise UnusableRow("bad_log_prob", f"logps {str(value)[:80]!r} is no list of six")
    chosen, rejected = (read_number(six[place], "logps", "bad_log_prob") for place in _SUMS)
    return chosen, rejected


def _write_rlaif_v(record: Record, writer: Writer) -> dict[str, Any]:
    row = _columns(record, writer)
    logps = _write_log_probs(record)
    return row if logps is None else row | {"logps": json.dumps({"logps": logps})}


def _write_rlhf_v(record: Record, writer: Writer) -> dict[str, Any]:
    row = _columns(record, writer)
    row["idx"] = int(record.id) if record.id.isdecimal() else record.id
    pair = {name: row.pop(name) for name in _PAIR}
    more = record.extra.get("text", {})
    logps = _write_log_probs(record)
    if logps is not None:
        pair["logps"] = logps
    return row | {"text": json.dumps(pair | more, ensure_ascii=False)}


def _columns(record: Record, writer: Writer) -> dict[str, Any]:
    if len(record.images) != 1:
        raise CannotHold("images", detail=f"{len(record.images)} of them; a row holds one")
    chosen, rejected = chosen_and_rejected(record)
    extra = {n: value for n, value in record.extra.items() if n not in ("logps", "text")}
    row = {
        "ds_name": record.source,
        "image": writer.image(record.images[0]),
        "question": question_of(record),
        "chosen": answer_of(chosen),
        "rejected": answer_of(rejected),
        "idx": record.id,
    }
    return with_extra(row, extra, writer)


def _write_log_probs(record: Record) -> list[Any] | None:
    chosen, rejected = chosen_and_rejected(record)
    if chosen.log_prob is None and rejected.log_prob is None:
        return None
    if chosen.log_prob is None or rejected.log_prob is None:
        raise CannotHold("log_prob", detail="of one response only")
    kept = _six(record.extra.get("logps"))
    if isinstance(kept, list) and [kept[i] for i in _SUMS] == [chosen.log_prob, rejected.log_prob]:
        return kept
    return [chosen.log_prob, None, [], rejected.log_prob, None, []]


_HOLDS = frozenset({"source", "extra", "rank", "log_prob"})
RLAIF_V = Format("rlaif_v", _claims_rlaif_v, _read_rlaif_v, _write_rlaif_v, _HOLDS)
RLHF_V = Format("rlhf_v", _claims_rlhf_v, _read_rlhf_v, _write_rlhf_v, _HOLDS)
