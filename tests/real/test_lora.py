"""Adapters of SmolLM2: PEFT's are read here, ours are read by PEFT."""

import json

import pytest

pytest.importorskip("torch")
peft = pytest.importorskip("peft")
import torch  # noqa: E402
from helpers import smollm2  # noqa: E402

from mmpo_jax.commands.train import run_training  # noqa: E402
from mmpo_jax.recipes.train_recipe import TrainRecipe  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

LENGTHS = "lengths={prompt: [64], response: [32]}"
ROWS = [
    {"id": "0", "prompt": "Name a colour.", "chosen": "Blue, as the sea", "rejected": "7"},
    {"id": "1", "prompt": "2 + 2?", "chosen": "Four.", "rejected": "Five; or rather: 22."},
]


def check(theirs, scores, tolerance=1e-3):
    for row in scores:
        for found, ids in zip(row["logps"], row["response_ids"], strict=True):
            expected = smollm2.log_prob(theirs, row["prompt_ids"], ids)
            assert found == pytest.approx(expected, rel=0, abs=tolerance)


def test_an_adapter_of_peft(mmpo, short_folder, short_theirs, tmp_path):
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", base_model_name_or_path=str(short_folder)
    )
    theirs = peft.get_peft_model(smollm2.load_theirs(short_folder), config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in sorted(theirs.named_parameters()):
            if ".lora_B." in name:  # zero until it is trained
                tensor.copy_(0.02 * torch.randn(tensor.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "adapter")
    scores = mmpo("score", tmp_path / "adapter", ROWS, "--tokens", LENGTHS)
    check(theirs, scores)
    with pytest.raises(AssertionError):
        check(short_theirs, scores, tolerance=0.1)


@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_an_adapter_that_is_trained_here(mmpo, short_folder, tmp_path, options):
    """PEFT's model with it gives the log-probs of our folders, the adapter's and the merged."""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    recipe = TrainRecipe.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": str(short_folder),
            "data": {"source": "file", "path": str(tmp_path / "pairs.jsonl")},
            "lengths": {"prompt": [64], "response": [32]},
            "training": {
                "objective": {"type": "dpo"},
                "lora": {"target": ".*", "rank": 4, "alpha": 8, **options},
                "optimizer": {"learning_rate": 1e-3},
                "epochs": 3,
                "batch_size": len(ROWS),
            },
        }
    )
    merged = run_training(recipe)
    adapter = tmp_path / "run" / "adapter"
    theirs = peft.PeftModel.from_pretrained(smollm2.load_theirs(short_folder), adapter).eval()
    scores = mmpo("score", merged, ROWS, "--tokens", LENGTHS)
    check(theirs, scores)
    assert mmpo("score", adapter, ROWS, "--tokens", LENGTHS) == scores
    with theirs.disable_adapter(), pytest.raises(AssertionError):
        check(theirs, scores, tolerance=0.1)
