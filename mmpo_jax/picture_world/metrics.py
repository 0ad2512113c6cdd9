"""How much captions hallucinate and how much they leave out.

CHAIR (Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018) on mentioned
groups, with exact truth in place of synonym lists: a mention is hallucinated when its kind is
absent or its number wrong ("a" is never too few).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mmpo_jax.picture_world.claims import Claim, is_true, parse
from mmpo_jax.picture_world.world import Scene

ERROR_TYPES = ("object", "colour", "count")


def error_type(claim: Claim, scene: Scene) -> str | None:
    """How a claim is wrong, or None when it is true.

    "count": the kind is there, in another number. "colour": the shape is there, but never in this
    colour. "object": not even the shape is there.
    """
    if is_true(claim, scene):
        return None
    if claim.kind in scene.counts():
        return "count"
    return "colour" if claim.shape in {thing.shape for thing in scene.things} else "object"


def caption_metrics(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Metrics of captions against the scenes they describe, pairwise.

    Args:
      captions: any text, read by `claims.parse`.
      scenes: as many.

    Returns:
      chair_i: hallucinated mentions / all mentions (0 when nothing is mentioned).
      chair_s: share of captions with a hallucinated mention.
      error_object, error_colour, error_count: hallucinated mentions of each type / all mentions;
        they add up to chair_i.
      recall: kinds present and mentioned, whatever the number / all kinds present.
      mean_length: words in a caption, without punctuation.
      unparsed: share of captions with a piece that could not be read.

    Raises:
      ValueError: no captions, or another number of scenes.
    """
    if len(captions) != len(scenes):
        raise ValueError(f"{len(captions)} captions but {len(scenes)} scenes")
    if not captions:
        raise ValueError("no captions to measure")
    errors: Counter[str] = Counter()
    mentions = hallucinated_captions = found = present = words = unparsed = 0
    for caption, scene in zip(captions, scenes, strict=True):
        parsed = parse(caption)
        wrong = [e for claim in parsed.claims if (e := error_type(claim, scene))]
        errors.update(wrong)
        mentions += len(parsed.claims)
        hallucinated_captions += bool(wrong)
        found += len({claim.kind for claim in parsed.claims} & scene.counts().keys())
        present += len(scene.counts())
        words += sum(any(c.isalnum() for c in word) for word in caption.split())
        unparsed += bool(parsed.unparsed)
    return {
        "chair_i": errors.total() / max(mentions, 1),
        "chair_s": hallucinated_captions / len(captions),
        **{f"error_{name}": errors[name] / max(mentions, 1) for name in ERROR_TYPES},
        "recall": found / present,
        "mean_length": words / len(captions),
        "unparsed": unparsed / len(captions),
    }
