"""Distillation in training: who teaches, what a teacher sees, whose responses are learned."""

import dataclasses
import json
import pickle
import re
import shutil

import jax
import numpy as np
import pytest
from helpers import meshes, tiny
from helpers.loop_runs import make_start
from helpers.reward_heads import save_headed
from helpers.rollouts import State, tokenized_prompts, trained
from pydantic import ValidationError

from mmpo_jax.checkpoints.steps import CheckpointError
from mmpo_jax.commands.train import run_training
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.lengths import Lengths
from mmpo_jax.data.pipeline import MixtureEntry
from mmpo_jax.data.records import ImageRef, Response
from mmpo_jax.data.skipped import SKIPPED_FILE, UnusableRow
from mmpo_jax.data.tokenization import tokenize_records
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.divergence import token_divergence
from mmpo_jax.picture_world.records import prompt_records
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.optimizers import AdamW
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.teacher import SelfTeacher
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.metrics import read_metrics
from mmpo_jax.training.on_policy import Prompts, Rollouts, prompt_examples
from mmpo_jax.training.row_use import PromptUse
from mmpo_jax.training.teacher import LoadedTeacher, shown_to

LENGTHS = Lengths(prompt=(24,), response=(8,))
ROLLOUT = Rollout(num_samples=2, max_new_tokens=6)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A teacher of another shape, with more tokens than there are words."""
    config = tiny.make_config(
        text={"hidden_size": 40, "num_hidden_layers": 3, "vocab_size": tiny.VOCAB_SIZE + 8}
    )
    return tiny.make_folder(tmp_path_factory.mktemp("larger") / "llava", config, seed=7)


def config_of(teacher, **options):
    given = {
        "objective": {"type": "distillation", "beta": 0.5},
        "teacher": teacher,
        "optimizer": AdamW(learning_rate=3e-3, weight_decay=0.0),
        "epochs": 4,
        "batch_size": 4,
        "micro_batch_size": 2,
        "log_every": 1,
        "save_every": 1,
    }
    return Training.model_validate(given | options)


def tokenized(processor, config, rollout=ROLLOUT, given=None):
    use = PromptUse.of(rollout, config)
    given = prompt_records("align", 0, 4, 24) if given is None else given
    return tokenized_prompts(processor, LENGTHS, given, function=use.tokenize)


@pytest.fixture
def run(tiny_model, tiny_processor):
    def run(folder, config, rollout=ROLLOUT, mesh=None, given=None):
        records = tokenized(tiny_processor, config, rollout, given)
        examples, mesh = prompt_examples(records, config), mesh or meshes.one_device()
        trained(folder, tiny_model, tiny_processor, examples, config, rollout, LENGTHS, mesh)
        return read_metrics(folder / "metrics.jsonl")

    return run


def test_a_teacher_that_is_the_start_has_nothing_to_teach(run, tiny_folder, tmp_path):
    config = config_of({"type": "model", "model": str(tiny_folder)}, max_steps=1)
    (row,) = run(tmp_path, config)
    assert row["divergence"] == pytest.approx(0, abs=1e-6)
    assert row["grad_norm"] == pytest.approx(0, abs=1e-4)


@pytest.mark.slow
def test_a_larger_teacher_is_learned(run, larger, tmp_path):
    """And stays what it was."""
    before = {path: path.read_bytes() for path in larger.glob("*.safetensors")}
    config = config_of({"type": "model", "model": str(larger)}, epochs=30)
    rows = run(tmp_path, config)
    assert rows[-1]["divergence"] < 0.6 * rows[0]["divergence"]
    assert rows[0]["loss"] == pytest.approx(rows[0]["divergence"])
    assert {path: path.read_bytes() for path in larger.glob("*.safetensors")} == before


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.slow
def test_devices_change_nothing(top_k, run, larger, tmp_path):
    """Eight devices and micro-batches against one device."""
    objective = {"type": "distillation", "beta": 0.3, "top_k": top_k}
    teacher = {"type": "model", "model": str(larger)}
    # A large epsilon, or the first step follows the signs of gradients that are next to nothing.
    smooth = AdamW(learning_rate=3e-3, weight_decay=0.0, epsilon=1.0)
    options = {"objective": objective, "max_steps": 2, "optimizer": smooth}
    one = run(tmp_path / "1", config_of(teacher, micro_batch_size=4, **options))
    eight = run(tmp_path / "8", config_of(teacher, **options), mesh=meshes.mesh_of(1, 2, 4))
    for ours, theirs in zip(one, eight, strict=True):
        for key in ("loss", "divergence", "grad_norm", "completions/mean_length"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-3, abs=1e-5), key
    assert one[0]["loss"] > 0.01


def test_the_statistic_is_that_of_whole_logits(tiny_model, tiny_processor, larger):
    """In any chunks, over the tokens that both have, with the teacher's own cap on logits."""
    from mmpo_jax.checkpoints.huggingface import load_model
    from mmpo_jax.models.head import Taught, next_token_logits, token_statistics

    model, params = tiny_model
    teacher, of_teacher = load_model(larger)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, (2, 3, 7)).astype(np.int32)
    heads, logits = [], []
    for made, tree in ((model, params), (teacher, of_teacher)):
        module = made.bind(tree)
        width = made.config.decoder.hidden_size
        hidden = rng.standard_normal((2, 3, 7, width)).astype(np.float32)
        heads.append((hidden, module.language_model.head_kernel()))
        logits.append(next_token_logits(module, hidden)[..., : tiny.VOCAB_SIZE])
    logits[1] = 2.0 * np.tanh(logits[1] / 2.0)
    logs = [jax.nn.log_softmax(x / 0.7) for x in logits]
    vocab = teacher.config.decoder.vocab_size
    for how in ((1.0, None), (0.4, 2)):
        for chunk in (2, 7):
            found = token_statistics(
                *heads[0],
                labels,
                ("divergence", "entropy"),
                chunk=chunk,
                temperature=0.7,
                teacher=Taught(*heads[1], vocab, 2.0, *how),
            )
            wanted = token_divergence(*logs, *how)
            np.testing.assert_allclose(found["divergence"], wanted, rtol=1e-4, atol=1e-5)
            entropy = -(np.exp(logs[0]) * logs[0]).sum(-1)
            np.testing.assert_allclose(found["entropy"], entropy, rtol=1e-4, atol=1e-5)


HINT = " {answer} ."


def asked():
    """Prompts with an answer and another image."""
    for number, record in enumerate(prompt_records("align", 0, 4, 24)):
        image = ImageRef(f"o{number}", png_bytes(sample_scene("test", 0, number), 24))
        yield dataclasses.replace(record, extra={"answer": "a red star"}, other_images=(image,))


def test_a_teacher_sees_more(tiny_model, tiny_processor):
    """The answer in the prompt and another image; the samples are the policy's, token for token."""
    teacher = {"type": "self", "hint": HINT, "image": "data", "prompt_lengths": [40]}
    config = config_of(teacher, reference={"type": "online"})
    given = list(asked())
    records = tokenized(tiny_processor, config, given=given)
    start = make_start(tiny_model, tiny_processor)
    loaded = LoadedTeacher.load(config, start, meshes.one_device())
    assert loaded is not None and loaded.params is None
    prompts = Prompts(records, [MixtureEntry(4)], seed=3)
    mesh = meshes.one_device()
    source = Rollouts(start, prompts, config, ROLLOUT, LENGTHS, mesh, 4, loaded)
    host = source.draw(State(tiny_model[1]))
    arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), host.arrays)
    policy, seen = arrays.prompts, arrays.teacher
    for name in ("response_ids", "response_mask", "loss_mask", "weights"):
        np.testing.assert_array_equal(getattr(policy, name), getattr(seen, name))
    assert host.taught.tokens == seen.prompt_mask.sum() + seen.response_mask.sum()
    assert (
        host.taught.tokens
        > host.amounts.tokens
        == policy.prompt_mask.sum() + policy.response_mask.sum()
    )
    assert (policy.pixel_values != seen.pixel_values).any(axis=(1, 2, 3, 4)).all()
    for row in range(4):
        texts = [
            tiny_processor.decode(batch.prompt_ids[row][batch.prompt_mask[row]].tolist())
            for batch in (policy, seen)
        ]
        assert "a red star" in texts[1] and "a red star" not in texts[0]
        assert texts[1].replace(" a red star .", "") == texts[0]


@pytest.mark.parametrize(
    ("teacher", "change", "reason"),
    [
        (SelfTeacher(hint=HINT), {"extra": {}}, "no_answer"),
        (SelfTeacher(image="data"), {"other_images": None}, "no_other_image"),
    ],
)
def test_rows_without_what_a_teacher_sees_are_left_out(teacher, change, reason):
    record = dataclasses.replace(next(asked()), **change)
    with pytest.raises(UnusableRow) as raised:
        shown_to(teacher, record)
    assert raised.value.reason == reason


def test_answers_that_are_no_texts_are_told_as_json():
    record = dataclasses.replace(next(asked()), extra={"solution": [[1, 2, 3, 4]]})
    shown = shown_to(SelfTeacher(hint=HINT), record)
    assert shown.prompt[-1].text.endswith(" [[1, 2, 3, 4]] .")
    assert shown.images == record.images


@pytest.mark.slow
def test_a_model_teaches_itself(run, tmp_path):
    """Its reference is told the answer; a moving one too."""
    for reference in ({"type": "online"}, {"type": "ema", "every": 2}):
        config = config_of({"type": "self", "hint": HINT}, reference=reference, epochs=6)
        folder = tmp_path / reference["type"]
        rows = run(folder, config, given=list(asked()), rollout=ROLLOUT)
        assert rows[0]["divergence"] > 1e-3
        assert rows[-1]["divergence"] < rows[0]["divergence"]


def test_a_share_of_batches_has_the_datas_responses(tiny_model, tiny_processor, tiny_folder):
    rollout = ROLLOUT.model_copy(update={"on_policy": 0.5})
    config = config_of({"type": "model", "model": str(tiny_folder)})
    given = [
        dataclasses.replace(record, responses=(Response.of("a red star"),))
        for record in prompt_records("align", 0, 4, 24)
    ]
    records = tokenized(tiny_processor, config, rollout, given)
    use = PromptUse.of(rollout, config)
    assert use.unfit(records[0]) is None
    assert use.unfit(dataclasses.replace(records[0], responses=()))[0] == "empty_response"
    start, mesh = make_start(tiny_model, tiny_processor), meshes.one_device()
    loaded = LoadedTeacher.load(config, start, mesh)
    prompts = Prompts(records, [MixtureEntry(4)], seed=3)
    source = Rollouts(start, prompts, config, rollout, LENGTHS, mesh, 4, loaded)
    given_steps = 0
    for step in range(12):
        source.set_state({"order": source.before, "uses": 0})
        host = source.draw(State(tiny_model[1], step))
        arrays = host.arrays.prompts
        if arrays.response_ids.shape[2] == 1:
            given_steps += 1
            ids = arrays.response_ids[0, 0, 0][arrays.response_mask[0, 0, 0]]
            assert tiny_processor.decode(ids.tolist()).startswith("a red star")
            np.testing.assert_array_equal(host.arrays.teacher.response_ids, arrays.response_ids)
        else:
            assert arrays.response_ids.shape[2] == ROLLOUT.num_samples
    assert 2 < given_steps < 10


def test_another_tokenizer_is_refused(tiny_model, tiny_processor, tmp_path):
    folder = tiny.make_folder(tmp_path / "other")
    path = folder / "tokenizer.json"
    rules = json.loads(path.read_text())
    words = rules["model"]["vocab"]
    first, second = [word for word in words if word.isalpha()][:2]
    words[first], words[second] = words[second], words[first]
    path.write_text(json.dumps(rules))
    config = config_of({"type": "model", "model": str(folder)})
    start = make_start(tiny_model, tiny_processor)
    with pytest.raises(MmpoError, match=r"policy and teacher have other tokenizers: .* ids"):
        LoadedTeacher.load(config, start, meshes.one_device())


def test_a_teacher_that_says_nothing_is_refused_first(tiny_folder, tiny_model, tmp_path):
    """Before any row is read."""
    scorer = save_headed(tmp_path / "scorer", tiny_folder, *tiny_model)
    teacher = {"type": "model", "model": str(scorer)}
    training = {"objective": {"type": "distillation"}, "teacher": teacher}
    with pytest.raises(ModelError, match=r"is a reward model, .* training.teacher takes a policy"):
        run_training(recipe(tiny_folder, tmp_path / "run", training=training))
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def closer(tmp_path_factory):
    """A teacher to whom a picture is 16 tokens, where it is 4 to the policy."""
    config = tiny.make_config(vision={"image_size": 32})
    return tiny.make_folder(tmp_path_factory.mktemp("closer") / "llava", config)


def test_too_long_a_prompt_for_a_teacher_is_left_out(tiny_processor, tiny_folder, closer):
    """By its own limit and its own processor, whatever the prompt is to the policy."""
    given = list(prompt_records("align", 0, 4, 24))

    def left_out(model, *sizes):
        teacher = {"type": "model", "model": str(model), "prompt_lengths": sizes or None}
        use = PromptUse.of(ROLLOUT, config_of(teacher))
        use = pickle.loads(pickle.dumps(use))  # as other processes are given it
        kept, skipped = tokenize_records(given, tiny_processor, LENGTHS, function=use.tokenize)
        assert len(kept) + len(skipped) == len(given)
        assert {row.reason for row in skipped} <= {"prompt_too_long"}
        return [row.detail for row in skipped]

    longest = max(
        len(row.prompt_ids) for row in tokenize_records(given, tiny_processor, LENGTHS)[0]
    )
    assert left_out(tiny_folder) == left_out(tiny_folder, longest) == []
    assert left_out(closer, longest + 12) == []
    (detail, *_) = left_out(closer, longest + 11)
    assert re.match(
        rf"as the teacher sees it: the prompt has {longest + 12} tokens, the li", detail
    )
    assert len(left_out(closer, 8)) == len(given)


def test_a_key_of_rows_is_of_the_teachers_processor(tiny_folder, closer):
    """And not of where it lies, which differs from machine to machine."""
    copy = closer.parent / "copy"
    shutil.copytree(closer, copy)
    keys = [
        PromptUse.of(ROLLOUT, config_of({"type": "model", "model": str(folder)})).key()
        for folder in (closer, copy, tiny_folder)
    ]
    first, same, other = (key["their_processor"] for key in keys)
    assert first == same != other
    assert "their_processor" not in PromptUse.of(ROLLOUT).key()


@pytest.mark.slow
def test_rows_too_long_for_a_teacher_stop_no_run(tiny_folder, closer, tmp_path):
    """They are left out and listed."""
    (tmp_path / "0.png").write_bytes(png_bytes(sample_scene("test", 0, 0), 24))
    texts = ["a ring ?", "is there a red star in the picture ?", "a star ?"]
    rows = [{"id": text, "images": ["0.png"], "prompt": text} for text in texts]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {
        "objective": {"type": "distillation"},
        "teacher": {"type": "model", "model": str(closer)},
        "batch_size": 2,
    }
    data = {"source": "file", "path": str(path), "max_skipped": 0.5}
    run_training(recipe(tiny_folder, tmp_path / "out", data=data, training=training))
    (skipped,) = (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()
    told = json.loads(skipped)
    assert (told["id"], told["reason"]) == (texts[1], "prompt_too_long")
    assert told["detail"].startswith("as the teacher sees it: ")


def recipe(folder, output, **changes):
    values = {
        "output": str(output),
        "model": str(folder),
        "lengths": {"prompt": [24], "response": [8]},
        "data": {"source": "picture_world", "split": "align", "size": 8, "image_size": 24},
        "rollout": {"num_samples": 2, "max_new_tokens": 4},
        "training": {
            "objective": {"type": "distillation"},
            "teacher": {"type": "model", "model": str(folder)},
            "batch_size": 8,
        },
    }
    return TrainRecipe.model_validate(values | changes)


@pytest.mark.slow
def test_a_recipe_distills(tiny_folder, larger, tmp_path):
    """Rows of a file with an answer and an enlarged crop; another teacher is another run."""
    rows = [
        {
            "prompt": [{"role": "user", "content": text}],
            "responses": [],
            "images": ["0.png"],
            "answer": "yes",
            **others,
        }
        for text, others in (("a ring ?", {"other_images": ["1.png"]}), ("a star ?", {}))
    ]
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png_bytes(sample_scene("test", 0, number), 24))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    training = {
        "objective": {"type": "distillation"},
        "teacher": {"type": "model", "model": str(larger), "image": "data", "hint": HINT},
        "batch_size": 2,
    }
    data = {"source": "file", "path": str(path), "max_skipped": 0.5}
    made = recipe(tiny_folder, tmp_path / "out", data=data, training=training)
    run_training(made)
    (skipped,) = (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()
    assert json.loads(skipped)["reason"] == "no_other_image"
    other = training | {"teacher": training["teacher"] | {"model": str(tiny_folder)}}
    with pytest.raises(CheckpointError, match="teacher"):
        run_training(recipe(tiny_folder, tmp_path / "out", data=data, training=other))


MODEL = {"type": "model", "model": "m"}
DISTILL = {"type": "distillation"}
REWARD = {"rewards": [{"type": "think_format"}], "max_new_tokens": 4}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"objective": DISTILL}}, "distillation learns from one; give model or self"),
        (
            {"training": {"objective": {"type": "grpo"}, "teacher": MODEL}, "rollout": REWARD},
            "no objective learns from it",
        ),
        (
            {"training": {"objective": DISTILL, "teacher": {"type": "self", "hint": "{answer}"}}},
            "a teacher of type self is the reference",
        ),
        (
            {
                "training": {
                    "objective": DISTILL,
                    "reference": {"type": "online"},
                    "teacher": {"type": "self"},
                }
            },
            "has to see more",
        ),
        (
            {"training": {"objective": DISTILL, "teacher": MODEL | {"hint": "say it"}}},
            "says nothing without",
        ),
        (
            {
                "training": {
                    "objective": [DISTILL, {"type": "distillation", "beta": 0.5}],
                    "teacher": MODEL,
                }
            },
            "the same beta and top_k",
        ),
        (
            {"training": {"objective": [DISTILL, {"type": "papo"}], "teacher": MODEL}},
            "papo and distillation need different rows",
        ),
        (
            {
                "training": {"objective": [DISTILL, {"type": "grpo"}], "teacher": MODEL},
                "rollout": REWARD | {"on_policy": 0.5},
            },
            "on_policy: grpo learns from rewarded samples",
        ),
        ({"rollout": {"scale": "batch"}}, "scale: is of rewards, and there are none"),
        (
            {
                "training": {"objective": {"type": "papo", "image": "data"}},
                "rollout": REWARD,
            },
            "prompts have no other image of the data",
        ),
    ],
)
def test_recipes_that_make_no_sense_are_refused(changes, message, tmp_path):
    with pytest.raises(ValidationError, match=message):
        recipe("model", tmp_path, **changes)
