"""Whole plans: of the picture world on simulated devices, and on TPUs that are not there."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import yaml
from helpers import tiny

from mmpo_jax import cli
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.contexts import MAIN
from mmpo_jax.models.lora import add_adapters
from mmpo_jax.models.quantized_base import quantize_base
from mmpo_jax.models.reward_head import KEY as HEAD_KEY
from mmpo_jax.objectives.terms import make_term
from mmpo_jax.parallel import chips
from mmpo_jax.parallel.mesh import make_mesh, put_params
from mmpo_jax.planning import abstract, opened, planned, topology
from mmpo_jax.planning.abstract import Sizes
from mmpo_jax.planning.stages import Assumed
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.command_recipes import GenerateRecipe, RewardRecipe, SelectRecipe
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.recipes.training import Training
from mmpo_jax.training.losses import make_loss, recipe_terms
from mmpo_jax.training.optimizer import make_optimizer
from mmpo_jax.training.step import create_state

ROOT = Path(__file__).parents[2]
WORLD = {"source": "picture_world", "size": 64}
SIZES = {"prompt": [24], "response": [32]}


@pytest.fixture
def without_weights(tiny_folder, tmp_path):
    """A checkpoint's folder with config, tokenizer and processor alone."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return str(folder)


def write(folder, **values):
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"output": str(folder / "out"), "data": WORLD, **values}))
    return str(path)


def test_a_recipe_without_weights(without_weights, tmp_path, capsys):
    recipe = write(tmp_path, model=without_weights, lengths=SIZES, scoring={"batch_size": 8})
    figures = tmp_path / "plan.json"
    flags = ["--topology", "cpu:8", "--fast", "--json", str(figures)]
    status = cli.main(["plan", recipe, *flags, "devices.tensor=2"])
    assert status == 0
    assert "mesh data 1 x fsdp 4 x tensor 2" in capsys.readouterr().out
    plan = json.loads(figures.read_text())
    (program,) = plan["programs"]
    assert (program["program"], program["shape"]) == ("log-probs", "8 x 24 + 2 x 32, 1 slot")
    assert program["runs"] == 64 / 8
    given = program["bytes"]
    # What it holds by our count is what the compiler is given, but for what it does not read.
    assert 0.9 < given["arguments"] / (given["parameters"] + given["batch"]) <= 1
    assert given["peak"] >= given["arguments"] + given["temporaries"]
    assert program["collectives"]["all-gather"] > 0
    assert program["roofline"] is None  # nobody has measured this machine
    assert not (tmp_path / "out").exists()


def stages_of(recipe, **assumed):
    plan = planned.plan_stages(recipe, make_mesh(), Assumed(**assumed))
    return {(run.stage, run.program.name): run for run in plan.runs}, plan.notes


def recipe_of(kind, model, **values):
    return kind.model_validate(
        {"output": "out", "model": model, "data": WORLD, "lengths": SIZES, **values}
    )


def test_programs_of_an_alignment(without_weights):
    recipe = recipe_of(
        AlignRecipe,
        without_weights,
        rounds=3,
        prompts_per_round=20,
        sampling={"num_samples": 4, "max_new_tokens": 32, "batch_size": 8},
        candidates=[{"type": "policy"}, {"type": "greedy"}],
        training={"batch_size": 8, "micro_batch_size": 8},
    )
    runs, notes = stages_of(recipe, claims=2.0)
    assert [*runs] == [
        ("generation", "prefill"),
        ("generation", "decode"),
        ("greedy", "greedy: prefill"),
        ("greedy", "greedy: decode"),
        ("labelling", "labelling"),
        ("reference", "reference"),
        ("training", "train step"),
    ]
    decode = runs["generation", "decode"]
    # All samples of all rounds: whole loops times the responses of one.
    made = decode.runs * decode.program.gives["responses"] * decode.program.loops
    assert made == pytest.approx(3 * 20 * 4)
    labelling = runs["labelling", "labelling"]
    assert labelling.runs * labelling.program.gives["claims"] >= 3 * 20 * 5 * 2
    # Two pairs a prompt, in three rounds.
    assert runs["training", "train step"].runs == 3 * (2 * 20 / 8)
    assert any("2 claims" in note for note in notes)


def test_rounds_start_from_float32_and_labelers_from_what_they_are(without_weights):
    path = Path(without_weights, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": "bfloat16"}))
    options = {"sampling": {"max_new_tokens": 32}, "training": {"batch_size": 8}}
    recipe = recipe_of(AlignRecipe, without_weights, rounds=2, **options)
    opened.open_config.cache_clear()
    runs, notes = stages_of(recipe)
    assert runs["generation", "decode"].program.dtype == "float32"
    assert runs["labelling", "labelling"].program.dtype == "bfloat16"
    assert any("the first has bfloat16" in note for note in notes)
    alone, _ = stages_of(recipe.model_copy(update={"rounds": 1}))
    assert alone["generation", "decode"].program.dtype == "bfloat16"
    options["training"]["compute_dtype"] = "bfloat16"
    narrow, _ = stages_of(recipe_of(AlignRecipe, without_weights, rounds=2, **options))
    assert narrow["generation", "decode"].program.dtype == "bfloat16"
    quantized = {"lora": {"rank": 2, "quantize_base": "int8"}, "batch_size": 8}
    steps = [
        stages_of(recipe_of(AlignRecipe, without_weights, **options | changes))[0]
        for changes in ({"rounds": rounds, "training": quantized} for rounds in (1, 2))
    ]
    held = [runs["training", "train step"].program.held for runs in steps]
    assert held[0] == held[1]  # of all rounds the same base
    before = runs["generation", "decode"].program.held["parameters"]
    assert narrow["generation", "decode"].program.held["parameters"] == before / 2


@pytest.fixture
def reward_model(without_weights):
    """A model with a head that reads critiques."""
    path = Path(without_weights, "config.json")
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {HEAD_KEY: {"type": "linear", "critique_prompt": "why ?"}}))
    opened.open_config.cache_clear()
    return without_weights


def test_programs_of_a_reward_model(reward_model):
    recipe = recipe_of(
        RewardRecipe,
        reward_model,
        data={"source": "file", "path": "rows.jsonl"},
        rewarding={"critiques": 2, "max_new_tokens": 16, "batch_size": 8},
    )
    runs, notes = stages_of(recipe, rows=40, responses=3)
    assert [*runs] == [
        ("rewards: critiques", "rewards: critiques: prefill"),
        ("rewards: critiques", "rewards: critiques: decode"),
        ("rewards", "rewards"),
    ]
    decode = runs["rewards: critiques", "rewards: critiques: decode"]
    made = decode.runs * decode.program.gives["responses"] * decode.program.loops
    assert made == pytest.approx(40 * 3 * 2)
    rewards = runs["rewards", "rewards"]
    assert rewards.runs == 5 and rewards.program.gives["rewards"] == 8 * 3 * 2
    assert any("critiques are planned as if" in note for note in notes)


def test_a_reward_model_is_planned_wherever_one_is_asked(reward_model, tiny_folder):
    asked = {"model": reward_model, "max_new_tokens": 16}
    sampling = {"max_new_tokens": 32}
    aligned = recipe_of(
        AlignRecipe,
        str(tiny_folder),
        sampling=sampling,
        feedback={"type": "reward_model", **asked},
        training={"batch_size": 8},
    )
    assert ("judging", "rewards") in stages_of(aligned, rows=40)[0]
    selected = recipe_of(SelectRecipe, str(tiny_folder), reward_model=asked, sampling=sampling)
    assert ("rewards", "rewards") in stages_of(selected, rows=40)[0]
    sampled = recipe_of(
        TrainRecipe,
        str(tiny_folder),
        rollout={"max_new_tokens": 32, "rewards": [{"type": "reward_model", **asked}]},
        training={"objective": {"type": "grpo"}, "batch_size": 8},
    )
    assert ("rewards", "rewards") in stages_of(sampled, rows=40)[0]
    asked = {"model": str(tiny_folder)}
    without = recipe_of(SelectRecipe, reward_model, reward_model=asked, sampling=sampling)
    with pytest.raises(MmpoError, match="has no reward head"):
        stages_of(without, rows=40)


def test_the_step_of_a_reward_model(without_weights):
    """Whose head is new, and which learns critiques too."""
    objective = [{"type": "bradley_terry"}, {"type": "critique", "prompt": "why ?"}]
    recipe = recipe_of(
        TrainRecipe,
        without_weights,
        data={"source": "file", "path": "rows.jsonl"},
        reward_head="linear",
        training={"objective": objective, "reference": {"type": "none"}, "batch_size": 8},
    )
    runs, _ = stages_of(recipe, rows=40)
    assert [*runs] == [("training", "train step")]
    program = runs["training", "train step"].program
    with jax.set_mesh(program.mesh):
        assert program.lower().as_text()


def test_programs_of_other_recipes(without_weights):
    rollout = {"rewards": {"type": "picture_world_caption"}, "num_samples": 4, "max_new_tokens": 32}
    grpo = recipe_of(
        TrainRecipe,
        without_weights,
        rollout=rollout,
        training={"objective": {"type": "grpo"}, "batch_size": 8},
    )
    runs, _ = stages_of(grpo)
    assert [name for _, name in runs] == ["rollouts: prefill", "rollouts: decode", "train step"]
    sampling, step = (runs[key].program for key in list(runs)[1:])
    # Moments lie there while samples are drawn, and the weights are those that are read.
    assert sampling.held["beside"] == step.held["optimizer"] > 0
    narrow = {"objective": {"type": "grpo"}, "batch_size": 8, "compute_dtype": "bfloat16"}
    runs, _ = stages_of(grpo.model_copy(update={"training": Training.model_validate(narrow)}))
    sampling, step = (runs[key].program for key in list(runs)[1:])
    both = step.held["optimizer"] + step.held["parameters"]  # float32, beside what is read
    assert sampling.held["beside"] == both
    step = runs["training", "train step"].program
    assert step.gives["prompts"] == 8 and "pairs" not in step.gives
    sampling = runs["rollouts", "rollouts: decode"].program
    assert re.fullmatch(r"\d+ rows of 1 prompt of 24, 4 places of 32", sampling.shape)
    options = {"reward_kl": 0.1, "minibatches": 2, "dynamic_sampling": 3}
    rloo = recipe_of(
        TrainRecipe,
        without_weights,
        rollout=rollout | options,
        training={
            "objective": {"type": "grpo"},
            "reference": {"type": "online"},
            "batch_size": 8,
            "save_every": 20,
        },
    )
    runs, notes = stages_of(rloo, rows=64)
    assert [name for _, name in runs][2:] == ["log-probs", "train step"]
    # Of every sample under the policy and under the reference, eight prompts at a time.
    assert runs["rollouts", "log-probs"].runs == 2 * 64 / 8
    assert any("dynamic_sampling" in note for note in notes)
    sft = recipe_of(
        TrainRecipe,
        without_weights,
        training={"objective": {"type": "sft"}, "batch_size": 8, "reference": {"type": "none"}},
        validation={"share": 0.25, "every": 10},
    )
    runs, _ = stages_of(sft)
    assert [name for _, name in runs] == ["train step", "validation"]
    generate = recipe_of(GenerateRecipe, without_weights)
    assert [name for _, name in stages_of(generate)[0]] == ["prefill", "decode"]
    select = recipe_of(SelectRecipe, without_weights, reference=without_weights, lengths=None)
    runs, notes = stages_of(select)
    assert [name for _, name in runs] == ["prefill", "decode", "log-probs"]
    assert any("no `lengths`" in note for note in notes)


def distilling(model, teacher, **training):
    return {
        "model": model,
        "lengths": SIZES,
        "rollout": {"num_samples": 2, "max_new_tokens": 32},
        "training": {
            "objective": {"type": "distillation"},
            "teacher": teacher,
            "batch_size": 16,
            "micro_batch_size": 8,
            "compute_dtype": "bfloat16",
            **training,
        },
    }


@pytest.mark.slow
def test_a_teacher_is_planned(without_weights, tmp_path):
    """Its weights are among what the compiled step is given, and its passes are counted."""
    config = tiny.make_config(text={"hidden_size": 64, "num_hidden_layers": 3})
    larger = str(tiny.make_folder(tmp_path / "larger", config))
    teacher = {"type": "model", "model": larger, "prompt_lengths": [40]}
    options = distilling(without_weights, teacher) | {"devices": {"tensor": 2}}
    recipe, cpus = recipe_of(TrainRecipe, **options), topology.find_topology("cpu:8")
    only = ("train step",)
    made = planned.plan_recipe(recipe, cpus, Assumed(), optimised=False, only=only)
    (step,) = made.to_json()["programs"]
    assert step["shape"].endswith("2 micro-batches, taught at 8 x 40 + 2 x 32, 1 slot")
    mesh = make_mesh(fsdp=4, tensor=2)
    model = opened.open_config(larger, "auto").model
    given = step["bytes"]
    assert given["teacher"] == abstract.local_bytes(abstract.params(model, mesh, jnp.bfloat16))
    names = ("parameters", "optimizer", "reference", "teacher", "batch")
    held = sum(given[name] for name in names)
    assert 0.9 < given["arguments"] / held <= 1


def test_a_teacher_that_is_the_reference_has_no_weights_of_its_own(without_weights):
    alone = {"type": "self", "hint": "{answer}"}
    own = distilling(without_weights, alone, reference={"type": "online"})
    runs, _ = stages_of(recipe_of(TrainRecipe, **own))
    program = runs["training", "train step"].program
    assert program.held["teacher"] == 0 < program.held["reference"]
    assert runs["rollouts", "rollouts: decode"].program.held["beside"] >= program.held["reference"]
    with jax.set_mesh(program.mesh):
        assert program.lower().as_text()
    teacher = {"type": "model", "model": without_weights, "prompt_lengths": [4]}
    short = distilling(without_weights, teacher)
    with pytest.raises(
        MmpoError, match=r"training\.teacher\.prompt_lengths: the largest size is 4"
    ):
        stages_of(recipe_of(TrainRecipe, **short))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"freeze": ["vision_tower/.*"], "reference": {"type": "online"}},
        {"lora": {"rank": 2}, "reference": {"type": "ema", "every": 4}},
        {"optimizer": {"type": "adamw", "offload": True}},
        {
            "lora": {"rank": 2, "dora": True},
            "reference": {"type": "online"},
            "compute_dtype": "bfloat16",
        },
        {"lora": {"rank": 2, "quantize_base": "int8"}},
    ],
    ids=["all", "frozen", "adapters", "offload", "magnitudes", "quantised"],
)
def test_the_state_is_that_of_training(tiny_model, options):
    model, params = tiny_model
    config = Training.model_validate({"objective": {"type": "dpo"}, **options})
    mesh, terms = make_mesh(fsdp=4, tensor=2), recipe_terms(config)
    loss = make_loss(model, terms)
    optimizer = make_optimizer(config.optimizer, lambda step: 0.0)
    dtype = {"online": config.compute_dtype, "ema": jnp.float32}.get(config.reference.type)
    start = params
    if config.quantization is not None:
        start = quantize_base(put_params(params, model.rules, mesh), model, config.quantization)
    if config.lora is not None:
        start = add_adapters(start, model, config.lora, config.freeze, 0)
    made = create_state(
        start, model, optimizer, config.freeze, mesh, reference_dtype=dtype, keeps=loss.state
    )
    shapes = abstract.train_state(
        model, config, loss, optimizer, mesh, jnp.float32, config.reference
    )
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    for ours, theirs in zip(jax.tree.leaves(shapes), jax.tree.leaves(made), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        assert ours.sharding.is_equivalent_to(theirs.sharding, theirs.ndim)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(made))
    waiting = abstract.local_bytes(shapes, on_host=True)
    assert abstract.local_bytes(shapes) + waiting == held
    assert (waiting > 0) == config.optimizer.offload


def test_the_batch_is_that_of_training(tiny_model):
    model, _ = tiny_model
    made = tiny.random_batch(model.config, [20, 24], [[3, 5], [7, 2]])
    rows, prompt = made.prompt_ids.shape
    responses, response = made.response_ids.shape[1:]
    sizes = Sizes(rows, prompt, responses, response, made.pixel_values.shape[1])
    shapes = abstract.batch(model, sizes, make_mesh(fsdp=1, devices=jax.devices()[:1]))
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    for ours, theirs in zip(jax.tree.leaves(shapes), jax.tree.leaves(made), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    batch = abstract.train_batch(
        model,
        Sizes(8, 24, 2, 32, 1),
        make_mesh(fsdp=8),
        [make_term("dpo")],
        (MAIN,),
        reference="sums",
        micro_batches=2,
    )
    assert batch.reference["sums"].shape == batch.fields["rank"].shape == (2, 8, 2)


class TestRefusals:
    @pytest.fixture
    def refused(self, capsys):
        def refused(*arguments):
            assert cli.main(["plan", *arguments]) == 1
            said = capsys.readouterr().err
            assert "Traceback" not in said
            return said

        return refused

    @pytest.fixture
    def recipe(self, without_weights, tmp_path):
        return write(tmp_path, model=without_weights, lengths=SIZES, scoring={"batch_size": 8})

    def test_what_does_not_fit_ends_with_status_1(self, refused, recipe, monkeypatch):
        monkeypatch.setitem(chips.CHIPS, "cpu", chips.Chip("cpu", 1000.0))
        said = refused(recipe, "--topology", "cpu:8", "--fast")
        assert "does not fit cpu:8: log-probs takes more than a device has" in said

    @pytest.mark.parametrize("name", ["v9:2x2", "v5e", "v5e:axb"])
    def test_unknown_slices(self, refused, recipe, name):
        assert "write a kind of chip (v4, v5e" in refused(recipe, "--topology", name)

    def test_no_compiler(self, refused, recipe, monkeypatch):
        monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
        assert "pip install libtpu" in refused(recipe, "--topology", "v5e:2x2")

    def test_a_prompt_that_is_smaller_than_its_picture(self, refused, recipe):
        said = refused(recipe, "--topology", "cpu:8", "lengths.prompt=[4]")
        assert "the picture of a prompt alone takes" in said

    def test_a_mesh_that_does_not_fit_the_slice(self, refused, recipe):
        said = refused(recipe, "--topology", "cpu:8", "devices.fsdp=16")
        assert "does not fit 8 devices" in said

    def test_recipes_of_several_commands(self, refused, without_weights, tmp_path):
        recipe = write(tmp_path, model=without_weights)
        assert "--as says it" in refused(recipe, "--topology", "cpu:8")

    def test_unknown_keys(self, refused, recipe):
        assert "unknown key" in refused(recipe, "--topology", "cpu:8", "scoring.size=3")


has_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="the compiler for TPUs is not installed: pip install libtpu",
)


def mmpo(*arguments, **environment):
    """`mmpo` in a process of its own: (status, stdout, stderr)."""
    done = subprocess.run(
        [sys.executable, "-m", "mmpo_jax.cli", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
@has_libtpu
def test_sides_of_a_torus_that_no_axis_is_a_multiple_of(without_weights, tmp_path):
    """32 of 16 x 16 chips: half a side, and the other one."""
    recipe = write(tmp_path, model=without_weights, lengths=SIZES, scoring={"batch_size": 8})
    mesh = ("devices.fsdp=8", "devices.tensor=32")
    status, out, err = mmpo("plan", recipe, "--topology", "v6e:16x16", "--fast", *mesh)
    assert status == 0, err
    assert "mesh data 1 x fsdp 8 x tensor 32" in out


SPREAD = """
from mmpo_jax.planning.topology import find_topology
devices = find_topology("v5e:8x8").devices
import jax
from jax.sharding import NamedSharding, PartitionSpec
from mmpo_jax.models.layers import spread_gradient
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.planning.collectives import find_collectives, summed

mesh = make_mesh(fsdp=64, devices=devices)
split = NamedSharding(mesh, PartitionSpec("fsdp"))

def loss(kernel, x, spread):
    kernel = spread_gradient(kernel, split.spec) if spread else kernel
    return (x @ kernel).astype("float32").sum()

arrays = [jax.ShapeDtypeStruct(shape, "bfloat16", sharding=split)
          for shape in ((1024, 2048), (64 * 256, 1024))]
with jax.set_mesh(mesh):
    for spread in (False, True):
        step = jax.jit(jax.grad(loss), static_argnums=2, out_shardings=split)
        sent = summed(find_collectives(step.lower(*arrays, spread).compile().as_text()))
        print("sent", *(sent.get(kind, 0) for kind in ("all-reduce", "reduce-scatter")))
"""


@pytest.mark.slow
@has_libtpu
def test_gradients_over_both_sides_of_a_torus_are_spread():
    """With half of the traffic: of a kernel of 4 MiB."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    done = subprocess.run(
        [sys.executable, "-c", SPREAD], env=environment, capture_output=True, text=True, check=True
    )
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("sent ")]
    plain, spread = ([float(number) for number in line] for line in lines)
    size = 2 * 1024 * 2048
    assert plain == [pytest.approx(2 * size, rel=0.05), 0]
    assert spread == [0, pytest.approx(size, rel=0.15)]


@pytest.mark.slow
@has_libtpu
def test_the_picture_world_on_tpus_that_are_not_there(tmp_path):
    figures = tmp_path / "plan.json"
    status, out, err = mmpo(
        "plan",
        "configs/picture_world_align.yaml",
        "--topology",
        "v5e:2x4",
        "--fast",
        "--json",
        str(figures),
        "devices.fsdp=4",
        "devices.tensor=2",
        "training.remat=full",
    )
    assert status == 0, err
    assert "attention is computed by xla" not in err
    assert "v5e:2x4: 8 chips on 2 hosts, 15.75 GiB each" in out
    plan = json.loads(figures.read_text())
    assert [program["program"] for program in plan["programs"]] == [
        "prefill",
        "decode",
        "labelling",
        "reference",
        "train step",
    ]
    for program in plan["programs"]:
        held, given = program["bytes"], program["bytes"]["arguments"]
        counted = sum(held[key] for key in held if key not in ("arguments", "temporaries", "peak"))
        # What is not read is left out, and arrays lie in tiles, which small ones do not fill.
        assert 0.7 < given / counted < 3
        assert program["roofline"]["bound"] in ("compute", "memory", "exchange")
        assert program["total_seconds"] > 0
    step = plan["programs"][-1]
    assert step["collectives"]["all-gather"] > 0
    assert plan["chip_hours"] == pytest.approx(8 * plan["hours"])
    assert sum(plan["stage_hours"].values()) == pytest.approx(plan["hours"])


@pytest.mark.slow
@has_libtpu
def test_a_step_has_each_kernel_of_attention_once(tiny_folder, tmp_path):
    """With the policy "dots" the forward kernel does not run again in the backward pass."""
    from mmpo_jax.planning.compiling import splash_kernels

    recipe = write(
        tmp_path,
        model=str(tiny_folder),
        data={"source": "file", "path": "none.jsonl"},
        lengths={"prompt": [40], "response": [32]},
        training={"batch_size": 4, "remat": "dots", "compute_dtype": "bfloat16"},
    )
    program = tmp_path / "program.txt"
    status, _, err = mmpo(
        *("plan", recipe, "--topology", "v5e:2x2", "--rows", "100", "--dump", str(program)),
        *("devices.fsdp=2", "devices.tensor=2"),
    )
    assert status == 0, err
    assert "splash" not in err  # it would say why another one is used
    assert splash_kernels(program.read_text()) == ["dkv", "dq", "fwd"]
