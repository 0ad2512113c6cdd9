"""What the parity tests of Gemma 4's members share: words, sizes of decoders, records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from helpers import checks, pictures

NAMED = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
IDS = checks.token_ids(*NAMED.values())
SOFT_TOKENS = 70
TEXT = checks.TEXT | {
    "vocab_size": len(IDS),
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
    "head_dim": 8,
    "global_head_dim": 16,
    "sliding_window": 30,
    "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision",
}
RECORDS = [
    checks.record("0", "what is this ?", pictures.refs("photograph"), "a red star", "two ring"),
    checks.record("1", "a star", pictures.refs("wide", "cmyk"), "blue", "is this a star ?"),
    checks.record("2", "?", pictures.refs("tall", "transparent", "grey"), "a", "?"),
    checks.record("3", "is this a star ?", (), "green", "two blue"),
]


def save_tokenizer(folder: Path) -> None:
    checks.save_tokenizer(folder, *NAMED.values(), image="<image>")
    named = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=NAMED)
    named.save_pretrained(folder)


def only_in_prompts(case: checks.Case, monkeypatch: Any) -> None:
    """Makes placeholders that transformers samples text, which they are here."""
    inner = case.theirs.model
    shown = inner.get_placeholder_mask

    def in_prompts(input_ids: Any = None, inputs_embeds: Any = None) -> tuple[Any, ...]:
        masks = shown(input_ids, inputs_embeds)
        is_step = masks[0].shape[1] == 1
        return tuple(mask & (not is_step) for mask in masks)

    monkeypatch.setattr(inner, "get_placeholder_mask", in_prompts)
