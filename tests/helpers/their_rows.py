"""What transformers makes of rows: texts, ids, and sums of log-probs."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from helpers import checks, families, smollm2, tiny
from helpers import row_cases as rows
from helpers.kinds import Kind, published

from mmpo_jax.data.records import ImageRef, Record

TAG = "\ue000"
"""Stands for a tag that somebody typed while a template writes those of pictures."""


def their_text(kind: Kind, tokenizer: Any, case: rows.Case, messages: list[Any], ask: bool) -> str:
    """What transformers' template makes of messages."""
    messages = json.loads(json.dumps(messages).replace("{EOS}", kind.eos))
    if not kind.image:  # text templates take texts
        messages = [m | {"content": "".join(p["text"] for p in m["content"])} for m in messages]
    arguments = case.arguments or {}
    return tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=ask, **arguments
    )


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


def their_inputs(kind: Kind, case: checks.Case, record: Any, ids: np.ndarray) -> dict[str, Any]:
    """What transformers' model takes beside the ids: the record's images."""
    if not record.images:
        return {}
    loaded = checks.load(record.images)
    prepared = families.FAMILIES[kind.family].prepare(case.processor.image_processor, loaded)
    made = dict(prepared)
    if kind.family in families.QWEN:
        made["mm_token_type_ids"] = torch.tensor(
            np.isin(ids, case.processor.placeholders)[None]
        ).long()
    return made


def is_learned(response: list[dict[str, Any]], cuts: list[int]) -> np.ndarray:
    """bool for each token of a response, whose answers begin and end at the cuts."""
    answers = [message for message in response if message["role"] == "assistant"]
    learned = np.zeros(cuts[-1], bool)
    for message, begin, end in zip(answers, cuts[::2], cuts[1::2], strict=True):
        learned[begin:end] = all(message.get(key, True) for key in ("loss", "weight", "train"))
    return learned


def their_cuts(kind: Kind, tokenizer: Any, case: rows.Case, response: list[Any]) -> list[str]:
    """`their_texts`, where tags that are text have another character."""
    if sum(message["role"] == "assistant" for message in response) > 1:
        tokenizer = trained_as(kind, tokenizer)
    if kind.image:
        prompt, response = (
            json.loads(json.dumps(messages).replace(kind.image, TAG))
            for messages in (case.prompt, response)
        )
        case = dataclasses.replace(case, prompt=prompt)
    return their_texts(kind, tokenizer, case, response)


def trained_as(kind: Kind, tokenizer: Any) -> Any:
    """The tokenizer with the template that TRL trains several answers with."""
    if kind.template != published("qwen3"):
        return tokenizer
    training = copy.copy(tokenizer)
    training.chat_template = published("qwen3_training")
    return training


@functools.cache
def plain_tokenizer() -> Any:
    """Without the control tokens of any kind."""
    return transformers.AutoTokenizer.from_pretrained(smollm2.make_folder(6))


def ids_of(kind: Kind, tokenizer: Any, text: str) -> list[int]:
    """Tokens of a rendered text, in which control tokens are the kind's but for typed tags."""
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, kind.special)) or '(?!)'})", text):
        if piece in kind.special:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        else:
            ids += plain_tokenizer()(piece.replace(TAG, kind.image))["input_ids"]
    return ids


def once(kind: Kind, tokenizer: Any, ids: list[int]) -> list[int]:
    """Ids with one placeholder for each image."""
    image = tokenizer.convert_tokens_to_ids(kind.image) if kind.image else None
    pairs = zip([None, *ids], ids, strict=False)
    return [token for before, token in pairs if not (token == before == image)]


def their_sum(
    kind: Kind,
    checkpoint: Any,
    prompt: list[int],
    ids: list[int],
    learned: np.ndarray,
    shown: list[Path],
) -> float:
    """Of the log-probs of what is learned of a response, in transformers."""
    whole = np.array([*prompt, *ids])
    images = [ImageRef(path.name, path.read_bytes()) for path in shown]
    inputs = their_inputs(kind, checkpoint, Record("row", tuple(images), (), ()), whole)
    return smollm2.log_prob(checkpoint.theirs, prompt, ids, learned, **inputs)
