"""Rounds of sentences: what goes on from one beginning is judged, and a clean one goes on.

After SENTINEL (Peng et al. 2025, arXiv 2507.12455): sentences that go on from the same beginning
of an answer are sampled and judged, clean ones are preferred to those with something rejected, and
a clean one makes the beginning longer. So every pair differs where an answer first goes wrong.

Sentence k has a folder of its own in that of the round, `sentence-k`, with the stages of a round:
`generate`, `sentences`, and the judge's. The stages `responses` and `judge` of the round have all
of them together, under ids `PROMPT/sentence-k`, and pairs and training go on as ever.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mmpo_jax.alignment.candidates import Asked
from mmpo_jax.core import progress
from mmpo_jax.core.files import canonical_json, fingerprint_json
from mmpo_jax.core.stages import Stage, StageOutput, run_told_stage
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import Record, Turn
from mmpo_jax.data.tokenization import TokenizedRecord, tokenize_prompt, tokenize_records
from mmpo_jax.feedback.claims import NO_CLAIMS
from mmpo_jax.feedback.judge import JUDGED, Judge, Responses
from mmpo_jax.feedback.sentences import first_sentence
from mmpo_jax.generation.responses import GENERATED, generate_stage
from mmpo_jax.recipes.sentences import Sentences

log = logging.getLogger(__name__)

SENTENCE_RULES = 2
"""Part of the key of sentences: changes with how they are cut and which ones are gone on from."""

BEGUN = GENERATED.append(pa.field("begun", pa.string()))
"""Columns of sentences; `begun` is the beginning of the answer that a sentence goes on from."""

CONTEXT = 16
"""Tokens of a prompt that are decoded together with what follows them."""

_MARK = "/sentence-"


@dataclasses.dataclass(frozen=True)
class Step:
    """The sentences with one number, of all answers."""

    records: Sequence[Record]
    """Prompts that end with the beginning of an answer, but for those of the first sentences."""
    sentences: StageOutput
    """Rows of `BEGUN`."""
    judged: StageOutput
    """A row for each."""


def judged_sentences(
    asked: Asked, judge: Judge, sentences: Sentences
) -> tuple[StageOutput, StageOutput]:
    """Samples and judges the round's answers sentence by sentence.

    Args:
      asked: the prompts and the policy.
      judge: gives sentences their scores.
      sentences: of the recipe.

    Returns:
      (all sentences as the stage `responses`, rows of `BEGUN`; their scores as the stage `judge`).
    """
    records = [_named(record, 1) for record in asked.records]
    steps: list[Step] = []
    for number in range(1, sentences.max_sentences + 1):
        with progress.doing(f"sentence {number}"):
            step = _step(asked, judge, sentences, records, number)
        if step is None:
            break
        steps.append(step)
        records = _going_on(step, sentences.clean, asked.recipe.seed, asked.index, number + 1)
    order = [record.id for record in asked.records]
    folder = asked.folder
    tables = [step.sentences for step in steps]
    return (
        _together(folder, "responses", order, tables, BEGUN),
        _together(folder, "judge", order, [step.judged for step in steps], JUDGED),
    )


def begun_records(records: Sequence[Record], generated: pa.Table) -> list[Record]:
    """The prompts that responses answer: the round's own, or each of its beginnings of answers.

    Args:
      records: of the round.
      generated: its responses.
    """
    if "begun" not in generated.column_names:
        return list(records)
    by_id = {record.id: record for record in records}
    rows = generated.select(["prompt_id", "begun"]).to_pylist()
    begun = {row["prompt_id"]: row["begun"] for row in rows}
    return [_begun(by_id[_own_id(name)], name, text) for name, text in begun.items()]


def _named(record: Record, number: int) -> Record:
    return dataclasses.replace(record, id=f"{record.id}{_MARK}{number}")


def _own_id(name: str) -> str:
    return name.rpartition(_MARK)[0]


def _begun(record: Record, name: str, begun: str) -> Record:
    """A prompt with this beginning of an answer, and no other, as its end."""
    prompt = record.prompt[:-1] if _beginning(record) else record.prompt
    if begun:
        prompt = (*prompt, Turn("assistant", begun))
    return dataclasses.replace(record, id=name, prompt=prompt)


def _beginning(record: Record) -> str:
    last = record.prompt[-1]
    return last.text if last.role == "assistant" else ""


def _step(
    asked: Asked, judge: Judge, sentences: Sentences, records: Sequence[Record], number: int
) -> Step | None:
    """The sentences with this number and their scores; None where there are none."""
    recipe, start = asked.recipe, asked.start
    folder = os.path.join(asked.folder, f"sentence-{number}")
    name = f"sentence {number}"
    tokenized, skipped = tokenize_records(
        records, start.processor, recipe.lengths, name, tokenize_prompt
    )
    if skipped:
        log.warning("%s: %d answers end here, such as %s", name, len(skipped), skipped[0])
    if not tokenized:
        return None
    generated = generate_stage(
        start,
        tokenized,
        recipe.sampling,
        recipe.lengths,
        asked.mesh,
        folder=folder,
        batch_size=recipe.sampling.batch_size,
        seed=recipe.seed,
        round_index=asked.index,
    )
    begun = {record.id: _beginning(record) for record in records}
    prompts = {record.id: record for record in tokenized}
    inputs = {"generated": generated.fingerprint, "begun": fingerprint_json(begun)}
    settings = {"rules": SENTENCE_RULES, "end": sentences.end}

    def make_part(_: int) -> pa.Table:
        return _cut(generated.table, prompts, begun, start.processor, sentences.end)

    cut = run_told_stage(Stage(folder, "sentences", inputs, settings), make_part)
    said = set(cut.table["prompt_id"].to_pylist())
    shown = [record for record in records if record.id in said]
    if not shown:
        return None
    return Step(shown, cut, judge.judge(Responses(folder, shown, cut)))


def _cut(
    generated: pa.Table,
    prompts: Mapping[str, TokenizedRecord],
    begun: Mapping[str, str],
    processor: Processor,
    end: str | None,
) -> pa.Table:
    """The first sentence of every sample, each but once. Samples that are cut in it, or that end
    the answer at once, have none."""
    rows: list[dict[str, Any]] = []
    seen: set[tuple[str, str]] = set()
    counts: Counter[str] = Counter()
    for row in generated.to_pylist():
        name = row["prompt_id"]
        text = row["text"]
        if begun[name]:
            text = continued_text(processor, prompts[name].prompt_ids, row["token_ids"])
        sentence = first_sentence(text, end, finished=row["finished"])
        finished = row["finished"] and (sentence is None or not text[len(sentence) :].strip())
        sentence = text if finished else sentence
        if sentence is None:
            counts["unfinished"] += 1
            continue
        if not sentence.strip():
            counts["ended"] += 1
            continue
        if (name, sentence.strip()) in seen:
            counts["again"] += 1
            continue
        counts["said"] += 1
        seen.add((name, sentence.strip()))
        # What was sampled goes on behind the sentence, so this is trained as text.
        cut = {"text": sentence, "finished": finished, "token_ids": None, "num_tokens": None}
        rows.append(row | cut | {"begun": begun[name]})
    log.info(
        "sentences: %d, %d said again, %d not finished in max_new_tokens, %d ends of answers",
        *(counts[kind] for kind in ("said", "again", "unfinished", "ended")),
    )
    return pa.Table.from_pylist(rows, schema=BEGUN)


def continued_text(processor: Processor, prompt_ids: np.ndarray, ids: Sequence[int]) -> str:
    """The text that tokens add to what stands before them.

    Decoded alone they may lose a space in front, which SentencePiece's first token never has.
    """
    before = prompt_ids[-CONTEXT:].tolist()
    start, whole = processor.decode(before), processor.decode([*before, *ids])
    return whole[len(start) :] if whole.startswith(start) else processor.decode(ids)


def _going_on(step: Step, clean: float, seed: int, round_number: int, number: int) -> list[Record]:
    """The prompts of the next step: one sentence longer, where a clean one does not end the answer.

    Of several one is drawn. Sentences that say nothing to check are gone on from where there is no
    clean one.
    """
    found: dict[str, dict[bool, list[str]]] = {
        record.id: {True: [], False: []} for record in step.records
    }
    rows = zip(step.sentences.table.to_pylist(), step.judged.table.to_pylist(), strict=True)
    for said, verdict in rows:
        is_clean = verdict["reason"] is None and verdict["score"] >= clean
        if not said["finished"] and (is_clean or verdict["reason"] == NO_CLAIMS):
            found[said["prompt_id"]][is_clean].append(said["text"])
    longer = []
    for record in step.records:
        texts = found[record.id][True] or found[record.id][False]
        if not texts:
            continue
        drawn = min(texts, key=lambda text: _draw([seed, round_number, record.id, text]))
        name = f"{_own_id(record.id)}{_MARK}{number}"
        longer.append(_begun(record, name, _beginning(record) + drawn))
    log.info("sentence %d: %d of %d answers go on", number - 1, len(longer), len(step.records))
    return longer


def _draw(key: list[Any]) -> bytes:
    """A hash whose smallest draws uniformly, the same in every version of every library."""
    return hashlib.sha256(canonical_json(key).encode()).digest()


def _together(
    folder: str,
    name: str,
    order: Sequence[str],
    outputs: Sequence[StageOutput],
    schema: pa.Schema,
) -> StageOutput:
    """The rows of all steps as a stage of the round, those of a prompt together in their order."""

    def make_part(_: int) -> pa.Table:
        by_prompt: dict[str, list[dict[str, Any]]] = {prompt_id: [] for prompt_id in order}
        for output in outputs:
            for row in output.table.to_pylist():
                by_prompt[_own_id(row["prompt_id"])].append(row)
        rows = [row for of_prompt in by_prompt.values() for row in of_prompt]
        return pa.Table.from_pylist(rows, schema=schema)

    inputs = {f"sentence-{n}": output.fingerprint for n, output in enumerate(outputs, start=1)}
    settings = {"rules": SENTENCE_RULES, "prompts": fingerprint_json(list(order))}
    return run_told_stage(Stage(folder, name, inputs, settings), make_part)
