"""Recipes: every mistake named with its path before anything starts, all options read."""

import ast
import inspect
import typing
from pathlib import Path

import pydantic
import pytest
import yaml

import mmpo_jax
from mmpo_jax.benchmarks.benchmark import find_benchmark
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.sections import Section
from mmpo_jax.data.sources import RecordSource
from mmpo_jax.objectives.catalog import OBJECTIVES
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.picture_world.render import MIN_IMAGE_SIZE
from mmpo_jax.recipes.align_recipe import AlignRecipe
from mmpo_jax.recipes.base import Base, Devices
from mmpo_jax.recipes.candidates import Candidate, Drawing
from mmpo_jax.recipes.command_recipes import (
    EvaluateRecipe,
    GenerateRecipe,
    SelectRecipe,
)
from mmpo_jax.recipes.commands import RECIPES
from mmpo_jax.recipes.evaluation import BenchmarkSection
from mmpo_jax.recipes.feedback import (
    CheckpointAsked,
    Judging,
    PictureWorldSplitting,
    ScoresFeedback,
    SourceFeedback,
    Speaking,
    WholeSplitting,
)
from mmpo_jax.recipes.files import RecipeError, load_recipe
from mmpo_jax.recipes.judging import JudgedAnswers
from mmpo_jax.recipes.methods import METHODS
from mmpo_jax.recipes.objectives import ObjectiveSection
from mmpo_jax.recipes.rewards import RewardModelReward, RewardSection
from mmpo_jax.recipes.rollout import Rollout
from mmpo_jax.recipes.sampling import Decoding, Sampling
from mmpo_jax.recipes.scoring import ImplicitReward, Rewarding
from mmpo_jax.recipes.train_recipe import TrainRecipe
from mmpo_jax.rewards import REWARDS

PACKAGE = Path(mmpo_jax.__file__).parent
CONFIGS = sorted((PACKAGE.parent / "configs").rglob("*.yaml"))
KINDS = (*RECIPES.values(), JudgedAnswers)
GOOD = {"output": "out", "model": "builtin:picture_world", "data": {"source": "picture_world"}}


@pytest.fixture
def load(tmp_path):
    """Loads a recipe of the given text, by default a small good one."""

    def load(*overrides, text=None, kind=TrainRecipe):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(GOOD) if text is None else text)
        # The picture world's own data hold no preferences.
        supervised = ["training.objective.type=sft"] if kind is TrainRecipe else []
        return load_recipe(kind, path, [*supervised, *overrides])

    return load


@pytest.fixture
def problem(load):
    """The message that refuses a recipe."""

    def problem(*overrides, **options):
        with pytest.raises(RecipeError) as caught:
            load(*overrides, **options)
        return str(caught.value)

    return problem


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("sead=1", "sead: unknown key; did you mean seed?"),
        ("training.epoch=1", "training.epoch: unknown key; did you mean epochs?"),
        (
            "training.optimizer.learning_rte=1",
            "training.optimizer.learning_rte: unknown key; did you mean learning_rate?",
        ),
        # Inside tagged sections: the path is the one of the file, without pydantic's tag.
        ("data.siez=1", "data.siez: unknown key; did you mean size?"),
        ("training.objective={type: dpo, bta: 1}", "training.objective.bta: unknown key; did you"),
        # The key of another choice is no key of this one.
        ("training.objective={type: sft, beta: 1}", "training.objective.beta: unknown key of sft"),
        (
            "data={source: file, path: a.jsonl, size: 3}",
            "data.size: unknown key of file; picture_world has it",
        ),
        (
            "training.optimizer={type: adafactor, offload: true}",
            "training.optimizer.offload: unknown key of adafactor; adamw, lion, muon have it",
        ),
        ("data.zzzzz=1", "data.zzzzz: unknown key; known here: source, split, size"),
    ],
)
def test_unknown_keys(problem, override, told):
    assert told in problem(override)


def test_nearest_name_is_one_of_the_same_section(problem):
    message = problem("training.objective={type: sft, temperature: 1}")
    assert "training.objective.temperature: unknown key; known here: type" in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("training.epochs=two", "training.epochs: Input should be a valid integer"),
        ("training.epochs=1.5", "training.epochs: "),
        ("training=3", "training: a group of keys is wanted (got 3)"),
        ("output=3", "output: Input should be a valid string"),
        ("lengths.prompt=[a]", "lengths.prompt.0: "),
        ("data.split=trian", "data.split: Input should be 'train', 'align'"),
        ("data.source=web", "data: source: there is no 'web'; known: picture_world, file"),
        ("training.objective={beta: 1}", "training.objective: "),
        ("seed=", "seed: "),
        (
            "training.objective.type=mdppo",
            "training.objective: type: there is no 'mdppo'; did",
        ),
        ("training.objective=dpo", "training.objective: a group of keys is wanted (got 'dpo')"),
        ("training.objective=[]", "training.objective: must not be empty"),
        ("training.objective=null", "training.objective: a list or a group of keys is wanted (got"),
        ("data=null", "data: a list or a group of keys is wanted (got None)"),
        ("training.freeze=vision_tower", "training.freeze: a list is wanted (got 'vision_tower')"),
        ("training.epochs=true", "training.epochs: Input should be a valid integer (got True)"),
        ("devices.data=0", "devices.data"),
        ("data.seed=4294967296", "data.seed: "),
        ("training.epochs=0", "training.epochs: Input should be greater than 0 (got 0)"),
        ("training.optimizer.learning_rate=0", "training.optimizer.learning_rate: "),
        (
            "training.optimizer.warmup_ratio=0.1",
            "training.optimizer: warmup_ratio belongs to the schedule now: write "
            "`training.schedule: {warmup_ratio: 0.1}`",
        ),
        (
            "training.optimizer.type=adamm",
            "training.optimizer: type: there is no 'adamm'; did you mean adamw?",
        ),
        ("training.optimizer={type: lion, beta3: 1}", "training.optimizer.beta3: unknown key"),
        ("training.schedule.decay_ratio=1", "training.schedule.decay_ratio: unknown key"),
        ("training.optimizer.learning_rate=.nan", "training.optimizer.learning_rate: "),
        ("training.optimizer.learning_rate=.inf", "training.optimizer.learning_rate: "),
        ("training.objective={type: dpo, label_smoothing: 0.5}", "training.objective.label_smoo"),
        ("data.hallucination_rate=1.1", "data.hallucination_rate: "),
        (f"data.image_size={MIN_IMAGE_SIZE - 1}", "data.image_size: "),
        ("lengths.prompt=[64, 32]", "lengths.prompt: give one or more sizes in ascending order"),
        ("lengths.response=[]", "lengths.response: give one or more sizes"),
        ("training.micro_batch_size=3", "training: batch_size 8 is no multiple of 3"),
        ("training.save_every=15", "training: save_every must be a multiple of log_every"),
    ],
)
def test_wrong_types_and_impossible_values(problem, override, told):
    assert told in problem(override)


@pytest.mark.parametrize(
    ("override", "kind", "told"),
    [
        ("training.objective={type: dpo}", TrainRecipe, "dialogues hold no preferences"),
        ("sampling.max_new_tokens=65", AlignRecipe, "sampling.max_new_tokens 65 is more than"),
        ("evaluation={type: picture_world, seeds: []}", AlignRecipe, "evaluation.seeds: "),
        ("evaluation={type: popes, data: a}", AlignRecipe, "type: there is no 'popes'; did you"),
        ("evaluation={type: pope, readin: official, data: a}", AlignRecipe, "mean reading?"),
        (
            "evaluation={type: mmhal, data: a}",
            AlignRecipe,
            "judge: name one, as `judge: {url",
        ),
        ("evaluation={type: object_halbench, data: a}", AlignRecipe, "or `objects: words`"),
        (
            "evaluation=[{type: pope, data: a}, {type: pope, data: b}]",
            AlignRecipe,
            "evaluation: two benchmarks are called pope; give one another `name`",
        ),
    ],
)
def test_options_that_cannot_go_together(problem, override, kind, told):
    assert told in problem(override, kind=kind)


def test_overrides_reach_into_lists(load, problem):
    keys = {"output": "out", "model": "m", "evaluation": [{"type": "picture_world", "size": 9}]}
    options = {"text": yaml.safe_dump(keys), "kind": EvaluateRecipe}
    (section,) = load("evaluation.0.size=3", **options).evaluation
    assert section.size == 3
    assert "1 is none of the numbers 0 to 0" in problem("evaluation.1.size=3", **options)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("validation={share: 0.1, every: 3}", "must be a multiple of training.log_every"),
        ("validation={data: {source: picture_world}}", "a round's pairs are its own; give share"),
        ("feedback={type: exact_match}", "selection.by: only feedback of type claims rejects any"),
        ("sentences={clean: 0}", "selection: sentences are judged on the way"),
    ],
)
def test_what_rounds_hold_out(problem, override, told):
    assert told in problem("selection={share: 0.1}", override, kind=AlignRecipe)


def test_shares_that_never_differ_so_much(problem):
    overrides = "feedback.score=fraction", "pairing.min_difference=2"
    assert "shares of accepted claims" in problem(*overrides, kind=AlignRecipe)


def test_missing_keys(problem):
    message = problem(text="seed: 1")
    for key in ("output", "model", "data"):
        assert f"\n  {key}: Field required" in message
    assert "data.path: Field required" in problem("data={source: file}")


def test_every_problem_is_listed_at_once(problem):
    message = problem("sead=1", "training.epochs=0", "data.siez=1", "lengths.prompt=[2, 1]")
    assert "recipe.yaml: this recipe cannot be run:" in message
    assert len(message.splitlines()) == 5
    for key in ("sead", "training.epochs", "data.siez", "lengths.prompt"):
        assert f"\n  {key}: " in message


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", "override 'seed': write key=value"),
        ("=3", "override '=3': write key=value"),
        ("seed.deep=3", "seed is no group of keys"),
        ("data.split=[", "override 'data.split=['"),
    ],
)
def test_bad_overrides(problem, override, told):
    assert told in problem(override, text=yaml.safe_dump(GOOD | {"seed": 1}))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"a: [1", "not valid YAML"),
        (b"a: \xff", "not valid YAML"),
        (b"- 1", "a recipe is a mapping of keys to values"),
        (b"", "output: Field required"),
        (b"1: 2", "1: "),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, told):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: ") as caught:
        load_recipe(TrainRecipe, path)
    assert told in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        load_recipe(TrainRecipe, tmp_path / "none.yaml")


def test_numbers_without_a_dot(load):
    """YAML 1.1, hence PyYAML, reads `1e-5` as text."""
    text = yaml.safe_dump(GOOD) + "training: {optimizer: {learning_rate: 1e-5, epsilon: 1E-9}}\n"
    recipe = load("training.optimizer.weight_decay=3e-2", text=text)
    optimizer = recipe.training.optimizer
    assert (optimizer.learning_rate, optimizer.epsilon) == (1e-5, 1e-9)
    assert optimizer.weight_decay == 3e-2


def test_overrides_win_and_make_groups(load):
    recipe = load("seed=7", "data.size=9", "training.objective.type=sft", "lengths.prompt=[8, 16]")
    assert (recipe.seed, recipe.data[0].size, recipe.lengths.prompt) == (7, 9, (8, 16))
    assert [section.type for section in recipe.training.objective] == ["sft"]
    assert load().seed == 0


def test_generate_leaves_room_for_long_responses(load):
    assert load("sampling.num_samples=2", kind=GenerateRecipe).sampling.max_new_tokens == 512
    assert load("sampling.num_samples=2", kind=AlignRecipe).sampling.max_new_tokens == 64


@pytest.mark.parametrize("kind", [GenerateRecipe, AlignRecipe])
def test_greedy_decoding_writes_one_response_unless_asked_for_more(load, kind):
    assert Sampling(temperature=0.1).num_samples == 10
    assert Sampling(temperature=0, num_samples=3).num_samples == 3
    if kind is AlignRecipe:  # whose pairs would be of equal responses
        for override in ("sampling.temperature=0", "sampling.num_samples=1"):
            with pytest.raises(RecipeError, match="pairs are made of different responses"):
                load(override, kind=kind)
    else:
        assert load("sampling.temperature=0.0", kind=kind).sampling.num_samples == 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "training: {epochs: 2}\nseed: 1\ntraining:\n  batch_size: 2\n",
            "recipe.yaml, line 3: training stands a second time, first in line 1",
        ),
        (
            "training:\n  optimizer:\n    beta1: 0\n    'beta1': 0.1\n",
            "line 4: training.optimizer.",
        ),
        ("data:\n- {path: a}\n- {path: a, path: b}\n", "line 3: data.1.path stands a second time"),
    ],
)
def test_a_key_that_stands_twice(problem, text, told):
    assert told in problem(text=text)


def test_a_key_that_stands_twice_in_an_override(problem):
    told = problem("devices={data: 1, data: 2}")
    assert "override 'devices={data: 1, data: 2}', line 1: data stands a second time" in told


def test_merged_and_repeated_groups_are_no_repeated_keys(load):
    """YAML's own ways to say things once; a merge is overridden by what stands beside it."""
    text = yaml.safe_dump(GOOD) + "lengths: &sizes {prompt: &few [8], response: *few}\n"
    text += "training: {optimizer: &rates {beta1: 0.5, beta2: 0.5}}\n"
    assert load(text=text).lengths.response == (8,)
    text = yaml.safe_dump(GOOD) + "devices: {<<: {data: 1, tensor: 2}, data: 4}\n"
    assert (load(text=text).devices.data, load(text=text).devices.tensor) == (4, 2)


def test_recipes_are_frozen(load):
    with pytest.raises(pydantic.ValidationError):
        load().seed = 3


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_loads_as_its_kind(path):
    keys = yaml.safe_load(path.read_text()).keys()
    fitting = [
        kind
        for kind in KINDS
        if {name for name, f in kind.model_fields.items() if f.is_required()} <= keys
        and keys <= kind.model_fields.keys()
    ]
    assert fitting, f"{path.name} has the keys of no kind of recipe"
    if not keys & {"reference", "reward_model"}:  # one of which `mmpo select` needs
        fitting = [kind for kind in fitting if kind is not SelectRecipe]
    if not keys & AlignRecipe.model_fields.keys() - TrainRecipe.model_fields.keys():
        fitting = [kind for kind in fitting if kind is not AlignRecipe]
    for kind in fitting:
        load_recipe(kind, path)


def test_configs_are_there():
    assert {"picture_world_align.yaml", "picture_world_sft.yaml"} <= {path.name for path in CONFIGS}


@pytest.mark.parametrize("name", METHODS)
def test_methods_that_are_options_are_spelt(name, problem, tmp_path):
    """The error names the keys, and these make a recipe."""
    written = name.upper().replace("_", "-")
    message = problem(f"training.objective.type={written}")
    assert f"training.objective: type: there is no '{written}'; write `training: {{" in message
    keys = [yaml.safe_load(part) for part in message.split("`")[1::2]]
    assert {key: value for part in keys for key, value in part.items()} == METHODS[name]
    recipe = yaml.safe_load((PACKAGE.parent / "configs" / "picture_world_grpo.yaml").read_text())
    recipe["training"] |= METHODS[name]["training"]
    rollout = METHODS[name].get("rollout", {})
    sampled = OBJECTIVES[recipe["training"]["objective"]["type"]].kind == "rollouts"
    if "teacher" in recipe["training"]:
        recipe["rollout"]["rewards"] = []
    recipe["rollout"] = recipe["rollout"] | rollout if sampled else None
    if not sampled:
        recipe["data"] = {"source": "file", "path": "pairs.jsonl"}
    TrainRecipe.model_validate(recipe)


def test_an_override_takes_the_rewards_out_of_a_recipe():
    """So that one of GRPO becomes one of distillation."""
    grpo = PACKAGE.parent / "configs" / "picture_world_grpo.yaml"
    taught = ("training.objective.type=distillation", "training.teacher={type: model, model: DIR}")
    recipe = load_recipe(TrainRecipe, grpo, [*taught, "rollout.rewards=[]"])
    assert recipe.rollout is not None and recipe.rollout.rewards == ()
    with pytest.raises(RecipeError, match=r"rollout\.rewards: a list or a group of keys is wanted"):
        load_recipe(TrainRecipe, grpo, [*taught, "rollout.rewards=null"])


# Every option is read somewhere ------------------------------------------------------------------

SPREAD = {Devices: make_mesh, Rollout: Decoding, Drawing: Sampling}
"""Sections given as `**section.model_dump(...)`, and what takes their fields as parameters."""
OF_JUDGES = (
    *(Judging, ImplicitReward, Rewarding, ChatServer, CheckpointAsked, Speaking),
    *(SourceFeedback, ScoresFeedback, PictureWorldSplitting, WholeSplitting),
)
"""Sections of a judge and of the models that it asks, which take them under other names."""


def sections(kind: type[Section]) -> set[type[Section]]:
    """A section and all that its fields hold."""

    def within(annotation) -> set[type[Section]]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return sections(annotation)
        return {s for argument in typing.get_args(annotation) for s in within(argument)}

    fields = kind.model_fields.values()
    return {kind}.union(*(within(field.annotation) for field in fields))


def names_read() -> set[tuple[str, str]]:
    """All `owner.name` in the package's code outside of whole recipes, as (owner, name)."""
    files = [
        path
        for path in PACKAGE.rglob("*.py")
        if not path.name.endswith(("recipe.py", "recipes.py"))
    ]
    nodes = (node for path in files for node in ast.walk(ast.parse(path.read_text())))
    return {
        (getattr(node.value, "attr", getattr(node.value, "id", "")), node.attr)
        for node in nodes
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }


def owners(section: type[Section]) -> set[str]:
    """What variables that hold the section are called: as the fields that do, or in general."""
    fields = (
        (name, field.annotation)
        for kind in set().union(*(sections(kind) for kind in KINDS))
        for name, field in kind.model_fields.items()
    )
    held = {name for name, annotation in fields if section in leaves(annotation)}
    passed = {"decoding"} if issubclass(section, Decoding) else set()
    if section in typing.get_args(Candidate):
        passed |= {"source"}
    if issubclass(section, OF_JUDGES):
        passed |= {"options", "asked", "server", "_server", "speaking", "splitting", "labeling"}
    if issubclass(section, BenchmarkSection):
        passed |= {"section", "self"}
    if issubclass(section, RecordSource | Rollout):
        passed |= {"self"}
    return passed | ({*held, "config", "recipe"} if held else {"recipe"})


def taken_by(section: type[Section]) -> set[str]:
    """Names that are given to a function as its parameters."""
    if issubclass(section, RewardModelReward):  # of all rewards of a rollout
        return {"weight"}
    if issubclass(section, RewardSection):  # the same of `RewardSection.values`
        return {"weight", *REWARDS[section.model_fields["type"].default].options}
    if issubclass(section, BenchmarkSection):  # the same of `BenchmarkSection.options`
        of = find_benchmark(section.model_fields["type"].default)
        return {*of.options, *of.asking_options}
    if issubclass(section, ObjectiveSection):
        # `ObjectiveSection.term` reads them all by name.
        return {"weight", *OBJECTIVES[section.model_fields["type"].default].options}
    spread = next((target for s, target in SPREAD.items() if issubclass(section, s)), None)
    return set(inspect.signature(spread).parameters) if spread else set()


def leaves(annotation) -> set[type[Section]]:
    if isinstance(annotation, type):
        return {annotation}
    return {leaf for argument in typing.get_args(annotation) for leaf in leaves(argument)}


def unread_options(kinds) -> set[str]:
    read = names_read()
    unread = set()
    for section in set().union(*(sections(kind) for kind in kinds)):
        # The discriminators choose a class; pydantic reads them.
        tags = {n for n, f in section.model_fields.items() if n in ("source", "type") and f.default}
        unread |= {
            f"{section.__name__}.{name}"
            for name in set(section.model_fields) - taken_by(section) - tags
            if not any((owner, name) in read for owner in owners(section))
        }
    return unread


def test_every_option_is_read():
    assert not unread_options(KINDS)


def test_an_unread_option_is_noticed():
    class Careless(Sampling):
        repetition_penalty_nobody_reads: float = 1.0
        labeler: str = ""

    class Recipe(Base):
        groups: tuple[Careless | None, ...] = ()
        output_nobody_reads: str = ""

    assert unread_options([Recipe]) == {
        "Careless.labeler",  # read of other sections only
        "Careless.repetition_penalty_nobody_reads",
        "Recipe.groups",
        "Recipe.output_nobody_reads",
    }


def test_the_walk_finds_nested_sections():
    names = {section.__name__ for kind in KINDS for section in sections(kind)}
    assert {
        "Dpo",
        "Sft",
        "FileData",
        "PictureWorldData",
        "AdamW",
        "Muon",
        "WarmupStableDecay",
        "Devices",
        "Pairing",
    } <= names
