"""`mmpo select` as a command: its rows, its errors, and going on after it was killed."""

import json
import os
import shutil

import numpy as np
import pytest
import transformers
from helpers import meshes, tiny
from helpers.reward_heads import save_headed
from helpers.score_rows import read_rows, write_rows

from mmpo_jax import cli
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.commands import select as command
from mmpo_jax.generation import responses as generation
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.scoring import log_probs
from mmpo_jax.scoring import stage as parts

POLICY = "builtin:picture_world"
ASK = "describe the picture ."
SHORT = ("--num-samples", "4", "--max-new-tokens", "12", "--temperature", "1")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setattr(cli, "start_jax", lambda: None)
    mesh = meshes.one_device()
    for module in ("generate", "reward", "select"):
        monkeypatch.setattr(f"mmpo_jax.commands.{module}.make_mesh", lambda **sizes: mesh)


@pytest.fixture
def prompts(tmp_path):
    """Three prompts about images."""
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(png_bytes(sample_scene("test", 0, number), 48))
    rows = [{"id": f"{n}", "images": [f"{n}.png"], "prompt": ASK} for n in range(3)]
    return write_rows(tmp_path / "prompts.jsonl", rows)


@pytest.fixture
def select(tiny_folder, tmp_path, capsys):
    """Runs the command; (its rows, what it printed)."""

    def select(*more, reference=tiny_folder, output="best.jsonl", written=None):
        flags = ["--policy", POLICY, "--reference", reference, "--output", tmp_path / output]
        status = cli.main(["select", *map(str, [*flags, *more])])
        captured = capsys.readouterr()
        assert status == 0, captured.err
        return read_rows(tmp_path / (written or output)), captured.out

    return select


@pytest.fixture
def refused(capsys):
    """The message of a command that must fail."""

    def refused(*arguments):
        assert cli.main(["select", *map(str, arguments)]) == 1
        err = capsys.readouterr().err
        assert "Traceback" not in err and err.count("mmpo select: ") == 1
        return err

    return refused


def test_samples_are_those_of_generate_and_scored_as_they_were_sampled(
    select, prompts, tmp_path, capsys
):
    """Sampled here, or by `mmpo generate` before: the same responses, rewards and choice."""
    rows, told = select("--data", prompts, *SHORT)
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert len(row["responses"]) == len(row["rewards"]) == 4
        assert row["best"] == row["rewards"].index(max(row["rewards"]))
    assert "12 responses to 3 prompts" in told
    report = json.loads((tmp_path / "best.selection.json").read_text())
    assert (report["prompts"], report["responses"]) == (3, 12)
    assert f"{report['per_token']['tokens']:+.2f}" in told

    there = tmp_path / "there.jsonl"
    flags = ["--model", POLICY, "--data", str(prompts), "--output", str(there)]
    assert cli.main(["generate", *flags, *SHORT]) == 0
    capsys.readouterr()
    scored, _ = select("--responses", there)
    summed, _ = select("--responses", there, "--summed", "--beta", "0.2")
    for row, again, sums, sampled in zip(rows, scored, summed, read_rows(there), strict=True):
        assert row["responses"] == again["responses"] == sampled["responses"]
        np.testing.assert_allclose(again["rewards"], row["rewards"], rtol=1e-4, atol=1e-6)
        assert again["best"] == row["best"]
        counts = np.array([len(ids) for ids in sampled["response_ids"]])
        np.testing.assert_allclose(sums["rewards"], 2 * counts * again["rewards"], rtol=1e-6)


def test_one_sample(select, prompts):
    rows, told = select("--data", prompts, "--temperature", "0", "--max-new-tokens", "4")
    assert [(len(row["responses"]), row["best"]) for row in rows] == [(1, 0)] * 3
    assert "to 0 of 3 prompts (0.0 %)" in told


def test_a_policy_that_is_its_reference(select, prompts, tmp_path, caplog):
    """All rewards are 0, so the first response is the best; one that says nothing ends too."""
    rows = [{"id": "a", "prompt": ASK, "responses": ["", "yes", "", "no"]}]
    there = write_rows(tmp_path / "there.jsonl", rows)
    (row,), _ = select("--responses", there, reference=POLICY)
    assert (row["rewards"], row["best"]) == ([0, 0, 0, 0], 0)
    assert "every reward is 0" in caplog.text


def test_responses_that_cannot_be_used_keep_their_places(select, tmp_path):
    rows = [{"id": "a", "prompt": ASK, "responses": [7, "a red star", "a ring"]}]
    (row,), _ = select("--responses", write_rows(tmp_path / "there.jsonl", rows))
    assert row["responses"] == [None, "a red star", "a ring"]
    assert row["rewards"][0] is None and row["best"] in (1, 2)
    assert row["rewards"][row["best"]] == max(row["rewards"][1:])
    (left_out,) = read_rows(tmp_path / "best.rejected_rows.jsonl")
    assert left_out["id"] == "a" and left_out["detail"].startswith("response 1: ")


def test_pairs_are_responses_too(select, tmp_path):
    """Into a folder, too."""
    rows = [{"prompt": ASK, "chosen": "a red star", "rejected": "a ring"}]
    there = write_rows(tmp_path / "pairs.jsonl", rows)
    (row,), told = select("--responses", there, output="out", written="out/best.jsonl")
    assert row["responses"] == ["a red star", "a ring"]
    assert f"best: {tmp_path / 'out' / 'best.jsonl'}" in told
    assert (tmp_path / "out" / "selection.json").exists()


def samples(*ids):
    """What `sampled_responses` gives, of three prompts that have these samples each."""
    texts = {(tiny.EOS_ID,): "", (tiny.IMAGE_ID, tiny.EOS_ID): ""}
    made = [{"text": texts[one], "finished": True, "token_ids": list(one)} for one in ids]
    return lambda *args, **options: {str(number): made for number in range(3)}


def test_samples_of_image_tokens_are_left_out(select, prompts, tmp_path, monkeypatch):
    shown, empty = (tiny.IMAGE_ID, tiny.EOS_ID), (tiny.EOS_ID,)
    monkeypatch.setattr(command, "sampled_responses", samples(shown, empty, empty))
    rows, _ = select("--data", prompts)
    for row in rows:
        assert row["responses"] == [None, "", ""] and row["best"] == 1
        assert row["rewards"][0] is None and row["rewards"][1] == row["rewards"][2] != 0
    monkeypatch.setattr(command, "sampled_responses", samples(shown))
    with pytest.raises(
        AssertionError, match=r"no sample can be scored; row 1, id '0': image_position"
    ):
        select("--data", prompts)
    reasons = [row["reason"] for row in read_rows(tmp_path / "best.rejected_rows.jsonl")]
    assert reasons == ["image_position"] * 3


class Killed(Exception):
    """What nothing expects."""


@pytest.mark.parametrize(
    ("stage", "calls"),
    [
        pytest.param("generate", 2, marks=pytest.mark.slow),
        pytest.param("policy", 2, marks=pytest.mark.slow),
        ("reference", 5),
    ],
)
def test_a_run_that_was_killed_ends_with_the_same_bytes(
    stage, calls, select, prompts, tmp_path, monkeypatch
):
    monkeypatch.setattr(parts, "ROWS_PER_PART", 1)
    monkeypatch.setattr(generation, "PROMPTS_PER_PART", 1)
    select("--data", prompts, *SHORT)
    written = [tmp_path / "best.jsonl", tmp_path / "best.selection.json"]
    before = [path.read_bytes() for path in written]
    for path in written:
        path.unlink()
    module, name = (
        (generation, "generate_responses") if stage == "generate" else (log_probs, "compute_scores")
    )
    compute, made = getattr(module, name), []

    def count(*args, **options):
        made.append(stage)
        if len(made) == calls:
            raise Killed
        return compute(*args, **options)

    monkeypatch.setattr(module, name, count)
    with pytest.raises(Killed):
        select("--data", prompts, *SHORT)
    assert os.listdir(tmp_path / "best.parts") and not written[0].exists()
    select("--data", prompts, *SHORT)
    assert [path.read_bytes() for path in written] == before
    # Every part of the three rows once, and again the one in which it was killed.
    assert len(made) == (3 if stage == "generate" else 6) + 1


class TestRefusals:
    @pytest.fixture
    def flags(self, tiny_folder, prompts, tmp_path):
        return {
            "--policy": POLICY,
            "--reference": tiny_folder,
            "--data": prompts,
            "--output": tmp_path / "best.jsonl",
        }

    def run(self, refused, flags, *more):
        return refused(*(word for pair in flags.items() for word in pair), *more)

    def test_whatever_is_missing(self, flags, refused, tmp_path):
        message = refused("--data", flags["--data"])
        for key in ("output", "model"):
            assert f"\n  {key}: Field required" in message
        nowhere = self.run(refused, flags | {"--reference": tmp_path / "nowhere"})
        assert "nowhere: there is no such checkpoint folder" in nowhere
        assert not (tmp_path / "best.jsonl").exists()

    def test_unknown_keys_and_impossible_values(self, flags, refused):
        message = self.run(refused, flags, "reward.betta=1", "refrence=x", "--num-samples", "0")
        assert "reward.betta: unknown key; did you mean beta?" in message
        assert "refrence: unknown key; did you mean reference?" in message
        assert "sampling.num_samples: Input should be greater than 0 (got 0)" in message
        message = self.run(refused, flags, "--beta", "0", "lengths={prompt: [24], response: [16]}")
        assert "reward.beta: Input should be greater than 0 (got 0)" in message
        assert "sampling.max_new_tokens 512 is more than is scored" in self.run(
            refused, flags, "lengths={prompt: [24], response: [16]}"
        )

    def test_another_tokenizer(self, flags, refused, tmp_path):
        other = tiny.make_sentencepiece_folder(tmp_path / "vicuna")
        message = self.run(refused, flags | {"--reference": other})
        assert "picture_world/checkpoint and " in message and "vicuna: policy and refer" in message
        assert "have other ids, the first is " in message
        assert not (tmp_path / "best.parts").exists()

    def test_prompts_alone_where_responses_should_be(self, flags, refused):
        there = flags.pop("--data")
        message = self.run(refused, flags | {"--responses": there})
        assert "3 of 3 rows cannot be used" in message and "empty_response 3" in message
        assert "no response to score" in message

    def test_images_that_the_reference_does_not_take(self, flags, refused, tiny_folder, tmp_path):
        """Told before anything is sampled."""
        text = shutil.copytree(tiny_folder, tmp_path / "text")
        transformers.LlamaConfig(**tiny.TEXT).save_pretrained(text)
        message = self.run(refused, flags | {"--reference": text})
        assert "3 of 3 rows cannot be used" in message and "unsupported_image 3" in message
        assert f"this model takes no images: {text}" in message
        assert not (tmp_path / "best.parts").exists()

    def test_prompts_and_responses_at_once(self, flags, refused, capsys):
        with pytest.raises(SystemExit) as caught:
            self.run(refused, flags, "--responses", flags["--data"])
        assert caught.value.code == 2
        assert "--responses: not allowed with argument --data" in capsys.readouterr().err
        there = flags.pop("--data")
        message = self.run(refused, flags, "--responses", there, "--num-samples", "2")
        assert "sampling is no group of keys" in message

    def test_responses_of_the_picture_world(self, flags, refused):
        del flags["--data"]
        message = self.run(refused, flags, "data={source: picture_world}", "sampling=null")
        assert "give a file of them" in message


def test_by_a_reward_model(prompts, tiny_folder, tiny_model, tmp_path, capsys):
    """The samples of the policy, scored by a model of another tokenizer; as `mmpo reward` does."""
    folder = tiny.make_byte_level_folder(tmp_path / "bytes")
    critic = save_headed(tmp_path / "critic", folder, *load_model(folder), critique_prompt="And?")
    out = tmp_path / "best.jsonl"
    given = ["--policy", POLICY, "--reward-model", str(critic), "--output", str(out)]
    limits = ["reward_model.max_new_tokens=4", "lengths=null"]
    assert cli.main(["select", *given, "--data", str(prompts), *SHORT, *limits]) == 0
    assert f"best: {out}" in capsys.readouterr().out
    rows = read_rows(out)
    assert [row["id"] for row in rows] == ["0", "1", "2"]
    for row in rows:
        assert len(row["responses"]) == len(row["rewards"]) == len(row["critiques"]) == 4
        assert row["best"] == row["rewards"].index(max(row["rewards"]))
        assert all(len(own) == 1 for own in row["critiques"])
    there = tmp_path / "there.jsonl"
    flags = ["--model", POLICY, "--data", str(prompts), "--output", str(there)]
    assert cli.main(["generate", *flags, *SHORT]) == 0
    assert [r["responses"] for r in read_rows(there)] == [row["responses"] for row in rows]
    scored = tmp_path / "scored.jsonl"
    flags = ["--model", str(critic), "--data", str(there), "--output", str(scored)]
    assert cli.main(["reward", *flags, "--max-new-tokens", "4"]) == 0
    for ours, theirs in zip(rows, read_rows(scored), strict=True):
        np.testing.assert_allclose(ours["rewards"], theirs["rewards"], rtol=0, atol=2e-5)


def test_one_of_two_rewards(refused, prompts, tmp_path):
    told = refused("--policy", POLICY, "--data", prompts, "--output", tmp_path / "best.jsonl")
    assert "give either reference, for DPO's own reward, or reward_model" in told
