"""`mmpo score` as a command: its flags, its errors, and going on after it was killed."""

import errno
import os
import shutil

import pytest
from helpers import tiny
from helpers.score_rows import PAIRS, write_rows

from mmpo_jax.core import files
from mmpo_jax.scoring import log_probs as reference
from mmpo_jax.scoring import stage


def test_cut_responses_have_no_eos(mmpo, tiny_folder, tmp_path):
    row = {"prompt": "what is this ?", "responses": ["a red star", "a red star"]}
    rows = [{**row, "finished": [True, False]}, row]
    cut, whole = mmpo("score", tiny_folder, write_rows(tmp_path / "rows.jsonl", rows), "--tokens")
    ended, unended = cut["response_ids"]
    assert whole["response_ids"] == [ended, ended]
    assert unended == ended[:-1]
    assert cut["num_tokens"] == [len(ended), len(ended) - 1]
    assert cut["logps"][1] > cut["logps"][0]


def test_vicuna_by_a_flag(mmpo, tmp_path):
    folder = tiny.make_sentencepiece_folder(tmp_path / "vicuna")
    data = write_rows(tmp_path / "rows.jsonl", [{"prompt": "what is this?", "responses": ["a"]}])
    (own,) = mmpo("score", folder, data, "--tokens")
    (vicuna,) = mmpo("score", folder, data, "--tokens", "--template", "vicuna_v1")
    assert len(vicuna["prompt_ids"]) > len(own["prompt_ids"]) + 10
    assert vicuna["logps"] != own["logps"]


class TestErrors:
    @pytest.fixture
    def flags(self, tiny_folder, tmp_path):
        data = write_rows(tmp_path / "rows.jsonl", PAIRS[1:2])
        return {"--model": tiny_folder, "--data": data, "--output": tmp_path / "out.jsonl"}

    def run(self, refused, command, flags, *more):
        return refused(command, *(word for pair in flags.items() for word in pair), *more)

    @pytest.mark.parametrize("command", ["score", "generate"])
    def test_whatever_is_missing(self, command, flags, refused, tmp_path):
        message = refused(command, "--model", "m")
        assert f"mmpo {command}: the options: this recipe cannot be run:" in message
        assert "output: Field required" in message
        assert "data: Field required" in message
        nothing = self.run(refused, command, flags | {"--data": tmp_path / "none.jsonl"})
        assert "data.path: there is no " in nothing and "none.jsonl" in nothing
        nowhere = self.run(refused, command, flags | {"--model": "/nowhere/llava"})
        assert "/nowhere/llava: there is no such checkpoint folder" in nowhere
        assert not (tmp_path / "out.jsonl").exists()

    def test_unknown_keys(self, flags, refused):
        message = self.run(refused, "score", flags, "scoring.token=true", "sead=1")
        assert "scoring.token: unknown key; did you mean tokens?" in message
        assert "sead: unknown key; did you mean seed?" in message
        message = self.run(refused, "score", flags | {"--template": "vicuna"})
        assert "template: Input should be 'auto' or 'vicuna_v1' (got 'vicuna')" in message
        message = self.run(refused, "generate", flags, "--num-samples", "0")
        assert "sampling.num_samples: Input should be greater than 0 (got 0)" in message

    @pytest.mark.parametrize("command", ["score", "generate"])
    def test_a_row_without_a_prompt(self, command, flags, refused, tmp_path):
        write_rows(tmp_path / "rows.jsonl", [PAIRS[1], {"id": "x", "responses": ["yes", "no"]}])
        message = self.run(refused, command, flags)
        assert "1 of 2 rows cannot be used, more than the allowed 10.0%: no_prompt 1" in message
        assert f"{tmp_path / 'rows.jsonl'}: row 2, id 'x': no_prompt: " in message

    @pytest.mark.parametrize("command", ["score", "generate"])
    def test_a_full_disk(self, command, flags, refused, monkeypatch, tmp_path):
        def fail(descriptor):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files.os, "fsync", fail)
        short = ("--max-new-tokens", "4") if command == "generate" else ()
        message = self.run(refused, command, flags, *short)
        assert f"stage {command}: cannot write" in message
        assert "No space left on device" in message
        assert not (tmp_path / "out.jsonl").exists()

    def test_a_flag_of_the_same_name_as_a_recipe(self, flags, refused, tmp_path):
        """Flags come after the recipe, and `key=value` after flags."""
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(
            "{model: builtin:circles, output: out, data: {source: picture_world, size: 3}}"
        )
        message = refused("score", recipe)
        assert "builtin:circles" in message
        message = refused("score", recipe, "--model", "/nowhere/flag")
        assert "/nowhere/flag" in message
        message = refused("score", recipe, "model=/nowhere/key", "--model", "/nowhere/flag")
        assert "/nowhere/key" in message


class Killed(Exception):
    """What nothing expects."""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(mmpo, tiny_folder, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "ROWS_PER_PART", 1)
    data = write_rows(pictures / "rows.jsonl", PAIRS)
    whole = mmpo("score", tiny_folder, data)
    score, scored = reference.compute_scores, []

    def count(checkpoint, records, batches, *args):
        places = (place for batch in batches for place, _ in batch.places)
        scored.extend(records[place].id for place in places)
        if len(scored) == 3:
            raise Killed
        return score(checkpoint, records, batches, *args)

    monkeypatch.setattr(reference, "compute_scores", count)
    with pytest.raises(Killed):
        mmpo("score", tiny_folder, data)
    assert os.listdir(tmp_path / "out.parts")
    assert mmpo("score", tiny_folder, data) == whole
    assert scored == ["a", "b", "c", "c"]
    # Nothing of another model's or of other rows'.
    other = shutil.copytree(tiny_folder, tmp_path / "other")
    (other / "chat_template.jinja").write_text(tiny.HUB_TEMPLATE)
    scored.clear()
    with pytest.raises(Killed):
        mmpo("score", tiny_folder, data)
    scored.append("more than three")
    mmpo("score", other, data)
    assert scored == ["a", "b", "c", "more than three", "a", "b", "c"]
