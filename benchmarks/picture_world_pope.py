"""POPE's questions about the picture world, for configs/picture_world_pope.yaml.

    python benchmarks/picture_world_pope.py --output runs/picture_world_pope_data

writes images/ and picture_world_pope_{random,popular,adversarial}.json in the layout of POPE's own
files. No model and no device is needed.
"""

from __future__ import annotations

import argparse

from mmpo_jax.picture_world.pope import write_questions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", default="runs/picture_world_pope_data")
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0, help="of the scenes")
    options = parser.parse_args()
    for file in write_questions(options.output, size=options.scenes, seed=options.seed):
        print(file)


if __name__ == "__main__":
    main()
