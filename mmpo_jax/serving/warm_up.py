"""A first request of the server's own, so that clients do not wait for the compiler."""

from __future__ import annotations

import base64
import io
import logging
import queue
from typing import Any

from PIL import Image

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.generation.engine import Part
from mmpo_jax.serving.app import Service
from mmpo_jax.serving.protocol import ChatBody
from mmpo_jax.serving.refusals import Refusal

log = logging.getLogger(__name__)


def warm_up(service: Service) -> None:
    """Asks about a blank picture, where the model takes any, as most clients ask about one.

    Raises:
      MmpoError: the model gives no answer.
    """
    content: list[dict[str, Any]] = [{"type": "text", "text": "a"}]
    if service.processor.images is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": _blank()}})
    message = {"role": "user", "content": content}
    body = {"model": service.name, "messages": [message], "max_tokens": 2, "temperature": 0}
    try:
        asked = service.prompts.asked(ChatBody.model_validate(body))
    except Refusal as refusal:
        log.warning("no first question can be asked: %s", refusal)
        return
    told: queue.SimpleQueue[list[Part] | Exception] = queue.SimpleQueue()
    service.worker.ask(asked, told.put)
    is_over = False
    while not is_over:
        parts = told.get()
        errors = [parts] if isinstance(parts, Exception) else [part.error for part in parts]
        for error in errors:
            if error is not None:
                raise MmpoError(f"{service.name} gives no answer: {error}") from error
        is_over = isinstance(parts, list) and any(part.finish for part in parts)
    service.worker.drop(asked)
    service.worker.known = asked


def _blank() -> str:
    file = io.BytesIO()
    Image.new("RGB", (336, 336)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
