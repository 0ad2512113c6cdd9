"""Recipes of published methods: the constants of their papers and scripts."""

from pathlib import Path

import pytest
import yaml

import mmpo_jax
from mmpo_jax.recipes.files import load_recipe
from mmpo_jax.recipes.train_recipe import TrainRecipe

ROOT = Path(mmpo_jax.__file__).parent.parent
MM_DPO = {
    "training.objective": [
        {"type": "mm_dpo", "beta": 0.1, "w": 0.5, "k": 0.5},
        {"type": "sft", "weight": 0.25},
    ],
    "training.optimizer.learning_rate": 1e-6,
    "training.optimizer.weight_decay": 0,
    "training.schedule": {"type": "cosine", "warmup_ratio": 0.1},
    "training.epochs": 1,
    "training.batch_size": 12 * 32,
    "training.freeze": ["vision_tower/.*"],
}
CONSTANTS = {
    "mm_rlhf_reward_7b": {
        "reward_head": "two_layer",
        "training.objective": [
            {"type": "bradley_terry", "margin": 0, "tie_weight": 1, "centring": 0.01},
            {"type": "critique", "weight": 1},
        ],
        "training.optimizer.learning_rate": 1e-6,
        "training.optimizer.weight_decay": 0,
        "training.schedule": {"type": "cosine", "warmup_ratio": 0.1},
        "training.epochs": 1,
        "training.batch_size": 24 * 8,
        "training.freeze": ["vision_tower/.*"],
    },
    "mm_dpo_7b": MM_DPO,
    "mm_dpo_0.5b": MM_DPO,
    "mdpo": {
        "training.objective": {"type": "mdpo", "beta": 0.1, "delta": 0},
        "training.optimizer": {"learning_rate": 1e-5, "beta2": 0.98, "weight_decay": 0.05},
        "training.schedule": {"type": "cosine", "warmup_ratio": 0.1},
        "training.epochs": 3,
        "training.batch_size": 32,
        "training.lora": {"target": "language_model/layers/.*", "rank": 64, "alpha": 128},
    },
    "mpo": {
        "training.objective": [
            {"type": "dpo", "beta": 0.1, "weight": 0.8},
            {"type": "bco", "beta": 0.1, "weight": 2 * 0.2},
            {"type": "sft", "weight": 1},
        ],
        "training.optimizer": {"learning_rate": 2e-7, "weight_decay": 0.05},
        "training.schedule": {"type": "cosine", "warmup_ratio": 0.03},
        "training.epochs": 1,
        "training.batch_size": 256,
    },
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants(name):
    path = ROOT / "configs" / f"{name}.yaml"
    written = yaml.safe_load(path.read_text())
    load_recipe(TrainRecipe, path)
    for key, value in CONSTANTS[name].items():
        found = written
        for part in key.split("."):
            found = found[part]
        assert found == value, key


@pytest.mark.parametrize("name", CONSTANTS)
def test_twins_and_files_that_comments_name_are_there(name):
    """And what a recipe reads of another one's output is what that one's comment writes."""
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    named = [word.rstrip(".;,") for word in text.split() if word.startswith("configs/")]
    assert any("picture_world" in word for word in named)
    assert all((ROOT / word).exists() for word in named)
    rewards = yaml.safe_load(text)["data"].get("rewards")
    assert rewards is None or f"--output {rewards}" in text


def test_every_published_recipe_stands_in_the_readme():
    page = (ROOT / "README.md").read_text()
    assert all(f"configs/{name}.yaml" in page for name in CONSTANTS)
