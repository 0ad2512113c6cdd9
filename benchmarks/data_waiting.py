"""How long training waits for data, at the shapes of `dpo_vs_trl.py`.

`mmpo train` on JPEG pictures of 640 x 480 pixels, each decoded and resized once; its last line says
what share of the time no step was running because no batch was ready.

    python benchmarks/data_waiting.py --pairs 32 --batch-size 4
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile

from checkpoint import (
    IMAGE_TOKENS,
    PAIRS_FILE,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    make_checkpoint,
    make_pairs,
)

from mmpo_jax import cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=4)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder)
        make_pairs(folder, options.pairs)
        recipe = {
            "model": folder,
            "output": os.path.join(folder, "run"),
            "data": {"source": "file", "path": os.path.join(folder, PAIRS_FILE)},
            "lengths": {"prompt": [IMAGE_TOKENS + PROMPT_TOKENS], "response": [RESPONSE_TOKENS]},
            "training": {
                "objective": {"type": "dpo"},
                "batch_size": options.batch_size,
                "remat": "dots",
                "log_every": 1,
            },
        }
        file = os.path.join(folder, "recipe.yaml")  # JSON is YAML
        with open(file, "w") as written:
            json.dump(recipe, written)
        cli.main(["train", file])


if __name__ == "__main__":
    main()
