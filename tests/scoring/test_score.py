"""`mmpo score` and `mmpo generate` from the command line, against transformers."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import tiny
from helpers.score_rows import ASK, LONG, PAIRS, SHORT, read_rows, write_rows

from mmpo_jax.checkpoints.huggingface import save_model

torch = pytest.importorskip("torch")
import transformers  # noqa: E402
from helpers import checks, families  # noqa: E402
from helpers import pictures as pictures_of_tests  # noqa: E402
from PIL import Image  # noqa: E402

pytestmark = pytest.mark.parity

RANKING = {
    "id": "d",
    "images": ["1.png"],
    "prompt": ASK,
    "responses": [SHORT, LONG, "yes", "two rings ."],
}
WORDS = [
    {"prompt": "what is this ?", "chosen": "a red star", "rejected": "two blue ring and a star"},
    {"prompt": "red green blue " * 7, "responses": ["a", "a red red ring", "this is two", "and"]},
]


@torch.no_grad()
def their_log_prob(model, inputs, start):
    """Sum over the tokens from `start` on, in float64."""
    logits = model(**inputs).logits[0, start - 1 : -1].double()
    labels = inputs["input_ids"][0, start:]
    return torch.log_softmax(logits, -1).gather(1, labels[:, None]).sum().item()


class TestLlava:
    @pytest.fixture(scope="class")
    def theirs(self, tiny_folder):
        model = transformers.LlavaForConditionalGeneration.from_pretrained(
            tiny_folder, dtype=torch.float32, attn_implementation="eager"
        )
        return model.eval(), transformers.AutoProcessor.from_pretrained(tiny_folder)

    def inputs(self, processor, pictures, row, answer):
        """What transformers' processor makes of a row and an answer; None for the prompt alone."""
        turns = row["prompt"]
        if isinstance(turns, str):
            parts = [{"type": "image"} for _ in row.get("images", [])]
            turns = [{"role": "user", "content": [*parts, {"type": "text", "text": turns}]}]
        if answer is not None:
            turns = [*turns, {"role": "assistant", "content": answer}]
        text = processor.apply_chat_template(turns, add_generation_prompt=answer is None)
        images = [Image.open(pictures / name).convert("RGB") for name in row.get("images", [])]
        options = {"images": images} if images else {}
        return processor(text=text, add_special_tokens=False, return_tensors="pt", **options)

    @pytest.fixture
    def scored(self, mmpo, tiny_folder, pictures):
        def scored(rows, *flags):
            return mmpo("score", tiny_folder, write_rows(pictures / "rows.jsonl", rows), *flags)

        return scored

    @pytest.mark.parametrize("rows", [PAIRS, [*PAIRS, RANKING]], ids=["pairs", "with-four"])
    def test_log_probs_and_ids_are_theirs(self, scored, theirs, pictures, rows):
        model, processor = theirs
        lines = scored(rows, "--tokens", "--batch-size", "2")
        assert [line["id"] for line in lines] == [row["id"] for row in rows]
        for row, line in zip(rows, lines, strict=True):
            answers = row.get("responses") or [text(row["chosen"]), text(row["rejected"])]
            prompt = self.inputs(processor, pictures, row, None)["input_ids"][0].tolist()
            assert line["prompt_ids"] == prompt
            expected = []
            for answer, ids in zip(answers, line["response_ids"], strict=True):
                inputs = self.inputs(processor, pictures, row, answer)
                assert [*prompt, *ids] == inputs["input_ids"][0].tolist()
                assert ids[-1] == tiny.EOS_ID
                expected.append(their_log_prob(model, inputs, len(prompt)))
            assert line["num_tokens"] == [len(ids) for ids in line["response_ids"]]
            np.testing.assert_allclose(line["logps"], expected, rtol=1e-5, atol=2e-4)
            assert len(set(expected)) == len(answers)

    @pytest.mark.slow
    def test_options_change_how_and_not_what(self, scored, caplog):
        first = scored(PAIRS)
        assert set(first[0]) == {"id", "logps", "num_tokens"}
        again = scored(PAIRS, "lengths={prompt: [64], response: [24]}", "attention=xla")
        same = [line["logps"] for line in again]
        np.testing.assert_allclose(
            np.concatenate(same), np.concatenate([x["logps"] for x in first]), rtol=1e-5
        )
        half = scored(PAIRS, "scoring.compute_dtype=bfloat16")
        assert half[0]["logps"] != first[0]["logps"]
        np.testing.assert_allclose(half[0]["logps"], first[0]["logps"], rtol=0.1)
        cut = scored(PAIRS, "lengths={prompt: [64], response: [3]}", "--tokens")
        assert cut[0]["num_tokens"] == [3, 3]
        assert "2 responses were cut to 3 tokens" in caplog.text

    @pytest.mark.slow
    def test_float16_files_are_computed_in_float32(
        self, mmpo, tiny_folder, tiny_model, pictures, tmp_path
    ):
        save_model(tmp_path / "half", *tiny_model, tiny_folder, dtype="float16")
        data = write_rows(pictures / "rows.jsonl", PAIRS[:1])
        default = mmpo("score", tmp_path / "half", data)
        assert default == mmpo("score", tmp_path / "half", data, "scoring.compute_dtype=float32")
        assert default != mmpo("score", tmp_path / "half", data, "scoring.compute_dtype=bfloat16")

    def test_rows_left_out(self, scored, pictures, tmp_path):
        (pictures / "broken.png").write_bytes(b"no picture")
        bad = {
            "broken": {"images": ["broken.png"], "prompt": ASK, "chosen": "a", "rejected": "yes"},
            "silent": {"prompt": ASK},
            "empty": {"prompt": ASK, "responses": []},
            "one": {"prompt": ASK, "chosen": "yes"},
        }
        rows = [{"id": name} | row for name, row in bad.items()]
        lines = scored([rows[0], PAIRS[1], *rows[1:]], "data.max_skipped=0.8")
        assert [line["id"] for line in lines] == ["b"]
        skipped = read_rows(tmp_path / "out.rejected_rows.jsonl")
        assert {row["id"]: row["reason"] for row in skipped} == {
            "broken": "image_broken",
            "silent": "empty_response",
            "empty": "empty_response",
            "one": "incomplete_pair",
        }
        scored(PAIRS)
        assert not (tmp_path / "out.rejected_rows.jsonl").exists()

    @pytest.mark.slow
    def test_greedy_generation_is_theirs(self, mmpo, theirs, tiny_folder, pictures, tmp_path):
        """And of rows with responses the prompt is read only; what comes out is scored again."""
        model, processor = theirs
        data = write_rows(pictures / "prompts.jsonl", [*PAIRS, RANKING])
        flags = "--temperature", "0", "--num-samples", "1", "--max-new-tokens", "12"
        lines = mmpo("generate", tiny_folder, data, *flags)
        assert [line["id"] for line in lines] == ["a", "b", "c", "d"]
        for row, line in zip([*PAIRS, RANKING], lines, strict=True):
            inputs = self.inputs(processor, pictures, row, None)
            with torch.no_grad():
                tokens = model.generate(
                    **inputs, do_sample=False, max_new_tokens=12, pad_token_id=tiny.PAD_ID
                )
            tokens = tokens[0, inputs["input_ids"].shape[1] :]
            expected = processor.tokenizer.decode(tokens, skip_special_tokens=True).strip()
            assert line["responses"] == [expected]
        generated = shutil.copy(tmp_path / "out.jsonl", tmp_path / "generated.jsonl")
        again = mmpo("score", tiny_folder, generated, "--tokens")
        before = mmpo("score", tiny_folder, data, "--tokens")
        assert [line["prompt_ids"] for line in again] == [line["prompt_ids"] for line in before]

    @pytest.mark.parametrize("held_as", ["bytes", "files-elsewhere", "files-below"])
    @pytest.mark.slow
    def test_what_is_generated_is_scored_with_its_images(
        self, mmpo, tiny_folder, pictures, tmp_path, held_as
    ):
        rows = [PAIRS[0], PAIRS[1], RANKING, RANKING | {"id": "e"}]
        folder = (
            tmp_path / "below" / "data" if held_as == "files-below" else tmp_path.parent / held_as
        )
        shutil.copytree(pictures, folder, dirs_exist_ok=True)
        data = folder / "rows.jsonl"
        if held_as == "bytes":
            data = folder / "rows.parquet"
            pq.write_table(pa.Table.from_pylist([with_bytes(row, folder) for row in rows]), data)
        else:
            write_rows(data, rows)
        flags = "--num-samples", "2", "--temperature", "1.5", "--max-new-tokens", "6"
        lines = mmpo("generate", tiny_folder, data, *flags)
        copies = [file.name for file in (tmp_path / "out.images").glob("*")]
        if held_as == "files-below":
            assert (lines[0]["images"], copies) == (["below/data/0.png"], [])
        else:
            assert len(copies) == 2
        generated = shutil.copy(tmp_path / "out.jsonl", tmp_path / "generated.jsonl")
        again = mmpo("score", tiny_folder, generated, "--tokens")
        for row, line in zip(rows, lines, strict=True):
            line["images"] = row.get("images")
        assert again == mmpo(
            "score", tiny_folder, write_rows(folder / "same.jsonl", lines), "--tokens"
        )

    @pytest.mark.slow
    def test_responses_that_are_cut_are_told(self, mmpo, tiny_folder, pictures, caplog):
        caplog.set_level("INFO")
        data = write_rows(pictures / "prompts.jsonl", PAIRS[1:2])
        flags = "--temperature", "1.5", "--num-samples", "8"
        (whole,) = mmpo("generate", tiny_folder, data, *flags)
        assert whole["finished"] == [True] * 8
        assert "0 of 8 responses were cut at max_new_tokens (512)" in caplog.text
        (some,) = mmpo("generate", tiny_folder, data, *flags, "--max-new-tokens", "40")
        cut = some["finished"].count(False)
        assert 0 < cut < 8
        assert f"{cut} of 8 responses were cut at max_new_tokens (40)" in caplog.text
        texts = zip(whole["responses"], some["responses"], some["finished"], strict=True)
        assert all(ours == long if done else long.startswith(ours) for long, ours, done in texts)

    @pytest.mark.slow
    def test_sampling_flags(self, mmpo, tiny_folder, pictures):
        data = write_rows(pictures / "prompts.jsonl", PAIRS[:1])
        flags = ["--num-samples", "3", "--temperature", "1.5", "--max-new-tokens", "6"]
        first = mmpo("generate", tiny_folder, data, *flags, "--seed", "1")
        assert len(set(first[0]["responses"])) == 3
        assert all(len(response.split()) <= 6 for response in first[0]["responses"])
        other = mmpo("generate", tiny_folder, data, *flags, "--seed", "2")
        assert first != other
        narrow = mmpo("generate", tiny_folder, data, *flags, "--top-k", "1", "--batch-size", "2")
        assert len(set(narrow[0]["responses"])) == 1
        assert narrow == mmpo("generate", tiny_folder, data, *flags, "--top-p", "1e-6")


def with_bytes(row, folder):
    """The prompt of a row as `datasets` writes it to Parquet."""
    images = [
        {"bytes": (folder / name).read_bytes(), "path": name} for name in row.get("images", [])
    ]
    return {"id": row["id"], "images": images, "prompt": row["prompt"]}


def text(response):
    """Of an answer in any of TRL's forms."""
    if isinstance(response, list):
        response = response[0]["content"]
    return response if isinstance(response, str) else response[0]["text"]


def test_a_text_model(mmpo, tmp_path):
    folder = tmp_path / "text"
    checks.save_tokenizer(folder)
    sizes = checks.TEXT | {"vocab_size": len(checks.token_ids())}
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=False)
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config)
    checks.make_case(folder, theirs)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    lines = mmpo("score", folder, write_rows(tmp_path / "rows.jsonl", WORDS), "--tokens")
    assert [line["id"] for line in lines] == ["row 1", "row 2"]
    for row, line in zip(WORDS, lines, strict=True):
        answers = row.get("responses") or [row["chosen"], row["rejected"]]
        user = {"role": "user", "content": [{"type": "text", "text": row["prompt"]}]}
        for index, answer in enumerate(answers):
            spoken = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
            rendered = tokenizer.apply_chat_template([user, spoken], tokenize=False)
            ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
            assert line["prompt_ids"] + line["response_ids"][index] == ids
            inputs = {"input_ids": torch.tensor([ids])}
            expected = their_log_prob(theirs, inputs, len(line["prompt_ids"]))
            np.testing.assert_allclose(line["logps"][index], expected, rtol=1e-5, atol=2e-4)


def test_images_for_a_text_model(refused, pictures, tmp_path):
    folder = tmp_path / "text"
    checks.save_tokenizer(folder)
    sizes = checks.TEXT | {"vocab_size": len(checks.token_ids())}
    config = transformers.Qwen2Config(**sizes, tie_word_embeddings=False)
    checks.make_case(folder, transformers.AutoModelForCausalLM.from_config(config))
    rows = [{**WORDS[0], "image": "photo.png"}, {**WORDS[0]}]
    write_rows(tmp_path / "rows.jsonl", rows)
    Image.new("RGB", (9, 9)).save(tmp_path / "photo.png")
    files = "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out.jsonl"
    message = refused("score", "--model", folder, *files)
    assert "1 of 2 rows cannot be used" in message
    assert "unsupported_image: this model takes no images" in message


@pytest.mark.slow
def test_videos(mmpo, refused, tiny_folder, tmp_path):
    """They change the score, at their rate; a family without videos takes none."""
    folder = tmp_path / "qwen"
    families.make_case("qwen2_5_vl", folder)
    frames = [frame.data for frame in pictures_of_tests.clip(4).frames]
    clips = [{"frames": frames, "fps": 1.0}, {"frames": frames, "fps": 0.2}]
    clips.append({"frames": frames[::-1], "fps": 1.0})
    row = {"prompt": "what is this ?", "responses": ["a red star", "two"]}
    data = tmp_path / "data" / "rows.parquet"
    data.parent.mkdir()
    pq.write_table(pa.Table.from_pylist([row | {"videos": [clip]} for clip in clips]), data)
    before = mmpo("score", folder, data, "--tokens")
    video = checks.token_ids(*families.QWEN_MEDIA)[families.VIDEO]
    assert before[0]["prompt_ids"].count(video) > 4
    assert len({tuple(line["logps"]) for line in before}) == 3

    lines = mmpo("generate", folder, data, "--num-samples", "1", "--max-new-tokens", "4")
    assert [line["videos"][0]["fps"] for line in lines] == [1.0, 0.2, 1.0]
    for line in lines:
        line |= {"responses": row["responses"], "finished": [True, True]}
    assert mmpo("score", folder, write_rows(tmp_path / "again.jsonl", lines), "--tokens") == before

    files = "--data", data, "--output", tmp_path / "none.jsonl"
    message = refused("score", "--model", tiny_folder, *files)
    assert "unsupported_video 3" in message
    assert "this model takes no videos" in message
