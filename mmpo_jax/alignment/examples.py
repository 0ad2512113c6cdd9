"""Some prompts of a round as text: their responses, scores, claims and verdicts."""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from mmpo_jax.core.files import write_atomic
from mmpo_jax.core.processes import on_one
from mmpo_jax.data.records import Record, question_with_beginning
from mmpo_jax.feedback.judge import sources_of
from mmpo_jax.feedback.scores import VERDICTS, accepted
from mmpo_jax.recipes.candidates import POLICY

FILE = "examples.txt"
PROMPTS = 10
"""Prompts that are shown, the first of the round."""
WIDTH = 100
LEFT_OUT = {
    "pairs_small_difference": "by min_difference",
    "pairs_same_text": "of equal texts",
    "pairs_other_source": "of other sources",
    "pairs_chosen_too_low": "without a clean sentence",
    "pairs_over_limit": "by max_pairs_per_prompt",
    "pairs": "by length",
}
"""What is told of each count of a prompt without pairs: nothing but the balance of lengths leaves
out what the other rules make."""


def write_examples(
    folder: str,
    records: Sequence[Record],
    generated: pa.Table,
    judged: pa.Table,
    pairs: pa.Table,
    left_out: Mapping[str, Mapping[str, int]],
) -> None:
    """Writes the first prompts of a round for a person to read.

    Args:
      folder: of the round, which gets the file.
      records: its prompts.
      generated, judged, pairs: the tables of its stages.
      left_out: by the id of a prompt that is shown, what became of its pairs, see
        `round.pairs_left_out`.
    """
    shown = records[:PROMPTS]
    responses: dict[str, list[Mapping[str, Any]]] = {record.id: [] for record in shown}
    texts, sources = generated["text"], sources_of(generated)
    for place, row in enumerate(judged.to_pylist()):
        if row["prompt_id"] in responses:
            said = {"text": texts[place].as_py(), "source": sources[place]}
            responses[row["prompt_id"]].append({**row, **said})
    paired: dict[str, list[str]] = {record.id: [] for record in shown}
    for pair in pairs.select(["prompt_id", "chosen_sample", "rejected_sample"]).to_pylist():
        if pair["prompt_id"] in paired:
            told = f"{pair['chosen_sample']} over {pair['rejected_sample']}"
            paired[pair["prompt_id"]].append(told)
    blocks = [
        "\n".join([*_prompt_lines(record, responses[record.id]), _pairs_line(told, counts)])
        for record in shown
        for told, counts in [(paired[record.id], left_out[record.id])]
    ]
    text = "\n\n".join(blocks) + "\n"
    on_one(lambda: write_atomic(os.path.join(folder, FILE), text.encode()))


def _prompt_lines(record: Record, responses: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    shown = ", ".join(media.name for media in record.media) or "no image"
    yield f"== {record.id} ({shown})"
    yield from _wrapped(question_with_beginning(record.prompt), "")
    for row in responses:
        score = "no score: " + row["reason"] if row["reason"] else f"score {row['score']:.4g}"
        source = "" if row["source"] == POLICY else f" of {row['source']}"
        yield f"-- {row['sample']}{source}: {score}"
        yield from _wrapped(row["text"], "   ")
        yield from _claim_lines(json.loads(row["details"]))


def _pairs_line(pairs: Sequence[str], left_out: Mapping[str, int]) -> str:
    """The pairs of a prompt, or why there are none."""
    if pairs:
        return "pairs: " + ", ".join(pairs)
    reasons = [f"{left_out[key]} {why}" for key, why in LEFT_OUT.items() if left_out.get(key)]
    if not reasons:
        return "pairs: none (fewer than two responses have a score)"
    return f"pairs: none (left out: {', '.join(reasons)})"


def _claim_lines(details: Mapping[str, Any]) -> Iterator[str]:
    """A line per claim: + accepted, - rejected, ? without an answer; then what else was said."""
    for verdict in details.get(VERDICTS, []):
        claim, p_yes, p_no = (verdict[name] for name in ("claim", "p_yes", "p_no"))
        if p_yes is None or p_no is None:
            yield f"   ? {claim}"
        else:
            sign = "+" if accepted(p_yes, p_no) else "-"
            yield f"   {sign} {claim} (yes {p_yes:.3f}, no {p_no:.3f})"
    for name in sorted(details.keys() - {VERDICTS}):
        yield from _wrapped(f"{name}: {details[name]}", "   ")


def _wrapped(text: str, indent: str) -> list[str]:
    return [
        line
        for paragraph in text.splitlines()
        for line in textwrap.wrap(paragraph, WIDTH, initial_indent=indent, subsequent_indent=indent)
    ]
