"""Yes/no questions about scenes in the three settings and the file layout of POPE.

Li et al. 2023 (arXiv 2305.10355), section 4: as many objects that are not there as objects that
are, drawn from all (random), the most frequent ones (popular), or those that appear most often
together with what is there (adversarial). An object is a kind of thing here.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal, get_args

import numpy as np

from mmpo_jax.core.files import write_atomic
from mmpo_jax.picture_world.language import ANSWERS, existence_question
from mmpo_jax.picture_world.records import scene_id, scenes
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import KINDS, Kind, Scene, generator

Setting = Literal["random", "popular", "adversarial"]
MAX_OBJECTS = 3
"""Objects of a scene that are asked about, and as many that are not there; POPE's number."""

_STREAM = 4  # of random numbers, apart from the scene's and those of its records


def write_questions(
    folder: str, *, size: int, split: str = "test", seed: int = 0, image_size: int = 48
) -> list[str]:
    """Writes `images/` and a file of questions for every setting.

    Args:
      folder: of the files.
      size: how many scenes.
      split, seed: which ones.
      image_size: their edge in pixels.

    Returns:
      The files `picture_world_pope_SETTING.json`, JSON lines with `question_id`, `image`, `text`
      and `label`.
    """
    shown = scenes(split, seed, size)
    names = [f"{scene_id(split, seed, index)}.png" for index in range(size)]
    for name, scene in zip(names, shown, strict=True):
        write_atomic(os.path.join(folder, "images", name), png_bytes(scene, image_size))
    files = []
    for setting in get_args(Setting):
        rows: list[dict[str, Any]] = []
        for name, asked in zip(names, questions(shown, setting, split, seed), strict=True):
            for kind, answer in asked:
                text, label = existence_question(kind), ANSWERS[answer]
                row = {"question_id": len(rows) + 1, "image": name, "text": text, "label": label}
                rows.append(row)
        files.append(os.path.join(folder, f"picture_world_pope_{setting}.json"))
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        write_atomic(files[-1], lines.encode())
    return files


def questions(
    shown: Sequence[Scene], setting: Setting, split: str, seed: int
) -> list[list[tuple[Kind, bool]]]:
    """(kind, whether it is there) of every question about every scene, yes and no in turns."""
    present = [list(scene.counts()) for scene in shown]
    often = Counter(kind for kinds in present for kind in kinds)
    together: Counter[tuple[Kind, Kind]] = Counter(
        (one, other) for kinds in present for one in kinds for other in kinds if one != other
    )
    found = []
    for index, kinds in enumerate(present):
        rng = generator(split, seed, index, _STREAM)
        there = _drawn(kinds, rng)[:MAX_OBJECTS]
        absent = _drawn([kind for kind in KINDS if kind not in kinds], rng)
        if setting == "popular":
            absent.sort(key=often.__getitem__, reverse=True)
        elif setting == "adversarial":
            beside = {kind: sum(together[kind, one] for one in kinds) for kind in absent}
            absent.sort(key=beside.__getitem__, reverse=True)
        pairs = zip(there, absent, strict=False)
        found.append([asked for yes, no in pairs for asked in ((yes, True), (no, False))])
    return found


def _drawn(kinds: Sequence[Kind], rng: np.random.Generator) -> list[Kind]:
    return [kinds[place] for place in rng.permutation(len(kinds))]
