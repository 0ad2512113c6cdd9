"""Steps of DPO on SmolLM2 as `mmpo train` takes them, and as TRL's trainer does."""

import copy
import json

import numpy as np
import pytest

pytest.importorskip("torch")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
import torch  # noqa: E402
import transformers  # noqa: E402
from helpers import smollm2  # noqa: E402

from mmpo_jax.commands.train import run_training  # noqa: E402
from mmpo_jax.recipes.train_recipe import TrainRecipe  # noqa: E402
from mmpo_jax.training.metrics import FILE, read_metrics  # noqa: E402

pytestmark = [pytest.mark.parity, pytest.mark.slow]

STEPS, RATE = 3, 5e-5
EPSILON = 1e-4
"""Large, or Adam would make whole steps of the rounding of gradients that are nearly zero."""
PAIRS = [  # prompt, chosen, rejected
    ("Is the Earth flat?", "No. It is nearly a sphere.", "Yes, it is as flat as a table."),
    ("Add 7 and 5.", "12", "7 and 5 make 75, since one writes them side by side."),
    ("Write a haiku about rain.", "Rain on the tin roof,\na cat asleep", "Rain is wet."),
    ("Who wrote «Faust»?", "Johann Wolfgang von Goethe", "I am sorry, I cannot answer that! 🙃"),
]
COMPARED = ("loss", "rewards/margins", "rewards/chosen", "logps/chosen", "logps/rejected")


@pytest.fixture(scope="module")
def theirs(short_folder, tmp_path_factory):
    """(the trained model, a row of metrics per step, [prompt, chosen, rejected] ids of each row).

    As plain text, to which TRL adds EOS: of messages it would also train the line break that the
    template writes behind EOS.
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(short_folder)

    def rendered(text):
        message = {"role": "user", "content": text}
        return tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True)

    rows = [{"prompt": rendered(p), "chosen": c, "rejected": r} for p, c, r in PAIRS]
    model = smollm2.load_theirs(short_folder)
    # Torch keeps the gradient of inputs from the padding token, which here is EOS, and prompts have
    # it: a gradient that is the loss's has it too.
    model.get_input_embeddings().padding_idx = None
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("trl")),
            per_device_train_batch_size=len(PAIRS),
            num_train_epochs=STEPS,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            weight_decay=0.01,
            adam_epsilon=EPSILON,
            max_length=None,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    ids = [[row[name] for name in names] for row in copy.deepcopy(list(trainer.train_dataset))]
    trainer.train()
    steps = [row for row in trainer.state.log_history if "loss" in row]
    return trainer.model.eval(), steps, ids


def test_steps_equal_trl(theirs, short_folder, short_theirs, mmpo, tmp_path):
    trained, expected, ids = theirs
    rows = [
        {"id": str(number), "prompt": prompt, "chosen": chosen, "rejected": rejected}
        for number, (prompt, chosen, rejected) in enumerate(PAIRS)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = TrainRecipe.model_validate(
        {
            "output": str(tmp_path / "run"),
            "model": str(short_folder),
            "data": {"source": "file", "path": str(tmp_path / "pairs.jsonl")},
            "lengths": {"prompt": [64], "response": [32]},
            "training": {
                "objective": {"type": "dpo", "beta": 0.1},
                "optimizer": {"learning_rate": RATE, "epsilon": EPSILON},
                "schedule": {"warmup_ratio": 0},
                "epochs": STEPS,
                "batch_size": len(PAIRS),
                "log_every": 1,
            },
        }
    )
    folder = run_training(recipe)
    steps = read_metrics(str(tmp_path / "run" / FILE))
    assert len(steps) == len(expected) == STEPS
    for ours, row in zip(steps, expected, strict=True):
        for name in COMPARED:
            assert ours[name] == pytest.approx(row[name], rel=2e-4, abs=2e-4), name
    assert steps[-1]["rewards/margins"] > 0.01

    check_weights(smollm2.load_theirs(folder), trained, short_theirs)
    # What was trained is what the folder scores.
    scores = mmpo("score", folder, rows, "--tokens")
    for row, (prompt, *responses) in zip(scores, ids, strict=True):
        assert [row["prompt_ids"], *row["response_ids"]] == [prompt, *responses]
        for found, response in zip(row["logps"], responses, strict=True):
            assert found == pytest.approx(smollm2.log_prob(trained, prompt, response), abs=5e-3)


@torch.no_grad()
def check_weights(ours, theirs, start):
    """How every parameter moved, up to a fiftieth of how far it did."""
    before, after = start.state_dict(), theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        moved = (after[name] - before[name]).numpy()
        distance = np.linalg.norm((tensor - after[name]).numpy())
        assert np.linalg.norm(moved) > 0 and distance < 0.02 * np.linalg.norm(moved), name
