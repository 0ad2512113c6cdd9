"""Chat templates: vicuna_v1 as LLaVA and RLAIF-V write it, into every folder of a result."""

import json
import logging

import pytest
from helpers import tiny
from transformers import AutoProcessor, AutoTokenizer

from mmpo_jax.checkpoints.checkpoint import load_processor, load_start
from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.commands.train import run_training
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, Record, Response, Turn
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.train_recipe import TrainRecipe

N = 4  # image tokens
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
ROUNDS = (("what is this?", "a red star."), ("is this a ring?", "a star"), ("what?", "the user"))
DIALOGUE = tuple(
    Turn(role, text)
    for pair in ROUNDS
    for role, text in zip(("user", "assistant"), pair, strict=True)
)
IMAGE = ImageRef("image", b"never decoded here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_sentencepiece_folder(tmp_path_factory.mktemp("vicuna") / "model")


@pytest.fixture(scope="module")
def vicuna(folder):
    return Processor(folder, load_config(folder), "vicuna_v1")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return AutoTokenizer.from_pretrained(folder)


def llava_ids(tokenizer, rounds=ROUNDS, system=SYSTEM, images=1):
    """As LLaVA builds them: the conversation's text cut at `<image>`, the pieces tokenized one by
    one, each without its BOS, image tokens between them, one BOS in front."""
    first, *others = [f"{question} ASSISTANT: {answer}</s>" for question, answer in rounds]
    text = f"{system} USER: " + "<image>\n" * images + "USER: ".join([first, *others])
    pieces = [tokenizer(piece)["input_ids"] for piece in text.split("<image>")]
    assert all(piece[0] == tiny.BOS_ID for piece in pieces)
    ids = pieces[0]
    for piece in pieces[1:]:
        ids = ids + [tiny.IMAGE_ID] * N + piece[1:]
    return ids


def whole(row):
    (response,) = row.responses
    return row.prompt_ids.tolist() + response.ids.tolist()


@pytest.mark.parametrize("split", [1, 3, 5])
def test_a_dialogue_is_llavas(vicuna, tokenizer, split):
    """However much of it is the prompt."""
    row = Record("r", (IMAGE,), DIALOGUE[:split], (Response(DIALOGUE[split:]),))
    row = tokenize(row, vicuna, 2**20, 2**20)
    expected = llava_ids(tokenizer)
    assert whole(row) == expected
    assert tokenizer.unk_token_id not in expected
    # Every answer is counted, its </s> included, its role is not.
    (response,) = row.responses
    answers = [tokenizer(f"{answer}</s>")["input_ids"][1:] for _, answer in ROUNDS[split // 2 :]]
    assert response.ids[response.loss_mask].tolist() == [i for ids in answers for i in ids]


def test_two_responses_share_the_prompt(vicuna, tokenizer):
    answers = ("a red star", "rings")
    row = Record("r", (IMAGE,), DIALOGUE[:1], tuple(Response.of(answer) for answer in answers))
    row = tokenize(row, vicuna, 2**20, 2**20)
    asked = tokenize(Record("r", (IMAGE,), DIALOGUE[:1], ()), vicuna, 2**20, 2**20)
    assert asked.prompt_ids.tolist() == row.prompt_ids.tolist()
    for answer, response in zip(answers, row.responses, strict=True):
        expected = llava_ids(tokenizer, [(ROUNDS[0][0], answer)])
        assert row.prompt_ids.tolist() + response.ids.tolist() == expected
        assert response.loss_mask.all()


def test_a_system_prompt_of_the_data_and_several_images(vicuna, tokenizer):
    turns = (Turn("system", "the user is a star."), *DIALOGUE[:1])
    row = Record("r", (IMAGE, IMAGE), turns, (Response(DIALOGUE[1:]),))
    expected = llava_ids(tokenizer, system="the user is a star.", images=2)
    assert whole(tokenize(row, vicuna, 2**20, 2**20)) == expected


def test_content_may_be_plain_text(vicuna):
    messages = [{"role": turn.role, "content": turn.text} for turn in DIALOGUE]
    parts = [
        {"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in DIALOGUE
    ]
    render = vicuna.tokenizer.apply_chat_template
    assert render(messages, tokenize=False) == render(parts, tokenize=False)


def test_the_hubs_template_gets_what_it_lacks_where_it_can(folder, tokenizer):
    """BOS in front and EOS at the end; no system prompt, and no EOS within a dialogue."""
    own = Processor(folder, load_config(folder))
    row = Record("r", (IMAGE,), DIALOGUE[:1], (Response(DIALOGUE[1:]),))
    ids = whole(tokenize(row, own, 2**20, 2**20))
    assert (ids[0], ids.count(tiny.BOS_ID)) == (tiny.BOS_ID, 1)
    assert (ids[-1], ids.count(tiny.EOS_ID)) == (tiny.EOS_ID, 1)
    assert ids[1] == tokenizer("USER:")["input_ids"][1]


def test_the_log_says_which(folder, tiny_folder, caplog):
    caplog.set_level(logging.INFO)
    load_start(str(folder))
    assert f"{folder}: chat template: its own" in caplog.text
    assert "ends no answer with </s>" in caplog.text
    caplog.clear()
    load_start(str(folder), template="vicuna_v1")
    assert f"{folder}: chat template: vicuna_v1" in caplog.text
    assert "ends no answer" not in caplog.text
    caplog.clear()
    load_start(str(tiny_folder))
    assert "ends no answer" not in caplog.text


def test_another_template_is_another_result(folder, vicuna):
    own = Processor(folder, load_config(folder)).fingerprints()
    assert own["template"] != vicuna.fingerprints()["template"]
    assert own["tokenizer"] == vicuna.fingerprints()["tokenizer"]


@pytest.mark.slow
def test_results_carry_the_template(folder, tokenizer, tmp_path):
    """Adapters and weights, from the folder and from the run: transformers renders with it."""
    (tmp_path / "0.png").write_bytes(png_bytes(sample_scene("test", 0, 0)))
    rows = [{"images": ["0.png"], "prompt": "what is this?", "chosen": "a", "rejected": "rings"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # Where older versions of transformers had it.
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = tiny.HUB_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    recipe = {
        "output": str(tmp_path / "out"),
        "model": str(folder),
        "template": "vicuna_v1",
        "data": {"source": "file", "path": str(tmp_path / "rows.jsonl")},
        "lengths": {"prompt": [128], "response": [16]},
        "training": {"max_steps": 1, "batch_size": 8},
    }
    saved = run_training(TrainRecipe.model_validate(recipe))
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "a"}]},
    ]
    text = AutoTokenizer.from_pretrained(saved).apply_chat_template(messages, tokenize=False)
    assert text == AutoProcessor.from_pretrained(saved).apply_chat_template(messages)
    text = text.replace("<image>", "<image>" * N)
    expected = llava_ids(tokenizer, [("what is this?", "a")])
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == expected
    for name in (saved, str(tmp_path / "out")):  # of the run, its last checkpoint
        row = Record("r", (IMAGE,), DIALOGUE[:1], (Response.of("a"),))
        assert whole(tokenize(row, load_processor(name), 2**20, 2**20)) == expected
    found = [path.name for path in (tmp_path / "out" / "model").glob("chat_template*")]
    assert found == ["chat_template.jinja"]
    assert "chat_template" not in (tmp_path / "out/model/tokenizer_config.json").read_text()
    assert "template: vicuna_v1" in (tmp_path / "out" / "model" / "README.md").read_text()
