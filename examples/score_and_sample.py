"""Log-probs of responses that are there, and samples: `python examples/score_and_sample.py`."""

from __future__ import annotations

import argparse

import mmpo_jax as mm
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:picture_world", help="folder, hub id, run, ...")
    parser.add_argument("--image", help="a file; a drawn scene by default")
    parser.add_argument("--prompt", default="is there a star ?")
    parser.add_argument("--responses", nargs="*", default=["yes .", "no ."])
    options = parser.parse_args(arguments)

    image = options.image or png_bytes(sample_scene("test", 0, 0), 48)
    checkpoint = mm.load(options.model)
    asked = mm.record(options.prompt, images=[image], responses=options.responses)
    for text, log_prob in zip(options.responses, mm.log_probs(checkpoint, [asked])[0], strict=True):
        print(f"{log_prob:9.3f}  {text}")
    (samples,) = mm.generate(checkpoint, [asked], num_samples=3, temperature=0.7, max_new_tokens=32)
    print(*samples, sep="\n")


if __name__ == "__main__":
    main()
