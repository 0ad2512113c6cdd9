"""The best of N samples by a model's own DPO reward: `python examples/best_of_n.py`.

The reward of a response is how much more probable training has made it, per token: beta times the
log-ratio of the trained model and the one it started from (RLAIF-V, arXiv 2405.17220). With files:
`mmpo select`.
"""

from __future__ import annotations

import argparse

import mmpo_jax as mm
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene


def main(arguments: list[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model", default="builtin:picture_world", help="trained; any name of a model"
    )
    parser.add_argument("--reference", default="builtin:picture_world", help="what it started from")
    parser.add_argument("--prompt", default="describe the picture .")
    parser.add_argument("--samples", type=int, default=8)
    options = parser.parse_args(arguments)

    image = png_bytes(sample_scene("test", 0, 1), 48)
    policy, reference = mm.load(options.model), mm.load(options.reference)
    asked = mm.record(options.prompt, images=[image])
    (texts,) = mm.generate(policy, [asked], num_samples=options.samples, max_new_tokens=32)
    answered = mm.record(options.prompt, images=[image], responses=sorted(set(texts)))
    (rewards,) = mm.implicit_rewards(policy, reference, [answered])
    said = [response.text for response in answered.responses]
    ranked = sorted(zip(rewards, said, strict=True), key=lambda pair: -pair[0])
    for reward, text in ranked:
        print(f"{reward:+.4f}  {text}")
    return ranked[0][1]


if __name__ == "__main__":
    main()
