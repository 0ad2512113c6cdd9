"""Prompts of a round or a benchmark as a page shows them: question and small pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from mmpo_jax.core.files import fingerprint_items
from mmpo_jax.core.processes import on_one
from mmpo_jax.core.stages import Stage, run_told_stage
from mmpo_jax.data.records import Record, question_with_beginning
from mmpo_jax.reporting.thumbnails import VERSION, make_thumbnail

STAGE = "prompts"
PER_PART = 512
"""Prompts of a part."""
MAX_PICTURES = 4
"""Pictures of a prompt that are kept, the first ones; a video has one."""
MAX_NAME = 200
"""Characters of a picture's name that are kept."""

SHOWN = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("question", pa.string()),
        ("images", pa.list_(pa.string())),
        ("thumbnails", pa.list_(pa.binary())),
    ]
)
"""Columns of the stage: `images` has the names of all pictures and videos, `thumbnails` the first
ones as WebP, of a video its middle frame, null where one cannot be opened."""


def write_prompts(folder: str, records: Sequence[Record], name: str = STAGE) -> None:
    """Writes prompts as a stage, in the first process.

    Args:
      folder: of the round, or of a benchmark's answers.
      records: the prompts.
      name: of the stage; `NAME-prompts` is that of the benchmark whose section is called so.
    """
    on_one(lambda: _write(folder, records, name))


def _write(folder: str, records: Sequence[Record], name: str) -> None:
    shown = (
        [
            record.id,
            question_with_beginning(record.prompt),
            [(media.name[:MAX_NAME], media.fingerprint()) for media in record.media],
        ]
        for record in records
    )
    inputs = {"prompts": fingerprint_items(shown)}
    settings = {"thumbnails": VERSION, "pictures": MAX_PICTURES}
    parts = max(1, -(-len(records) // PER_PART))
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def make_part(part: int) -> pa.Table:
            of_part = records[part * PER_PART : (part + 1) * PER_PART]
            media = [one for record in of_part for one in record.media[:MAX_PICTURES]]
            made = iter(pool.map(make_thumbnail, media))
            rows = [
                {
                    "prompt_id": record.id,
                    "question": question_with_beginning(record.prompt),
                    "images": [media.name[:MAX_NAME] for media in record.media],
                    "thumbnails": [next(made) for _ in record.media[:MAX_PICTURES]],
                }
                for record in of_part
            ]
            return pa.Table.from_pylist(rows, schema=SHOWN)

        run_told_stage(Stage(folder, name, inputs, settings, parts), make_part)
