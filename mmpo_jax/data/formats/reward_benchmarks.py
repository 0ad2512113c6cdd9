"""Rows of benchmarks of reward models, as they are published: two responses, one of them better.

VL-RewardBench (``test-*.parquet``): ``query``, ``response``, a list of two, and ``human_ranking``,
which has 0 at the better one. Multimodal RewardBench (``all_data.json``): ``Text``, ``Image``,
``Output1``, ``Output2`` and the name of one of them in ``Better``; its id is called ``ID``.
MM-RLHF-RewardBench has the layout of MM-RLHF's pairs. Responses keep their order, in which
`mmpo evaluate` wants their rewards.
"""

from collections.abc import Sequence
from typing import Any

from mmpo_jax.data.formats.format import (
    Draft,
    DraftResponse,
    Format,
    read_text,
    rest,
    source_of,
)
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.turns import parse_turns
from mmpo_jax.data.formats.writing import CannotHold, Writer, answer_of, question_of, with_extra
from mmpo_jax.data.ids import ID_COLUMNS, own_id
from mmpo_jax.data.records import Record
from mmpo_jax.data.rows import MessagesAs, Row, brief
from mmpo_jax.data.skipped import UnusableRow

RANKINGS = ([0, 1], [1, 0])
"""What VL-RewardBench ranks two responses as."""
OUTPUTS = ("Output1", "Output2")
"""Columns of the responses of Multimodal RewardBench."""
_ID = "ID"


def _claims_vl(row: Row) -> bool:
    return "human_ranking" in row and "response" in row and "query" in row


def _read_vl(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    said, ranking = row.get("response"), row.get("human_ranking")
    if not isinstance(said, list) or len(said) != len(RANKINGS):
        raise UnusableRow("incomplete_pair", "response is no list of two texts")
    if ranking not in RANKINGS:
        raise UnusableRow("bad_rank", f"human_ranking is {brief(ranking)}, not [0, 1] or [1, 0]")
    return Draft(
        prompt=parse_turns(read_text(row.get("query"), "query"), "user"),
        responses=_ranked(said, [rank + 1 for rank in ranking], "response"),
        images=media.images(row),
        videos=media.videos(row),
        source=source_of(row),
        extra=rest(row, "query", "response", "human_ranking"),
    )


def _write_vl(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id, **_one_image(record, writer, "image")}
    if record.source is not None:
        row["source"] = record.source
    row |= {"query": question_of(record), "response": _two(record)}
    row["human_ranking"] = [0, 1] if _first_is_better(record) else [1, 0]
    return with_extra(row, record.extra, writer)


def _claims_multimodal(row: Row) -> bool:
    return "Better" in row and all(name in row for name in OUTPUTS)


def _read_multimodal(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    better = row.get("Better")
    if better not in OUTPUTS:
        raise UnusableRow("bad_rank", f"Better is {brief(better)}, not {' or '.join(OUTPUTS)}")
    missing = [name for name in OUTPUTS if name not in row]
    if missing:
        raise UnusableRow("incomplete_pair", f"no {' and no '.join(missing)}")
    images = media.images(row)
    if not images and "Image" in row:
        images = (media.image(row["Image"]),)
    ranks = [1 if name == better else 2 for name in OUTPUTS]
    used = ["Text", "Image", "Better", *OUTPUTS]
    if own_id(row) is None:
        used.append(_ID)
    return Draft(
        prompt=parse_turns(read_text(row.get("Text"), "Text"), "user"),
        responses=_ranked([row[name] for name in OUTPUTS], ranks, "Output"),
        images=images,
        videos=media.videos(row),
        source=source_of(row),
        extra=rest(row, *used),
    )


def _write_multimodal(record: Record, writer: Writer) -> dict[str, Any]:
    row: dict[str, Any] = {"id": record.id} if _ID in record.extra else {_ID: record.id}
    row |= _one_image(record, writer, "Image")
    if record.source is not None:
        row["source"] = record.source
    first, second = _two(record)
    better = OUTPUTS[0] if _first_is_better(record) else OUTPUTS[1]
    row |= {"Text": question_of(record), "Output1": first, "Output2": second, "Better": better}
    return with_extra(row, record.extra, writer)


def _ranked(texts: Sequence[Any], ranks: Sequence[int], name: str) -> tuple[DraftResponse, ...]:
    return tuple(
        DraftResponse(parse_turns(read_text(text, name), "assistant"), fields={"rank": rank})
        for text, rank in zip(texts, ranks, strict=True)
    )


def _two(record: Record) -> list[str]:
    """The texts of the responses, in order.

    Raises:
      CannotHold: they are not two of which one is better.
    """
    ranks = [response.rank for response in record.responses]
    if ranks not in ([1, 2], [2, 1]):
        detail = f"{len(ranks)} with the ranks {ranks}; a row holds two, one of them better"
        raise CannotHold("responses", detail=detail)
    return [answer_of(response) for response in record.responses]


def _first_is_better(record: Record) -> bool:
    return record.responses[0].rank == 1


def _one_image(record: Record, writer: Writer, column: str) -> dict[str, Any]:
    if len(record.images) > 1:
        raise CannotHold("images", detail=f"{len(record.images)} of them; a row holds one")
    return {column: writer.image(record.images[0])} if record.images else {}


_HOLDS = frozenset({"source", "extra", "rank"})
VL_REWARDBENCH = Format("vl_rewardbench", _claims_vl, _read_vl, _write_vl, _HOLDS)
MULTIMODAL_REWARDBENCH = Format(
    "multimodal_rewardbench",
    _claims_multimodal,
    _read_multimodal,
    _write_multimodal,
    _HOLDS,
    (*ID_COLUMNS, _ID),
)
