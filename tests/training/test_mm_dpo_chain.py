"""MM-DPO end to end: a reward model, its rewards, and training with beta of their margins."""

import json
from pathlib import Path

import numpy as np
import pytest

import mmpo_jax
from mmpo_jax import cli
from mmpo_jax.picture_world.language import hallucinated_caption, true_caption
from mmpo_jax.picture_world.preferences import write_preferences
from mmpo_jax.picture_world.records import prompt_records, scenes
from mmpo_jax.training.metrics import FILE, read_metrics

CONFIGS = Path(mmpo_jax.__file__).parent.parent / "configs"
SCENES = 12


def rankings(folder):
    rng = np.random.default_rng(0)
    shown = scenes("align", 0, SCENES)
    asked = prompt_records("align", 0, SCENES, image_size=24)
    captions = (
        [true_caption(s, rng), *(hallucinated_caption(s, rng) for _ in "ab")] for s in shown
    )
    return write_preferences(str(folder), zip(asked, captions, shown, strict=True))["rankings"]


@pytest.mark.slow
def test_margins_of_a_trained_reward_model_set_beta(tiny_folder, tmp_path):
    data, rewards = rankings(tmp_path), tmp_path / "rewards.jsonl"
    short = [
        "training.batch_size=8",
        "training.max_steps=1",
        "validation=null",
        f"data.path={data}",
    ]

    def train(recipe, name, *more):
        output = tmp_path / name
        settings = [*short, f"model={tiny_folder}", f"output={output}", *more]
        assert cli.main(["train", str(CONFIGS / f"{recipe}.yaml"), *settings]) == 0
        return output

    model = train("picture_world_reward_scalar", "reward")
    asked = ["--model", str(model), "--data", data, "--output", str(rewards)]
    assert cli.main(["reward", *asked]) == 0
    given = [json.loads(line)["rewards"] for line in rewards.read_text().splitlines()]
    assert len(given) == SCENES
    assert len({reward for row in given for reward in row}) > len(given)
    outputs = (
        train(
            "picture_world_mm_dpo",
            str(w),
            f"data.rewards={rewards}",
            f"training.objective=[{{type: mm_dpo, w: {w}}}]",
        )
        for w in (0.5, 0)
    )
    (first,), (plain,) = (read_metrics(str(output / FILE)) for output in outputs)
    # Before the first update the policy has no margins, so beta is in the gradient alone.
    assert first["loss"] == pytest.approx(plain["loss"]) == pytest.approx(np.log(2), abs=1e-5)
    assert first["grad_norm"] != pytest.approx(plain["grad_norm"], rel=1e-5)
