"""Sampling from a LLaVA-shaped model: transformers' `generate` and mmpo_jax, side by side.

Both draw the same number of responses of the same length to the same pictures and prompts, at
temperature 1 from the whole vocabulary; nothing ends a response early. Each runs in a process of
its own.

    python benchmarks/generate_vs_transformers.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time

from checkpoint import IMAGE_TOKENS, PAIRS_FILE, PROMPT_TOKENS, make_checkpoint, make_pairs


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both sides are run with."""

    images: int = 4
    samples: int = 10
    """Responses to each image."""
    new_tokens: int = 100
    repeats: int = 3
    """Timed runs after one that is not timed."""
    seed: int = 0


def run_transformers(folder: str, settings: Settings) -> dict:
    """`generate` on one batch of all images."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(settings.seed)
    processor = transformers.AutoProcessor.from_pretrained(folder)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype="float32", attn_implementation="sdpa"
    ).eval()
    rows = datasets.load_dataset(
        "parquet", data_files=os.path.join(folder, PAIRS_FILE), split="train", cache_dir=folder
    )
    messages = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for question in (row["prompt"][0]["content"] for row in rows)
    ]
    inputs = processor(
        images=[row["images"] for row in rows],
        text=processor.apply_chat_template(messages, add_generation_prompt=True),
        add_special_tokens=False,
        return_tensors="pt",
    )
    model.generation_config.eos_token_id = None  # nothing ends a response early

    def generate() -> torch.Tensor:
        with torch.inference_mode():
            return model.generate(
                **inputs,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                num_return_sequences=settings.samples,
                max_new_tokens=settings.new_tokens,
            )

    seconds, cpu_seconds, warm_up, tokens = _timed(generate, settings.repeats)
    prompt = inputs["input_ids"].shape[1]
    return {
        "prompt_ids": inputs["input_ids"].tolist(),
        "tokens": tokens.shape[0] * (tokens.shape[1] - prompt),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "warm_up_seconds": warm_up,
    }


def run_ours(folder: str, settings: Settings) -> dict:
    """`sample` on one batch of all images."""
    import jax

    from mmpo_jax.checkpoints.configs import load_config
    from mmpo_jax.checkpoints.huggingface import load_params
    from mmpo_jax.data.batching import pad_batch
    from mmpo_jax.data.processor import Processor
    from mmpo_jax.data.readers import read_records
    from mmpo_jax.data.tokenization import tokenize
    from mmpo_jax.generation.sampler import sample, sample_keys
    from mmpo_jax.models.model import Model
    from mmpo_jax.recipes.sampling import Decoding

    model = Model.create(load_config(folder))
    params = jax.device_put(load_params(folder, model))
    processor = Processor(folder, model.config)
    length = IMAGE_TOKENS + PROMPT_TOKENS
    records, _ = read_records(os.path.join(folder, PAIRS_FILE))
    records = [dataclasses.replace(record, responses=()) for record in records]
    batch = pad_batch(
        [tokenize(record, processor, length, 1) for record in records],
        processor,
        rows=len(records),
        prompt_sizes=(length,),
        response_sizes=(1,),
    )
    batch = jax.device_put(batch)
    decoding = Decoding(
        num_samples=settings.samples, temperature=1.0, max_new_tokens=settings.new_tokens
    )
    keys = sample_keys(settings.seed, 0, range(len(records)), settings.samples)

    def generate() -> jax.Array:
        tokens = sample(
            model, params, batch, keys, decoding=decoding, eos_ids=(), pad_id=processor.pad_id
        )
        return jax.block_until_ready(tokens)

    seconds, cpu_seconds, warm_up, tokens = _timed(generate, settings.repeats)
    return {
        "prompt_ids": batch.prompt_ids.tolist(),
        "tokens": tokens.size,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "warm_up_seconds": warm_up,
    }


def _timed(run, repeats: int) -> tuple:
    """(best seconds, its processor seconds, seconds of the first run, its result)."""
    runs = []
    for _ in range(1 + repeats):
        started, cpu = time.perf_counter(), time.process_time()
        result = run()
        runs.append((time.perf_counter() - started, time.process_time() - cpu))
    return (*min(runs[1:]), runs[0][0], result)


def show(result: dict) -> None:
    lines = [
        ("tokens/s", "tokens_per_second", "{:.0f}", result["speed_ratio"]),
        ("tokens per processor second", "tokens_per_cpu_second", "{:.0f}", result["cpu_ratio"]),
        ("seconds, images to last token", "seconds", "{:.2f}", None),
        ("first run (compilation), seconds", "warm_up_seconds", "{:.1f}", None),
    ]
    theirs, ours = result["transformers"], result["ours"]
    print(f"\n{'':36}{'transformers':>13}{'mmpo_jax':>10}{'ratio':>8}")
    for title, key, form, ratio in lines:
        shown = "" if ratio is None else f"{ratio:.2f}"
        print(f"{title:36}{form.format(theirs[key]):>13}{form.format(ours[key]):>10}{shown:>8}")
    print(f"prompts' token ids are {'equal' if result['same_ids'] else 'NOT EQUAL'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", choices=("transformers", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    if arguments.worker:
        run = run_ours if arguments.worker == "ours" else run_transformers
        with contextlib.redirect_stdout(sys.stderr):
            result = run(arguments.folder, settings)
        with open(os.path.join(arguments.folder, f"{arguments.worker}.json"), "w") as file:
            json.dump(result, file)
        return
    sides = {}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, settings.seed)
        make_pairs(folder, settings.images, settings.seed)
        for side in ("transformers", "ours"):
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", side]
            subprocess.run([*command, "--folder", folder], check=True)
            with open(os.path.join(folder, f"{side}.json")) as file:
                sides[side] = json.load(file)
    same_ids = sides["ours"].pop("prompt_ids") == sides["transformers"].pop("prompt_ids")
    expected = settings.images * settings.samples * settings.new_tokens
    for side in sides.values():
        side["tokens_per_second"] = side["tokens"] / side["seconds"]
        side["tokens_per_cpu_second"] = side["tokens"] / side["cpu_seconds"]
    ratios = {
        name: sides["ours"][key] / sides["transformers"][key]
        for name, key in (
            ("speed_ratio", "tokens_per_second"),
            ("cpu_ratio", "tokens_per_cpu_second"),
        )
    }
    result = {"settings": dataclasses.asdict(settings), **sides, **ratios, "same_ids": same_ids}
    show(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=2)
    if not same_ids or any(side["tokens"] != expected for side in sides.values()):
        sys.exit("the two sides did not do the same")


if __name__ == "__main__":
    main()
