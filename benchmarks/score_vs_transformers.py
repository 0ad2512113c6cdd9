"""Log-probs of responses of real lengths: transformers and mmpo_jax on the same rows.

Two models: SmolLM2-135M on the texts themselves, and the LLaVA-shaped model of `dpo_vs_trl.py`, one
picture a row, with as many random words as the texts have. transformers scores one response at a
time, and in batches padded to the longest of their rows, which are sorted by length. All in
float32, each side in a process of its own, on the same token ids.

    python benchmarks/score_vs_transformers.py --data pairs.jsonl --smollm2 FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from typing import Any

from checkpoint import PROMPT_TOKENS, make_checkpoint, picture, random_words

TOLERANCE = 2e-3
"""Of a response's log-prob, relative to its size where that is over 1."""
ROWS = "rows.parquet"


def make_rows(pairs: list[dict[str, str]], folder: str, with_pictures: bool) -> str:
    """Writes the pairs in TRL's schema; with pictures, words are random ones."""
    import datasets
    import numpy as np

    random = np.random.default_rng(0)
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {}
        texts = {name: pair[name] for name in ("prompt", "chosen", "rejected")}
        if with_pictures:
            row["images"] = [{"bytes": picture(random), "path": None}]
            lengths = {name: max(1, len(text.split())) for name, text in texts.items()}
            lengths["prompt"] = PROMPT_TOKENS - 3
            texts = {name: random_words(random, length) for name, length in lengths.items()}
        for name, text in texts.items():
            role = "user" if name == "prompt" else "assistant"
            row[name] = [{"role": role, "content": text}]
        rows.append(row)
    path = os.path.join(folder, ROWS)
    dataset = datasets.Dataset.from_list(rows)
    if with_pictures:
        dataset = dataset.cast_column("images", datasets.List(datasets.Image()))
    dataset.to_parquet(path)
    return path


def run_ours(folder: str, rows: str, batch_size: int) -> dict:
    """Scores everything twice, as the first time compiles; writes the ids that were scored."""
    from mmpo_jax.checkpoints.checkpoint import load_checkpoint
    from mmpo_jax.data.batching import fitting_lengths
    from mmpo_jax.data.readers import read_records
    from mmpo_jax.data.tokenization import tokenize_records
    from mmpo_jax.inference.loop import TokenCount
    from mmpo_jax.parallel.mesh import make_mesh
    from mmpo_jax.scoring.log_probs import score_records

    mesh = make_mesh()
    checkpoint = load_checkpoint(folder, mesh)
    records, _ = read_records(rows)
    tokenized, skipped = tokenize_records(records, checkpoint.processor, None)
    assert not skipped, skipped
    lengths = fitting_lengths(tokenized)
    times = []
    for _ in range(2):
        count = TokenCount()
        begun, cpu = time.perf_counter(), time.process_time()
        scores = score_records(checkpoint, tokenized, lengths, mesh, batch_size, count=count)
        times.append((time.perf_counter() - begun, time.process_time() - cpu))
    with open(os.path.join(os.path.dirname(rows), "ids.json"), "w") as file:
        json.dump(
            [
                [row.prompt_ids.tolist(), [response.ids.tolist() for response in row.responses]]
                for row in tokenized
            ],
            file,
        )
    return {
        "seconds": times[1][0],
        "cpu_seconds": times[1][1],
        "seconds_with_compiling": times[0][0],
        "useful_share": count.useful_share,
        "log_probs": [value for row in scores for value in row],
    }


def run_theirs(folder: str, rows: str, batch_size: int) -> dict:
    """Sums of log-probs in batches of responses, sorted by length where there are several."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    with open(os.path.join(os.path.dirname(rows), "ids.json")) as file:
        ids = json.load(file)
    data = datasets.load_dataset(
        "parquet", data_files=rows, split="train", cache_dir=os.path.dirname(rows)
    )
    has_pictures = "images" in data.column_names
    auto = "AutoModelForImageTextToText" if has_pictures else "AutoModelForCausalLM"
    model = getattr(transformers, auto).from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )
    model.eval()
    images = transformers.AutoImageProcessor.from_pretrained(folder) if has_pictures else None
    responses = [
        (number, prompt, response) for number, (prompt, both) in enumerate(ids) for response in both
    ]
    order = list(range(len(responses)))
    if batch_size > 1:
        order.sort(key=lambda place: len(responses[place][1]) + len(responses[place][2]))
    found = [0.0] * len(responses)
    real = computed = 0
    begun, cpu = time.perf_counter(), time.process_time()
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        chosen = [responses[place] for place in places]
        longest = max(len(prompt) + len(response) for _, prompt, response in chosen)
        keep = max(len(response) for _, _, response in chosen) + 1
        tokens = torch.zeros(len(chosen), longest, dtype=torch.long)
        mask = torch.zeros_like(tokens)
        for row, (_, prompt, response) in enumerate(chosen):  # padded on the left
            count = len(prompt) + len(response)
            tokens[row, longest - count :] = torch.tensor([*prompt, *response])
            mask[row, longest - count :] = 1
            real += count
        computed += tokens.numel()
        inputs: dict[str, Any] = {}
        if images is not None:
            shown = [data[number]["images"][0] for number, _, _ in chosen]
            inputs["pixel_values"] = images(shown, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            logits = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
                logits_to_keep=keep,
                **inputs,
            ).logits[:, :-1]
            chosen_logits = logits.gather(-1, tokens[:, -keep + 1 :, None])[..., 0]
            log_probs = chosen_logits - logits.logsumexp(-1)
        for row, (place, (_, _, response)) in enumerate(zip(places, chosen, strict=True)):
            found[place] = float(log_probs[row, -len(response) :].sum())
    return {
        "seconds": time.perf_counter() - begun,
        "cpu_seconds": time.process_time() - cpu,
        "useful_share": real / computed,
        "log_probs": found,
    }


def compare(name: str, ours: dict, theirs: dict[int, dict], responses: int) -> dict:
    """The table of one model; a ratio is ours / theirs in responses a second."""
    print(f"\n{name}, {responses} responses")
    print(f"{'':34}{'seconds':>10}{'CPU s':>10}{'useful':>9}{'ratio':>8}{'CPU ratio':>11}")
    result: dict[str, Any] = {"responses": responses}
    for size, side in theirs.items():
        title = "one at a time" if size == 1 else f"{size} at a time, sorted"
        ratios = [side[key] / ours[key] for key in ("seconds", "cpu_seconds")]
        _line(f"transformers, {title}", side, *(f"{ratio:.2f}" for ratio in ratios))
        result[f"transformers {size}"] = {**_figures(side), "ratio": ratios[0]}
    _line("mmpo_jax", ours, "", "")
    result["mmpo_jax"] = _figures(ours)
    print(f"compiling included: {ours['seconds_with_compiling']:.1f} s")
    one = theirs[1]["log_probs"]
    result["largest_difference"] = max(
        abs(a - b) / max(1.0, abs(b)) for a, b in zip(ours["log_probs"], one, strict=True)
    )
    print(f"largest relative difference of the log-probs: {result['largest_difference']:.1e}")
    return result


def _line(title: str, side: dict, *ratios: str) -> None:
    cells = f"{side['seconds']:10.1f}{side['cpu_seconds']:10.1f}{side['useful_share']:9.2f}"
    print(f"{title:34}{cells}{ratios[0]:>8}{ratios[1]:>11}")


def _figures(side: dict) -> dict:
    return {name: value for name, value in side.items() if name != "log_probs"}


def measure(folder: str, rows: str, sizes: list[int], batch_size: int) -> tuple[dict, dict]:
    """(ours, theirs by batch size), each side in a process of its own."""

    def side(worker: str, size: int) -> dict:
        out = os.path.join(os.path.dirname(rows), f"{worker}-{size}.json")
        command = [sys.executable, __file__, "--worker", worker, "--folder", folder]
        command += ["--rows", rows, "--batch-size", str(size), "--json", out]
        subprocess.run(command, check=True)
        with open(out) as file:
            return json.load(file)

    ours = side("ours", batch_size)
    return ours, {size: side("theirs", size) for size in sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="JSONL with prompt, chosen and rejected")
    parser.add_argument("--smollm2", help="folder of SmolLM2; without it, LLaVA's shape alone")
    parser.add_argument("--rows", help="of the data, at most; a file to workers", default=None)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--batch-size", type=int, default=16, help="ours: rows at a time")
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        run = run_ours if arguments.worker == "ours" else run_theirs
        with contextlib.redirect_stdout(sys.stderr):
            result = run(arguments.folder, arguments.rows, arguments.batch_size)
        with open(arguments.json, "w") as file:
            json.dump(result, file)
        return
    with open(arguments.data) as file:
        pairs = [json.loads(line) for line in file][: int(arguments.rows or 0) or None]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        models = {"LLaVA's shape": ""} | (
            {"SmolLM2": arguments.smollm2} if arguments.smollm2 else {}
        )
        for name, checkpoint in models.items():
            own = os.path.join(folder, "text" if checkpoint else "llava")
            os.makedirs(own)
            if not checkpoint:
                checkpoint = os.path.join(own, "checkpoint")
                make_checkpoint(checkpoint)
            rows = make_rows(pairs, own, with_pictures=name != "SmolLM2")
            ours, theirs = measure(checkpoint, rows, arguments.sizes, arguments.batch_size)
            results[name] = compare(name, ours, theirs, 2 * len(pairs))
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=2)
    if any(result["largest_difference"] > TOLERANCE for result in results.values()):
        sys.exit("the two sides did not compute the same")


if __name__ == "__main__":
    main()
