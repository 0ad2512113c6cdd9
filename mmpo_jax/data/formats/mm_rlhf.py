"""MM-RLHF's published files: `data.jsonl` (rankings) and `dpo_pairs.jsonl`.

``image`` is a path and ``video`` a folder of frames; archives may have put either a folder deeper.
"""

import math
from collections.abc import Mapping
from typing import Any

from mmpo_jax.data.formats.entries import entries
from mmpo_jax.data.formats.format import (
    Draft,
    DraftResponse,
    Format,
    read_flag,
    read_list,
    read_number,
    read_rank,
    read_text,
    rest,
    source_of,
)
from mmpo_jax.data.formats.media import MediaFolder
from mmpo_jax.data.formats.trl import SCORES, pair_scores
from mmpo_jax.data.formats.turns import parse_turns
from mmpo_jax.data.formats.writing import CannotHold, Writer, answer_of, question_of, with_extra
from mmpo_jax.data.records import SCORE, ImageRef, Record, VideoRef
from mmpo_jax.data.rows import MessagesAs, Row
from mmpo_jax.data.skipped import UnusableRow

DIMENSIONS = ("helpfulness", "faithfulness", "ethical")
FACTOR_RATE = 0.5
"""k of ``ls_factor`` = 1 - exp(-k (chosen's score - rejected's)), the paper's default."""


def _media(row: Row, media: MediaFolder) -> tuple[tuple[ImageRef, ...], tuple[VideoRef, ...]]:
    images = tuple(media.image(entry, deeper=True) for entry in entries(row, "image"))
    videos = tuple(
        media.video(entry, number, deeper=True)
        for number, entry in enumerate(entries(row, "video"), start=1)
    )
    return images, videos


def _write_media(record: Record, writer: Writer) -> dict[str, Any]:
    if len(record.images) + len(record.videos) > 1:
        raise CannotHold("images", detail="a row holds one image or one video")
    if record.videos:
        return {"video": writer.video_folder(record.videos[0])}
    return {"image": writer.image(record.images[0])} if record.images else {}


def _claims_ranking(row: Row) -> bool:
    return "models_output" in row


def _read_ranking(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    """Ranks, scores and reasons stand in lists beside that of the responses; scores may be null."""
    outputs = row.get("models_output")
    if not isinstance(outputs, list):
        raise UnusableRow("bad_message", "models_output is not a list")
    fields: list[dict[str, Any]] = [{"scores": {}} for _ in outputs]
    if "final_ranking" in row:
        ranks = read_list(row["final_ranking"], "final_ranking", len(outputs), "rank_count")
        for given, rank in zip(fields, ranks, strict=True):
            given["rank"] = read_rank(rank)
    for name in DIMENSIONS:
        if name in row:
            scores = read_list(row[name], name, len(outputs), "score_count")
            for given, score in zip(fields, scores, strict=True):
                if score is not None:
                    given["scores"][name] = read_number(score, name)
    used = ["question", "models_output", "final_ranking", *DIMENSIONS]
    reasons = row.get("score_reasons")
    if _is_critiques(reasons, len(outputs)):
        used.append("score_reasons")
        for given, reason in zip(fields, reasons or (), strict=True):
            given["critique"] = reason if reason is None else read_text(reason, "score_reasons")
    images, videos = _media(row, media)
    return Draft(
        prompt=parse_turns(read_text(row.get("question"), "question"), "user"),
        responses=tuple(_answer(text, given) for text, given in zip(outputs, fields, strict=True)),
        images=images,
        videos=videos,
        source=source_of(row),
        extra=rest(row, *used),
    )


def _answer(text: Any, fields: Mapping[str, Any]) -> DraftResponse:
    try:
        turns = parse_turns(read_text(text, "models_output"), "assistant")
    except UnusableRow as problem:
        return DraftResponse((), fields=fields, problem=problem)
    return DraftResponse(turns, fields=fields)


def _is_critiques(reasons: Any, count: int) -> bool:
    """Whether there is a text, or nothing, for each response."""
    return (
        isinstance(reasons, list)
        and len(reasons) == count
        and all(reason is None or isinstance(reason, str) for reason in reasons)
    )


def _write_ranking(record: Record, writer: Writer) -> dict[str, Any]:
    responses = record.responses
    row = {"id": record.id, **_write_media(record, writer), "question": question_of(record)}
    row["models_output"] = [answer_of(response) for response in responses]
    if record.source is not None:
        row["source"] = record.source
    if any(response.rank is not None for response in responses):
        row["final_ranking"] = [response.rank for response in responses]
    named = {name for response in responses for name in response.scores}
    if named - set(DIMENSIONS):
        detail = f"{', '.join(sorted(named - set(DIMENSIONS)))}; known: {', '.join(DIMENSIONS)}"
        raise CannotHold("scores", detail=detail)
    for name in DIMENSIONS:
        if name in named:
            row[name] = [response.scores.get(name) for response in responses]
    if any(response.critique is not None for response in responses):
        row["score_reasons"] = [response.critique for response in responses]
    return with_extra(row, record.extra, writer)


_PAIR_COLUMNS = (
    "chosen_reason",
    "rejected_reason",
    "is_tie",
    "ls_factor",
    "mixed_up_image",
    "reference_chosen_logp",
    "reference_rejected_logp",
)


def _claims_pair(row: Row) -> bool:
    return "chosen" in row and "rejected" in row and any(name in row for name in _PAIR_COLUMNS)


def _read_pair(row: Row, media: MediaFolder, messages_as: MessagesAs) -> Draft:
    """``mixed_up_image`` is another image for the same texts, outside the ranking."""
    missing = [name for name in ("prompt", "chosen", "rejected") if name not in row]
    if missing:
        raise UnusableRow("incomplete_pair", f"no {' and no '.join(missing)}")
    tie = read_flag(row.get("is_tie", False), "is_tie")
    used = {*_PAIR_COLUMNS, *SCORES}
    scores = pair_scores(row)
    from_factor = not scores[0]
    if from_factor:
        scores = _factor_scores(row)
    if not (from_factor and scores[0]):
        used.remove("ls_factor")
    responses = []
    sides = ("chosen", 1), ("rejected", 1 if tie else 2)
    for (side, rank), score in zip(sides, scores, strict=True):
        fields: dict[str, Any] = {"rank": rank, "scores": score}
        if f"{side}_reason" in row:
            fields["critique"] = read_text(row[f"{side}_reason"], f"{side}_reason")
        fields |= _log_prob(row, f"reference_{side}_logp")
        responses.append(
            DraftResponse(parse_turns(read_text(row[side], side), "assistant"), fields=fields)
        )
    images, videos = _media(row, media)
    other = (media.image(row["mixed_up_image"], deeper=True),) if "mixed_up_image" in row else None
    return Draft(
        prompt=parse_turns(read_text(row["prompt"], "prompt"), "user"),
        responses=tuple(responses),
        images=images,
        videos=videos,
        other_images=other,
        source=source_of(row),
        extra=rest(row, "prompt", "chosen", "rejected", *used),
    )


def _log_prob(row: Row, name: str) -> dict[str, float]:
    return {"log_prob": read_number(row[name], name, "bad_log_prob")} if name in row else {}


def _factor_scores(row: Row) -> tuple[dict[str, float], dict[str, float]]:
    """Scores as far apart as ``ls_factor`` says; 1, which stands for none, says nothing."""
    if "ls_factor" not in row:
        return {}, {}
    factor = read_number(row["ls_factor"], "ls_factor")
    if factor > 1:
        raise UnusableRow("bad_score", f"ls_factor {factor} is more than 1")
    if factor == 1:
        return {}, {}
    return {SCORE: -math.log1p(-factor) / FACTOR_RATE}, {SCORE: 0.0}


def _write_pair(record: Record, writer: Writer) -> dict[str, Any]:
    responses = record.responses
    ranks = [response.rank for response in responses]
    if ranks not in ([1, 2], [1, 1]):
        detail = f"{len(ranks)} with the ranks {ranks}; a row holds a pair, the better one first"
        raise CannotHold("responses", detail=detail)
    chosen, rejected = responses
    row = {"id": record.id, **_write_media(record, writer), "prompt": question_of(record)}
    row |= {"chosen": answer_of(chosen), "rejected": answer_of(rejected)}
    if record.source is not None:
        row["source"] = record.source
    for side, response in (("chosen", chosen), ("rejected", rejected)):
        if response.critique is not None:
            row[f"{side}_reason"] = response.critique
        if response.log_prob is not None:
            row[f"reference_{side}_logp"] = response.log_prob
    if ranks == [1, 1]:
        row["is_tie"] = True
    if chosen.scores or rejected.scores:
        if not chosen.scores.keys() == rejected.scores.keys() == {SCORE}:
            raise CannotHold("scores", detail=f"a row holds one of each response, called {SCORE}")
        better, worse = chosen.scores[SCORE], rejected.scores[SCORE]
        if worse:
            row |= {"score_chosen": better, "score_rejected": worse}
        else:
            row["ls_factor"] = -math.expm1(-FACTOR_RATE * better)
    if record.other_images is not None:
        if len(record.other_images) != 1:
            raise CannotHold("other_images", detail=f"{len(record.other_images)}; a row holds one")
        row["mixed_up_image"] = writer.image(record.other_images[0])
    if not _claims_pair(row):  # or it would be taken for a TRL row, whose media are found otherwise
        row["is_tie"] = False
    return with_extra(row, record.extra, writer)


_SHARED = frozenset({"source", "videos", "extra", "rank", "scores", "critique"})
RANKING = Format("mm_rlhf", _claims_ranking, _read_ranking, _write_ranking, _SHARED)
PAIRS = Format(
    "mm_rlhf_pairs",
    _claims_pair,
    _read_pair,
    _write_pair,
    _SHARED | {"log_prob", "other_images"},
)
