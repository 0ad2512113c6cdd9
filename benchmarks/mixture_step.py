"""A DPO step of a mixture of experts and of a dense model of the same active size, on CPU.

Both are random Qwen3s of equal shape but for their MLPs: 4 of 16 experts of width 384, or one MLP
of 4 times that. A step is the loss and its gradient by all weights; what an optimizer does with
these, of which the mixture has four times as many, is not in it. Steps of both alternate.

    python benchmarks/mixture_step.py
    python benchmarks/mixture_step.py --experts 32 --active 8 --width 192
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import transformers
from published import decoder

from mmpo_jax.core.trees import flatten
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.flops import model_flops
from mmpo_jax.models.model import Model, read_config
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.training.losses import make_loss

GOAL = 1.3
"""Seconds of the mixture / seconds of the dense model, at most."""
VOCABULARY = 4096


def make_models(options: argparse.Namespace) -> dict[str, Model]:
    def shape(wide: int, **more: Any) -> dict[str, Any]:
        sizes = options.hidden, wide, options.layers, 8, 4, VOCABULARY, 1e6
        return decoder(*sizes, head_dim=options.hidden // 8, **more)

    dense = transformers.Qwen3Config(**shape(options.width * options.active))
    mixture = transformers.Qwen3MoeConfig(
        **shape(options.width),
        num_experts=options.experts,
        num_experts_per_tok=options.active,
        moe_intermediate_size=options.width,
        norm_topk_prob=True,
    )
    return {
        "dense": Model.create(read_config(dense)),
        "mixture": Model.create(read_config(mixture)),
    }


def make_batch(options: argparse.Namespace) -> TrainBatch:
    """Pairs of random tokens without padding."""
    rng = np.random.default_rng(0)
    b, p, t = options.pairs, options.prompt, options.response
    real = np.ones((b, 2, t), bool)
    prompts = Batch(
        prompt_ids=rng.integers(VOCABULARY, size=(b, p), dtype=np.int32),
        prompt_mask=np.ones((b, p), bool),
        positions=np.broadcast_to(np.arange(p, dtype=np.int32), (b, 1, p)),
        next_position=np.full(b, p, np.int32),
        pixel_values=np.zeros((b, 0), np.float32),
        patches={},
        feature_index=np.full((b, p, 1), -1, np.int32),
        feature_weight=np.zeros((b, p, 1), np.float32),
        response_ids=rng.integers(VOCABULARY, size=(b, 2, t), dtype=np.int32),
        response_mask=real,
        loss_mask=real,
        weights=np.ones(b, np.float32),
    )
    rank = np.tile(np.arange(2, dtype=np.float32), (b, 1))
    return TrainBatch(prompts, {"sums": np.zeros((b, 2), np.float32)}, {"rank": rank})


def stepping(model: Model, batch: TrainBatch) -> Callable[[], Any]:
    """A step, compiled."""
    loss = make_loss(model, [make_term("dpo", beta=0.1)])

    def value(params: Any, batch: TrainBatch) -> jax.Array:
        sums, _ = loss.sums(loss.forward(params, None, batch), batch, {})
        return loss.value(sums)

    params = jax.tree.map(jax.numpy.asarray, model.init(0))
    run = jax.jit(jax.value_and_grad(value))
    return lambda: jax.block_until_ready(run(params, batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--active", type=int, default=4, help="experts of a token")
    parser.add_argument("--width", type=int, default=384, help="of an expert")
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--json", help="also write the figures here")
    options = parser.parse_args()
    models, batch = make_models(options), make_batch(options)
    for name, model in models.items():
        shapes = flatten(model.abstract_params())
        weights = sum(int(np.prod(leaf.shape)) for leaf in shapes.values())
        token = model_flops(model, shapes).token
        print(f"{name:8s} {weights / 1e6:8.1f} M weights, {token / 1e6:8.1f} MFLOP a token")
    steps = {name: stepping(model, batch) for name, model in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.steps + 1):  # the first one compiles
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if number:
                seconds[name].append(time.perf_counter() - started)
    ratios = [m / d for m, d in zip(seconds["mixture"], seconds["dense"], strict=True)]
    for name, taken in seconds.items():
        median = statistics.median(taken)
        print(f"{name:8s} {min(taken):7.3f} s at best, {median:7.3f} s in the median")
    best = min(seconds["mixture"]) / min(seconds["dense"])
    print(f"mixture / dense: {best:.2f} of the best, {statistics.median(ratios):.2f} in the median")
    print(f"goal: at most {GOAL}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"seconds": seconds, "ratio": best}, file, indent=1)


if __name__ == "__main__":
    main()
