"""Preferences over captions of the picture world, with the scenes themselves as the judge.

A caption's faults are the claims that are not true of the scene, the pieces that nobody can read,
and the kinds of things it leaves out: if only what is said counted, saying less would be better.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence

from mmpo_jax.data.files import write_rows
from mmpo_jax.data.formats import FORMATS
from mmpo_jax.data.formats.writing import Writer
from mmpo_jax.data.records import SCORE, Record, Response, Span, Turn
from mmpo_jax.picture_world.claims import Claim, is_true, parse
from mmpo_jax.picture_world.critiques import critique
from mmpo_jax.picture_world.language import mention, statement
from mmpo_jax.picture_world.world import Kind, Scene

MAX_RESPONSES = 5
"""Responses of a prompt, at most."""

SPAN_WEIGHT = 5.0
"""Weight of the tokens of what is wrong in a response; RLHF-V's gamma."""


@dataclasses.dataclass(frozen=True)
class Judged:
    """A caption and what is wrong with it."""

    caption: str
    false: tuple[Claim, ...]
    unreadable: tuple[str, ...]
    missing: tuple[Kind, ...]
    """Kinds that are there and not mentioned, in whatever number."""

    @property
    def faults(self) -> int:
        return len(self.false) + len(self.unreadable) + len(self.missing)


def judge(caption: str, scene: Scene) -> Judged:
    """What is wrong with a caption of a scene."""
    parsed = parse(caption)
    mentioned = {claim.kind for claim in parsed.claims}
    return Judged(
        caption,
        tuple(claim for claim in parsed.claims if not is_true(claim, scene)),
        parsed.unparsed,
        tuple(kind for kind in scene.counts() if kind not in mentioned),
    )


def preferences(asked: Record, captions: Sequence[str], scene: Scene) -> dict[str, Record]:
    """What can be learned from captions of one scene, by kind of data.

    Args:
      asked: the picture and the prompt; its records get the scene as their answer.
      captions: sampled, in order.
      scene: that they describe.

    Returns:
      Nothing where all captions are equally good. Else, of the first distinct captions:
        rankings: all of them, with ranks (fewer faults are better, equal numbers are a tie),
          scores (minus the faults), critiques, and spans over what is wrong;
        pairs: the same, of the best and the worst;
        verdicts: all of them, without ranks; without a fault is desirable;
        true_pairs: a caption of all that is there, and the worst.
    """
    asked = dataclasses.replace(asked, extra={**asked.extra, "answer": scene.to_dict()})
    distinct = list(dict.fromkeys(captions))[:MAX_RESPONSES]
    judged = [judge(caption, scene) for caption in distinct]
    numbers = sorted({one.faults for one in judged})
    if len(numbers) < 2:
        return {}
    ranked = tuple(_response(one, 1 + numbers.index(one.faults), scene) for one in judged)
    best = min(range(len(judged)), key=lambda i: judged[i].faults)
    worst = max(range(len(judged)), key=lambda i: judged[i].faults)
    verdicts = (
        dataclasses.replace(r, rank=None, desirable=one.faults == 0)
        for r, one in zip(ranked, judged, strict=True)
    )
    groups = [(number, kind) for kind, number in scene.counts().items()]
    true = _response(judge(statement(groups), scene), 1, scene)
    return {
        "rankings": dataclasses.replace(asked, responses=ranked),
        "pairs": dataclasses.replace(asked, responses=(ranked[best], ranked[worst])),
        "verdicts": dataclasses.replace(asked, responses=tuple(verdicts)),
        "true_pairs": dataclasses.replace(asked, responses=(true, ranked[worst])),
    }


def write_preferences(
    folder: str, asked: Iterable[tuple[Record, Sequence[str], Scene]]
) -> Mapping[str, str]:
    """Writes a file for each kind of data, and the pictures beside them.

    Args:
      folder: of the files.
      asked: what `preferences` takes.

    Returns:
      The files by kind of data.
    """
    writer = Writer(root=folder, copies=os.path.join(folder, "images"))
    rows: dict[str, list[dict[str, object]]] = {}
    for record, captions, scene in asked:
        for kind, found in preferences(record, captions, scene).items():
            rows.setdefault(kind, []).append(FORMATS["record"].write(found, writer))
    files = {kind: os.path.join(folder, f"{kind}.jsonl") for kind in rows}
    for kind, file in files.items():
        write_rows(file, rows[kind])
    return files


def _response(judged: Judged, rank: int, scene: Scene) -> Response:
    return Response(
        (Turn("assistant", judged.caption),),
        rank=rank,
        scores={SCORE: float(-judged.faults)},
        critique=critique(judged.caption, scene, judged.missing, judged.faults),
        spans=_spans(judged),
    )


def _spans(judged: Judged) -> tuple[Span, ...]:
    """The places of false claims and unreadable pieces, as far as they stand there as they are
    read; the number of a phrase is its place among them."""
    pieces = [mention(claim.number, claim.kind) for claim in judged.false]
    places = []
    for piece in (*pieces, *judged.unreadable):
        match = re.search(rf"(?<!\S){re.escape(piece)}(?!\S)", judged.caption)
        if match:
            places.append(match.span())
    return tuple(
        Span(start, end, SPAN_WEIGHT, phrase)
        for phrase, (start, end) in enumerate(sorted(set(places)))
    )
