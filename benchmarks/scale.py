"""Plans of published models on slices of TPUs, as the tables of docs/scale.md.

    python benchmarks/scale.py --json scale.json          # all, as `mmpo plan --fast` has it
    python benchmarks/scale.py --json scale.json --table  # what the file holds
    python benchmarks/scale.py --json weak.json --weak    # LLaVA-1.5-7B on 8 to 256 chips
    python benchmarks/scale.py --json new.json --models Qwen3.5-27B --slices v6e-64

Needs `libtpu` and no TPU. What the file holds already is not planned again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from published import write_folder

SLICES = {
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v5p-128": "v5p:4x4x8",
    "v6e-256": "v6e:16x16",
    "v5p-64": "v5p:4x4x4",
    "v6e-64": "v6e:8x8",
    "v5e-8": "v5e:2x4",
    "v5e-16": "v5e:4x4",
    "v5e-32": "v5e:4x8",
    "v5e-128": "v5e:8x16",
}
USUAL = ("v5e-64", "v5e-256", "v5p-128", "v6e-256")
OF_64 = ("v5e-64", "v5p-64", "v6e-64")
DPO = {
    "objective": {"type": "dpo", "beta": 0.1},
    "compute_dtype": "bfloat16",
    "remat": "full",
    "freeze": ["vision_tower/.*"],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Programs of one recipe."""

    name: str
    model: str
    command: str
    """Which runs the recipe."""
    values: dict[str, Any]
    only: tuple[str, ...]
    """Names of the programs."""
    tensor: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Slice -> size of the axis `tensor`; 1 where it is not named. `fsdp` takes the rest."""
    data: int = 1
    """Size of the axis `data`."""
    expert: int = 1
    """Size of the axis `expert`."""
    slices: tuple[str, ...] = USUAL


def dpo(batch: int, prompt: int, response: int) -> dict[str, Any]:
    return {
        "lengths": {"prompt": [prompt], "response": [response]},
        "training": DPO | {"batch_size": batch},
    }


def labelling() -> dict[str, Any]:
    """As RLAIF-V's recipe has it: ten responses to 16,000 prompts in four rounds."""
    return {
        "rounds": 4,
        "prompts_per_round": 4000,
        "lengths": {"prompt": [3072], "response": [512]},
        "sampling": {"num_samples": 10, "max_new_tokens": 512},
        "feedback": {"labeler": {"type": "checkpoint", "batch_size": 64}},
        "training": DPO | {"batch_size": 256},
    }


SAMPLING = {"num_samples": 10, "max_new_tokens": 512, "batch_size": 64}
STEP = ("train step",)
FEW_ROWS = {"v5e-64": 8, "v5e-256": 32, "v5p-128": 16, "v6e-256": 32}
CASES = (
    Case("RLAIF-V's step", "LLaVA-1.5-7B", "train", dpo(8, 832, 512), STEP, FEW_ROWS),
    Case("batch of 256", "LLaVA-1.5-7B", "train", dpo(256, 832, 512), STEP),
    Case(
        "labeler",
        "LLaVA-NeXT-34B",
        "align",
        labelling(),
        ("labelling",),
        dict.fromkeys(USUAL, 8),
    ),
    Case("9 tiles", "LLaVA-OneVision-7B", "train", dpo(256, 7680, 512), STEP),
    Case("batch of 256", "Qwen2.5-VL-72B", "train", dpo(256, 1152, 512), STEP),
    Case("batch of 256", "Qwen3-VL-8B", "train", dpo(256, 1152, 512), STEP, slices=("v5e-64",)),
    Case(
        "sampling",
        "Qwen2.5-VL-72B",
        "generate",
        {"lengths": {"prompt": [1152], "response": [512]}, "sampling": SAMPLING},
        ("prefill", "decode"),
        dict.fromkeys(USUAL, 8),
    ),
    Case("batch of 64", "Qwen3.5-27B", "train", dpo(64, 1536, 512), STEP, slices=OF_64),
    Case("batch of 64", "Gemma-4-31B", "train", dpo(64, 1536, 512), STEP, slices=OF_64),
    Case(
        "batch of 64",
        "Qwen3-VL-30B-A3B",
        "train",
        dpo(64, 1536, 512),
        STEP,
        expert=8,
        slices=OF_64,
    ),
)


WEAK = tuple(
    Case(
        f"{pairs} pairs a chip" + (f", data {data}" if data > 1 else ""),
        "LLaVA-1.5-7B",
        "train",
        dpo(pairs * chips, 832, 512),
        STEP,
        data=data,
        slices=(f"v5e-{chips}",),
    )
    for chips, data, pairs in (
        *((8, 1, 3), (16, 1, 4), (32, 1, 4), (64, 1, 4), (128, 1, 4), (256, 1, 4)),
        *((64, 4, 4), (256, 4, 4), (256, 16, 4)),
    )
)
"""As many rows a chip on more and more of them."""


def plan(case: Case, slice_name: str, folder: str, optimised: bool) -> dict[str, Any]:
    """One case on one slice, as `mmpo plan --json` has it."""
    from mmpo_jax.planning.planned import plan_recipe
    from mmpo_jax.planning.stages import Assumed
    from mmpo_jax.planning.topology import find_topology
    from mmpo_jax.recipes.commands import RECIPES

    if not Path(folder, "config.json").exists():
        write_folder(case.model, folder)
    values = {
        "output": "scale",
        "model": folder,
        "data": {"source": "file", "path": "rows.jsonl"},
        "devices": {
            "data": case.data,
            "fsdp": -1,
            "tensor": case.tensor.get(slice_name, 1),
            **({"expert": case.expert} if case.expert > 1 else {}),
        },
        **case.values,
    }
    topology = find_topology(SLICES[slice_name])
    recipe = RECIPES[case.command].model_validate(values)
    assumed = Assumed(rows=16000)
    return plan_recipe(recipe, topology, assumed, optimised=optimised, only=case.only).to_json()


COLUMNS = (
    *("model", "what", "slice", "mesh", "GiB", "fits", "TFLOP", "sent GB", "bound by", "rate"),
    "compiled in s",
)


def lines(found: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    rows = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for key, made in found.items():
        model, what, slice_name = key.split("/")
        for program in made["programs"]:
            mesh = " x ".join(str(size) for size in program["mesh"].values())
            peak = program["bytes"]["peak"] / 2**30
            sent = program["collectives"]
            counted = sent is None
            total = program["collectives_counted"] if counted else sum(sent.values())
            rates = program["per_second"]
            first = next(name for name in rates if name != "tokens")
            name = what if len(made["programs"]) == 1 else f"{what}, {program['program']}"
            cells = [
                model,
                name,
                slice_name,
                mesh,
                f"{peak:.2f}",
                "yes" if program["fits"] else "no",
                f"{program['flops'] / 1e12:,.0f}",
                f"{total / 1e9:,.2f}" + ("*" if counted else ""),
                program["roofline"]["bound"],
                f"{rates[first]:,.0f} {first}",
                f"{program['compile_seconds']:.0f}",
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, help="file for the figures")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    parser.add_argument("--optimised", action="store_true", help="four times as long")
    parser.add_argument("--slices", nargs="+", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--models", nargs="+", help="of these alone")
    parser.add_argument("--weak", action="store_true", help="one model on more and more chips")
    options = parser.parse_args()
    found = json.loads(Path(options.json).read_text()) if os.path.exists(options.json) else {}
    if options.table:
        print("\n".join(lines(found)))
        return
    chosen = [
        (case, slice_name)
        for slice_name in options.slices
        for case in (WEAK if options.weak else CASES)
        if slice_name in case.slices and case.model in (options.models or [case.model])
    ]
    with tempfile.TemporaryDirectory() as folder:
        for case, slice_name in chosen:
            key = f"{case.model}/{case.name}/{slice_name}"
            if key in found:
                continue
            own = os.path.join(folder, case.model)
            found[key] = plan(case, slice_name, own, options.optimised)
            Path(options.json).write_text(json.dumps(found, indent=1))
            print("\n".join(lines({key: found[key]})[2:]), flush=True)


if __name__ == "__main__":
    main()
