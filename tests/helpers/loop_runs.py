"""Small training runs, and how they are interrupted and compared."""

import contextlib
import dataclasses
import itertools

import numpy as np
import pytest
from helpers import tiny

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.optimizers import AdamW
from mmpo_jax.recipes.training import Training
from mmpo_jax.scoring.log_probs import score_records
from mmpo_jax.training import loop

LENGTHS = Lengths(prompt=(16, 24), response=(8,))


ROWS, STEPS = 10, 8


CONFIG = Training(
    objective={"type": "dpo"},
    optimizer=AdamW(learning_rate=1e-2, weight_decay=0.01),
    epochs=5,
    max_steps=STEPS,
    batch_size=4,
    micro_batch_size=2,
    log_every=1,
    save_every=2,
    keep_checkpoints=3,
)


IDENTITY = {
    "model": "a" * 64,
    "rows": "b" * 64,
    "training": {"objective": [{"type": "dpo", "beta": 0.1}]},
}


class Killed(BaseException):
    """What nothing expects."""


def make_record(number: int) -> Record:
    long = "is there a red star in the picture and a ring ?"
    return Record(
        id=f"row-{number}",
        images=(ImageRef(f"{number}", png_bytes(sample_scene("train", 0, number), 24)),),
        prompt=(Turn("user", long if number % 3 == 0 else "a ring ?"),),
        responses=(Response.of("a red star" if number % 2 else "yes"), Response.of("two rings")),
    )


def make_start(model, processor) -> Checkpoint:
    """What a run starts from; its tree is its own, as training takes parameters out of it."""
    return Checkpoint(model[0], processor, unflatten(flatten(model[1])))


def with_reference(model, processor, records, lengths, mesh, batch_size):
    """Examples of records whose reference is the model itself, a `(model, parameters)`."""
    tokenized, skipped = tokenize_records(records, processor, lengths)
    assert not skipped
    start = Checkpoint(model[0], processor, model[1])
    sums = score_records(start, tokenized, lengths, mesh, batch_size)
    return [tiny.example(record, row) for record, row in zip(tokenized, sums, strict=True)]


@contextlib.contextmanager
def compiled_once(steps, key):
    """Takes the train step from `steps` where it has one of this key."""
    make_step = loop.make_step

    def make_once(*args):
        if key not in steps:
            steps[key] = make_step(*args)
        return steps[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", make_once)
        yield


@contextlib.contextmanager
def interrupted(before_step):
    """Makes runs stop, as suddenly as nothing expects, when they take the batch of a step."""
    put_batch = loop.put_batch
    taken = itertools.count(1)

    def fragile(*args, **options):
        if next(taken) == before_step:
            raise Killed
        return put_batch(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "put_batch", fragile)
        yield


def files(folder):
    """Path -> contents."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert ours[path].tobytes() == theirs[path].tobytes(), path


def poison(examples, row):
    """The same pairs, one with a reference that is no number."""
    return [
        dataclasses.replace(e, reference={"sums": np.float32([[np.nan, 0]])}) if e.id == row else e
        for e in examples
    ]
