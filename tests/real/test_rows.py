"""Rows of all formats against transformers: ids as its template and tokenizer give them, sums of
log-probs as its models do, on every family, with a real tokenizer and published templates."""

from __future__ import annotations

import dataclasses
import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("trl")
import checks
import families
import layouts_of_rows as rows
import smollm2
import tiny
import torch
import transformers
import trl
from jax.sharding import AxisType
from PIL import Image

from mmpo_jax.data.batching import fitting_lengths
from mmpo_jax.data.contexts import tokenize_contexts
from mmpo_jax.data.readers import read_records
from mmpo_jax.parallel.mesh import AXES
from mmpo_jax.training.reference import score_records

pytestmark = pytest.mark.parity

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
PARTS = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- for part in message['content'] -%}
{{- part['text'] if part['type'] == 'text' else '<' + part['type'] + '>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- '<|im_start|>assistant\n' -}} {%- endif -%}
"""
"""ChatML that keeps the order of parts."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """A checkpoint: its family, its template, and the control tokens of both."""

    family: str
    template: str | None
    eos: str = "<|im_end|>"
    special: tuple[str, ...] = ()
    image: str = ""
    cases: tuple[str, ...] = ()
    """Those with what only some templates know."""


def published(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SYSTEM = tuple(rows.SYSTEMS)
KINDS = {
    "smollm2": Kind("llama", None, cases=SYSTEM[:2]),
    "llama3": Kind("llama", published("llama3"), "<|eot_id|>", LLAMA3, cases=SYSTEM[:2]),
    "qwen3": Kind("qwen3", published("qwen3"), cases=(*SYSTEM[:2], *rows.KEYS)),
    "llava": Kind("llava", tiny.HUB_TEMPLATE, "</s>", ("</s>", "<image>"), "<image>"),
    "llava_next": Kind(
        "llava_next", published("llava_next"), "</s>", ("</s>", "<image>"), "<image>", SYSTEM
    ),
    "llava_onevision": Kind(
        "llava_onevision", PARTS, special=("<image>", "<video>"), image="<image>", cases=SYSTEM
    ),
    "internvl": Kind(
        "internvl",
        PARTS,
        special=("<image>", "<img>", "</img>", "<video>"),
        image="<image>",
        cases=SYSTEM,
    ),
    "qwen2_5_vl": Kind(
        "qwen2_5_vl", published("qwen2_5_vl"), special=VISION, image="<|image_pad|>", cases=SYSTEM
    ),
}
CASES = rows.TEXTS | rows.IMAGES | rows.SYSTEMS | rows.KEYS


def cases_of(kind: Kind) -> dict[str, rows.Case]:
    names = [*rows.TEXTS, *(rows.IMAGES if kind.image else ()), *kind.cases]
    return {name: CASES[name] for name in names}


def save_tokenizer(folder: Path, kind: Kind) -> Any:
    """SmolLM2's, with the kind's control tokens and template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2.make_folder(6))
    tokenizer.add_special_tokens({"additional_special_tokens": list(kind.special)})
    tokenizer.eos_token = kind.eos
    if "<|begin_of_text|>" in kind.special:
        tokenizer.bos_token = "<|begin_of_text|>"
    if kind.template is not None:
        tokenizer.chat_template = kind.template
    if kind.family in families.NAMED:
        named = families.NAMED[kind.family]
        if kind.family == "qwen2_5_vl":
            named = {"image_token": VISION[2], "video_token": VISION[3]}
        tokenizer.save_pretrained(folder)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=named)
    tokenizer.save_pretrained(folder)
    return tokenizer


def make_model(kind: Kind, tokenizer: Any) -> Any:
    config = families.FAMILIES[kind.family].config(False)
    config.get_text_config().vocab_size = len(tokenizer)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in kind.special}
    names = {
        "image_token_index": kind.image,
        "image_token_id": kind.image,
        "video_token_index": "<video>",
        "video_token_id": "<video>" if "<video>" in ids else VISION[3],
        "vision_start_token_id": VISION[0],
        "vision_end_token_id": VISION[1],
    }
    for name, token in names.items():
        if hasattr(config, name) and token in ids:
            setattr(config, name, ids[token])
    auto = "AutoModelForImageTextToText" if kind.image else "AutoModelForCausalLM"
    return getattr(transformers, auto).from_config(config, attn_implementation="eager")


@pytest.fixture(scope="module", params=list(KINDS))
def checkpoint(request, tmp_path_factory):
    """(kind, its checkpoint, its tokenizer in transformers)."""
    kind = KINDS[request.param]
    folder = tmp_path_factory.mktemp("kinds") / request.param
    tokenizer = save_tokenizer(folder, kind)
    if kind.family in families.VIDEO_SETTINGS:
        settings = families.VIDEO_SETTINGS[kind.family]
        checks.write_json(folder / "video_preprocessor_config.json", settings)
    theirs = make_model(kind, tokenizer)
    tiny_family = families.FAMILIES[kind.family]
    return kind, checks.make_case(folder, theirs, tiny_family.image_processor), tokenizer


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


def their_text(kind: Kind, tokenizer: Any, case: rows.Case, messages: list[Any], ask: bool) -> str:
    """What transformers' template makes of messages."""
    messages = json.loads(json.dumps(messages).replace("{EOS}", kind.eos))
    if not kind.image:  # text templates take texts
        messages = [m | {"content": "".join(p["text"] for p in m["content"])} for m in messages]
    arguments = case.arguments or {}
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=ask, **arguments
    )


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
                check_literal(case, record, ids, texts[-1], typed)
            else:
                assert ids == their_ids(case, record, texts), name


def their_texts(kind: Kind, tokenizer: Any, case: rows.Case, response: list[Any]) -> list[str]:
    """The dialogue up to every answer, and with it, the last one up to its EOS."""
    texts = []
    for place, message in enumerate(response):
        if message["role"] == "assistant":
            before = [*case.prompt, *response[:place]]
            texts.append(their_text(kind, tokenizer, case, before, True))
            texts.append(their_text(kind, tokenizer, case, [*before, message], False))
    if kind.template == tiny.HUB_TEMPLATE:  # it ends no answer with EOS: ours is
        texts[-1] = texts[-1].removesuffix(" ") + kind.eos
    else:
        texts[-1] = texts[-1][: texts[-1].rindex(kind.eos) + len(kind.eos)]
    return texts


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


def check_literal(case: checks.Case, record: Any, ids: list[int], text: str, typed: int) -> None:
    """What only looks like an image is text; transformers would look for an image for it."""
    features = sum(len(layout.index) for layout in case.processor.layouts(record.images))
    assert sum(token in case.processor.placeholders for token in ids) == features
    written = case.processor.tokenizer.decode(ids)
    assert sum(map(written.count, ("<image>", "<video>"))) == features + typed
    assert without_tags(written) == without_tags(text)


def without_tags(text: str) -> str:
    return re.sub(r"<image>|<video>|</?img>", "", text)


def their_inputs(kind: Kind, case: checks.Case, record: Any, ids: np.ndarray) -> dict[str, Any]:
    if not record.images:
        return {}
    loaded = checks.load(record.images)
    prepared = families.FAMILIES[kind.family].prepare(case.processor.image_processor, loaded)
    made = dict(prepared)
    if kind.family == "qwen2_5_vl":
        made["mm_token_type_ids"] = torch.tensor(
            np.isin(ids, case.processor.placeholders)[None]
        ).long()
    return made


@pytest.mark.slow
def test_log_probs_are_those_of_transformers(checkpoint, records):
    kind, case, _ = checkpoint
    mesh = jax.make_mesh(
        (1, 1, 1), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:1]
    )
    made = [tokenize_contexts(r, case.processor, 2**20, 2**20) for r in records.values()]
    lengths = fitting_lengths(made)
    sums = score_records(case.model, case.params, case.processor, made, lengths, mesh, batch_size=8)
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
