"""How much captions hallucinate and how much they leave out.

CHAIR (Rohrbach et al., "Object Hallucination in Image Captioning", EMNLP 2018) on mentioned
groups, with exact truth in place of synonym lists: a mention is hallucinated when its kind is
absent or its number wrong ("a" is never too few).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def caption_counts(caption: str, scene: Scene) -> dict[str, tuple[int, int]]:
    """What a caption of a scene adds to the metrics of `caption_metrics`: (above, below) of each,
    which are sums of the one over sums of the other."""
    parsed, there = parse(caption), scene.counts()
    wrong = [e for claim in parsed.claims if (e := error_type(claim, scene))]
    mentions = len(parsed.claims)
    found = {claim.kind for claim in parsed.claims} & there.keys()
    words = sum(any(c.isalnum() for c in word) for word in caption.split())
    return {
        "chair_i": (len(wrong), mentions),
        "chair_s": (int(bool(wrong)), 1),
        **{f"error_{name}": (wrong.count(name), mentions) for name in ERROR_TYPES},
        "recall": (len(found), len(there)),
        "mean_length": (words, 1),
        "unparsed": (int(bool(parsed.unparsed)), 1),
    }


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
    return ratios([caption_counts(*pair) for pair in zip(captions, scenes, strict=True)])


def ratios(counts: Sequence[Mapping[str, tuple[int, int]]]) -> dict[str, float]:
    """The metrics of several captions by what each adds; 0 where there is nothing to divide by."""
    sums = {name: map(sum, zip(*(c[name] for c in counts), strict=True)) for name in counts[0]}
    return {name: above / max(below, 1) for name, (above, below) in sums.items()}
