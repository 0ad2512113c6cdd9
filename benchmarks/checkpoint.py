"""A small random checkpoint in the shape of LLaVA-1.5, and preference pairs for it.

What costs time in LLaVA-1.5 is kept: 336-pixel images of 576 tokens, features of the last layer
but one, a vocabulary of 32,000. Depth and width are small, so that a laptop can run it.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Sequence

import numpy as np
from PIL import Image

VOCABULARY = 32_000
PROMPT_TOKENS = 40
"""Text tokens of a prompt, BOS and the template's words included."""
RESPONSE_TOKENS = 100
"""EOS included."""
IMAGE_TOKENS = 576
PAIRS_FILE = "pairs.parquet"

ANSWERS = ("yes", "Yes", "no", "No")
_NAMED = ("<unk>", "<s>", "</s>", "<pad>", "<image>", "USER:", "ASSISTANT:", *ANSWERS)
_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<s> USER:' if message['role'] == 'user' else ' ASSISTANT:' }}"
    "{% for part in message['content'] %}"
    "{{ ' ' + ('<image>' if part['type'] == 'image' else part['text']) }}"
    "{% endfor %}"
    "{{ ' </s>' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ ' ASSISTANT:' if add_generation_prompt else '' }}"
)


def make_checkpoint(folder: str, seed: int = 0) -> None:
    """Writes weights, config, tokenizer and processor as `transformers` saves them."""
    import tokenizers
    import torch
    import transformers

    words = [*_NAMED, *(f"w{index}" for index in range(VOCABULARY - len(_NAMED)))]
    vocabulary = {word: index for index, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": "<image>"},
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            bos_token_id=vocabulary["<s>"],
            eos_token_id=vocabulary["</s>"],
            pad_token_id=vocabulary["<pad>"],
        ),
        image_token_index=vocabulary["<image>"],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(
            size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336}
        ),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_TEMPLATE,
    ).save_pretrained(folder)


def make_pairs(
    folder: str,
    count: int,
    seed: int = 0,
    responses: int = 2,
    lengths: Sequence[tuple[int, ...]] | None = None,
) -> str:
    """Writes preference pairs in TRL's vision schema: all pairs of `count` rankings, one random
    picture each.

    Args:
      folder: gets the file.
      count: rankings.
      seed: of words and pictures.
      responses: of a ranking.
      lengths: tokens of the responses of every ranking, EOS included; all `RESPONSE_TOKENS` by
        default.

    Returns:
      The Parquet file.
    """
    import datasets

    random = np.random.default_rng(seed)
    # The template adds BOS, "USER:" and "ASSISTANT:" to a prompt, and EOS to a response.
    rows = []
    for number in range(count):
        shown = {
            "images": [{"bytes": picture(random), "path": None}],
            "prompt": [{"role": "user", "content": random_words(random, PROMPT_TOKENS - 3)}],
        }
        sizes = lengths[number] if lengths else (RESPONSE_TOKENS,) * responses
        ranking = [random_words(random, size - 1) for size in sizes]
        for pair in itertools.combinations(ranking, 2):
            sides = [[{"role": "assistant", "content": text}] for text in pair]
            rows.append({**shown, "chosen": sides[0], "rejected": sides[1]})
    path = os.path.join(folder, PAIRS_FILE)
    dataset = datasets.Dataset.from_list(rows)
    dataset.cast_column("images", datasets.List(datasets.Image())).to_parquet(path)
    return path


def response_lengths(path: str, count: int) -> list[tuple[int, ...]]:
    """Lengths of the responses of pairs in words, EOS added.

    Args:
      path: JSONL with `chosen` and `rejected`.
      count: pairs at most.
    """
    with open(path) as file:
        rows = [json.loads(line) for line in file][:count]
    return [
        tuple(max(1, len(row[name].split())) + 1 for name in ("chosen", "rejected")) for row in rows
    ]


def random_words(random: np.random.Generator, count: int) -> str:
    return " ".join(f"w{n}" for n in random.integers(0, VOCABULARY - len(_NAMED), count))


def picture(random: np.random.Generator) -> bytes:
    """A JPEG of 640 x 480 pixels, the size of COCO's photographs."""
    coarse = random.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((640, 480), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()
