"""An objective of one's own in a training loop of one's own: `python examples/own_objective.py`.

The picture world's captions are preferred to ones that invent a thing.
"""

from __future__ import annotations

import argparse

import jax
import optax

import mmpo_jax as mm
from mmpo_jax.picture_world.language import CAPTION_PROMPTS, supervised_caption
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import generator, sample_scene


@mm.pairwise("reference")
def hinge_dpo(chosen: mm.Side, rejected: mm.Side, *, beta: float = 0.1) -> jax.Array:
    """hinge_dpo: max(0, 1 - beta * (log-ratio of chosen - log-ratio of rejected))

    SLiC-HF's hinge (arXiv 2305.10425) on DPO's implicit rewards.
    """
    return jax.nn.relu(1 - beta * (chosen.ratio - rejected.ratio))


def caption_pair(index: int) -> mm.Record:
    """A scene with a true caption, and with one that invents a thing."""
    scene = sample_scene("train", 0, index)
    true, invented = (
        supervised_caption(scene, generator("train", 0, index, 1), rate) for rate in (0.0, 1.0)
    )
    return mm.record(CAPTION_PROMPTS[0], images=[png_bytes(scene, 48)], responses=[true, invented])


def main(arguments: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", help="Hugging Face folder for the result")
    options = parser.parse_args(arguments)

    start = mm.load("builtin:picture_world")
    records = [caption_pair(index) for index in range(options.pairs)]
    terms = [mm.make_term("hinge_dpo", beta=0.5)]
    state, step = mm.start_training(start, terms, optax.adamw(1e-4))
    losses = []
    for batch in mm.training_batches(start, records, terms, batch_size=options.batch_size):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
        print(f"loss {losses[-1]:.4f}  margin {float(metrics['rewards/margins']):.4f}")
    if options.output:
        mm.save(options.output, start, state)
    return losses


if __name__ == "__main__":
    main()
