"""A round's prompts of which the model is shown less: changed images, and hidden image tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pyarrow as pa

from mmpo_jax.core.files import fingerprint_json
from mmpo_jax.data.contexts import OtherImage, changed_images
from mmpo_jax.data.hidden_tokens import hide_image
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.skipped import SkippedRow, UnusableRow
from mmpo_jax.data.tokenization import TokenizedRecord
from mmpo_jax.recipes.candidates import EditedImageCandidates, HiddenImageCandidates

Change = Callable[[TokenizedRecord], TokenizedRecord]

BEHIND = "/"
"""Stands between a prompt's id and the number of a sample that has a prompt of its own."""


def changed_prompts(
    source: EditedImageCandidates | HiddenImageCandidates,
    records: Sequence[TokenizedRecord],
    processor: Processor,
    num_samples: int,
    seed: int,
) -> tuple[list[TokenizedRecord], list[SkippedRow]]:
    """The prompts as a source shows them, and those that show nothing that could be changed.

    Args:
      source: how, and whether every sample is shown a change of its own.
      records: the prompts.
      processor: of the model.
      num_samples: of every prompt.
      seed: of the changes of one round, which depend on it and on the prompt's id.

    Returns:
      (prompts, those left out). Where samples have changes of their own, a prompt for each of them,
      called `PROMPT/SAMPLE`.
    """
    change = _change(source, processor, seed)
    changed, skipped = [], []
    for record in records:
        try:
            changed += [change(copy) for copy in _copies(record, source.per_sample, num_samples)]
        except UnusableRow as error:
            skipped.append(SkippedRow(source.name, None, record.id, error.reason, error.detail))
    return changed, skipped


def _copies(record: TokenizedRecord, per_sample: bool, num_samples: int) -> list[TokenizedRecord]:
    if not per_sample:
        return [record]
    names = (f"{record.id}{BEHIND}{sample}" for sample in range(num_samples))
    return [dataclasses.replace(record, id=name) for name in names]


def _change(
    source: EditedImageCandidates | HiddenImageCandidates, processor: Processor, seed: int
) -> Change:
    if isinstance(source, HiddenImageCandidates):
        share = source.share

        def hide(record: TokenizedRecord) -> TokenizedRecord:
            own = int(fingerprint_json([seed, record.id])[:15], 16)
            return hide_image(record, processor, share, own)

        return hide
    other = OtherImage(
        source.edit,
        source.step if source.edit == "noise" else 0,
        seed,
        source.share if source.edit == "masked" else 0.0,
    )
    return lambda record: changed_images(record, other)


def under_their_prompts(table: pa.Table) -> pa.Table:
    """Responses to prompts of single samples as those of the prompts themselves: one of each."""
    place = table.column_names.index("prompt_id")
    ids = [name.rpartition(BEHIND)[0] for name in table["prompt_id"].to_pylist()]
    return table.set_column(place, table.schema.field(place), pa.array(ids, pa.string()))
