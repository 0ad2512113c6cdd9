"""The command line of `mmpo`: its commands, their flags, and what these are as a recipe's keys."""

from __future__ import annotations

import argparse
import difflib
import json
import os
from collections.abc import Sequence
from typing import Any, get_args

from mmpo_jax.core.dtypes import SaveDtype
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.data.rows import FormatName

RECIPES = {
    "align": "Run the rounds: generate, check, pair, train, repeat.",
    "train": "Run one training stage on data that is there.",
    "generate": "Sample responses to prompts.",
    "score": "Compute the log-probs of responses.",
    "reward": "Score responses by a reward model.",
    "select": "Take the best of several responses by a reward.",
    "correct": "Ask about what is wrong in rejected responses, for nSFT.",
    "serve": "Answer the clients of OpenAI's chat protocol.",
    "evaluate": "Measure a checkpoint by benchmarks, or score answers.",
}
"""Commands that run a recipe, of the class in `recipes.commands`: name -> help."""

OTHERS = {
    "convert": "Turn a run's Orbax checkpoint, or an adapter and its base merged, into a Hugging "
    "Face folder; or a Hugging Face folder into a checkpoint.",
    "plan": "Say what a recipe takes of TPUs that are not there: memory, exchange, hours.",
    "objectives": "List the objectives and rewards with formula, source, options and what they "
    "need.",
    "report": "Write a page about runs: curves, tables, and their prompts to browse.",
}

DATA_COMMANDS = {
    "check": "Say what is in a data file, and which rows cannot be used and why.",
    "convert": "Write the rows of a data file in another format.",
}

FILES = {
    "--model": ("model", "checkpoint: folder, bucket, hub id, run, adapter"),
    "--data": ("data.path", "file, folder or tfds:NAME#SPLIT"),
    "--format": ("data.format", "of the rows; their columns say it by default"),
    "--image-root": ("data.image_root", "folder of the images; the data file's by default"),
    "--output": ("output", "JSONL file"),
    "--template": ("template", "auto (the checkpoint's own) or vicuna_v1"),
}
SAMPLING = {
    "--num-samples": ("sampling.num_samples", "responses per prompt: 10, and 1 if greedy"),
    "--temperature": ("sampling.temperature", "0 is greedy"),
    "--top-p": ("sampling.top_p", "of the probability, what is kept"),
    "--top-k": ("sampling.top_k", "tokens that are kept; 0 is all"),
    "--max-new-tokens": ("sampling.max_new_tokens", "where a response is cut off"),
    "--batch-size": ("sampling.batch_size", "prompts at a time"),
    "--seed": ("seed", "of the samples"),
}
FLAGS = {
    "generate": FILES | SAMPLING,
    "score": FILES
    | {
        "--tokens": ("scoring.tokens", "write the ids of prompts and responses too"),
        "--batch-size": ("scoring.batch_size", "rows at a time"),
    },
    "reward": FILES
    | {
        "--critiques": ("rewarding.critiques", "critiques to write of each response: 1, or 0"),
        "--temperature": ("rewarding.temperature", "of critiques: 0, and 0.7 of several"),
        "--given-critiques": ("rewarding.given_critiques", "read the critiques of the data"),
        "--max-new-tokens": ("rewarding.max_new_tokens", "where a critique is cut off"),
        "--batch-size": ("rewarding.batch_size", "rows at a time"),
        "--seed": ("seed", "of the critiques"),
    },
    "select": {
        "--policy": ("model", "trained checkpoint, the key `model`; any name of one"),
        "--reference": ("reference", "checkpoint that the policy was trained from"),
        "--reward-model": ("reward_model.model", "checkpoint with a reward head, instead"),
        "--data": ("data.path", "prompts, which the policy answers"),
        "--responses": ("responses", "file of responses that are there, to score in their place"),
        **{flag: FILES[flag] for flag in ("--format", "--image-root", "--output", "--template")},
        "--per-token": ("reward.per_token", "divide rewards by the number of tokens: the default"),
        "--summed": ("reward.per_token", "do not"),
        "--beta": ("reward.beta", "factor of the rewards: 0.1"),
        **SAMPLING,
        "--num-samples": ("sampling.num_samples", "responses per prompt: 16, and 1 if greedy"),
        "--batch-size": ("batch_size", "prompts at a time, with all of their responses"),
    },
    "correct": {
        "--data": FILES["--data"],
        "--output": FILES["--output"],
        "--by": ("corrector.type", "who finds what is wrong: rule (the default), chat, checkpoint"),
        "--url": ("corrector.url", "of a chat server, as http://host:8000/v1"),
        "--model": ("corrector.model", "its name there, or a checkpoint"),
        "--codebook": ("codebook", "YAML file of the errors that are looked for"),
        "--max-errors": ("max_errors", "errors of a response, two questions each: 3"),
        "--layout": ("layout", "dialogue (questions behind the chosen response) or apart"),
        "--format": FILES["--format"],
        "--image-root": FILES["--image-root"],
        "--seed": ("seed", "of the order of the questions"),
    },
    "serve": {
        "--model": FILES["--model"],
        "--template": FILES["--template"],
        "--host": ("serving.host", "address to listen on: 127.0.0.1, which this machine reaches"),
        "--port": ("serving.port", "8000; 0 takes a free one"),
        "--name": ("serving.name", "of the model in requests; that of its folder by default"),
        "--api-key-env": ("serving.api_key_env", "variable with the key that clients give"),
        "--max-samples": ("serving.max_samples", "decoded at a time: 16"),
        "--max-requests": ("serving.max_requests", "at a time, with those that wait: 256"),
        "--max-prompt-tokens": ("serving.max_prompt_tokens", "with those of images: 4096"),
        "--max-new-tokens": ("serving.max_new_tokens", "of a response, at most: 2048"),
    },
}
"""Flags of the commands that need no recipe file, and the recipe's keys that they stand for."""
SWITCHES = {
    "--tokens": True,
    "--given-critiques": True,
    "--per-token": True,
    "--summed": False,
}
"""Flags without a value, and what they set their key to."""
EXCLUSIVE = (
    ("--data", "--responses"),
    ("--reference", "--reward-model"),
    ("--critiques", "--given-critiques"),
    ("--per-token", "--summed"),
)
"""Flags of which a command takes one."""
AS_THEY_ARE = {
    *("responses", "reference", "reward_model.model"),
    *("corrector.url", "corrector.model", "codebook"),
    *("serving.host", "serving.name", "serving.api_key_env"),
    *(key for key, _ in FILES.values()),
}
"""Keys whose values on the command line are taken as they are, not as YAML."""
RECIPE_ENDINGS = (".yaml", ".yml")
PLACES = {"correct": ("data.path", "output")}
"""Keys that words without a flag stand for, in their order; a word in front of them is a recipe."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; overrides of a recipe may stand behind flags, which argparse
    alone refuses.

    Args:
      arguments: the words behind `mmpo`; None for those of this process.

    Raises:
      SystemExit: help was asked for, or a word is wrong, which is told.
    """
    parser = argparse.ArgumentParser(prog="mmpo", description="Align vision-language models.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, help in RECIPES.items():
        command = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        if name in FLAGS:
            _add_flags(command, name)
            continue
        if name == "evaluate":
            _add_benchmark(command)
            continue
        command.add_argument("recipe", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="a.b.c=value")
    others = {
        name: subparsers.add_parser(name, help=help, description=help)
        for name, help in OTHERS.items()
    }
    command = others["convert"]
    command.add_argument("source", help="run, one step of it, adapter, Hugging Face folder, hub id")
    command.add_argument("target", help="new folder")
    help = (
        "of the weights; theirs by default, of a run or an adapter the widest, so nothing is lost"
    )
    command.add_argument("--dtype", choices=get_args(SaveDtype), help=help)
    others["objectives"].add_argument("names", nargs="*", help="all by default")
    _add_plan(others["plan"])
    _add_report(others["report"])
    _add_data_commands(subparsers)
    options, rest = parser.parse_known_args(arguments)
    if options.command == "evaluate":
        _check_benchmark(subparsers.choices["evaluate"], options)
    behind = "recipe" if options.command in FLAGS else "overrides"
    more = getattr(options, behind, None)
    if rest and (more is None or any(text[:1] == "-" or "=" not in text for text in rest)):
        subparsers.choices[options.command].error(
            _unknown(rest, subparsers.choices[options.command])
        )
    if more is not None:
        setattr(options, behind, [*more, *rest])
    return options


def _unknown(words: Sequence[str], command: argparse.ArgumentParser) -> str:
    """What to say of words that a command does not know."""
    known = [flag for action in command._actions for flag in action.option_strings]
    near = [each for word in words for each in difflib.get_close_matches(word, known, 1)]
    told = f"unrecognized arguments: {' '.join(words)}"
    return f"{told}; did you mean {', '.join(near)}?" if near else told


def flags_as_overrides(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """(the recipe file if there is one, flags as overrides of it, then those written as such)."""
    _read_places(options)
    path, *written = options.recipe or [None]
    if path is not None and "=" in path and not os.path.exists(path):
        path, written = None, options.recipe
    overrides = []
    for key in dict.fromkeys(key for key, _ in FLAGS[options.command].values()):
        value = getattr(options, key)
        if value is None:
            continue
        if key in ("data.path", "responses"):  # whatever data the recipe has
            overrides.append('data={"source": "file"}')
        text = json.dumps(value, ensure_ascii=False) if key in AS_THEY_ARE else value
        if key == "responses":  # which are data that are not sampled
            overrides += ["sampling=null", f"data.path={text}"]
        else:
            overrides.append(f"{key}={text}")
    return path, overrides + written


def _read_places(options: argparse.Namespace) -> None:
    """Takes words without a flag for the values of a command's `PLACES`, if no flag gives these and
    there are enough; one word is a recipe."""
    places = PLACES.get(options.command, ())
    words = [word for word in options.recipe if "=" not in word or os.path.exists(word)]
    given = any(getattr(options, key) is not None for key in places)
    if not places or given:
        return
    if len(words) < len(places):
        if words and not words[0].endswith(RECIPE_ENDINGS):
            raise MmpoError(f"{words[0]}: is no recipe, which ends with .yaml; give IN and OUT")
        return
    for key, word in zip(places, words[-len(places) :], strict=True):
        setattr(options, key, word)
        options.recipe.remove(word)


def _add_flags(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(
        "recipe",
        nargs="*",
        metavar="IN OUT recipe.yaml key=value" if name in PLACES else "recipe.yaml key=value",
        help="YAML file, if not all is said by flags; a.b.c=value",
    )
    groups: dict[str, Any] = {}
    for flags in EXCLUSIVE:
        if FLAGS[name].keys() >= set(flags):
            groups |= dict.fromkeys(flags, command.add_mutually_exclusive_group())
    for flag, (key, help) in FLAGS[name].items():
        group = groups.get(flag, command)
        if flag in SWITCHES:
            value = SWITCHES[flag]
            group.add_argument(flag, dest=key, action="store_const", const=value, help=help)
        else:
            group.add_argument(flag, dest=key, metavar=flag[2:].upper(), help=help)


BENCHMARK_FLAGS = {
    "--benchmark": "score answers that are there, without a model: pope, mmstar, ...",
    "--data": "folder of the benchmark's published files",
    "--responses": "file of the answers: JSONL, JSON, Parquet, xlsx, tsv",
    "--output": "JSON file",
}


ANSWER_FLAGS = ("--rule", "--judgements", "--judge")
"""Flags beside those, of which a benchmark needs none or one."""


def _add_benchmark(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", nargs="?", help="YAML file, if a model is evaluated")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="a.b.c=value")
    for flag, help in BENCHMARK_FLAGS.items():
        command.add_argument(flag, metavar=flag[2:].upper(), help=help)
    help = "rule of the benchmark; `mmpo evaluate --benchmark NAME` lists them"
    command.add_argument("--rule", action="append", default=[], metavar="NAME=VALUE", help=help)
    help = "file of judgements that are there, the benchmark authors' or ours"
    command.add_argument("--judgements", metavar="FILE", help=help)
    help = "option of the judge that is asked, as url=http://host:8000/v1, model=NAME, or its YAML"
    command.add_argument("--judge", action="append", default=[], metavar="KEY=VALUE", help=help)


def _check_benchmark(command: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Ends with what is wrong where neither a recipe nor a whole benchmark is named."""
    given = {flag: getattr(options, flag[2:]) for flag in BENCHMARK_FLAGS}
    if options.recipe is not None:
        more = {flag: getattr(options, flag[2:]) or None for flag in ANSWER_FLAGS}
        wrong = [flag for flag, value in (given | more).items() if value is not None]
        if wrong:
            command.error(f"{wrong[0]} is for answers that are there, not for a recipe")
    elif options.benchmark is None:
        command.error("name a recipe, or a benchmark: --benchmark NAME")
    elif any(value is not None for flag, value in given.items() if flag != "--benchmark"):
        missing = [flag for flag, value in given.items() if value is None and flag != "--data"]
        if missing:
            command.error(f"--benchmark {options.benchmark} needs {', '.join(missing)}")


def _add_data_commands(subparsers: Any) -> None:
    help = "Look into data files, and convert them."
    parser = subparsers.add_parser("data", help=help, description=help)
    commands = parser.add_subparsers(dest="data_command", required=True)
    parsers = {
        name: commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        for name, help in DATA_COMMANDS.items()
    }
    formats = get_args(FormatName)
    root = "folder of the images; the data file's by default"
    check, convert = parsers["check"], parsers["convert"]
    check.add_argument("file", help="file, folder or tfds:NAME#SPLIT")
    check.add_argument("--model", help="checkpoint whose tokens count; characters without")
    check.add_argument("--template", default="auto", choices=("auto", "vicuna_v1"))
    check.add_argument("--format", default="auto", choices=formats, help="of the rows")
    check.add_argument("--image-root", help=root)
    typed = ("tokens", "text")
    check.add_argument("--control-tokens", default="tokens", choices=typed, help="if typed in rows")
    for name in ("prompt", "response"):
        flag, help = f"--{name}-sizes", "buckets, as 64,128; chosen from the data by default"
        check.add_argument(flag, type=_sizes, default=(), help=help)
    convert.add_argument("source", help="file, folder or tfds:NAME#SPLIT")
    convert.add_argument("target", help="new file: .jsonl, .parquet or .array_record")
    written = [name for name in formats if name not in ("auto", "picture_world")]
    convert.add_argument("--format", default="record", choices=written, help="of the target")
    convert.add_argument("--read-as", default="auto", choices=formats, help="format of the source")
    convert.add_argument("--image-root", help=root)
    help = "fields to leave out, as scores,critique"
    convert.add_argument("--drop", type=lambda text: text.split(","), default=(), help=help)
    help = "join the pairs of one prompt into a ranking, where they agree"
    convert.add_argument("--join-pairs", action="store_true", help=help)
    help = "write every pair as a question which answer is better, in both orders"
    convert.add_argument("--ask-which", action="store_true", help=help)
    help = "share of unusable rows above which nothing is written"
    convert.add_argument("--max-skipped", type=float, default=0.1, help=help)


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="a.b.c=value")
    help = "slice of TPUs, as v5e:8x8, v5p:4x4x8, v6e:16x16, v4:4x4x4, tpu7x:2x2x1; or cpu:8"
    command.add_argument("--topology", required=True, help=help)
    command.add_argument("--json", metavar="FILE", help="file for all figures")
    kinds = ("train", "align", "generate", "score", "reward", "select")
    help = "command that the recipe is of, where its keys do not say it"
    command.add_argument("--as", dest="command_of_recipe", choices=kinds, help=help)
    help = "compile without optimisations: a quarter of the time, memory a few per cent off"
    command.add_argument("--fast", action="store_true", help=help)
    help = "rank meshes, micro-batches and rematerialisation that fit by their rooflines"
    command.add_argument("--search", action="store_true", help=help)
    help = "programs that a search compiles at most: 8"
    command.add_argument("--compilations", type=int, default=8, metavar="N", help=help)
    command.add_argument("--dump", metavar="FILE", help="file for the last program, optimised HLO")
    command.add_argument("--rows", type=int, help="rows of the data; counted where it is here")
    command.add_argument("--claims", type=float, default=8.0, help="of a response: 8")
    command.add_argument("--responses", type=int, default=2, help="of a row that is scored: 2")
    help = "WIDTHxHEIGHT of a prompt's picture: 896x896"
    command.add_argument("--image", type=_image_size, help=help)


def _add_report(command: argparse.ArgumentParser) -> None:
    help = "folder that mmpo align or mmpo train wrote, finished or not"
    command.add_argument("runs", nargs="+", metavar="RUN", help=help)
    help = "HTML file; RUN/report.html by default, if there is one run"
    command.add_argument("--output", metavar="FILE", help=help)
    help = "prompts that can be browsed, of all rounds alike: 2000, or all"
    command.add_argument("--prompts", metavar="N", help=help)


def _image_size(text: str) -> tuple[int, int]:
    width, height = (int(edge) for edge in text.split("x"))
    return height, width


def _sizes(text: str) -> tuple[int, ...]:
    from mmpo_jax.data.lengths import Lengths

    return Lengths(prompt=tuple(int(size) for size in text.split(","))).prompt
