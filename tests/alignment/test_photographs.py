"""A whole round on photographs, on a LLaVA with a real tokenizer: with checkpoints that split and
label, and with served ones.

MMPO_RLAIF_V_EXAMPLES names a folder of real ones: `prompts.jsonl` of id, image and question, and
the images.
"""

import contextlib
import json
import math
import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("trl")
from helpers import pictures  # noqa: E402
from helpers.browser import NoBrowser, look_at  # noqa: E402
from helpers.chat_server import ChatTestServer  # noqa: E402
from helpers.kinds import KINDS, make_checkpoint  # noqa: E402
from helpers.served_rounds import MODELS, Feedback  # noqa: E402

from mmpo_jax.alignment.align import run_alignment  # noqa: E402
from mmpo_jax.checkpoints.fingerprints import fingerprint_model  # noqa: E402
from mmpo_jax.core.files import read_table  # noqa: E402
from mmpo_jax.data.records import Turn  # noqa: E402
from mmpo_jax.recipes.align_recipe import AlignRecipe  # noqa: E402
from mmpo_jax.training.metrics import read_metrics  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_device")]

PROMPTS, SAMPLES = 12, 3
SPLIT_PROMPT = "{question}{answer}"
KINDS_OF_THINGS = ("dog", "car", "hat", "sea")
REPLIES = [
    json.dumps({"claims": [{"claim": f"A {one}.", "question": f"Is there a {one}?"}]})
    for one in KINDS_OF_THINGS
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of twelve prompts about photographs."""
    if given := os.environ.get("MMPO_RLAIF_V_EXAMPLES"):
        return Path(given) / "prompts.jsonl"
    folder = tmp_path_factory.mktemp("photographs")
    names = list(pictures.IMAGES)
    rows = []
    for number in range(PROMPTS):
        name = names[number % len(names)]
        (folder / name).write_bytes(pictures.IMAGES[name])
        rows.append({"id": f"{number}", "image": name, "question": f"What is this, no. {number}?"})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "prompts.jsonl"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model") / "llava", KINDS["llava"]).folder


@pytest.fixture(scope="module")
def splitter(tmp_path_factory):
    """A text model that learned to say one of a few replies, whatever it is asked."""
    case = make_checkpoint(tmp_path_factory.mktemp("splitter") / "llama", KINDS["smollm2"])
    processor, theirs = case.processor, case.theirs
    with torch.no_grad():
        for weights in theirs.parameters():
            if weights.ndim > 1:
                weights.mul_(0.2)  # what it was asked is noise, of which there is to be little
    answers = [processor.tokenizer.encode(f"{reply}<|im_end|>") for reply in REPLIES]
    longest = max(map(len, answers))
    optimizer = torch.optim.Adam(theirs.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    theirs.train()
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * (1 - step / 300)
        rows = []
        for answer in answers:
            length = int(torch.randint(5, 60, (), generator=generator))
            words = torch.randint(100, 40_000, (length,), generator=generator)
            said = Turn("user", processor.tokenizer.decode(words.tolist()))
            asked = processor.encode(processor.render([said], True))
            rows.append((asked, answer))
        size = max(len(asked) for asked, _ in rows) + longest
        ids = torch.zeros((len(rows), size), dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (asked, answer) in enumerate(rows):
            ids[row, : len(asked)] = torch.tensor(asked)
            place = slice(len(asked), len(asked) + len(answer))
            ids[row, place] = labels[row, place] = torch.tensor(answer)
        loss = theirs(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Which of the replies it is nobody can know, and everything else of them it does.
    assert loss.item() < 1.5 * math.log(len(REPLIES)) / longest + 0.05, loss.item()
    theirs.save_pretrained(case.folder)
    return case.folder


def recipe(output, model, data, feedback):
    return AlignRecipe.model_validate(
        {
            "output": str(output),
            "model": str(model),
            "data": {"source": "file", "path": str(data)},
            "rounds": 1,
            "lengths": {"prompt": [128], "response": [64]},
            "sampling": {"num_samples": SAMPLES, "max_new_tokens": 8, "batch_size": 12},
            "feedback": {"max_failed": 0.3, **feedback},
            "pairing": {"length_balance": "none", "min_difference": 0.001},
            "training": {
                "optimizer": {"learning_rate": 1e-3},
                "batch_size": 2,
                "max_steps": 4,
                "log_every": 1,
                "save_every": 4,
            },
        }
    )


def check(output, model, reports):
    """Pairs, and a model that learned of them, no step skipped."""
    assert (reports[1].prompts, reports[1].responses) == (PROMPTS, PROMPTS * SAMPLES)
    assert reports[1].pairs > 1 and reports[1].claims > 0
    judged = read_table(output / "round-1" / "judge.parquet")
    assert len({row["score"] for row in judged.to_pylist() if row["reason"] is None}) > 1
    steps = read_metrics(str(output / "round-1" / "train" / "metrics.jsonl"))
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) for row in steps)
    assert fingerprint_model(output / "model") != fingerprint_model(model)


def test_with_checkpoints(model, splitter, data, tmp_path):
    feedback = {
        "score": "log_odds",  # a random labeler says neither yes nor no, one more than the other
        "splitter": {
            "type": "checkpoint",
            "model": str(splitter),
            "prompt": SPLIT_PROMPT,
            "temperature": 1,
            "top_p": 1,
            "max_new_tokens": 64,
        },
    }
    check(tmp_path, model, run_alignment(recipe(tmp_path, model, data, feedback)))
    divided = read_table(tmp_path / "round-1" / "divide.parquet")
    said = {claim for claims in divided["claims"].to_pylist() for claim in claims}
    assert len(said) > 1
    with contextlib.suppress(NoBrowser):
        seen = look_at(tmp_path / "report.html")
        assert (seen.prompts, seen.pictures) == (PROMPTS, PROMPTS)


def test_served(model, data, tmp_path):
    with ChatTestServer(Feedback({}), models=MODELS) as server:
        address = {"type": "chat", "url": server.url}
        feedback = {
            "splitter": {**address, "model": "splitter"},
            "labeler": {**address, "model": "labeler"},
        }
        check(tmp_path, model, run_alignment(recipe(tmp_path, model, data, feedback)))
