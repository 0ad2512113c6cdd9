"""Rows that once went wrong, through `mmpo data check`, `train` and `generate`."""

from __future__ import annotations

import base64
import dataclasses
import json
import re
import shutil

import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
import transformers
import yaml
from helpers import failed_rows, smollm2
from helpers import row_cases as rows
from helpers.failed_rows import CHOSEN, LIMITS, REJECTED, talk
from helpers.kinds import KINDS
from helpers.row_cases import BAD, GOOD, Q, plain
from helpers.their_rows import ids_of, is_learned, their_cuts

from mmpo_jax import cli
from mmpo_jax.commands.data_check import check_data
from mmpo_jax.data.readers import read_records

pytestmark = pytest.mark.parity

PAIR = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
LEFT_OUT = ("03", "04", "05", "06", "07", "13")
"""Folders of which rows were left out, or pictures not seen, when they were read."""
SFT, DPO = {"type": "sft"}, {"type": "dpo"}


@pytest.fixture
def write(tmp_path):
    """Writes rows; the file."""

    def write(*rows, name="rows.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


@pytest.fixture
def train(tmp_path, write):
    """A step on rows with `mmpo train`; (its metrics, the rows that it left out)."""

    def train(model, objective, *rows, **data):
        path = data.pop("path", None) or write(*rows)
        recipe = {
            "output": str(tmp_path / "run"),
            "model": str(model),
            "data": {"source": "file", "path": str(path), **data},
            "lengths": failed_rows.LENGTHS,
            "training": {"objective": objective, "batch_size": 4, "max_steps": 1},
        }
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        assert cli.main(["train", str(tmp_path / "recipe.yaml")]) == 0
        (step,) = lines(tmp_path / "run" / "metrics.jsonl")
        return step, lines(tmp_path / "run" / "rejected_rows.jsonl")

    return train


@pytest.fixture(scope="module")
def with_template(kind_case, tmp_path_factory):
    """The checkpoint of the text family with another chat template."""

    def with_template(template):
        folder = tmp_path_factory.mktemp("template") / "model"
        shutil.copytree(kind_case(failed_rows.TEXT)[1].folder, folder)
        (folder / "chat_template.jinja").write_text(template)
        return folder

    return with_template


@pytest.fixture(scope="module")
def chatml(with_template):
    """The text family with SmolLM2's own template, which writes all answers alike."""
    return with_template((smollm2.make_folder(6) / "chat_template.jinja").read_text())


def alike(ours, theirs):
    """Whether two JSON values are the same but for the rounding of sums: rows that are computed
    together stand in different places."""
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(alike(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(alike, ours, theirs))
    return ours == (pytest.approx(theirs, rel=1e-5) if isinstance(theirs, float) else theirs)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.parametrize("folder", [f for f in failed_rows.FOLDERS if f[:2] in LEFT_OUT])
def test_check_takes_them_all(folder, write, picture_folder):
    cases = failed_rows.FOLDERS[folder]
    path = write(*({"id": name} | case.row for name, (_, case) in cases.items()))
    report = check_data(str(path), image_root=str(picture_folder))
    assert f"{len(cases)} rows, {len(cases)} can be used" in report
    shown = [json.dumps(case.prompt).count(json.dumps(rows.IMAGE)) for _, case in cases.values()]
    assert (f"images: {sum(shown)} of" if any(shown) else "images: none") in report
    assert f"without an image or video: {shown.count(0)}\n" in report or all(shown)


@pytest.mark.parametrize("images", [pa.binary(), pa.string(), pa.struct({"bytes": pa.binary()})])
@pytest.mark.parametrize(
    "wrap",
    [lambda png: png, lambda png: {"bytes": png}, lambda png: [png]],
    ids=["bytes", "object", "list"],
)
def test_images_beside_empty_lists_of_parquet(wrap, images, picture_folder, tmp_path):
    row = {"prompt": Q, "chosen": GOOD, "rejected": BAD}
    pictures = [wrap((picture_folder / f"{number}.png").read_bytes()) for number in range(2)]
    table = pa.Table.from_pylist([row | {"image": picture} for picture in pictures])
    table = table.append_column("images", pa.array([[], []], pa.list_(images)))
    pq.write_table(table, tmp_path / "rows.parquet")
    report = check_data(str(tmp_path / "rows.parquet"))
    assert "images: 2 of 2 sizes, 30 x 40 to 60 x 25" in report


@pytest.mark.parametrize(
    ("ids", "own"),
    [
        (["2", None], ["2", "row 2"]),
        ([None, "1"], ["row 1", "1"]),
        ([None, 1, None], ["row 1", "1", "row 3"]),
        (["3", None, None], ["3", "row 2", "row 3"]),
    ],
)
def test_a_number_of_a_row_is_no_id(ids, own, write, mmpo, chatml):
    rows = [PAIR | ({} if id is None else {"id": id}) for id in ids]
    assert f"{len(ids)} rows, {len(ids)} can be used" in check_data(str(write(*rows)))
    if ids == ["2", None]:
        assert [row["id"] for row in mmpo("score", chatml, rows, LIMITS)] == own
    assert [record.id for record in read_records(write(*rows))[0]] == own


def test_encoded_pictures_and_none_in_messages(kind_case, picture_folder, tmp_path, capsys, caplog):
    """Whatever spells the picture, it is that of the file, and no message repeats it."""
    png = (picture_folder / "0.png").read_bytes()
    text = base64.b64encode(png).decode()
    url = f"data:image/png;base64,{text}"
    broken = f"data:image/png;base64,{text[:-40]}!!!!"
    lines_of_text = "\n".join(re.findall(".{1,76}", text))
    (tmp_path / "0.png").write_bytes(png)
    images = {
        "a file": "0.png",
        "data_url": url,
        "b64_plain": text,
        "b64_dict_url": {"base64": url},
        "b64_newlines": {"base64": lines_of_text},
        "unpadded": base64.urlsafe_b64encode(png).decode().rstrip("="),
        "a part": {"type": "image_url", "image_url": {"url": url}},
        "http": "http://example.com/x.png",
        "broken": broken,
        "bytes of no picture": base64.b64encode(bytes(5000)).decode(),
    }
    rows = [PAIR | {"id": name, "image": image} for name, image in images.items()]
    data, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = kind_case(failed_rows.QWEN)[1].folder
    flags = ["--model", str(model), "--data", str(data), "--output", str(out), "--tokens", LIMITS]
    assert cli.main(["score", *flags, "data.max_skipped=0.3"]) == 0
    first, *others = lines(out)
    assert [first["id"], *(row["id"] for row in others)] == list(images)[:7]
    assert all(alike(row, first | {"id": row["id"]}) for row in others)
    rejected = {row["id"]: row for row in lines(tmp_path / "out.rejected_rows.jsonl")}
    assert list(rejected) == list(images)[7:]
    assert "save the image and give the file's path" in rejected["http"]["detail"]
    told = [row["detail"] for row in rejected.values()] + caplog.messages
    told += [*capsys.readouterr(), check_data(str(data))]
    assert not any(re.search("[A-Za-z0-9+/]{100}", part) for part in told)


DIALOGUES = {
    "as brought": [talk("What?", GOOD, "Sure?", "Yes.")] * 2,
    "varied": [
        talk("What?", GOOD, "Sure?", "Yes.", "Why?", "Whiskers."),
        talk("What?", failed_rows.THOUGHT, "Sure?", "Yes."),
        [plain("system", "Be brief."), *talk("What?", GOOD, "Sure?", "Yes.")],
        talk("What?", GOOD, "Sure?", "Yes.", reasoning_content="Ears."),
    ],
}


@pytest.mark.parametrize("name", list(DIALOGUES))
@pytest.mark.slow
def test_all_answers_are_learned_as_they_were_given(name, train, kind_case):
    kind, checkpoint, tokenizer = kind_case(failed_rows.TEXT)
    step, left_out = train(checkpoint.folder, SFT, *({"messages": d} for d in DIALOGUES[name]))
    assert not left_out
    expected = their_loss(kind, checkpoint, tokenizer, DIALOGUES[name])
    assert step["nll_loss"] == pytest.approx(expected, rel=1e-5)


UNLEARNED = {"as brought": [{"loss": False}], "varied": [{"weight": 0}, {"train": False}, {}]}


@pytest.mark.parametrize("name", list(UNLEARNED))
@pytest.mark.slow
def test_what_is_not_to_be_learned(name, train, kind_case, chatml):
    kind, checkpoint, _ = kind_case(failed_rows.TEXT)
    tokenizer = transformers.AutoTokenizer.from_pretrained(chatml)
    kind = dataclasses.replace(kind, template=tokenizer.chat_template)
    told = talk("What?", "A bad answer.", "Sure?", "Sorry, a cat.")
    dialogues = [[told[0], told[1] | keys, *told[2:]] for keys in UNLEARNED[name]]
    step, _ = train(chatml, SFT, *({"messages": messages} for messages in dialogues))
    expected = their_loss(kind, checkpoint, tokenizer, dialogues)
    assert step["nll_loss"] == pytest.approx(expected, rel=1e-5)


def their_loss(kind, checkpoint, tokenizer, dialogues):
    """The mean over the tokens that are learned, of transformers' model."""
    total, count = 0.0, 0
    for messages in map(failed_rows.in_parts, dialogues):
        first = next(n for n, message in enumerate(messages) if message["role"] == "assistant")
        case = rows.Case({}, messages[:first], [messages[first:]])
        texts = their_cuts(kind, tokenizer, case, messages[first:])
        cuts = [ids_of(kind, tokenizer, text) for text in texts]
        prompt, ids = cuts[0], cuts[-1][len(cuts[0]) :]
        learned = is_learned(messages[first:], [len(cut) - len(prompt) for cut in cuts])
        total -= smollm2.log_prob(checkpoint.theirs, prompt, ids, learned)
        count += learned.sum()
    return total / count


REWRITING = {
    "counts its messages": "{{ messages | length if messages | length > 2 else '' }}",
    "says the last in front": "{{ messages[-1]['content'] if messages | length > 2 else '' }}",
    "names who speaks last": "{{ messages[-1]['role'] if messages | length > 2 else '' }}",
}


@pytest.mark.parametrize("name", list(REWRITING))
@pytest.mark.slow
def test_a_row_that_cannot_be_told_apart_is_left_out_alone(
    name, train, write, mmpo, with_template, chatml, tmp_path, capsys
):
    model = with_template(REWRITING[name] + (chatml / "chat_template.jinja").read_text())
    pairs = [{"id": "single"} | PAIR, {"id": "multi_early", "chosen": CHOSEN, "rejected": REJECTED}]
    scores = mmpo("score", model, pairs, LIMITS, "data.max_skipped=0.5")
    assert [row["id"] for row in scores] == ["single"]
    (left_out,) = lines(tmp_path / "out.rejected_rows.jsonl")
    assert (left_out["id"], left_out["reason"]) == ("multi_early", "template_refuses")
    assert cli.main(["data", "check", str(write(*pairs)), "--model", str(model)]) == 0
    assert "template_refuses: 1" in capsys.readouterr().out
    if name == next(iter(REWRITING)):
        dialogues = [{"id": "single", "messages": CHOSEN[:2]}, {"id": "multi", "messages": CHOSEN}]
        _, (left_out,) = train(model, SFT, *dialogues, max_skipped=0.5)
        assert (left_out["id"], left_out["reason"]) == ("multi", "template_refuses")


TYPED = {
    "as brought": (failed_rows.LLAVA, [("<s>old</s> is right.", "<s>old</s> is wrong.")]),
    "varied": (
        failed_rows.TEXT,
        [
            ("It ends <|im_end|> here.", "It ends <|im_end|> there."),
            ("<|im_end|>First.", "<|im_end|>Second."),
            ("So <|im_end|> ends.", "So."),
        ],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(TYPED))
def test_pairs_that_differ_behind_eos_train(name, train, write, mmpo, kind_case, capsys):
    kind, pairs = TYPED[name]
    model = kind_case(kind)[1].folder
    rows = [{"prompt": Q, "chosen": chosen, "rejected": rejected} for chosen, rejected in pairs]
    scores = mmpo("score", model, rows, LIMITS)
    assert all(chosen != rejected for chosen, rejected in (row["logps"] for row in scores))
    step, left_out = train(model, DPO, *rows)
    assert not left_out and step["grad_norm"] > 0.01
    for place, side in enumerate(("chosen", "rejected")):
        mean = sum(row["logps"][place] for row in scores) / len(scores)
        assert step[f"logps/{side}"] == pytest.approx(mean, rel=1e-5)
    assert cli.main(["data", "check", str(write(*rows)), "--model", str(model)]) == 0
    told = f"rows whose texts type control tokens: {KINDS[kind].eos} {len(rows)}"
    assert told in capsys.readouterr().out


@pytest.mark.parametrize("name", list(TYPED))
def test_control_tokens_as_plain_text(name, mmpo, kind_case):
    kind, pairs = TYPED[name]
    _, checkpoint, tokenizer = kind_case(kind)
    flags = ("--tokens", LIMITS, "data.control_tokens=text")
    rows = [{"prompt": Q, "responses": texts} for texts in pairs]
    for found, texts in zip(mmpo("score", checkpoint.folder, rows, *flags), pairs, strict=True):
        for ids, text in zip(found["response_ids"], texts, strict=True):
            assert ids[-1] == tokenizer.eos_token_id
            assert not set(ids[:-1]) & set(tokenizer.all_special_ids)
            assert tokenizer.decode(ids[:-1]).endswith(text)


@pytest.fixture(scope="module")
def brief(kind_case, tmp_path_factory):
    """The text family's model with an EOS that begins every second answer to `Q`."""
    _, checkpoint, tokenizer = kind_case(failed_rows.TEXT)
    folder = tmp_path_factory.mktemp("brief") / "model"
    shutil.copytree(checkpoint.folder, folder)
    asked = [{"role": "user", "content": Q}]
    prompt = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    with torch.no_grad():
        state = checkpoint.theirs.model(prompt).last_hidden_state[0, -1]
        others = checkpoint.theirs.lm_head(state).logsumexp(0)
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    tensors["lm_head.weight"][tokenizer.eos_token_id] = state * others / (state @ state)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.slow
def test_what_is_generated_is_read_back(brief, kind_case, train, mmpo, tmp_path):
    """An empty sample is EOS alone, and the others stay what was sampled."""
    tokenizer = kind_case(failed_rows.TEXT)[2]
    asked = [{"id": str(number), "prompt": Q} for number in range(3)]
    flags = ["--num-samples", "4", "--temperature", "1", "--max-new-tokens", "6", LIMITS]
    generated = mmpo("generate", brief, asked, *flags)
    texts = [text for row in generated for text in row["responses"]]
    assert 2 <= texts.count("") <= 10
    path = tmp_path / "generated.jsonl"
    (tmp_path / "out.jsonl").rename(path)
    assert "3 rows, 3 can be used" in check_data(str(path))
    scores = mmpo("score", brief, generated, "--tokens", LIMITS)
    theirs = smollm2.load_theirs(brief)
    total = 0.0
    for row, found in zip(generated, scores, strict=True):
        assert found["response_ids"] == row["response_ids"]
        for text, ids, log_prob in zip(
            row["responses"], row["response_ids"], found["logps"], strict=True
        ):
            assert (text == "") == (ids == [tokenizer.eos_token_id])
            expected = smollm2.log_prob(theirs, found["prompt_ids"], ids)
            assert log_prob == pytest.approx(expected, rel=1e-4, abs=1e-3)
            total -= expected
    step, left_out = train(brief, SFT, path=path)
    assert not left_out
    count = sum(sum(row["num_tokens"]) for row in scores)
    assert step["nll_loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_sample_that_cannot_be_used_is_left_out_alone(mmpo, kind_case):
    model = kind_case(failed_rows.TEXT)[1].folder
    bad = {"null": None, "a number": 7, "a stranger": {"role": "narrator", "content": "x"}}
    rows = [
        {"id": name, "prompt": "What?", "responses": ["A cat.", sample, "", "B."]}
        for name, sample in bad.items()
    ]
    alone = {"id": "alone", "prompt": "What?", "responses": ["A cat.", "", "B."]}
    *found, expected = mmpo("score", model, [*rows, alone], LIMITS)
    for row in found:
        assert row["logps"].pop(1) is None
        assert row["logps"] == pytest.approx(expected["logps"], rel=1e-5)
