"""Rows of all formats against transformers: ids as its template and tokenizer give them, sums of
log-probs as its models do, on every family, with a real tokenizer and published templates."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from helpers import meshes

pytest.importorskip("torch")
pytest.importorskip("trl")
import torch
import transformers
from helpers import checks
from helpers import row_cases as rows
from helpers.kinds import KINDS, Kind, make_checkpoint, published
from helpers.their_rows import their_inputs, their_texts
from PIL import Image

from mmpo_jax.checkpoints.checkpoint import Checkpoint
from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.contexts import tokenize_contexts
from mmpo_jax.data.readers import read_records
from mmpo_jax.scoring.log_probs import score_records

pytestmark = pytest.mark.parity

CASES = rows.TEXTS | rows.IMAGES | rows.SYSTEMS | rows.KEYS


def cases_of(kind: Kind) -> dict[str, rows.Case]:
    names = [*rows.TEXTS, *(rows.IMAGES if kind.image else ()), *kind.cases]
    return {name: CASES[name] for name in names}


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request, tmp_path_factory):
    """(kind, its checkpoint, its tokenizer in transformers)."""
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("kinds") / request.param
    case = make_checkpoint(folder, kind)
    return kind, case, transformers.AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def records(checkpoint, tmp_path_factory):
    """name -> the record that is read of its row."""
    kind, _, _ = checkpoint
    folder = tmp_path_factory.mktemp("rows")
    for number, size in enumerate([(40, 30), (25, 60)]):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    cases = cases_of(kind)
    written = [json.dumps({"id": name, **case.row}) for name, case in cases.items()]
    text = "".join(line.replace("{EOS}", kind.eos) + "\n" for line in written)
    (folder / "rows.jsonl").write_text(text)
    found, skipped = read_records(folder / "rows.jsonl")
    assert not skipped, skipped
    return {record.id: record for record in found}


@pytest.mark.slow
def test_ids_are_those_of_transformers(checkpoint, records):
    kind, case, tokenizer = checkpoint
    training = transformers.AutoTokenizer.from_pretrained(case.folder)
    if kind.family == "qwen3":  # what it writes where a response has several answers
        training.chat_template = published("qwen3_training")
    for name, expected in cases_of(kind).items():
        record = records[name]
        ours = tokenize_contexts(record, case.processor, 2**20, 2**20)
        for response, made in zip(expected.responses, ours.responses, strict=True):
            several = sum(message["role"] == "assistant" for message in response) > 1
            theirs = training if several else tokenizer
            texts = their_texts(kind, theirs, expected, response)
            ids = [*ours.prompt_ids.tolist(), *made.ids.tolist()]
            tags = [tag for tag in ("<image>", "<video>") if tag in kind.special]
            typed = sum(map(texts[-1].count, tags)) - tags.count(kind.image) * len(record.images)
            if typed:
                check_literal(case, record, ids, texts[-1], tags, typed)
            else:
                assert ids == their_ids(case, record, texts), name


def their_ids(case: checks.Case, record: Any, texts: list[str]) -> list[int]:
    """The last text's tokens, with those of an image for each placeholder.

    Where a token would reach over the beginning or the end of an answer, what follows is tokenized
    by itself: a prompt has the tokens that it has where the answer is generated.
    """
    ids: list[int] = []
    for start, text in pairwise(["", *texts]):
        begun, whole = (
            case.processor.tokenizer(t, add_special_tokens=False)["input_ids"]
            for t in (start, text)
        )
        if whole[: len(begun)] != begun:
            begun = []
            whole = case.processor.tokenizer(text[len(start) :], add_special_tokens=False)[
                "input_ids"
            ]
        ids += whole[len(begun) :]
    layouts = iter(case.processor.layouts(record.images))
    expanded: list[int] = []
    for token in ids:
        shown = token in case.processor.placeholders
        expanded += next(layouts).ids.tolist() if shown else [token]
    return expanded


def check_literal(
    case: checks.Case, record: Any, ids: list[int], text: str, tags: list[str], typed: int
) -> None:
    """What only looks like an image is text; transformers would look for an image for it."""
    features = sum(len(layout.index) for layout in case.processor.layouts(record.images))
    assert sum(token in case.processor.placeholders for token in ids) == features
    written = case.processor.tokenizer.decode(ids)
    assert sum(map(written.count, tags)) == features + typed
    assert without_tags(written) == without_tags(text)


def without_tags(text: str) -> str:
    return re.sub(r"<image>|<video>|</?img>", "", text)


@pytest.mark.slow
def test_log_probs_are_those_of_transformers(checkpoint, records):
    kind, case, _ = checkpoint
    mesh = meshes.one_device()
    made = [tokenize_contexts(r, case.processor, 2**20, 2**20) for r in records.values()]
    lengths = fitting_lengths(made)
    start = Checkpoint(case.model, case.processor, case.params)
    sums = score_records(start, made, lengths, mesh, batch_size=8)
    for record, row, ours in zip(records.values(), made, sums, strict=True):
        for response, found in zip(row.responses, ours, strict=True):
            ids = np.concatenate([row.prompt_ids, response.ids])
            with torch.no_grad():
                logits = case.theirs(
                    input_ids=torch.tensor(ids[None]).long(),
                    **their_inputs(kind, case, record, ids),
                ).logits[0, len(row.prompt_ids) - 1 : -1]
            chosen = (
                logits.double()
                .log_softmax(-1)
                .gather(1, torch.tensor(response.ids)[:, None].long())
            )
            theirs = float(chosen[:, 0][torch.tensor(response.loss_mask)].sum())
            assert abs(found - theirs) <= 1e-3 * max(1, abs(theirs)), (record.id, found, theirs)
