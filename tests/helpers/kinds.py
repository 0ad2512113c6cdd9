"""Tiny checkpoints of every family with a real tokenizer and published chat templates."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import transformers
import trl
from helpers import checks, families, smollm2, tiny
from helpers import row_cases as rows

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
    "qwen3_vl": Kind(
        "qwen3_vl", published("qwen3_vl"), special=VISION, image="<|image_pad|>", cases=SYSTEM
    ),
}


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
        if kind.family in families.QWEN:
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


def make_checkpoint(folder: Path, kind: Kind) -> checks.Case:
    """A checkpoint with large random weights."""
    tokenizer = save_tokenizer(folder, kind)
    if kind.family in families.VIDEO_SETTINGS:
        settings = families.VIDEO_SETTINGS[kind.family]
        checks.write_json(folder / "video_preprocessor_config.json", settings)
    theirs = make_model(kind, tokenizer)
    return checks.make_case(folder, theirs, families.FAMILIES[kind.family].image_processor)
