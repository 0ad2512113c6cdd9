"""Rankings out of the pairs of a prompt, where what they say fits together."""

import dataclasses
import graphlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mmpo_jax.core.files import fingerprint_bytes
from mmpo_jax.data.records import SOLUTIONS, ImageRef, Record, Response


@dataclasses.dataclass(frozen=True)
class Joined:
    """What `join_pairs` made."""

    records: list[Record]
    """Records in the order of the data; a ranking stands where the first of its rows stood."""
    rankings: int = 0
    """Number of rankings that were made."""
    rows: int = 0
    """Number of rows that they were made of."""
    contradicting: int = 0
    """Rows that stay since others of their prompt say the reverse, in a circle too."""
    incomparable: int = 0
    """Rows that stay since for two responses of their prompt no row says, directly or through
    others, which is better."""
    differing: int = 0
    """Rankings that lack scores, a critique or a log-prob, as rows give several of it."""

    @property
    def absorbed(self) -> int:
        """Number of rows that went into rankings which stand in other rows' places."""
        return self.rows - self.rankings

    def __str__(self) -> str:
        return (
            f"{self.rows} rows of {self.rankings} prompts joined into rankings "
            f"({self.differing} without scores, critiques or log-probs of which their rows give "
            f"different ones); rows left as they are: {self.contradicting} that contradict others "
            f"of their prompt, {self.incomparable} of prompts with responses that nothing compares"
        )


def join_pairs(records: Iterable[Record]) -> Joined:
    """Joins ranked rows about one prompt into one ranking each.

    Rows belong together that have the same prompt (system included), arguments of the chat
    template, images, videos, other images, source and answer. Equal responses are one. A row's
    ranks say which of two is better and which are tied; better carries over from row to row. Where
    every two responses are then either tied, or one is better and nothing says the reverse, the
    ranks are the places in that order; if not, the rows of that prompt stay as they are: equal
    ranks are a statement, which some objectives learn from, and no word for responses that nothing
    compares. Rows whose responses have images, prompts or marked spans of their own always do, as
    do those with one response.

    Fields of a response are kept where all its rows agree; a score is kept if it does for all
    responses. Other columns are kept where they agree. The ranking has the first row's id, and
    nothing that was left out of a row, as its places are the row's.
    """
    records = list(records)
    groups: dict[Any, list[Record]] = {}
    for place, record in enumerate(records):
        key = _prompt_key(record) if _can_join(record) else place
        groups.setdefault(key, []).append(record)
    joined: dict[str, Record] = {}
    gone: set[str] = set()
    counts = dict.fromkeys(("rankings", "rows", "contradicting", "incomparable", "differing"), 0)
    for group in groups.values():
        if len(group) == 1:
            continue
        ranks = _ranks([_statements(record) for record in group])
        if isinstance(ranks, str):
            counts[ranks] += len(group)
            continue
        made, agreed = _join(group, ranks)
        counts["rankings"] += 1
        counts["rows"] += len(group)
        counts["differing"] += not agreed
        joined[made.id] = made
        gone.update(record.id for record in group[1:])
    kept = [joined.get(record.id, record) for record in records if record.id not in gone]
    return Joined(kept, **counts)


def _can_join(record: Record) -> bool:
    plain = all(
        response.images is None and response.prompt is None and not response.spans
        for response in record.responses
    )
    return record.ranked and plain


def _prompt_key(record: Record) -> Any:
    others = record.other_images
    return (
        record.prompt,
        tuple(map(_image_key, record.images)),
        tuple(
            (tuple(map(_image_key, video.parts)), video.fps, video.seconds)
            for video in record.videos
        ),
        None if others is None else tuple(map(_image_key, others)),
        record.source,
        json.dumps(record.template, sort_keys=True, default=repr),
        repr([record.extra.get(name) for name in SOLUTIONS]),
    )


def _image_key(image: ImageRef) -> Any:
    content = str(image.path) if image.data is None else fingerprint_bytes(image.data)
    return content, image.edit


def _response_key(response: Response) -> Any:
    return response.turns, response.finished, response.desirable


def _statements(record: Record) -> list[tuple[Any, int]]:
    """(response, rank) of a row."""
    return [(_response_key(response), response.rank or 0) for response in record.responses]


def _ranks(rows: Sequence[Sequence[tuple[Any, int]]]) -> dict[Any, int] | str:
    """Response -> rank, from 1, by what all rows say; else why there is no such order."""
    ordered = [sorted(row, key=lambda entry: entry[1]) for row in rows]
    neighbours = [both for row in ordered for both in itertools.pairwise(row)]
    ties = _Ties(response for row in rows for response, _ in row)
    for (one, rank), (other, lower) in neighbours:
        if rank == lower:
            ties.join(one, other)
    order: graphlib.TopologicalSorter[Any] = graphlib.TopologicalSorter()
    for response in ties.above:
        order.add(ties.of(response))
    for (one, rank), (other, lower) in neighbours:
        if rank == lower:
            continue
        if ties.of(one) == ties.of(other):
            return "contradicting"
        order.add(ties.of(other), ties.of(one))
    try:
        order.prepare()
    except graphlib.CycleError:
        return "contradicting"
    levels: dict[Any, int] = {}
    while order.is_active():
        best = order.get_ready()
        if len(best) > 1:  # nothing says which of them is better
            return "incomparable"
        levels[best[0]] = len(levels) + 1
        order.done(*best)
    return {response: levels[ties.of(response)] for response in ties.above}


class _Ties:
    """Classes of responses that are tied, each with one of them as its name (union-find)."""

    def __init__(self, responses: Iterable[Any]):
        self.above = {response: response for response in responses}

    def of(self, response: Any) -> Any:
        """The name of a response's class."""
        while self.above[response] != response:
            self.above[response] = response = self.above[self.above[response]]
        return response

    def join(self, one: Any, other: Any) -> None:
        """Makes one class of two."""
        self.above[self.of(other)] = self.of(one)


def _join(group: Sequence[Record], ranks: Mapping[Any, int]) -> tuple[Record, bool]:
    """The ranking of a group, and whether its rows agree on all that they say of responses."""
    same: dict[Any, list[Response]] = {key: [] for key in ranks}
    for record in group:
        for response in record.responses:
            same[_response_key(response)].append(response)
    names = sorted({name for found in same.values() for r in found for name in r.scores})
    scores = {name: {key: _scores(found, name) for key, found in same.items()} for name in names}
    kept = {n: given for n, given in scores.items() if all(len(v) < 2 for v in given.values())}
    agreed = len(kept) == len(scores)
    responses = []
    for key, found in same.items():
        critiques = {response.critique for response in found} - {None}
        log_probs = {response.log_prob for response in found} - {None}
        agreed &= len(critiques) < 2 and len(log_probs) < 2
        response = dataclasses.replace(
            found[0],
            rank=ranks[key],
            scores={name: next(iter(given[key])) for name, given in kept.items() if given[key]},
            critique=critiques.pop() if len(critiques) == 1 else None,
            log_prob=log_probs.pop() if len(log_probs) == 1 else None,
        )
        responses.append(response)
    first = group[0]
    extra = {
        name: value
        for name, value in first.extra.items()
        if all(repr(record.extra.get(name)) == repr(value) for record in group)
    }
    joined = dataclasses.replace(first, responses=tuple(responses), extra=extra, left_out=())
    return joined, agreed


def _scores(responses: Sequence[Response], name: str) -> set[float]:
    """What rows give a response as its score of a name."""
    return {response.scores[name] for response in responses if name in response.scores}
