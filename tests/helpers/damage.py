"""Ways in which a checkpoint's folder can be damaged, each by name."""

import dataclasses
import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp

ZSTD = bytes.fromhex("28b52ffd")
"""What a frame of zstd begins with."""


@dataclasses.dataclass(frozen=True)
class Damage:
    """A way to damage the folder of a step."""

    do: Callable[[Path], object]
    is_whole: bool = False
    """Whether all that training reads is still what was saved."""
    is_begun: bool = False
    """Whether the folder looks like one that is being written."""


def largest(folder: Path) -> Path:
    """The largest file below a folder."""
    return max(
        (file for file in folder.rglob("*") if file.is_file()), key=lambda f: f.stat().st_size
    )


def flip(file: Path, bit: int) -> None:
    """Flips one bit of a file."""
    data = bytearray(file.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)


def flip_in_array(folder: Path) -> None:
    """Flips a bit in the middle of the largest array below a folder, which zstd has compressed."""
    file = largest(folder)
    data = file.read_bytes()
    frames = [match.start() for match in re.finditer(re.escape(ZSTD), data)]
    sizes = {start: end - start for start, end in itertools.pairwise([*frames, len(data)])}
    start = max(sizes, key=sizes.__getitem__)
    flip(file, 8 * (start + sizes[start] // 2))


def truncate(file: Path) -> None:
    """Halves a file."""
    os.truncate(file, file.stat().st_size // 2)


def garble(file: Path) -> None:
    """Random bytes in place of a file's."""
    file.write_bytes(random.Random(0).randbytes(file.stat().st_size))


def one_file(step: Path) -> None:
    """A file in place of the folder."""
    shutil.rmtree(step)
    step.write_bytes(b"")


def nothing(step: Path) -> None:
    """An empty folder."""
    shutil.rmtree(step)
    step.mkdir()


def turned(step: Path) -> None:
    """Parameters of other shapes, which Orbax wrote."""
    params = step / "params"
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(params).item_metadata.tree
        arrays = {name: np.zeros(leaf.shape[::-1], leaf.dtype) for name, leaf in saved.items()}
        shutil.rmtree(params)
        checkpointer.save(params, arrays)


def other_position(step: Path) -> None:
    """A data position that is off by one."""
    file = step / "run" / "metadata"
    run = json.loads(file.read_text())
    run["position"]["next_index"] += 1
    file.write_text(json.dumps(run))


DAMAGES = {
    "largest file of the optimizer's state cut in half": Damage(
        lambda step: truncate(largest(step / "optimizer"))
    ),
    "largest file of the parameters removed": Damage(lambda s: largest(s / "params").unlink()),
    "largest file of the parameters emptied": Damage(
        lambda s: os.truncate(largest(s / "params"), 0)
    ),
    "one bit flipped in the parameters": Damage(lambda step: flip_in_array(step / "params")),
    "one bit flipped in the optimizer's state": Damage(
        lambda step: flip_in_array(step / "optimizer")
    ),
    "metadata of the parameters removed": Damage(
        lambda step: (step / "params" / "_METADATA").unlink(), is_whole=True
    ),
    "metadata of the optimizer's state garbled": Damage(
        lambda step: garble(step / "optimizer" / "_METADATA")
    ),
    "data position changed": Damage(other_position),
    "the item `run` garbled": Damage(lambda step: garble(step / "run" / "metadata")),
    "folder of the optimizer's state removed": Damage(lambda s: shutil.rmtree(s / "optimizer")),
    "parameters of other shapes": Damage(turned),
    "an empty folder": Damage(nothing),
    "a file in place of the folder": Damage(one_file),
    "still under its temporary name": Damage(
        lambda step: step.rename(step.with_name(f"{step.name}.orbax-checkpoint-tmp")), is_begun=True
    ),
    "marker of its end removed": Damage(
        lambda step: (step / "commit_success.txt").unlink(), is_whole=True
    ),
    "metadata of the step garbled": Damage(
        lambda step: garble(step / "_CHECKPOINT_METADATA"), is_whole=True
    ),
}
