"""Sampling from a LLaVA-shaped model: transformers' `generate` and mmpo_jax, side by side.

Both draw responses of given lengths to the same pictures and prompts, at temperature 1 from the
whole vocabulary: once all of one length, once of lengths as real answers have them (log-normal, cut
at a limit). A random model knows no end, so the benchmark says when a response ends: before its
length no EOS can be drawn, and there nothing else. transformers is told by a logits processor;
ours by a function in place of `choose_token`, which finds the length in the sample's own key. Our
side is run as it is, and with places that are not refilled: every sample of a batch has one, and
the next batch begins when all have ended.

Each side is a process of its own, and both take turns; rates are medians over the turns.
transformers gets several batch sizes, of which the best counts, and its pictures are ready before
the time is taken; ours reads them while it samples.

    python benchmarks/generate_vs_transformers.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from checkpoint import IMAGE_TOKENS, PAIRS_FILE, PROMPT_TOKENS, make_checkpoint, make_pairs

KINDS = ("equal", "drawn")
"""Lengths: all the same, or as real ones."""
SPREAD = 0.8
"""Standard deviation of the logarithm of lengths."""
QUANTILES = 4096


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both sides are run with."""

    images: int = 48
    their_images: int = 8
    """The first of them, which transformers gets."""
    batch_size: int = 16
    """Prompts at a time, of ours."""
    samples: int = 10
    """Responses to each image."""
    mean: int = 100
    """Tokens of a response, EOS included."""
    limit: int = 512
    repeats: int = 3
    """Timed turns after one that is not timed."""
    seed: int = 0

    def tokens(self, kind: str) -> int:
        """The most that a response has."""
        return self.limit if kind == "drawn" else self.mean


def length_table(settings: Settings) -> np.ndarray:
    """int32[QUANTILES]: lengths, any of which is as likely as another."""
    normal = statistics.NormalDist()
    at = (np.arange(QUANTILES) + 0.5) / QUANTILES
    shape = np.exp(SPREAD * np.array([normal.inv_cdf(x) for x in at]))
    low, high = 0.0, float(settings.limit)
    for _ in range(60):  # the factor for which the mean is as asked
        middle = (low + high) / 2
        lengths = np.clip(np.ceil(middle * shape), 1, settings.limit)
        low, high = (middle, high) if lengths.mean() < settings.mean else (low, middle)
    return lengths.astype(np.int32)


class Theirs:
    """`generate` on batches of images."""

    sizes = (1, 2, 4, 8)

    def __init__(self, folder: str, settings: Settings):
        import datasets
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        torch.manual_seed(settings.seed)
        self.settings, self.torch = settings, torch
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype="float32", attn_implementation="sdpa"
        ).eval()
        processor = transformers.AutoProcessor.from_pretrained(folder)
        self.eos = processor.tokenizer.eos_token_id
        rows = datasets.load_dataset(
            "parquet", data_files=os.path.join(folder, PAIRS_FILE), split="train", cache_dir=folder
        ).select(range(settings.their_images))
        messages = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
            for question in (row["prompt"][0]["content"] for row in rows)
        ]
        self.inputs = processor(
            images=[row["images"] for row in rows],
            text=processor.apply_chat_template(messages, add_generation_prompt=True),
            add_special_tokens=False,
            return_tensors="pt",
        )

    def prompt_ids(self) -> list[list[int]]:
        return self.inputs["input_ids"].tolist()

    def run(self, kind: str, size: int, lengths: list[list[int]]) -> dict[str, float]:
        """Samples of the given lengths to all images, `size` of them at a time."""
        import transformers

        class Ends(transformers.LogitsProcessor):
            def __init__(self, lengths: Any, prompt: int, eos: int):
                self.last, self.eos = prompt + lengths - 1, eos

            def __call__(self, ids: Any, scores: Any) -> Any:
                ends = ids.shape[1] >= self.last
                own = scores[:, self.eos].clone()
                scores = scores.masked_fill(ends[:, None], -float("inf"))
                scores[:, self.eos] = own.masked_fill(~ends, -float("inf"))
                return scores

        prompt, tokens = self.inputs["input_ids"].shape[1], 0
        lengths = lengths[: self.settings.their_images]
        for start in range(0, self.settings.their_images, size):
            batch = {name: x[start : start + size] for name, x in self.inputs.items()}
            own = self.torch.tensor(lengths[start : start + size]).reshape(-1)
            with self.torch.inference_mode():
                out = self.model.generate(
                    **batch,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    num_return_sequences=self.settings.samples,
                    max_new_tokens=self.settings.tokens(kind),
                    eos_token_id=self.eos,
                    pad_token_id=self.eos,
                    logits_processor=[Ends(own, prompt, self.eos)],
                )
            said = out[:, prompt:] == self.eos
            if not said[self.torch.arange(len(own)), own - 1].all():
                raise RuntimeError("responses do not end where they should")
            tokens += int(own.sum())
        return {"tokens": tokens}


class Ours:
    """`sample_tokens` on all images."""

    sizes = (0, 1)
    """Places that are refilled, and such as are not."""

    def __init__(self, folder: str, settings: Settings):
        import jax
        import jax.numpy as jnp

        from mmpo_jax.checkpoints.checkpoint import load_checkpoint
        from mmpo_jax.data.readers import read_records
        from mmpo_jax.data.tokenization import tokenize
        from mmpo_jax.generation import decoding, responses
        from mmpo_jax.generation.refill import Layout
        from mmpo_jax.parallel.mesh import make_mesh

        self.settings, self.mesh = settings, make_mesh()
        self.checkpoint = load_checkpoint(folder, self.mesh)
        processor, length = self.checkpoint.processor, IMAGE_TOKENS + PROMPT_TOKENS
        records, _ = read_records(os.path.join(folder, PAIRS_FILE))
        records = [dataclasses.replace(record, responses=()) for record in records]
        self.records = [tokenize(record, processor, length, 1) for record in records]
        table, eos = jnp.asarray(length_table(settings)), processor.eos_ids[0]
        draw = decoding.choose_token

        def choose_token(logits, keys, position, options):
            token = draw(logits, keys, position, options)
            last = jnp.full(position.shape, settings.mean)
            if options.max_new_tokens == settings.limit:
                place = jax.vmap(jax.vmap(lambda key: jax.random.randint(key, (), 0, QUANTILES)))
                last = table[place(keys)]
            return jnp.where(position + 1 == last, eos, jnp.where(token == eos, eos + 1, token))

        decoding.choose_token = choose_token
        self.layouts = {
            0: responses.choose_layout,
            1: lambda prompts, tokens, options, batch_size, shards: Layout(
                batch_size, 1, 2, options.num_samples // 2, batch_size
            ),
        }

    def prompt_ids(self) -> list[list[int]]:
        return [record.prompt_ids.tolist() for record in self.records[: self.settings.their_images]]

    def run(self, kind: str, size: int, lengths: list[list[int]]) -> dict[str, Any]:
        """Samples to all images; says which lengths they have."""
        from mmpo_jax.data.batching import fitting_lengths
        from mmpo_jax.generation import responses
        from mmpo_jax.recipes.sampling import Decoding

        responses.choose_layout = self.layouts[size]
        count = responses.SampleCount()
        options = Decoding(
            num_samples=self.settings.samples, max_new_tokens=self.settings.tokens(kind)
        )
        found = responses.sample_tokens(
            self.checkpoint,
            self.records,
            options,
            fitting_lengths(self.records),
            self.mesh,
            batch_size=self.settings.batch_size,
            seed=self.settings.seed,
            count=count,
        )
        read = responses.read_length
        lengths = [[read(self.checkpoint.processor, row)[0] for row in rows] for rows in found]
        return {
            "tokens": sum(map(sum, lengths)),
            "lengths": lengths,
            "useful": count.samples.useful_share,
        }


SIDES: dict[str, type] = {"theirs": Theirs, "ours": Ours}


def work(side: str, folder: str, settings: Settings) -> None:
    """Answers what the main process asks, a line of JSON for a line of JSON."""
    answers = sys.stdout
    sys.stdout = sys.stderr
    worker = SIDES[side](folder, settings)
    print(json.dumps(worker.prompt_ids()), file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        result = worker.run(**json.loads(line))
        result |= {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(result), file=answers, flush=True)


def start(side: str, folder: str, arguments: list[str]) -> tuple[Callable[..., Any], list]:
    """(what asks a worker, token ids of its prompts)."""
    command = [sys.executable, __file__, *arguments, "--worker", side, "--folder", folder]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdin is not None and process.stdout is not None
    asked, answers = process.stdin, process.stdout

    def ask(kind: str, size: int, lengths: list[list[int]]) -> dict[str, Any]:
        print(json.dumps({"kind": kind, "size": size, "lengths": lengths}), file=asked, flush=True)
        line = answers.readline()
        if not line:
            sys.exit(f"{side} failed")
        return json.loads(line)

    return ask, json.loads(answers.readline())


def measure(folder: str, settings: Settings, arguments: list[str]) -> dict[str, Any]:
    """Tokens per second, by the name of what was run; `useful` shares of ours."""
    workers = {side: start(side, folder, arguments) for side in SIDES}
    if workers["ours"][1] != workers["theirs"][1]:
        sys.exit("the two sides have other prompts")
    rates: dict[str, list[float]] = {}
    cpu: dict[str, list[float]] = {}
    useful: dict[str, float] = {}
    # The first turn compiles, and finds the best batch size of theirs.
    best: dict[str, int] = {}
    for turn in range(1 + settings.repeats):
        for kind in KINDS:
            lengths: list[list[int]] = []
            for size, name in enumerate(("refilled", "at once")):
                result = workers["ours"][0](kind, size, [])
                lengths = result["lengths"]
                useful[f"{name}, {kind}"] = result["useful"]
                runs = [(f"{name}, {kind}", result)]
                if turn:
                    _add(rates, cpu, runs)
            tried = {}
            for size in Theirs.sizes if not turn else (best[kind],):
                tried[size] = workers["theirs"][0](kind, size, lengths)
            best.setdefault(kind, min(tried, key=lambda size: tried[size]["seconds"]))
            if turn:
                _add(rates, cpu, [(f"transformers, {kind}", tried[best[kind]])])
    return {
        "tokens_per_second": {name: statistics.median(each) for name, each in rates.items()},
        "tokens_per_cpu_second": {name: statistics.median(each) for name, each in cpu.items()},
        "useful": useful,
        "best_batch_of_transformers": best,
    }


def _add(rates: dict, cpu: dict, runs: list[tuple[str, dict[str, Any]]]) -> None:
    for name, result in runs:
        rates.setdefault(name, []).append(result["tokens"] / result["seconds"])
        cpu.setdefault(name, []).append(result["tokens"] / result["cpu"])


def show(result: dict[str, Any]) -> None:
    print(f"{'':24}{'tokens/s':>10}{'per processor second':>22}{'useful':>8}")
    for name, rate in result["tokens_per_second"].items():
        useful = result["useful"].get(name)
        share = "" if useful is None else f"{useful:.2f}"
        print(f"{name:24}{rate:10.0f}{result['tokens_per_cpu_second'][name]:22.0f}{share:>8}")
    ratios = (
        ("refilled, drawn", "at once, equal"),
        ("refilled, drawn", "refilled, equal"),
        ("refilled, drawn", "at once, drawn"),
        ("refilled, drawn", "transformers, drawn"),
        ("at once, equal", "transformers, equal"),
    )
    for above, below in ratios:
        wall, cpu = (
            result[unit][above] / result[unit][below]
            for unit in ("tokens_per_second", "tokens_per_cpu_second")
        )
        print(f"{above} / {below}: {wall:.2f}; by processor time {cpu:.2f}")
    print(f"images at a time, of transformers: {result['best_batch_of_transformers']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    if arguments.worker:
        work(arguments.worker, arguments.folder, settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, settings.seed)
        make_pairs(folder, settings.images, settings.seed)
        result = measure(folder, settings, sys.argv[1:])
    show(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"settings": dataclasses.asdict(settings), **result}, file, indent=2)


if __name__ == "__main__":
    main()
