"""What feedback of several kinds is worth on the picture world, where the truth is known.

    python benchmarks/feedback_results.py --seeds 0 1 2 --output runs/feedback

aligns the shipped checkpoint once for every case and seed, from configs/picture_world_align.yaml
with the changes of `CASES`, and prints a Markdown table, the one in docs/results.md: how many pairs
agree with the truth (the chosen caption has fewer wrong or unreadable mentions than the other),
what became of hallucination and recall on held-out scenes, and, of the cases in `BEST_OF`, the best
of N captions by the implicit reward. A run that is finished is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence

from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.commands.select import run_selection
from mmpo_jax.core.files import read_table
from mmpo_jax.picture_world.claims import is_true, parse
from mmpo_jax.picture_world.metrics import caption_metrics
from mmpo_jax.picture_world.records import scene_id, scenes
from mmpo_jax.picture_world.world import Scene
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.command_recipes import SelectRecipe
from mmpo_jax.recipes.files import load_recipe

CONFIGS = os.path.join(os.path.dirname(__file__), os.pardir, "configs")
RECIPE = os.path.join(CONFIGS, "picture_world_align.yaml")
START = "builtin:picture_world"

CASES: Mapping[str, Sequence[str]] = {
    "claims, two rounds": (),
    "claims, one round on all": ("rounds=1", "prompts_per_round=2000"),
    "self-reward, two rounds": (
        "feedback.splitter={type: picture_world, whole: true}",
        "feedback.score=log_odds",
    ),
    "mixed candidates, two rounds": (
        "sampling.num_samples=4",
        f"candidates=[{{type: policy}}, "
        f"{{type: checkpoint, name: start, model: {START}, temperature: 0.7, num_samples: 3}}, "
        f"{{type: edited_image, edit: noise, step: 500, num_samples: 3}}]",
    ),
    "sentences, two rounds": (
        "sentences={max_sentences: 6, end: ' (,|and|[.])'}",
        "lengths.prompt=[24, 32, 48]",
    ),
    "the truth, two rounds": (
        f"feedback={{type: python, function: '{os.path.abspath(__file__)}:true_score'}}",
    ),
}
"""Name -> changes of the recipe.

The shipped model cannot write a number, so self-reward is read from its p(yes) and p(no) where it
is asked about a whole caption at once, in the words of the questions that it was trained on. The
mixed candidates are as many as the policy's are otherwise: four of its samples, three of the model
that the first round starts from, at another temperature, and three of images with noise.
A sentence is one group of a caption, as a caption is one sentence of prose."""
BEST_OF = "claims, two rounds"
"""Case whose model chooses among its own samples."""
NUMBERS = (1, 4, 16)
COLUMNS = (
    ("pairs", "pairs", 0),
    ("right", "pairs that are right", 3),
    ("tie", "a tie", 3),
    ("sampled/chair_s", "CHAIR_s, sampled", 3),
    ("greedy/chair_s", "greedy", 3),
    ("sampled/recall", "recall, sampled", 3),
    ("greedy/recall", "greedy", 3),
    ("sampled/mean_length", "words", 2),
)
CHOICES = (
    ("chair_s", "CHAIR_s", 3),
    ("recall", "recall", 3),
    ("mean_length", "words", 2),
    ("shift", "tokens more than the mean", 2),
)

Result = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--output", default="runs/feedback")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of all recipes")
    options = parser.parse_args()
    aligned: dict[str, list[Result]] = {}
    chosen: dict[str, list[Result]] = {}
    for seed in options.seeds:
        for case in options.cases:
            folder = os.path.join(options.output, f"seed-{seed}", case.replace(" ", "_"))
            aligned.setdefault(case, []).append(align(case, folder, seed, options.set))
            print(f"seed {seed} {row(case, aligned[case][-1:], COLUMNS)}", flush=True)
        if BEST_OF in options.cases:
            folder = os.path.join(options.output, f"seed-{seed}")
            model = os.path.join(folder, BEST_OF.replace(" ", "_"), "model")
            for name, result in best_of(model, os.path.join(folder, "select"), seed).items():
                chosen.setdefault(name, []).append(result)
    print(table(aligned, COLUMNS))
    print(table(chosen, CHOICES))


def align(case: str, folder: str, seed: int, changes: Sequence[str]) -> Result:
    """Aligns and measures: pairs against the truth, and the last round's metrics."""
    overrides = [*CASES[case], *changes, f"seed={seed}", f"output={folder}"]
    recipe = load_recipe(AlignRecipe, RECIPE, overrides)
    report = run_alignment(recipe)[-1]
    data = recipe.data
    truth = {scene_id(data.split, data.seed, number): scene for number, scene in _numbered(data)}
    verdicts = [
        verdict
        for index in range(1, recipe.rounds + 1)
        for verdict in pair_verdicts(os.path.join(folder, f"round-{index}"), truth)
    ]
    count = len(verdicts)
    return {
        **report.metrics,
        "pairs": count,
        "right": sum(verdict > 0 for verdict in verdicts) / count,
        "tie": sum(verdict == 0 for verdict in verdicts) / count,
    }


def _numbered(data) -> list[tuple[int, Scene]]:
    return list(enumerate(scenes(data.split, data.seed, data.size)))


def pair_verdicts(folder: str, truth: Mapping[str, Scene]) -> list[int]:
    """Of every pair, how many wrong mentions fewer the chosen caption has."""
    pairs = read_table(os.path.join(folder, "pairs.parquet")).to_pylist()
    return [
        wrong_mentions(pair["rejected"], scene) - wrong_mentions(pair["chosen"], scene)
        for pair in pairs
        for scene in [truth[pair["prompt_id"].partition("/")[0]]]
    ]


def true_score(question, texts: Sequence[str]) -> list[float]:
    """The judge that knows the scene: minus the number of wrong mentions."""
    scene = Scene.from_dict(question.solution)
    return [-float(wrong_mentions(text, scene)) for text in texts]


def wrong_mentions(caption: str, scene: Scene) -> int:
    """Mentions that are not true or cannot be read."""
    parsed = parse(caption)
    return sum(not is_true(claim, scene) for claim in parsed.claims) + len(parsed.unparsed)


def best_of(model: str, folder: str, seed: int) -> dict[str, Result]:
    """The best of N samples on held-out scenes, by the reward per token and by the sum."""
    results = {}
    for number in NUMBERS:
        for per_token in (True, False) if number > 1 else (True,):
            way = "per token" if per_token else "summed"
            output = os.path.join(folder, f"{number}-{way.replace(' ', '_')}", "best.jsonl")
            recipe = SelectRecipe(
                model=model,
                reference=START,
                output=output,
                data={"source": "picture_world", "split": "test", "size": 500},
                sampling={"num_samples": number, "temperature": 1.0, "max_new_tokens": 32},
                reward={"per_token": per_token},
                batch_size=64,
                seed=seed,
            )
            path, selection = run_selection(recipe)
            with open(path) as file:
                rows = [json.loads(line) for line in file]
            name = "a sample" if number == 1 else f"best of {number}, {way}"
            results[name] = _measured(rows, per_token, selection)
    return results


def _measured(rows: Sequence[Mapping], per_token: bool, selection) -> Result:
    captions = [row["responses"][row["best"]] for row in rows]
    held_out = dict(enumerate(scenes("test", 0, 500)))
    shown = [held_out[int(row["id"].rpartition("-")[2])] for row in rows]
    told = selection.to_json()["per_token" if per_token else "summed"]
    return {**caption_metrics(captions, shown), "shift": told["tokens"]}


def row(name: str, results: Sequence[Result], columns: Sequence[tuple[str, str, int]]) -> str:
    """One line of a table: means, with standard deviations where there are several."""
    cells = [name, str(len(results))]
    for key, _, digits in columns:
        values = [result[key] for result in results]
        mean = f"{statistics.mean(values):.{digits}f}"
        spread = f" ({statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
        cells.append(mean + spread)
    return "| " + " | ".join(cells) + " |"


def table(results: Mapping[str, Sequence[Result]], columns: Sequence[tuple[str, str, int]]) -> str:
    """All cases as a Markdown table."""
    head = ["", "seeds", *(heading for _, heading, _ in columns)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(row(name, of_case, columns) for name, of_case in results.items())])


if __name__ == "__main__":
    main()
