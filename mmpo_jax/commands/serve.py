"""`mmpo serve`: a checkpoint behind OpenAI's chat protocol."""

from __future__ import annotations

import importlib.util
import ipaddress
import logging
import posixpath

import transformers

from mmpo_jax.checkpoints.checkpoint import Checkpoint, check_speaker, load_checkpoint
from mmpo_jax.core import processes, progress
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.generation.engine import Engine
from mmpo_jax.parallel.mesh import make_mesh
from mmpo_jax.recipes.command_recipes import ServeRecipe

log = logging.getLogger(__name__)

NEEDS = ("starlette", "uvicorn")
MISREAD = ("o1", "o3", "o4", "gpt-5")
"""What lmms-eval takes a model for one of OpenAI's for, wherever it stands in a name: it sends
neither temperature nor a limit of tokens then."""


def main(recipe: ServeRecipe) -> None:
    """Serves until told to end.

    Raises:
      MmpoError: something is missing, or the devices fail again and again.
    """
    missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise MmpoError(f"{missing[0]} is not installed: pip install 'mmpo_jax[serve]'")
    if processes.several():
        raise MmpoError("a server is one process; start one on each host, behind a balancer")
    from mmpo_jax.serving.app import Service, make_app
    from mmpo_jax.serving.server import address, key_of, listen, run_server
    from mmpo_jax.serving.warm_up import warm_up

    serving = recipe.serving
    key = key_of(serving.api_key_env)
    check_speaker(recipe.model, "mmpo serve")
    listening = listen(serving.host, serving.port)
    mesh = make_mesh(**recipe.devices.model_dump())
    checkpoint = load_checkpoint(recipe.model, mesh, recipe.attention, recipe.template)
    name = serving.name or _name(recipe.model)
    positions = _positions(checkpoint)
    engine = Engine(
        checkpoint,
        mesh,
        places=serving.max_samples,
        max_prompt=min(serving.max_prompt_tokens, positions),
    )
    failures: list[Exception] = []
    service = Service(
        checkpoint,
        engine,
        serving,
        name=name,
        positions=positions,
        key=key,
        gave_up=failures.append,
    )
    with progress.doing("compiling"):
        warm_up(service)
    _warn(name, serving.host, key)
    log.info("%s is served at %s", name, address(listening))
    with progress.doing(f"serving {name}", unit="requests"):
        run_server(make_app(service), service, listening, lambda: bool(failures))
    if failures:
        raise MmpoError(f"the devices failed {failures[0]!r}; the log says how")
    print(f"{name} is served no longer")


def _name(model: str) -> str:
    """The last part of a model's name, without what a run calls it."""
    parts = [part for part in posixpath.normpath(model.replace(":", "/")).split("/") if part]
    if len(parts) > 1 and parts[-1] == "model":
        return parts[-2]
    return parts[-1]


def _positions(checkpoint: Checkpoint) -> int:
    """Tokens that the model was made for, at most, as its config says."""
    folder = checkpoint.processor.folder
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    return config.get_text_config().max_position_embeddings


def _warn(name: str, host: str, key: str | None) -> None:
    read = [word for word in MISREAD if word in name]
    if read:
        log.warning(
            "lmms-eval takes %s for a model of OpenAI's, as %r is in its name, and sends no "
            "temperature; serving.name gives it another",
            name,
            read[0],
        )
    try:
        is_ours = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_ours = host == "localhost"
    if not is_ours and key is None:
        log.warning(
            "%s: whoever reaches this address may ask; serving.api_key_env asks a key", host
        )
