"""DPO of a LLaVA-shaped model: TRL's DPOTrainer and mmpo_jax on the same pairs, side by side.

Both start from the same checkpoint, see the same token ids and pictures in the same order, and run
one epoch of AdamW in float32 with the start model as reference. Each runs in a process of its own;
TRL twice, as it is by default (gradient checkpointing: less memory) and without (faster).

    python benchmarks/dpo_vs_trl.py
    python benchmarks/dpo_vs_trl.py --responses 5   # rankings, of which TRL gets all 10 pairs
    python benchmarks/dpo_vs_trl.py --lengths pairs.jsonl   # responses as long as those of a file
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time

from checkpoint import (
    IMAGE_TOKENS,
    PAIRS_FILE,
    PROMPT_TOKENS,
    RESPONSE_TOKENS,
    make_checkpoint,
    make_pairs,
    response_lengths,
)

LOSS_TOLERANCE = 1e-4
COMPARED_STEPS = 4
SIDES = ("ours", "trl", "trl_checkpointing")
"""Ours first: it says in which order the pairs come."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both sides are run with."""

    pairs: int = 32
    """How many; of rankings, how many of these."""
    responses: int = 2
    """Of every ranking; TRL gets all pairs of them."""
    batch_size: int = 4
    """Pairs or rankings per update."""
    learning_rate: float = 1e-5
    weight_decay: float = 0.01
    beta: float = 0.1
    freeze_vision: bool = False
    remat: str = "dots"
    """Ours: the rematerialisation policy of the layers."""
    seed: int = 0
    lengths: str = ""
    """JSONL with `chosen` and `rejected`: responses have as many words as they have."""

    @property
    def pairs_each(self) -> int:
        """Of a ranking."""
        return math.comb(self.responses, 2)


def run_trl(folder: str, settings: Settings, checkpointing: bool) -> dict:
    """One epoch of TRL's DPOTrainer on the pairs in the order of `order.json`."""
    import copy

    import datasets
    import torch
    import transformers
    import trl

    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype="float32", attn_implementation="sdpa"
    )
    if settings.freeze_vision:
        model.model.vision_tower.requires_grad_(False)
    with open(os.path.join(folder, "order.json")) as file:
        order = [
            ranking * settings.pairs_each + pair
            for ranking in json.load(file)
            for pair in range(settings.pairs_each)
        ]
    rows = datasets.load_dataset(
        "parquet", data_files=os.path.join(folder, PAIRS_FILE), split="train", cache_dir=folder
    ).select(order)
    arguments = trl.DPOConfig(
        output_dir=os.path.join(folder, "trl"),
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.pairs_each,
        num_train_epochs=1,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=settings.weight_decay,
        beta=settings.beta,
        max_length=None,
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=checkpointing,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    times: list[float] = []
    cpu_times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            times.append(time.perf_counter())
            cpu_times.append(time.process_time())

        on_step_end = on_train_begin

    trainer = trl.DPOTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=transformers.AutoProcessor.from_pretrained(folder),
        callbacks=[Clock()],
    )
    batch = trainer.data_collator([copy.deepcopy(rows[i]) for i in range(settings.batch_size)])
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "ids": _without_padding(batch["input_ids"].tolist()),
        "losses": [row["loss"] for row in steps],
        "grad_norms": [row["grad_norm"] for row in steps],
        "epoch_seconds": times[-1] - times[0],
        "cpu_seconds": cpu_times[-1] - cpu_times[0],
        "compile_seconds": 0.0,
        "peak_bytes": _peak_bytes(),
    }


def run_ours(folder: str, settings: Settings) -> dict:
    """Reference pass and one epoch with mmpo_jax; writes the order of the pairs to `order.json`."""
    import jax
    import numpy as np
    import optax

    from mmpo_jax.checkpoints.checkpoint import Checkpoint
    from mmpo_jax.checkpoints.configs import load_config
    from mmpo_jax.checkpoints.huggingface import load_params
    from mmpo_jax.data.examples import Example
    from mmpo_jax.data.lengths import Lengths
    from mmpo_jax.data.pipeline import training_batches
    from mmpo_jax.data.processor import Processor
    from mmpo_jax.data.readers import read_records
    from mmpo_jax.data.tokenization import tokenize_records
    from mmpo_jax.data.train_batch import USEFUL_SHARE
    from mmpo_jax.inference.plan import packed_over
    from mmpo_jax.models.model import Model
    from mmpo_jax.parallel.mesh import make_mesh, put_batch, put_params
    from mmpo_jax.recipes import training as recipe_training
    from mmpo_jax.recipes.optimizers import AdamW
    from mmpo_jax.scoring.log_probs import score_records
    from mmpo_jax.training.losses import make_loss
    from mmpo_jax.training.optimizer import make_optimizer
    from mmpo_jax.training.step import create_state, make_step

    config = recipe_training.Training(
        objective={"type": "dpo", "beta": settings.beta},
        optimizer=AdamW(learning_rate=settings.learning_rate, weight_decay=settings.weight_decay),
        batch_size=settings.batch_size,
        freeze=("vision_tower/.*",) if settings.freeze_vision else (),
        remat=settings.remat,
    )
    longest = RESPONSE_TOKENS
    if settings.lengths:
        longest = max(map(max, response_lengths(settings.lengths, settings.pairs)))
    lengths = Lengths(prompt=(IMAGE_TOKENS + PROMPT_TOKENS,), response=(longest,))
    model = Model.create(load_config(folder))
    params = load_params(folder, model)
    mesh = make_mesh()
    pairs, _ = read_records(os.path.join(folder, PAIRS_FILE))
    records = [
        _ranking(pairs[start : start + settings.pairs_each], settings.responses)
        for start in range(0, len(pairs), settings.pairs_each)
    ]
    schedule = optax.constant_schedule(settings.learning_rate)
    optimizer = make_optimizer(config.optimizer, schedule)
    loss = make_loss(model, [term.term() for term in config.objective], remat=config.remat)

    def batches(examples, processor):
        return training_batches(
            examples,
            processor,
            lengths,
            seed=settings.seed,
            epochs=1,
            batch_size=config.batch_size,
            micro_batch_size=config.batch_size,
            packed_over=packed_over(model, mesh),
        )

    def epoch(records) -> dict:
        """Tokenize, score with the reference, train: with fresh state and empty caches."""
        processor = Processor(folder, model.config)
        started, cpu = time.perf_counter(), time.process_time()
        tokenized, _ = tokenize_records(records, processor, lengths)
        placed = put_params(params, model.rules, mesh)
        start = Checkpoint(model, processor, placed)
        reference = score_records(start, tokenized, lengths, mesh, config.batch_size)
        del placed, start
        scored = time.perf_counter()
        examples = [
            Example(
                (record,),
                {"rank": np.arange(1, settings.responses + 1, dtype=np.float32)},
                {"sums": np.float32([sums])},
            )
            for record, sums in zip(tokenized, reference, strict=True)
        ]
        losses, norms, ids, shares = [], [], [], []
        state = create_state(params, model, optimizer, config.freeze, mesh)
        step = jitted.setdefault("step", make_step(loss, optimizer, schedule, state))
        for host in batches(examples, processor):
            state, metrics = step(state, put_batch(host.arrays, mesh, leading=1))
            losses.append(float(metrics["loss"]))
            norms.append(float(metrics["grad_norm"]))
            ids += host.ids
            shares.append(host.metrics[USEFUL_SHARE])
        by_id = {record.id: record for record in tokenized}
        return {
            "ids": _rows([by_id[name] for name in ids[: settings.batch_size]], settings.batch_size),
            "useful_share": float(np.mean(shares)),
            "order": [list(by_id).index(name) for name in ids],
            "losses": losses,
            "grad_norms": norms,
            "reference_seconds": scored - started,
            "epoch_seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu,
        }

    jitted: dict = {}
    with jax.set_mesh(mesh):
        # Compiles everything: on one batch, where all have one shape.
        warm = epoch(records if settings.lengths else records[: settings.batch_size])
        result = epoch(records)
    with open(os.path.join(folder, "order.json"), "w") as file:
        json.dump(result["order"], file)
    steady = result["epoch_seconds"]
    if not settings.lengths:
        steady *= settings.batch_size / settings.pairs
    return result | {
        "compile_seconds": max(0.0, warm["epoch_seconds"] - steady),
        "peak_bytes": _peak_bytes(),
    }


def _ranking(pairs: list, responses: int):
    """The record of all pairs of a ranking: the best response, and those that lose to it."""
    first = pairs[0]
    lost = [pair.responses[1] for pair in pairs[: responses - 1]]
    ranked = [
        dataclasses.replace(response, rank=rank)
        for rank, response in enumerate([first.responses[0], *lost], start=1)
    ]
    return dataclasses.replace(first, responses=tuple(ranked))


def _rows(records: list, count: int) -> list[list[int]]:
    """Token ids of the first pairs of a batch as TRL lays them out: all chosen rows, then all
    rejected ones."""
    pairs = [
        [[*record.prompt_ids.tolist(), *response.ids.tolist()] for response in pair]
        for record in records
        for pair in itertools.combinations(record.responses, 2)
    ]
    return [pair[side] for side in (0, 1) for pair in pairs[:count]]


def _without_padding(rows: list[list[int]]) -> list[list[int]]:
    """Rows that end with EOS, id 2, without what stands behind it."""
    return [row[: row.index(2) + 1] for row in rows]


def _peak_bytes() -> int:
    """The most memory this process has held; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def compare(settings: Settings, sides: dict[str, dict]) -> dict:
    """The figures of all sides, and whether they computed the same."""
    figures = {}
    pairs = settings.pairs * settings.pairs_each
    for name, side in sides.items():
        seconds, compiling = side["epoch_seconds"], side["compile_seconds"]
        figures[name] = {
            "pairs_per_second": pairs / seconds,
            "pairs_per_second_with_compile": pairs / (seconds + compiling),
            "cpu_seconds_per_pair": side["cpu_seconds"] / pairs,
            "compile_seconds": compiling,
            "peak_mib": side["peak_bytes"] / 2**20,
            "losses": side["losses"][:COMPARED_STEPS],
            "grad_norms": side["grad_norms"][:COMPARED_STEPS],
        }
    ours = figures["ours"]["losses"]
    return {
        "settings": dataclasses.asdict(settings),
        **figures,
        "reference_seconds": sides["ours"]["reference_seconds"],
        "useful_share": sides["ours"]["useful_share"],
        "same_ids": all(side["ids"] == sides["ours"]["ids"] for side in sides.values()),
        "largest_loss_difference": max(
            abs(a - b)
            for side in figures.values()
            for a, b in zip(ours, side["losses"], strict=True)
        ),
    }


def show(result: dict) -> None:
    """The table; a ratio is ours / TRL's."""
    lines = [
        ("pairs/s, whole epoch", "pairs_per_second", "{:.3f}"),
        ("pairs/s, compilation included", "pairs_per_second_with_compile", "{:.3f}"),
        ("processor seconds a pair", "cpu_seconds_per_pair", "{:.2f}"),
        ("peak memory, MiB", "peak_mib", "{:.0f}"),
    ]
    names = ("TRL", "ratio", "TRL default", "ratio", "mmpo_jax")
    print("\n" + " " * 32 + "".join(name.rjust(12) for name in names))
    ours = result["ours"]
    for title, key, form in lines:
        cells = []
        for side in ("trl", "trl_checkpointing"):
            value = result[side][key]
            cells += [form.format(value), f"{ours[key] / value:.2f}"]
        print(f"{title:32}" + "".join(c.rjust(12) for c in [*cells, form.format(ours[key])]))
    print(f"compilation: {ours['compile_seconds']:.1f} s")
    print(f"useful share of the tokens ours computes: {result['useful_share']:.2f}")
    for step, losses in enumerate(zip(*(result[s]["losses"] for s in SIDES), strict=True), 1):
        print(f"loss of step {step}: " + "  ".join(f"{loss:.6f}" for loss in losses))
    print(f"token ids of the first batch are {'equal' if result['same_ids'] else 'NOT EQUAL'}")
    print(f"largest difference of these losses: {result['largest_loss_difference']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    if arguments.worker:
        with contextlib.redirect_stdout(sys.stderr):
            if arguments.worker == "ours":
                result = run_ours(arguments.folder, settings)
            else:
                checkpointing = arguments.worker == "trl_checkpointing"
                result = run_trl(arguments.folder, settings, checkpointing)
        with open(os.path.join(arguments.folder, f"{arguments.worker}.json"), "w") as file:
            json.dump(result, file)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, settings.seed)
        lengths = response_lengths(settings.lengths, settings.pairs) if settings.lengths else None
        make_pairs(folder, settings.pairs, settings.seed, settings.responses, lengths)
        results = {}
        for side in SIDES:
            command = [sys.executable, __file__, *sys.argv[1:], "--worker", side]
            subprocess.run([*command, "--folder", folder], check=True)
            with open(os.path.join(folder, f"{side}.json")) as file:
                results[side] = json.load(file)
    result = compare(settings, results)
    show(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(result, file, indent=2)
    if not result["same_ids"] or result["largest_loss_difference"] > LOSS_TOLERANCE:
        sys.exit("the two sides did not compute the same")


if __name__ == "__main__":
    main()
