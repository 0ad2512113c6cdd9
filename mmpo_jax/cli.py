"""The `mmpo` command: its flags, how its errors are said, and how its process ends.

Nothing heavy is imported before a command runs, so that `-h` answers at once. What a subcommand
does is in `mmpo_jax.commands`, in a module of its name with a function `main`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import importlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn, get_args

from mmpo_jax.core import processes, progress, watch
from mmpo_jax.core.dtypes import SaveDtype
from mmpo_jax.core.errors import MmpoError, Stopped
from mmpo_jax.data.rows import FormatName

RECIPES = {
    "align": ("AlignRecipe", "Run the rounds: generate, check, pair, train, repeat."),
    "train": ("TrainRecipe", "Run one training stage on data that is there."),
    "generate": ("GenerateRecipe", "Sample responses to prompts."),
    "score": ("ScoreRecipe", "Compute the log-probs of responses."),
    "select": ("SelectRecipe", "Take the best of several responses by the model's own reward."),
    "evaluate": ("EvaluateRecipe", "Measure hallucination of a checkpoint."),
}
"""Commands that run a recipe: name -> (its class, help)."""

OTHERS = {
    "convert": "Turn a run's Orbax checkpoint into a Hugging Face folder, or a folder into a "
    "checkpoint.",
    "plan": "Say what a recipe takes of TPUs that are not there: memory, exchange, hours.",
    "objectives": "List the objectives and rewards with formula, source, options and what they "
    "need.",
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
    "select": {
        "--policy": ("model", "trained checkpoint, the key `model`; any name of one"),
        "--reference": ("reference", "checkpoint that the policy was trained from"),
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
}
"""Flags of the commands that need no recipe file, and the recipe's keys that they stand for."""
SWITCHES = {"--tokens": True, "--per-token": True, "--summed": False}
"""Flags without a value, and what they set their key to."""
EXCLUSIVE = (("--data", "--responses"), ("--per-token", "--summed"))
"""Flags of which a command takes one."""
AS_THEY_ARE = {"responses", "reference", *(key for key, _ in FILES.values())}
"""Keys whose values on the command line are taken as they are, not as YAML."""


INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it."""


class ToldToEnd(KeyboardInterrupt):
    """SIGTERM came: of whoever takes the machine away, or of `launch/run.sh stop`."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Parses the command line and runs a subcommand.

    Returns:
      The exit status: 0, also where SIGTERM came and the command can go on later; 1 with one
      message for an error that a user can mend; or `INTERRUPTED`.
    """
    parser = argparse.ArgumentParser(prog="mmpo", description="Align vision-language models.")
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (_, help) in RECIPES.items():
        command = subparsers.add_parser(name, help=help, description=help, allow_abbrev=False)
        if name in FLAGS:
            _add_flags(command, name)
            continue
        command.add_argument("recipe", help="YAML file")
        command.add_argument("overrides", nargs="*", metavar="key=value", help="a.b.c=value")
    others = {
        name: subparsers.add_parser(name, help=help, description=help)
        for name, help in OTHERS.items()
    }
    command = others["convert"]
    command.add_argument("source", help="run, one step of it, Hugging Face folder or hub id")
    command.add_argument("target", help="new folder")
    help = "of the weights; theirs by default, of a run the widest, so nothing is lost"
    command.add_argument("--dtype", choices=get_args(SaveDtype), help=help)
    others["objectives"].add_argument("names", nargs="*", help="all by default")
    _add_plan(others["plan"])
    _add_data_commands(subparsers)
    options = _parsed(parser, arguments)
    try:
        _set_up_logging(processes.member())
    except MmpoError as error:  # of the environment
        print(f"mmpo {options.command}: {error}", file=sys.stderr)
        return 1
    try:
        with progress.told(), _interrupts_that_arrive(), _ending_when_told():
            _run(options)
    except Stopped as stopped:
        if processes.is_first():
            _say(options, str(stopped))
    except ToldToEnd:
        _say(options, watch.TOLD_TO_END)
        watch.end_others()
    except KeyboardInterrupt:
        told = "stopped; the same command goes on from what is finished"
        _say(options, told)
        watch.stop_others(told)
        return INTERRUPTED
    except Exception as error:
        return _failed(options, error)
    finally:
        watch.finish()
    return 0


def _set_up_logging(me: processes.Member) -> None:
    """The first process says everything, the others what is wrong, under their number."""
    if me.index == 0:
        logging.basicConfig(level=logging.INFO, format="%(message)s")
    else:
        logging.basicConfig(level=logging.WARNING, format=f"process {me.index}: %(message)s")
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (until the process ends)
    for noisy in ("absl", "httpcore2", "httpx2", "jax", "matplotlib", "orbax", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Orbax leaves its failed tasks to it, a page each; the error itself reaches us.
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", ".*decompression bomb")  # images over the limit are skipped


def _failed(options: argparse.Namespace, error: Exception) -> int:
    """Says what went wrong, to the user and to the other processes; the exit status.

    Raises:
      Exception: this one, where no user can mend it.
    """
    told = _told(error)
    if told is None:
        if not processes.several():
            raise error
        watch.wait_for_reason(error)
        traceback.print_exception(error)
        told = traceback.format_exception_only(error)[-1].strip()
    elif processes.is_first() or not processes.is_agreed(error):
        _say(options, told)
    if not processes.is_agreed(error):
        watch.stop_others(told)
    return 1


def _say(options: argparse.Namespace, told: str) -> None:
    index = processes.member().index
    prefix = f"process {index}: " if index else ""
    print(f"mmpo {options.command}: {prefix}{told}", file=sys.stderr)


def _told(error: Exception) -> str | None:
    """What a user is told of an error that they can mend; None for others."""
    if isinstance(error, MmpoError):
        return str(error)
    if not isinstance(error, OSError):
        return None
    if error.filename and error.errno in (errno.ENOTDIR, errno.EACCES, errno.EROFS):
        return f"{error.filename}: {error.strerror}"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return None
    where = f" while writing {error.filename}" if error.filename else ""
    return f"the disk is full{where}; what is finished is kept, the same command goes on from there"


@contextlib.contextmanager
def _interrupts_that_arrive() -> Iterator[None]:
    """Ctrl-C and SIGTERM come again where Python had to ignore them: in a callback of the garbage
    collector, of which JAX has one, or in an object's end."""
    before, main_thread = sys.unraisablehook, threading.main_thread()

    def hook(ignored: Any) -> None:
        if issubclass(ignored.exc_type, KeyboardInterrupt):
            number = signal.SIGTERM if ignored.exc_type is ToldToEnd else signal.SIGINT
            # A signal, and no flag: it ends a wait in the system as well.
            again = signal.pthread_kill, (main_thread.ident, number)
            threading.Timer(0.05, *again).start()
        else:
            before(ignored)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


@contextlib.contextmanager
def _ending_when_told() -> Iterator[None]:
    """SIGTERM raises `ToldToEnd`, but for training, which saves first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _tell_to_end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _tell_to_end(number: int, frame: FrameType | None) -> NoReturn:
    raise ToldToEnd


def _run(options: argparse.Namespace) -> None:
    if options.command in RECIPES:
        _join_others()
        _run_recipe(options)
    elif options.command == "convert":
        from mmpo_jax.core.output import claimed_new

        _join_others()
        with claimed_new(options.target):
            _module("convert", starts_jax=True).main(options)
    elif processes.is_first():  # what needs no devices needs no other process either
        data = options.command == "data"
        with processes.alone():
            _module(f"data_{options.data_command}" if data else options.command).main(options)


def _join_others() -> None:
    """Joins the other processes of the command, if there are any; from here on the end of one is
    that of all."""
    if processes.several():
        with progress.doing(f"waiting for {processes.member().count} processes"):
            before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # JAX waits without Python
            processes.start()
            signal.signal(signal.SIGTERM, before)
            watch.watch()


def _run_recipe(options: argparse.Namespace) -> None:
    """Checks the recipe, claims the output, starts JAX and imports what the command runs, which
    takes seconds, and runs it."""
    from mmpo_jax.core.output import claimed

    recipe = _load_recipe(options)
    is_file = options.command in FLAGS and recipe.output.endswith(".jsonl")
    with claimed(recipe.output, is_file):
        _module(options.command, starts_jax=True).main(recipe)


def _load_recipe(options: argparse.Namespace) -> Any:
    """The recipe of a command, which is the same in all processes.

    Raises:
      MmpoError: naming what is wrong with it.
    """
    from mmpo_jax.recipes import recipe as recipes
    from mmpo_jax.recipes.files import load_recipe

    kind, _ = RECIPES[options.command]
    if options.command in FLAGS:
        path, overrides = _flags_as_overrides(options)
    else:
        path, overrides = options.recipe, options.overrides

    def load() -> Any:
        return load_recipe(getattr(recipes, kind), path, overrides)

    if not processes.several():
        return load()
    first = processes.on_one(lambda: load().model_dump(mode="json"))
    recipe = load()
    own = recipe.model_dump(mode="json")
    different = [key for key in first if own.get(key) != first[key]]
    if different:
        raise MmpoError(f"the first process has another recipe: {', '.join(different)} differ")
    return recipe


def _module(command: str, starts_jax: bool = False) -> Any:
    """The module of a command, which takes seconds to import with all that it runs."""
    with progress.doing("starting JAX, loading libraries" if starts_jax else "loading libraries"):
        if starts_jax:
            start_jax()
        return importlib.import_module(f"mmpo_jax.commands.{command}")


def _add_flags(command: argparse.ArgumentParser, name: str) -> None:
    command.add_argument(
        "recipe",
        nargs="*",
        metavar="recipe.yaml key=value",
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
    help = "share of unusable rows above which nothing is written"
    convert.add_argument("--max-skipped", type=float, default=0.1, help=help)


def _add_plan(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="a.b.c=value")
    help = "slice of TPUs, as v5e:8x8, v5p:4x4x8, v6e:16x16, v4:4x4x4, tpu7x:2x2x1; or cpu:8"
    command.add_argument("--topology", required=True, help=help)
    command.add_argument("--json", metavar="FILE", help="file for all figures")
    kinds = ("train", "align", "generate", "score", "select")
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


def _image_size(text: str) -> tuple[int, int]:
    width, height = (int(edge) for edge in text.split("x"))
    return height, width


def _parsed(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; overrides of a recipe may stand behind flags, which argparse alone refuses."""
    options, rest = parser.parse_known_args(arguments)
    more = getattr(options, "overrides", None)
    if rest and (more is None or any(text[:1] == "-" or "=" not in text for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if more is not None:
        options.overrides = [*more, *rest]
    return options


def _sizes(text: str) -> tuple[int, ...]:
    from mmpo_jax.data.lengths import Lengths

    return Lengths(prompt=tuple(int(size) for size in text.split(","))).prompt


def _flags_as_overrides(options: argparse.Namespace) -> tuple[str | None, list[str]]:
    """(the recipe file if there is one, flags as overrides of it, then those written as such)."""
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


def start_jax() -> None:
    """Compiled programs are kept between runs: a restart begins at once.

    Not those of several CPU devices: XLA does not keep the order of their collectives (jaxlib
    0.10), and two devices that meet in different ones wait for each other for ever.
    """
    import jax

    from mmpo_jax.core.files import cache_folder

    if jax.default_backend() == "cpu" and jax.device_count() > 1:
        jax.config.update("jax_enable_compilation_cache", False)
    else:
        if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX's own, maybe in a bucket
            jax.config.update("jax_compilation_cache_dir", os.path.join(cache_folder(), "compiled"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)


def run() -> NoReturn:
    """The process of `main`, over when that is: taking compiled programs and arrays down one by one
    can be half a minute of silence after the last line."""
    status = main()
    if watch.is_failing():  # the others do not come to the end that JAX would wait for
        sys.stderr.flush()
        os._exit(status)
    if any(not thread.daemon for thread in threading.enumerate()[1:]):
        sys.exit(status)  # which waits for them
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
