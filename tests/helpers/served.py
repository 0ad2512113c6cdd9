"""A service on a free port of this machine, in a thread of the test's process."""

import asyncio
import base64
import contextlib
import threading
import time

import uvicorn
from helpers.meshes import one_device

from mmpo_jax.checkpoints.checkpoint import load_checkpoint
from mmpo_jax.generation.engine import Engine
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.recipes.serving import Serving
from mmpo_jax.serving.app import Service, make_app
from mmpo_jax.serving.server import address, listen

NAME = "picture_world"


def load():
    return load_checkpoint("builtin:picture_world", one_device())


@contextlib.contextmanager
def service(checkpoint, key=None, **limits):
    """(the service, its URL)."""
    serving = Serving(port=0, **limits)
    mesh = one_device()
    engine = Engine(
        checkpoint, mesh, places=serving.max_samples, max_prompt=serving.max_prompt_tokens
    )
    made = Service(checkpoint, engine, serving, name=NAME, positions=1024, key=key)
    listening = listen(serving.host, serving.port)
    config = uvicorn.Config(make_app(made), lifespan="off", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])), daemon=True)
    url = address(listening)
    thread.start()
    try:
        yield made, url
    finally:
        server.should_exit = True
        thread.join(30)
        made.worker.stop()
        assert not thread.is_alive()


def wait_until_idle(made, seconds=60.0):
    """Waits until nobody is served, and nothing is left of who was."""
    end = time.monotonic() + seconds
    engine = made.worker._engine
    while made.requests or engine.works or made.worker._tells:
        assert time.monotonic() < end, (made.requests, engine.works)
        time.sleep(0.02)
    assert not any(holder for row in engine.holders for holder in row)
    assert not any(seat for row in engine.seats for seat in row)


def picture(seed, size=48):
    """Bytes of a picture of the picture world."""
    return png_bytes(sample_scene("test", 3, seed), size)


def data_url(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def user(text, *images):
    """A message with its pictures in front."""
    if not images:
        return {"role": "user", "content": text}
    shown = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return {"role": "user", "content": [*shown, {"type": "text", "text": text}]}


def body(*messages, **more):
    return {"model": NAME, "messages": list(messages), "temperature": 0, "max_tokens": 24, **more}
