"""SmolLM2 with its tokenizer and chat template: ids, log-probs and greedy text of transformers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
import torch
import transformers
from helpers import smollm2

pytestmark = pytest.mark.parity

ROOT = Path(__file__).parents[2]
USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
CODE = 'def area(r):\n    """Of a circle."""\n\n\treturn 3.14159 * r ** 2  # π·r²'
DIALOGUES = {  # prompt, responses
    "short": ([(USER, "What is the capital of Norway?")], ["Oslo.", "I do not know that."]),
    "system": (
        [(SYSTEM, "You answer in one word."), (USER, "The colour of grass?")],
        ["Green", "Grass is green, mostly; in autumn it may be yellow."],
    ),
    "several turns": (
        [
            (USER, "Name three rivers of Germany."),
            (ASSISTANT, "1. Elbe\n2. Weser\n3. Ems"),
            (USER, "And one of Austria?\n\nOnly its name, please."),
        ],
        ["The Mur", "Danube (Donau)", "Inn, which begins in Switzerland"],
    ),
    "code": (
        [(USER, f"What is wrong here?\n```python\n{CODE}\n```")],
        [CODE, f"Nothing:\n\n{CODE}"],
    ),
    "scripts": (
        [(USER, "Übersetze: «Καλημέρα κόσμε», 你好，世界! 🙂👩‍🚀 naïve café")],
        ["Guten Morgen, Welt! 🙂", "早上好，世界 — x² ≥ 10⁻³ €"],
    ),
    "numbers": ([(USER, "12345 * 678 = ?")], ["8,369,910", "= 8369910.00", "8 369 910"]),
}


LENGTHS = "lengths={prompt: [160], response: [64]}"
NEW_TOKENS = 16


def rows(dialogues=DIALOGUES):
    return [
        {"id": name, "prompt": messages(prompt), "responses": responses}
        for name, (prompt, responses) in dialogues.items()
    ]


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


@pytest.fixture(scope="module")
def tokenizer(short_folder):
    return transformers.AutoTokenizer.from_pretrained(short_folder)


def ids_of(tokenizer, turns, for_answer=False):
    return tokenizer.apply_chat_template(
        messages(turns), tokenize=True, add_generation_prompt=for_answer, return_dict=False
    )


def check_ids(tokenizer, scores):
    """A dialogue's ids are those of the template; what it writes behind the last EOS, a line
    break, belongs to no response."""
    assert [row["id"] for row in scores] == list(DIALOGUES)
    for row, (prompt, responses) in zip(scores, DIALOGUES.values(), strict=True):
        assert row["prompt_ids"] == ids_of(tokenizer, prompt, True)
        assert len(row["response_ids"]) == len(responses)
        for ids, text in zip(row["response_ids"], responses, strict=True):
            whole = ids_of(tokenizer, [*prompt, (ASSISTANT, text)])
            ours = [*row["prompt_ids"], *ids]
            assert ours == whole[: len(ours)]
            assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
            assert tokenizer.decode(whole[len(ours) :]) == "\n"


def check_log_probs(theirs, scores):
    for row in scores:
        for found, ids in zip(row["logps"], row["response_ids"], strict=True):
            assert found == pytest.approx(
                smollm2.log_prob(theirs, row["prompt_ids"], ids), rel=0, abs=1e-3
            )


@pytest.mark.slow
def test_ids_and_log_probs(mmpo, tokenizer, short_folder, short_theirs):
    scores = mmpo("score", short_folder, rows(), "--tokens", LENGTHS)
    check_ids(tokenizer, scores)
    check_log_probs(short_theirs, scores)


@pytest.mark.slow
def test_a_bfloat16_folder_computed_in_float32(mmpo, short_theirs):
    """Its weights are read as they are, and they are others."""
    folder = smollm2.make_folder(6, "bfloat16")
    some = rows({name: DIALOGUES[name] for name in ("short", "several turns")})
    scores = mmpo("score", folder, some, "--tokens", LENGTHS, "scoring.compute_dtype=float32")
    check_log_probs(smollm2.load_theirs(folder), scores)
    with pytest.raises(AssertionError):
        check_log_probs(short_theirs, scores)


@pytest.mark.slow
def test_greedy_text_of_the_whole_model(tokenizer, tmp_path):
    """All layers, word for word; in a process of its own, as the flags with which tests compile
    fast make programs that run slowly."""
    folder, data, out = smollm2.make_folder(), tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    some = {name: DIALOGUES[name] for name in ("short", "several turns", "code", "scripts")}
    data.write_text("".join(json.dumps(row) + "\n" for row in rows(some)))
    flags = ["--model", folder, "--data", data, "--output", out, LENGTHS]
    flags += ["--temperature", "0", "--num-samples", "1", "--max-new-tokens", str(NEW_TOKENS)]
    subprocess.run(
        [sys.executable, "-m", "mmpo_jax.cli", "generate", *map(str, flags)],
        check=True,
        env=os.environ | {"XLA_FLAGS": ""},
        cwd=ROOT,
    )
    written = [json.loads(line) for line in out.read_text().splitlines()]
    theirs = smollm2.load_theirs(folder)
    for row, (prompt, _) in zip(written, some.values(), strict=True):
        text, finished = greedy(theirs, tokenizer, prompt)
        assert [found.strip() for found in row["responses"]] == [text.strip()]
        assert row["finished"] == [finished]
    assert "Oslo" in written[0]["responses"][0]
    assert True in [row["finished"][0] for row in written]


def greedy(theirs, tokenizer, prompt):
    """(text, whether it ended by itself) by transformers' own loop."""
    ids = torch.tensor([ids_of(tokenizer, prompt, True)])
    made = theirs.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW_TOKENS
    )[0, ids.shape[1] :]
    finished = tokenizer.eos_token_id in made.tolist()
    return tokenizer.decode(made, skip_special_tokens=True), finished
