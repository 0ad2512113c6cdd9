"""The `mmpo` command: how its errors are said, and how its process ends.

Nothing heavy is imported before a command runs, so that `-h` answers at once. What a subcommand
does is in `mmpo_jax.commands`, in a module of its name with a function `main`.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import errno
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

from mmpo_jax.core import processes, progress, watch
from mmpo_jax.core.errors import MmpoError, Stopped
from mmpo_jax.core.libtpu import quiet_libtpu
from mmpo_jax.flags import FLAGS, RECIPES, flags_as_overrides, parse

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
    options = parse(arguments)
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
    for noisy in ("httpcore2", "httpx2", "jax", "transformers"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    # Of a write that failed Orbax logs every task, a page each; the error itself reaches us.
    for noisy in ("absl", "asyncio", "orbax"):
        logging.getLogger(noisy).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", ".*decompression bomb")  # images over the limit are skipped
    # Caches grow with the prompts that places are given, so their old memory cannot be theirs.
    warnings.filterwarnings("ignore", ".*donated buffers were not usable")


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
    if options.command == "evaluate" and options.benchmark is not None:
        if processes.is_first():
            with processes.alone():
                _module("evaluate_answers").main(options, start_jax)
    elif options.command in RECIPES:
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
    if options.command == "serve":  # which writes nothing
        _module(options.command, starts_jax=True).main(recipe)
        return
    is_file = options.command in FLAGS and recipe.output.endswith(".jsonl")
    with claimed(recipe.output, is_file):
        _module(options.command, starts_jax=True).main(recipe)


def _load_recipe(options: argparse.Namespace) -> Any:
    """The recipe of a command, which is the same in all processes.

    Raises:
      MmpoError: naming what is wrong with it.
    """
    from mmpo_jax.recipes import commands
    from mmpo_jax.recipes.files import check_files, load_recipe

    kind = commands.RECIPES[options.command]
    if options.command in FLAGS:
        path, overrides = flags_as_overrides(options)
    else:
        path, overrides = options.recipe, options.overrides

    def load() -> Any:
        recipe = load_recipe(kind, path, overrides)
        check_files(recipe)
        return recipe

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


def start_jax() -> None:
    """Compiled programs are kept between runs: a restart begins at once.

    Not those of several CPU devices: XLA does not keep the order of their collectives (jaxlib
    0.10), and two devices that meet in different ones wait for each other for ever.
    """
    import jax

    from mmpo_jax.core.files import cache_folder

    quiet_libtpu()
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
    # Ends pools and waits for what is no daemon, as `sys.exit` does; but that also unwinds threads
    # that wait in C++, such as those of `watch`, which aborts the process.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
