"""A copy of a round's model behind a server that a command of the user's brings up."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import subprocess
import threading
import time
from collections.abc import Collection, Iterator

from etils import epath
from jax.sharding import Mesh

from mmpo_jax.chat.server import hide_key, read_key, secret_of
from mmpo_jax.chat.shared import AnyClient
from mmpo_jax.checkpoints.checkpoint import Checkpoint, Origin
from mmpo_jax.checkpoints.fingerprints import fingerprint_model, has_fingerprint
from mmpo_jax.checkpoints.folders import copy_base
from mmpo_jax.checkpoints.huggingface import save_model
from mmpo_jax.checkpoints.safetensors_files import INDEX_FILE, weight_files
from mmpo_jax.core import progress
from mmpo_jax.core.buckets import Mirror, absolute, local_copy, replace_folder
from mmpo_jax.core.commands import GRACE, running, tail_of
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import (
    fingerprint_json,
    is_local,
    read_json,
    write_json,
)
from mmpo_jax.core.processes import VARIABLES, on_one
from mmpo_jax.recipes.candidates import ServedCandidates

log = logging.getLogger(__name__)

MODEL_VARIABLE, ROUND_VARIABLE = "MMPO_MODEL", "MMPO_ROUND"
"""Environment variables of the command: the model's folder, and the round's."""
LOOKS = 0.5
"""Seconds between two looks whether the server is up."""
LEAVING = GRACE + 5.0
"""Seconds that somebody who answers at the address has to leave it: a run that was killed gives its
server `GRACE`."""


@contextlib.contextmanager
def brought_up(
    source: ServedCandidates,
    start: Checkpoint,
    mesh: Mesh,
    folder: str,
    client: AnyClient,
    withheld: Collection[str],
) -> Iterator[None]:
    """The server of a source, up with the round's model within the block. Of several processes the
    first runs the command.

    Args:
      source: whose command is run.
      start: the round's model; its weights leave the devices where the server shares them.
      mesh: the devices.
      folder: of the round, which gets the command's log, and the model where no folder has it;
        where it is in a bucket, a folder of this machine gets the model.
      client: of the server.
      withheld: environment variables that the command does not get, such as others' keys.

    Raises:
      MmpoError: something else answers at its address, and does not end; the command ends, before
        the server is up or later, when whoever asks the client gets it; or the server is not up in
        time.
    """
    name, url = f"candidates: {source.name}", source.url
    assert source.command is not None
    if not on_one(lambda: _is_left(client)):
        raise MmpoError(
            f"{name}: somebody answers at {url} before the command has run, who may have another "
            "model; end that server, or leave `command` out to ask it"
        )
    model = model_folder(start, mesh, os.path.join(local_copy(folder), f"{source.name}-model"))
    if source.shares_devices:
        start.release()
    with contextlib.ExitStack() as stack:
        on_one(lambda: stack.enter_context(_command_up(source, model, folder, client, withheld)))
        yield


@contextlib.contextmanager
def _command_up(
    source: ServedCandidates,
    model: str,
    folder: str,
    client: AnyClient,
    withheld: Collection[str],
) -> Iterator[None]:
    """The command of a source within the block, its server up; see `brought_up`."""
    assert source.command is not None
    name = f"candidates: {source.name}"
    logs = folder if is_local(folder) else local_copy(os.path.join(folder, "logs"))
    os.makedirs(logs, exist_ok=True)
    log_file = os.path.abspath(os.path.join(logs, f"generate-{source.name}.log"))
    withheld = {*VARIABLES, *withheld}
    given = {name: value for name, value in os.environ.items() if name not in withheld}
    environment = given | {MODEL_VARIABLE: model, ROUND_VARIABLE: absolute(folder)}
    log.info("%s: serving %s by the recipe's command; its log: %s", name, model, log_file)
    secret = secret_of(read_key(source))
    with contextlib.ExitStack() as stack:
        if not is_local(folder):
            stack.enter_context(contextlib.closing(Mirror(logs, absolute(folder))))
        command = running(source.command, environment, log_file, secret=secret)
        process = stack.enter_context(command)
        _wait_until_up(source, client, process, log_file)
        over = threading.Event()

        def watch() -> None:
            process.wait()
            if not over.is_set():
                client.stop(_ended(source, process, log_file))

        threading.Thread(target=watch, name="served-copy", daemon=True).start()
        try:
            yield
        finally:
            over.set()


def _is_left(client: AnyClient) -> bool:
    """Whether nobody answers, after a while: the server of a run that was killed ends by itself."""
    if not client.is_up():
        return True
    deadline = time.monotonic() + LEAVING
    with progress.doing(f"waiting for an earlier server at {client.server.url} to end"):
        progress.tell()
        while time.monotonic() < deadline:
            time.sleep(LOOKS)
            if not client.is_up():
                return True
    return False


def _wait_until_up(
    source: ServedCandidates,
    client: AnyClient,
    process: subprocess.Popen[bytes],
    log_file: str,
) -> None:
    """Waits until a server answers, and looks whether it has the model.

    Raises:
      MmpoError: see `brought_up`; or it has other models.
    """
    deadline = time.monotonic() + source.start_timeout
    with progress.doing(f"waiting for the server at {source.url}"):
        while not client.is_up():
            if process.poll() is not None:
                raise _ended(source, process, log_file)
            if time.monotonic() > deadline:
                waited = f"nobody answers at {source.url} after {source.start_timeout:g} s"
                told = f"candidates: {source.name}: {waited} (start_timeout)"
                raise MmpoError(_with_log(told, source, log_file))
            time.sleep(LOOKS)
    client.check()


def _ended(source: ServedCandidates, process: subprocess.Popen[bytes], log_file: str) -> MmpoError:
    status = f"the command ended with status {process.returncode}"
    told = f"candidates: {source.name}: {status}; what was answered is kept"
    return MmpoError(_with_log(told, source, log_file))


def _with_log(told: str, source: ServedCandidates, log_file: str) -> str:
    """A message with the end of the command's log."""
    tail = hide_key(tail_of(log_file), read_key(source))  # what an older run left may have it
    return f"{told}; its log, {log_file}, " + (f"ends with:\n{tail}" if tail else "is empty")


def model_folder(start: Checkpoint, mesh: Mesh, target: str) -> str:
    """A Hugging Face folder on this machine with a checkpoint as it is: its own, or one that is
    made where there is none, where adapters are merged, or where dialogues have another template.

    Args:
      start: the checkpoint.
      mesh: the devices, where its weights have to be read again.
      target: folder that is made, and found by a later run.
    """
    origin, template = start.origin, start.processor.chat_template
    own = None if origin is None else _own_folder(origin)
    if own is not None and template is None:
        return own
    manifest, of = f"{target}.json", fingerprint_json([start.fingerprint, template])

    def is_there() -> bool:
        done = read_json(manifest)
        return done.get("of") == of and has_fingerprint(target, done["model"])

    if on_one(is_there):
        return os.path.abspath(target)
    with progress.doing(f"writing {target}"):
        if own is not None:
            link = functools.partial(_link, own, template)
            on_one(lambda: replace_folder(target, link))
        else:
            params = start.moved(mesh).params
            folder = start.processor.folder
            save_model(target, start.model, params, folder, chat_template=template)

    def note() -> None:
        done = {"of": of, "model": fingerprint_model(target)}
        write_json(manifest, done)

    on_one(note)
    return os.path.abspath(target)


def _own_folder(origin: Origin) -> str | None:
    """The Hugging Face folder that parameters are read from, as they are; None where there is none
    on this machine."""
    location = origin.location
    merged = location.is_orbax or location.adapters or origin.random_seed is not None
    return None if merged or not is_local(location.weights) else os.path.abspath(location.weights)


def _link(source: str, template: str | None, target: str) -> None:
    """A checkpoint folder with another chat template, whose weights are links."""
    copy_base(source, target, template)
    index = epath.Path(source) / INDEX_FILE
    for file in [*weight_files(source), *([os.fspath(index)] if index.exists() else [])]:
        os.symlink(os.path.abspath(file), os.path.join(target, os.path.basename(file)))
