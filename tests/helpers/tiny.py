"""Tiny LLaVA checkpoints and batches for the tests, built without torch."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from mmpo_jax.checkpoints.configs import load_config
from mmpo_jax.checkpoints.huggingface import save_model
from mmpo_jax.core.trees import flatten, unflatten
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.examples import Example
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import IMAGE, ImageRef, Record, Response, Turn
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.data.train_batch import TrainBatch
from mmpo_jax.models.batch import Batch
from mmpo_jax.models.families.llava import LlavaConfig
from mmpo_jax.models.model import Model, Params
from mmpo_jax.objectives.sums import mean
from mmpo_jax.picture_world.processor import CHAT_TEMPLATE, IMAGE_TOKEN, TOKENS, save_processor
from mmpo_jax.picture_world.render import png_bytes
from mmpo_jax.picture_world.world import sample_scene
from mmpo_jax.training.losses import Loss

IMAGE_ID = TOKENS.index(IMAGE_TOKEN)
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
VOCAB_SIZE = -(-len(TOKENS) // 8) * 8  # so that eight devices can split it
FIRST_WORD = IMAGE_ID + 1

VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
    "projection_dim": 16,
}
TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}


def make_config(
    vision: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    tower: Any = transformers.CLIPVisionConfig,
    **llava: Any,
) -> transformers.LlavaConfig:
    """A transformers config: the sizes above with changes."""
    llava = {"vision_feature_layer": -2, "tie_word_embeddings": False, **llava}
    return transformers.LlavaConfig(
        vision_config=tower(**(VISION | (vision or {}))),
        text_config=transformers.LlamaConfig(**(TEXT | (text or {}))),
        image_token_index=IMAGE_ID,
        pad_token_id=PAD_ID,
        **llava,
    )


def make_folder(
    folder: str | os.PathLike[str],
    config: transformers.LlavaConfig | None = None,
    seed: int = 0,
) -> Path:
    """Writes a checkpoint folder: config, random weights, tokenizer and processor."""
    folder = Path(folder)
    source = folder.parent / (folder.name + "-source")
    config = config or make_config()
    config.save_pretrained(source)
    save_processor(source, config.vision_config.image_size, config.vision_config.patch_size)
    model = Model.create(load_config(source))
    save_model(folder, model, random_params(model, seed), source)
    return folder


def random_params(model: Model, seed: int = 0) -> Params:
    """Float32 NumPy parameters large enough that every part of the model matters."""
    rng = np.random.default_rng(seed)

    def draw(path: str, shape: tuple[int, ...]) -> np.ndarray:
        noise = rng.standard_normal(shape)
        if path.endswith("/scale"):
            noise = 1 + 0.2 * noise
        elif path.endswith("/bias"):
            noise = 0.2 * noise
        elif path.endswith("/kernel"):
            noise = 1.5 * noise / np.sqrt(shape[-2])
        return noise.astype(np.float32)

    abstract = flatten(model.abstract_params())
    return unflatten({path: draw(path, leaf.shape) for path, leaf in abstract.items()})


def random_prompt(config: LlavaConfig, rng: np.random.Generator, length: int, images: int):
    """Token ids: BOS, words and `images` runs of image tokens between them; a word ends it."""
    words = length - 1 - images * config.num_image_tokens
    assert words >= max(1, images), "too short for its images"
    ids = rng.integers(FIRST_WORD, len(TOKENS), words).tolist()
    for place in sorted(rng.choice(words, images, replace=False).tolist(), reverse=True):
        ids[place:place] = [IMAGE_ID] * config.num_image_tokens
    return [BOS_ID, *ids]


def random_batch(
    config: LlavaConfig,
    prompts: Sequence[int],
    responses: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    images: int = 1,
    prompt_size: int | None = None,
    response_size: int | None = None,
) -> Batch:
    """A batch of NumPy arrays with the given lengths; what it draws is independent of padding.

    Args:
      config: the model's.
      prompts: length of every prompt, image tokens included.
      responses: lengths of every prompt's responses.
      seed: of the ids and pixels.
      images: per prompt.
      prompt_size: P, the longest prompt by default.
      response_size: T, the longest response by default.
    """
    rng = np.random.default_rng(seed)
    b, r = len(prompts), len(responses[0])
    p = prompt_size or max(prompts)
    t = response_size or max(max(lengths) for lengths in responses)
    prompt_ids = np.full((b, p), PAD_ID, np.int32)
    response_ids = np.full((b, r, t), PAD_ID, np.int32)
    response_mask = np.zeros((b, r, t), bool)
    for row, length in enumerate(prompts):
        prompt_ids[row, :length] = random_prompt(config, rng, length, images)
        for column, size in enumerate(responses[row]):
            response_ids[row, column, :size] = rng.integers(FIRST_WORD, len(TOKENS), size)
            response_mask[row, column, :size] = True
    size = config.vision.image_size
    pixels = rng.standard_normal((b, images, 3, size, size)).astype(np.float32)
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=np.arange(p) < np.array(prompts)[:, None],
        pixel_values=pixels,
        **reading_order(prompt_ids, prompts),
        response_ids=response_ids,
        response_mask=response_mask,
        loss_mask=response_mask,
        weights=np.ones(b, np.float32),
    )


def reading_order(prompt_ids: np.ndarray, lengths: Sequence[int]) -> dict[str, Any]:
    """The fields of `Batch` for prompts whose image features come in their own order."""
    b, p = prompt_ids.shape
    is_image = prompt_ids == IMAGE_ID
    index = np.where(is_image, np.cumsum(is_image, axis=1) - 1, -1)
    return {
        "positions": np.broadcast_to(np.arange(p, dtype=np.int32), (b, 1, p)),
        "next_position": np.array(lengths, np.int32),
        "patches": {},
        "feature_index": index[..., None].astype(np.int32),
        "feature_weight": is_image[..., None].astype(np.float32),
    }


def batch_with_later_images(processor: Processor, rows: int) -> Batch:
    """Three responses a row, by turns of rows: images in later turns of all three, at different
    places; one image in the prompt and one later in two of the three; none but in the prompt."""
    images = [ImageRef(str(i), png_bytes(sample_scene("test", 0, i), 24)) for i in range(2 * rows)]
    dialogues = (
        ("no", "is there a ring ?", "yes"),
        ("a red star", "what is in the picture ?", "no"),
        ("yes", "the ring ?", "a ring"),
    )

    def record(number: int) -> Record:
        first, later = (((), (IMAGE,)), ((IMAGE,), (IMAGE,)), ((IMAGE,), ()))[number % 3]
        responses = tuple(
            Response(
                (
                    Turn("assistant", said),
                    Turn("user", (*later, asked)),
                    Turn("assistant", answer),
                )
            )
            for said, asked, answer in dialogues
        )
        shown = tuple(images[2 * number :][: len(first) + len(later)])
        return Record(str(number), shown, (Turn("user", (*first, "a red star")),), responses)

    made = [tokenize(record(number), processor, 64, 64) for number in range(rows)]
    batch = pad_batch(made, processor, rows=rows, prompt_sizes=(16,), response_sizes=(32,))
    assert batch.shown is not None
    # Dialogues of a record show the same images: a model also takes one without.
    ids, index = batch.response_ids.copy(), batch.shown.feature_index.copy()
    weight = batch.shown.feature_weight.copy()
    cleared = (np.arange(rows) % 3 == 1)[:, None, None] & (ids == IMAGE_ID)
    cleared &= (np.arange(3) == 1)[:, None]
    ids[cleared], index[cleared], weight[cleared] = FIRST_WORD, -1, 0
    shown = dataclasses.replace(batch.shown, feature_index=index, feature_weight=weight)
    return dataclasses.replace(batch, response_ids=ids, shown=shown)


def make_sentencepiece_folder(folder: str | os.PathLike[str]) -> Path:
    """`make_folder` with a tokenizer that works like Llama's: BPE in which a space, written as ▁,
    stands in front of every text it is given, BOS by itself, and LLaVA-1.5's template of the hub.

    Vocabulary and merges come from a few words.
    """
    words = CORPUS.split()
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    specials = ["<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=specials, initial_alphabet=["\n", "▁"], show_progress=False
    )
    tokenizer.train_from_iterator(words * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", BOS_ID)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    folder = make_folder(folder, make_config(text={"vocab_size": tokenizer.get_vocab_size()}))
    _save_tokenizer(folder, tokenizer, HUB_TEMPLATE)
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": HUB_TEMPLATE}))
    return folder


def _save_tokenizer(folder: Path, tokenizer: Tokenizer, template: str) -> None:
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        clean_up_tokenization_spaces=False,
        chat_template=template,
    ).save_pretrained(folder)


def make_byte_level_folder(folder: str | os.PathLike[str]) -> Path:
    """`make_folder` with byte-level BPE of few merges, so that words are several tokens and
    characters too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<pad>", "<s>", "</s>", "<unk>", IMAGE_TOKEN]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS.split() * 3, trainer)
    folder = make_folder(folder, make_config(text={"vocab_size": tokenizer.get_vocab_size()}))
    _save_tokenizer(folder, tokenizer, CHAT_TEMPLATE)
    return folder


CORPUS = """\
A chat between a curious user and an artificial intelligence assistant. The gives helpful, detailed,
and polite answers to the user's questions. USER: what is this? ASSISTANT: a red star rings
"""

HUB_TEMPLATE = """\
{%- for message in messages -%}
  {%- if message['role'] != 'system' -%} {{- message['role'] | upper + ': ' -}} {%- endif -%}
  {%- for part in message['content'] if part['type'] == 'image' -%}
    {{- '<image>\\n' -}}
  {%- endfor -%}
  {%- for part in message['content'] if part['type'] == 'text' -%}
    {{- part['text'] + ' ' -}}
  {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- 'ASSISTANT:' -}} {%- endif -%}
"""
"""No BOS, no system prompt, no EOS."""


def train_batch(batch, reference=None):
    """What a train step takes of a batch: of pairs, the chosen first, if there is a reference.

    Args:
      batch: B prompts, with any axes in front.
      reference: [..., B, R] summed log-probs, R > 1 responses from best to worst.
    """
    if reference is None:
        return TrainBatch(batch, {}, {})
    ranks = np.broadcast_to(
        np.arange(1, reference.shape[-1] + 1, dtype=np.float32), reference.shape
    )
    return TrainBatch(batch, {"sums": reference}, {"rank": ranks})


def example(record, reference=None):
    """A ranked record with the reference's log-probs float32[R] of its responses."""
    if reference is None:
        return Example((record,), {})
    reference = np.float32(reference)
    ranks = np.arange(1, len(reference) + 1, dtype=np.float32)
    return Example((record,), {"rank": ranks}, {"sums": reference[None]})


def row_loss(forward, *terms, coupled=False):
    """The loss of a train step without a model.

    Args:
      forward: (params, batch) -> a number for every row.
      terms: of every term (these numbers, batch) -> `Sums`.
      coupled: whether rows depend on each other.
    """
    return Loss(
        forward=lambda params, reference, batch: forward(params, batch),
        sums=lambda outputs, batch, state: ([term(outputs, batch) for term in terms], state),
        value=lambda sums: sum(mean(part.loss, part.weight) for part in sums),
        metrics=lambda sums: {},
        coupled=coupled,
    )


def memory_in_use():
    """Bytes of this process; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory_maps():
    """Number of this process's memory mappings; 0 where the system does not say."""
    try:
        return Path("/proc/self/maps").read_bytes().count(b"\n")
    except OSError:
        return 0
