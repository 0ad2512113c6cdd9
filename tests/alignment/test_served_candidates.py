"""Responses of servers: one that is up, and one that a command brings up with the round's model."""

import dataclasses
import json
import operator
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pydantic
import pytest
from helpers import served_model
from helpers.alive import is_alive, wait_until
from helpers.chat_server import ChatTestServer, error, images, question, reply
from helpers.live_arrays import first_steps
from helpers.served_model import NAME, is_cut, text_of
from helpers.small_rounds import CoinLabeler, make_recipe, prompts_of
from helpers.world_files import write_pairs

from mmpo_jax.alignment import align, candidates, served_candidates, served_copy
from mmpo_jax.alignment.align import run_alignment
from mmpo_jax.alignment.candidates import Asked, check_servers, round_responses
from mmpo_jax.alignment.served_candidates import messages_of, unservable
from mmpo_jax.alignment.served_copy import model_folder
from mmpo_jax.chat import client
from mmpo_jax.chat.pacing import Backoff
from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.checkpoints.huggingface import load_model
from mmpo_jax.checkpoints.peft import save_adapter
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import read_table
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.records import IMAGE, VIDEO, Record, Turn, VideoRef
from mmpo_jax.feedback import judges
from mmpo_jax.feedback.judge import TooManyFailed
from mmpo_jax.feedback.served import Servers
from mmpo_jax.models.lora import Lora, add_adapters
from mmpo_jax.recipes.data import FileData

pytestmark = pytest.mark.usefixtures("stubs")

PROMPTS, SAMPLES = 7, 3
POLICY = {"type": "policy"}
TRAINING = {
    "optimizer": {"learning_rate": 1e-3},
    "batch_size": 4,
    "max_steps": 2,
    "log_every": 1,
    "save_every": 2,
}
MAKE_LABELER = judges.make_labeler  # before fixtures put another in its place
SCRIPT = served_model.__file__


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(client, "Backoff", lambda: Backoff(0.005, 0.02))
        patch.setattr(served_copy, "LOOKS", 0.02)
        yield


@pytest.fixture(scope="module")
def pairs_file(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"), PROMPTS)


@pytest.fixture
def start(stubs, tiny_folder):
    return load_checkpoint(str(tiny_folder), align.make_mesh())


@pytest.fixture
def make(pairs_file, tiny_folder, tmp_path):
    """A recipe of one round on the pairs' prompts."""

    def make(*candidates, output="run", **changes):
        changes = {
            "rounds": 1,
            "prompts_per_round": None,
            "evaluation": None,
            "feedback": {"type": "picture_world_caption"},
            "data": {"source": "file", "path": str(pairs_file)},
            "candidates": list(candidates),
            **changes,
        }
        return make_recipe(tmp_path / output, tiny_folder, **changes)

    return make


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def notes(tmp_path):
    return tmp_path / "notes.jsonl"


@pytest.fixture
def copy(port, notes):
    """Makes a source with the command of a server that fails as the options say."""

    def make(*options, **changes):
        command = [f'"{sys.executable}" "{SCRIPT}" {port} "{notes}"', *options]
        url = f"http://127.0.0.1:{port}/v1"
        source = {"type": "served", "url": url, "model": NAME, "command": " ".join(command)}
        return source | {"max_outage": 20, **changes}

    return make


def responses_of(recipe, start, index=1):
    """The responses of a round, and its prompts."""
    records, tokenized = prompts_of(recipe, start)
    folder = f"{recipe.output}/round-{index}"
    with Servers(recipe.output) as servers:
        asked = Asked(
            *(start, records, tokenized, recipe, align.make_mesh(), folder, index),
            servers=servers,
        )
        return round_responses(asked), records


def noted(notes):
    """(what servers said when they began, the requests)."""
    entries = [json.loads(line) for line in notes.read_text().splitlines()]
    starts = [entry for entry in entries if "pid" in entry]
    return starts, [entry for entry in entries if "pid" not in entry]


class TestAServerThatIsUp:
    @pytest.fixture
    def server(self):
        with ChatTestServer(models=(NAME,)) as server:
            server.script = lambda body, seen: reply(
                body,
                text_of(body["seed"]),
                finish="length" if is_cut(body["seed"]) else "stop",
                usage={"completion_tokens": 4},
            )
            yield server

    @pytest.fixture
    def source(self, server):
        return {"type": "served", "url": server.url, "model": NAME}

    def test_its_samples(self, make, start, source, server):
        sampling = {"num_samples": SAMPLES, "temperature": 0.6, "top_p": 0.9, "max_new_tokens": 6}
        recipe = make(source, sampling=sampling | {"batch_size": 12})
        output, records = responses_of(recipe, start)
        rows = output.table.to_pylist()
        assert [(row["prompt_id"], row["sample"]) for row in rows] == [
            (record.id, sample) for record in records for sample in range(SAMPLES)
        ]
        seeds = [body["seed"] for body in server.bodies]
        assert len(set(seeds)) == len(rows) and all(0 <= seed < 2**31 for seed in seeds)
        assert {row["source"] for row in rows} == {"served"}
        assert {row["token_ids"] for row in rows} == {None}
        assert {row["num_tokens"] for row in rows} == {4}
        assert sorted(row["text"] for row in rows) == sorted(map(text_of, seeds))
        assert sorted(row["finished"] for row in rows) == sorted(not is_cut(s) for s in seeds)
        asked = {(record.prompt[0].text, record.images[0].read()) for record in records}
        assert len(asked) == PROMPTS
        for body in server.bodies:
            assert body["temperature"] == 0.6 and body["top_p"] == 0.9 and "n" not in body
            assert body["max_tokens"] == 6 and "top_k" not in body
            ((mime, data),) = images(body)
            assert mime == "image/png" and (question(body), data) in asked

    def test_top_k_is_sent_where_there_is_one(self, make, start, source, server):
        responses_of(make(source | {"top_k": 50, "num_samples": 2}, POLICY), start)
        assert {body["top_k"] for body in server.bodies} == {50}

    def test_rounds_and_sources_draw_by_themselves(self, make, start, source, server):
        recipe = make(source, source | {"name": "again"})
        for index in (1, 2):
            responses_of(recipe, start, index)
        assert len({body["seed"] for body in server.bodies}) == 4 * PROMPTS * SAMPLES

    def test_what_fails_is_left_out_and_counted(self, make, start, source, server, caplog):
        right = server.script

        def script(body, seen):
            return error(400, "no such picture") if is_cut(body["seed"]) else right(body, seen)

        server.script = script
        output, _ = responses_of(make(source | {"max_failed": 0.6}, POLICY), start)
        failed = sum(is_cut(body["seed"]) for body in server.bodies)
        rows = [row for row in output.table.to_pylist() if row["source"] == "served"]
        assert 0 < failed < PROMPTS * SAMPLES and len(rows) == PROMPTS * SAMPLES - failed
        told = f"candidates: served: {failed} of {PROMPTS * SAMPLES} responses failed (bad_request"
        assert told in caplog.text
        table = read_table(f"{Path(make(POLICY).output)}/round-1/generate-served.parquet")
        assert table["failure"].to_pylist().count("bad_request") == failed
        assert table.num_rows == PROMPTS * SAMPLES

    def test_too_many_that_fail_stop_and_are_asked_anew(self, make, start, source, server):
        right = server.script

        def script(body, seen):
            return error(400, "no such picture") if body["seed"] % 2 else right(body, seen)

        server.script, recipe = script, make(source, POLICY)
        with pytest.raises(TooManyFailed, match=r"asking http.*candidates: served: max_failed"):
            responses_of(recipe, start)
        sent, server.script = len(server.bodies), right
        output, _ = responses_of(recipe, start)
        odd = sum(body["seed"] % 2 for body in server.bodies[:sent])
        assert len(server.bodies) - sent == odd > 0
        assert output.table["source"].to_pylist().count("served") == PROMPTS * SAMPLES

    def test_what_is_there_is_not_asked_again(self, make, start, source, server, monkeypatch):
        monkeypatch.setattr(served_candidates, "PROMPTS_PER_PART", 3)
        recipe = make(source, POLICY)
        sampled = served_candidates._sampled
        calls = []

        def sampling(*args):
            calls.append(len(args[1]))
            if len(calls) == 3:
                raise KeyboardInterrupt
            return sampled(*args)

        monkeypatch.setattr(served_candidates, "_sampled", sampling)
        with pytest.raises(KeyboardInterrupt):
            responses_of(recipe, start)
        output, _ = responses_of(recipe, start)
        assert calls == [2, 2, 3, 3]
        assert len(server.bodies) == PROMPTS * SAMPLES
        again, _ = responses_of(recipe, start)
        assert again.fingerprint == output.fingerprint
        assert len(server.bodies) == PROMPTS * SAMPLES

    def test_it_is_looked_for_before_anything_starts(self, make, source, server):
        recipe = make(source, POLICY)
        with Servers(recipe.output) as servers:
            check_servers(recipe, servers)
        server.stop()
        with pytest.raises(MmpoError, match="the chat server cannot be reached"):
            run_alignment(recipe)


class TestACommand:
    def test_its_key_is_looked_for_where_it_is_asked_with_and_stays_there(
        self, make, copy, monkeypatch
    ):
        recipe, given = make(copy(api_key_env="COPY_KEY"), POLICY), []
        monkeypatch.setattr(candidates, "on_one", lambda function: None)  # another process
        check_servers(recipe, Servers(recipe.output))
        monkeypatch.setattr(candidates, "on_one", lambda function: given.append(function()))
        with pytest.raises(MmpoError, match="COPY_KEY has no key in it"):
            check_servers(recipe, Servers(recipe.output))
        monkeypatch.setenv("COPY_KEY", "sk-0123456789")
        check_servers(recipe, Servers(recipe.output))
        assert given == [None]

    def test_it_serves_the_rounds_model(self, make, start, copy, notes, tiny_folder):
        recipe = make(copy(), POLICY)
        output, _ = responses_of(recipe, start)
        ((begun,), requests) = noted(notes)
        assert begun["MMPO_MODEL"] == str(tiny_folder)
        assert begun["MMPO_ROUND"] == f"{recipe.output}/round-1"
        assert "model.safetensors" in begun["files"]
        assert len(requests) == PROMPTS * SAMPLES
        rows = [row for row in output.table.to_pylist() if row["source"] == "served"]
        texts = sorted(text_of(request["seed"]) for request in requests)
        assert sorted(row["text"] for row in rows) == texts
        assert not is_alive(begun["pid"])
        log = Path(recipe.output, "round-1", "generate-served.log").read_text()
        assert "loading the model" in log
        again, _ = responses_of(recipe, start)
        assert again.fingerprint == output.fingerprint
        assert len(noted(notes)[0]) == 1  # it was not run again

    def test_it_gets_its_own_key_and_no_other_which_nothing_shows(
        self, make, start, copy, monkeypatch
    ):
        own, others = "sk-own-0123456789", "sk-others-0123456789"
        monkeypatch.setenv("COPY_KEY", own)
        monkeypatch.setenv("LABELER_KEY", others)
        labeler = {"type": "chat", "url": "http://127.0.0.1:9/v1", "model": "m"}
        feedback = {"type": "claims", "labeler": labeler | {"api_key_env": "LABELER_KEY"}}
        source = copy(api_key_env="COPY_KEY", command="env; exit 7")
        recipe = make(source, POLICY, feedback=feedback)
        with pytest.raises(MmpoError, match="status 7") as caught:
            responses_of(recipe, start)
        log = Path(recipe.output, "round-1", "generate-served.log").read_text()
        assert "COPY_KEY=[key]" in log and "LABELER_KEY" not in log
        assert own not in log + str(caught.value) and others not in log

    @pytest.mark.parametrize(
        "given", ["--api-key sk-0123456789", "--api_key=sk-0123456789", "VLLM_API_KEY='sk-012345'"]
    )
    def test_a_key_in_it_is_refused_and_not_repeated(self, make, copy, given):
        with pytest.raises((pydantic.ValidationError, MmpoError), match="no key stands") as caught:
            make(copy(given), POLICY)
        assert "sk-01" not in str(caught.value)
        for named in ("--api-key $KEY", '--api-key "${KEY}"', "API_KEY=$KEY"):
            make(copy(named), POLICY)

    def test_one_that_is_slow_to_start(self, make, start, copy, notes):
        responses_of(make(copy("--slow", "1"), POLICY), start)
        assert len(noted(notes)[1]) == PROMPTS * SAMPLES

    def test_one_that_dies_at_once(self, make, start, copy, notes):
        with pytest.raises(MmpoError) as caught:
            responses_of(make(copy("--dies", "7"), POLICY), start)
        told = str(caught.value)
        assert told.startswith("candidates: served: the command ended with status 7")
        assert told.endswith("loading the model\nno memory for it")

    def test_one_that_is_never_up(self, make, start, copy, notes):
        source = copy("--slow", "100", start_timeout=0.5)
        with pytest.raises(MmpoError, match=r"nobody answers at http.* after 0\.5 s \(start_tim"):
            responses_of(make(source, POLICY), start)
        ((begun,), requests) = noted(notes)
        assert not requests and not is_alive(begun["pid"])

    def test_one_that_serves_another_name(self, make, start, copy, notes):
        with pytest.raises(MmpoError, match=f"has no model other; it has {NAME}"):
            responses_of(make(copy(model="other"), POLICY), start)
        assert not is_alive(noted(notes)[0][0]["pid"])

    def test_somebody_who_answers_there_already(self, make, start, copy, notes, port, monkeypatch):
        monkeypatch.setattr(served_copy, "LEAVING", 0.3)
        with (
            ChatTestServer(models=(NAME,), port=port) as server,
            pytest.raises(MmpoError, match="somebody answers at http"),
        ):
            responses_of(make(copy(), POLICY), start)
        assert not server.bodies and not notes.exists()

    def test_the_server_of_a_run_that_was_killed_has_time_to_end(
        self, make, start, copy, notes, port
    ):
        with ChatTestServer(models=(NAME,), port=port) as earlier:
            ending = threading.Timer(0.5, earlier.stop)
            ending.start()
            responses_of(make(copy(), POLICY), start)
            ending.join()
        assert not earlier.bodies and len(noted(notes)[1]) == PROMPTS * SAMPLES

    def test_one_that_dies_while_it_is_asked(self, make, start, copy, notes, monkeypatch):
        """What it answered is not asked again."""
        recipe = make(copy("$HEALTH", max_concurrent=1), POLICY)
        monkeypatch.setenv("HEALTH", "--dies-after 9")
        began = time.monotonic()
        with pytest.raises(MmpoError, match="command ended with status 3; what was answered is k"):
            responses_of(recipe, start)
        assert time.monotonic() - began < 15  # and not max_outage
        assert len(noted(notes)[1]) == 9
        monkeypatch.setenv("HEALTH", "")
        output, _ = responses_of(recipe, start)
        requests = noted(notes)[1]
        assert len(requests) == len({request["seed"] for request in requests}) == PROMPTS * SAMPLES
        assert output.table["source"].to_pylist().count("served") == PROMPTS * SAMPLES

    def test_answers_of_other_weights_are_not_taken(self, make, start, copy, notes):
        recipe = make(copy(shares_devices=False), POLICY)
        responses_of(recipe, start)
        shutil.rmtree(f"{recipe.output}/round-1")
        responses_of(recipe, start)
        assert len(noted(notes)[1]) == PROMPTS * SAMPLES
        other = dataclasses.replace(start, fingerprint="other")
        responses_of(recipe, other)
        assert len(noted(notes)[1]) == 2 * PROMPTS * SAMPLES

    def test_nor_are_those_of_another_command(self, make, start, copy, notes):
        one, other = (make(copy(*options), POLICY) for options in ((), ("--delay", "0.001")))
        for recipe in (one, other, other):
            responses_of(recipe, start)
        assert len(noted(notes)[1]) == 2 * PROMPTS * SAMPLES

    @pytest.mark.parametrize("shares", [True, False])
    def test_weights_make_room_for_it(self, make, start, copy, notes, shares, monkeypatch):
        held = []
        sampled = served_candidates._sampled

        def sampling(*args):
            held.append(len(flatten(start.params)))
            return sampled(*args)

        monkeypatch.setattr(served_candidates, "_sampled", sampling)
        source = copy(shares_devices=shares)
        beside, _ = responses_of(make(source, POLICY), start)
        assert (held[0] == 0) == shares
        alone, _ = responses_of(make(POLICY, output="alone"), start)
        ours = [row for row in beside.table.to_pylist() if row["source"] == "policy"]
        assert [row["token_ids"] for row in ours] == alone.table["token_ids"].to_pylist()


@pytest.mark.slow
def test_a_labeler_that_is_the_start_shares_the_weights_that_are_read_again(
    make, copy, monkeypatch
):
    """And training begins with none of them beside its own."""
    shared = []

    class Labeler(CoinLabeler):
        def __init__(self, checkpoint, *args, **options):
            arrays = jax.tree.leaves(checkpoint.params)
            starts = jax.tree.leaves(works[0].start.params)
            shared.append(len(arrays) == len(starts) > 0 and all(map(operator.is_, arrays, starts)))

    def run_round(work, *others):
        works.append(work)
        return original(work, *others)

    works, original = [], align.run_round
    monkeypatch.setattr(align, "run_round", run_round)
    monkeypatch.setattr(judges, "make_labeler", MAKE_LABELER)
    monkeypatch.setattr(judges, "CheckpointLabeler", Labeler)
    with first_steps() as beside:
        run_alignment(make(copy(), feedback={}, training=TRAINING))
    assert shared == [True]
    assert beside == [{}]


class TestModelFolder:
    def test_a_folder_is_served_as_it_is(self, start, tiny_folder, tmp_path):
        target = tmp_path / "model"
        assert model_folder(start, align.make_mesh(), str(target)) == str(tiny_folder)
        assert not target.exists()

    def test_another_template_beside_the_same_weights(self, tiny_folder, tmp_path):
        mesh = align.make_mesh()
        start = load_checkpoint(str(tiny_folder), mesh, template="vicuna_v1")
        target = tmp_path / "model"
        assert model_folder(start, mesh, str(target)) == str(target)
        assert (target / "model.safetensors").is_symlink()
        same = load_checkpoint(str(target), mesh)
        assert same.processor.tokenizer.chat_template == start.processor.tokenizer.chat_template
        assert same.processor.template == "auto"
        assert_equal(same.params, start.params)

    def test_one_is_made_where_there_is_none(self, tmp_path, tiny_folder, tiny_model):
        mesh = align.make_mesh()
        model, params = tiny_model
        adapted = {
            path: leaf + 0.1 if path.endswith("lora_b") else leaf
            for path, leaf in flatten(
                add_adapters(params, model, Lora(target=".*/v_proj", rank=2), (), 0)
            ).items()
        }
        adapter = tmp_path / "adapter"
        save_adapter(adapter, model, unflatten(adapted), base=str(tiny_folder), dropout=0.0)
        start = load_checkpoint(str(adapter), mesh)
        expected = {name: np.asarray(leaf) for name, leaf in flatten(start.params).items()}
        start.release()
        target = tmp_path / "model"
        assert model_folder(start, mesh, str(target)) == str(target)
        assert_equal(load_model(target)[1], expected)
        before = (target / "model.safetensors").stat().st_mtime_ns
        model_folder(start, mesh, str(target))  # which is found
        assert (target / "model.safetensors").stat().st_mtime_ns == before


def assert_equal(params, expected):
    expected = flatten(expected)
    found = flatten(params)
    assert found.keys() == expected.keys()
    for name, leaf in found.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[name]), name)


class TestPrompts:
    def record(self, *turns, images=(), **fields):
        return Record("p", tuple(images), turns, (), **fields)

    def test_dialogues_with_images_in_their_places(self, start, pairs_file):
        first, second = (record.images[0] for record in load_records(pairs_file)[:2])
        record = self.record(
            Turn("system", "Be brief."),
            Turn("user", ("Compare ", IMAGE, " with ", IMAGE, ".")),
            Turn("assistant", "Both are round."),
            Turn("user", "And the colour?"),
            images=(first, second),
        )
        assert unservable(record) is None
        messages = messages_of(record)
        assert [message.role for message in messages] == ["system", "user", "assistant", "user"]
        assert messages[1].parts == ("Compare ", first, " with ", second, ".")
        assert messages[3].parts == ("And the colour?",)

    def test_videos_in_their_places(self, start, pairs_file):
        first, second = (record.images[0] for record in load_records(pairs_file)[:2])
        video = VideoRef("clip", (first, second))
        record = self.record(
            Turn("user", ("Is ", IMAGE, " in ", VIDEO, "?")), images=[first], videos=(video,)
        )
        (message,) = messages_of(record)
        assert message.parts == ("Is ", first, " in ", video, "?")
        (message,) = messages_of(self.record(Turn("user", "What?"), videos=(video,)))
        assert message.parts == (video, "What?")

    @pytest.mark.parametrize(
        ("record", "told"),
        [
            (((Turn("developer", "a"), Turn("user", "b")), {}), "no turn of developer"),
            (((Turn("user", "a"), Turn("assistant", "b")), {}), "answer a turn of the user's"),
            (((Turn("user", "a"),), {"template": {"tools": []}}), "cannot be sent"),
            (((Turn("user", "a", {"name": "b"}),), {}), "cannot be sent"),
        ],
    )
    def test_what_cannot_be_asked(self, record, told):
        turns, fields = record
        reason, detail = unservable(self.record(*turns, **fields))
        assert reason == "template_refuses" and told in detail


def load_records(path):
    return FileData(source="file", path=str(path)).load(supervised=False).records


@pytest.mark.slow
def test_a_round_that_is_killed_while_the_copy_is_asked(make, copy, notes, tmp_path):
    """No server is left, and the same command asks what is missing and ends as if undisturbed."""
    pairing = {"length_balance": "none", "chosen_from": ["served"]}
    feedback = {"type": "source", "order": ["served", "policy"]}
    changes = {"training": TRAINING, "pairing": pairing, "feedback": feedback}
    whole = make(copy(), POLICY, output="whole", **changes)
    run_alignment(whole)
    requests = len(noted(notes)[1])
    assert requests == PROMPTS * SAMPLES

    recipe = make(copy("$PACE", max_concurrent=2), POLICY, **changes)
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe.model_dump(mode="json", exclude_unset=True)))
    process = subprocess.Popen(
        [sys.executable, "-m", "mmpo_jax.cli", "align", str(file)],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PACE": "--delay 0.3"},
        start_new_session=True,
    )
    try:
        wait_until(lambda: len(noted(notes)[1]) >= requests + 8)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    served = noted(notes)[0][-1]["pid"]
    wait_until(lambda: not is_alive(served))
    run_alignment(recipe)
    assert len(noted(notes)[1]) - requests <= requests + 2  # what was under way
    for name in ("responses.parquet", "judge.parquet", "pairs.parquet"):
        files = (Path(one.output, "round-1", name) for one in (whole, recipe))
        assert len({file.read_bytes() for file in files}) == 1
