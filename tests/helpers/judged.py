"""Responses of a round as judges are asked about them, and a text model that follows a script."""

from __future__ import annotations

import pyarrow as pa

from mmpo_jax.core.stages import Stage, run_stage
from mmpo_jax.data.records import ImageRef, Record, Turn
from mmpo_jax.feedback.judge import Responses
from mmpo_jax.feedback.text_model import Reply
from mmpo_jax.generation.responses import GENERATED
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene


class Scripted:
    """A text model whose replies are those of a function (text, attempt) -> text or reply."""

    def __init__(self, says):
        self.says, self.rounds, self.rejected, self.schemas = says, [], [], []

    def say(self, asks, schema=None):
        self.rounds.append(list(asks))
        self.schemas.append(schema)
        said = [self.says(ask.text, ask.attempt) for ask in asks]
        return [one if isinstance(one, Reply) else Reply(one) for one in said]

    def reject(self, asks, schema=None):
        self.rejected += [(ask.id, ask.attempt) for ask in asks]

    def release(self):
        pass


def prompt(name, number=0, **extra):
    """A record that asks about a scene."""
    picture = ImageRef(name, png_bytes(sample_scene("test", 0, number), 24))
    return Record(name, (picture,), (Turn("user", f"what is in {name} ?"),), (), extra=extra)


def responses_of(folder, texts, ids=None, records=None, finished=True):
    """The stage `generate` of a round with these texts.

    Args:
      folder: of the round.
      texts: prompt id -> its responses.
      ids: (prompt id, sample) -> sampled ids; none by default.
      records: the prompts; some of the picture world's by default.
      finished: whether responses ended by themselves.
    """
    rows = [
        {
            "prompt_id": name,
            "sample": sample,
            "text": text,
            "num_tokens": 1,
            "finished": finished,
            "token_ids": list((ids or {}).get((name, sample), ())),
        }
        for name, of_prompt in texts.items()
        for sample, text in enumerate(of_prompt)
    ]
    table = pa.Table.from_pylist(rows, schema=GENERATED)
    stage = Stage(folder, "generate", {"texts": repr(rows)})
    records = records or [prompt(name, number) for number, name in enumerate(texts)]
    return Responses(str(folder), records, run_stage(stage, lambda _: table))
