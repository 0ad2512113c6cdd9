"""Plans of published models on slices of TPUs, as the tables of docs/scale.md.

    python benchmarks/scale.py --json scale.json          # all, as `mmpo plan --fast` has it
    python benchmarks/scale.py --json scale.json --table  # what the file holds

Needs `libtpu` and no TPU. What the file holds already is not planned again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from published import write_folder

SLICES = {
    "v5e-64": "v5e:8x8",
    "v5e-256": "v5e:16x16",
    "v5p-128": "v5p:4x4x8",
    "v6e-256": "v6e:16x16",
}
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
    kind: str
    """Class of the recipe."""
    values: dict[str, Any]
    only: tuple[str, ...]
    tensor: dict[str, int] = dataclasses.field(default_factory=dict)
    """Slice -> size of the axis `tensor`; 1 where it is not named. `fsdp` takes the rest."""


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
        "training": DPO,
    }


SAMPLING = {"num_samples": 10, "max_new_tokens": 512, "batch_size": 64}
STEP = ("train step",)
FEW_ROWS = {"v5e-64": 8, "v5e-256": 32, "v5p-128": 16, "v6e-256": 32}
CASES = (
    Case("RLAIF-V's step", "LLaVA-1.5-7B", "TrainRecipe", dpo(8, 832, 512), STEP, FEW_ROWS),
    Case("batch of 256", "LLaVA-1.5-7B", "TrainRecipe", dpo(256, 832, 512), STEP),
    Case(
        "labeler",
        "LLaVA-NeXT-34B",
        "AlignRecipe",
        labelling(),
        ("labelling",),
        dict.fromkeys(SLICES, 8),
    ),
    Case("9 tiles", "LLaVA-OneVision-7B", "TrainRecipe", dpo(256, 7680, 512), STEP),
    Case("batch of 256", "Qwen2.5-VL-72B", "TrainRecipe", dpo(256, 1152, 512), STEP),
    Case(
        "sampling",
        "Qwen2.5-VL-72B",
        "GenerateRecipe",
        {"lengths": {"prompt": [1152], "response": [512]}, "sampling": SAMPLING},
        ("prefill", "decode"),
        dict.fromkeys(SLICES, 8),
    ),
)


def plan(case: Case, slice_name: str, folder: str, optimised: bool) -> dict[str, Any]:
    """One case on one slice, as `mmpo plan --json` has it."""
    from mmpo_jax.planning.planned import plan_recipe
    from mmpo_jax.planning.stages import Assumed
    from mmpo_jax.planning.topology import find_topology
    from mmpo_jax.recipes import recipe as recipes

    if not Path(folder, "config.json").exists():
        write_folder(case.model, folder)
    values = {
        "output": "scale",
        "model": folder,
        "data": {"source": "file", "path": "rows.jsonl"},
        "devices": {"fsdp": -1, "tensor": case.tensor.get(slice_name, 1)},
        **case.values,
    }
    topology = find_topology(SLICES[slice_name])
    recipe = getattr(recipes, case.kind).model_validate(values)
    assumed = Assumed(rows=16000)
    return plan_recipe(recipe, topology, assumed, optimised=optimised, only=case.only).to_json()


COLUMNS = ("model", "what", "slice", "mesh", "GiB", "fits", "TFLOP", "sent GB", "bound by", "rate")


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
            ]
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", required=True, help="file for the figures")
    parser.add_argument("--table", action="store_true", help="print what the file holds")
    parser.add_argument("--optimised", action="store_true", help="four times as long")
    parser.add_argument("--slices", nargs="+", default=list(SLICES), choices=list(SLICES))
    options = parser.parse_args()
    found = json.loads(Path(options.json).read_text()) if os.path.exists(options.json) else {}
    if options.table:
        print("\n".join(lines(found)))
        return
    with tempfile.TemporaryDirectory() as folder:
        for slice_name in options.slices:
            for case in CASES:
                key = f"{case.model}/{case.name}/{slice_name}"
                if key in found:
                    continue
                own = os.path.join(folder, case.model)
                found[key] = plan(case, slice_name, own, options.optimised)
                Path(options.json).write_text(json.dumps(found, indent=1))
                print("\n".join(lines({key: found[key]})[2:]), flush=True)


if __name__ == "__main__":
    main()
