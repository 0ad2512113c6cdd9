"""What a model says to one question: a plain forward pass of the whole dialogue, nothing shared."""

import functools

import jax
import numpy as np
from helpers import tiny

from mmpo_jax.data.records import IMAGE, Turn
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.head import next_token_logits
from mmpo_jax.picture_world.processor import TOKENS


@functools.partial(jax.jit, static_argnums=0)
def next_token(model, params, batch):
    """Probabilities of what follows the prompts, [B, V]."""
    module = model.bind(params)
    last, _ = module.hidden_states(batch)
    return jax.nn.softmax(next_token_logits(module, last), axis=-1)


def plain_answer(model, params, processor, picture, question, lead=()):
    """One row, teacher forced: the whole dialogue is the prompt, and no response is seen."""
    text = processor.render([Turn("user", (IMAGE, question))], True)
    layouts = processor.layouts([picture])
    ids = [*processor.expand_media(processor.encode(text), layouts, 1, []), *lead]
    size = 32 * (1 + len(ids) // 32)
    absent = np.zeros((1, 1, 1), bool)
    prompt_ids = np.array([ids + [tiny.PAD_ID] * (size - len(ids))], np.int32)
    batch = Batch(
        prompt_ids=prompt_ids,
        prompt_mask=np.arange(size)[None] < len(ids),
        pixel_values=np.stack(processor.pixels([picture])),
        **tiny.reading_order(prompt_ids, [len(ids)]),
        response_ids=absent.astype(np.int32),
        response_mask=absent,
        loss_mask=absent,
        weights=np.ones(1, np.float32),
    )
    p = np.asarray(next_token(model, params, batch))[0]
    return p[TOKENS.index("yes")], p[TOKENS.index("no")]
