"""What every family must show against transformers: logits, greedy decoding, folders."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.torch
import torch
import transformers
from helpers import pictures
from helpers.sampling import sample
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import load_image

from mmpo_jax.checkpoints.huggingface import load_model, load_params, save_model
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.batching import pad_batch
from mmpo_jax.data.images import image_size
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, Record, Response, Turn, placed
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.generation.sampler import sample_keys
from mmpo_jax.models.head import next_token_logits
from mmpo_jax.models.log_probs import shift_right
from mmpo_jax.parallel.mesh import make_mesh, param_shardings
from mmpo_jax.recipes.sampling import Decoding

torch.set_num_threads(1)  # for models this small, threads mostly wait for each other

WORDS = ("red", "green", "blue", "star", "ring", "what", "is", "this", "?", "a", "two", "and")
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")
PAD_ID, BOS_ID, EOS_ID = range(3)
TOLERANCE = 2e-4

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "pad_token_id": PAD_ID,
    "bos_token_id": BOS_ID,
    "eos_token_id": EOS_ID,
}
"""A small decoder's sizes, without its vocabulary's."""

EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
"""Of a small mixture."""

TEMPLATE = """\
{{- '<s>' -}}
{%- for message in messages -%}
  {{- ' ' + message['role'] | upper + ':' -}}
  {%- for part in message['content'] -%}
    {{- ' ' + (MEDIA) -}}
  {%- endfor -%}
  {%- if message['role'] == 'assistant' -%} {{- ' </s>' -}} {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%} {{- ' ASSISTANT:' -}} {%- endif -%}
"""


@dataclasses.dataclass(frozen=True)
class Case:
    """One random checkpoint, in transformers and here."""

    folder: Path
    theirs: Any
    model: Any
    params: Any
    processor: Processor


def token_ids(*media: str) -> dict[str, int]:
    """Ids of the vocabulary whose media tokens, such as "<image>", are these."""
    names = (*SPECIAL, *media, "USER:", "ASSISTANT:", "SYSTEM:", *WORDS)
    return {name: index for index, name in enumerate(names)}


def save_tokenizer(folder: Path, *media: str, **written: str) -> None:
    """A word-level tokenizer; `written` says what the template writes for a content type."""
    tokenizer = Tokenizer(models.WordLevel(token_ids(*media), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    parts = "part['text'] if part['type'] == 'text' else " + str(written) + "[part['type']]"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=list(media),
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE.replace("MEDIA", parts),
    ).save_pretrained(folder)


def write_json(path: Path, settings: Any) -> None:
    path.write_text(json.dumps(settings))


def make_case(
    folder: Path, theirs: Any, image_processor: Any = None, seed: int = 0, norm: float = 1.0
) -> Case:
    """Fills a transformers model with large random weights, saves it and loads it here.

    The folder has its tokenizer already. `norm` is what scales of norms are around.
    """
    randomise(theirs, seed, norm)
    theirs.save_pretrained(folder)
    if image_processor is not None:
        image_processor.save_pretrained(folder)
    model, params = load_model(folder)
    return Case(folder, theirs.eval(), model, params, Processor(folder, model.config))


@torch.no_grad()
def randomise(theirs: Any, seed: int, norm: float = 1.0) -> None:
    """Weights large enough that every part of the model matters, and numbers that torch trains as
    little as we do as far from 0 and 1 as trained ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(theirs.named_parameters()):
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim > 1:
            fan_in = tensor[0].numel() if "embed" not in name else 1
            tensor.copy_(1.2 * noise / fan_in**0.5)
        elif name.endswith("bias"):
            tensor.copy_(0.2 * noise)
        else:  # norms, layer scales
            tensor.copy_((norm if "norm" in name else 1) + 0.2 * noise)
    generator = torch.Generator().manual_seed(2)
    around = dict.fromkeys(("layer_scalar", "std_scale", "std_bias", "put_max"), 0.8)
    for name, buffer in theirs.named_buffers():
        for ending, center in (around | {"put_min": -0.8}).items():
            if name.endswith(ending):
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(center + 0.2 * noise)


def record(name: str, text: str, images: Sequence[ImageRef] = (), *responses: str) -> Record:
    answers = tuple(Response.of(response) for response in responses)
    return Record(name, tuple(images), (Turn("user", text),), answers)


RECORDS = (
    record("0", "what is this ?", pictures.refs("photograph"), "a red star", "two ring"),
    record("1", "a star", pictures.refs("wide", "cmyk"), "blue", "is this a star ?"),
    record("2", "?", pictures.refs("tall", "one-pixel", "transparent", "palette"), "a", "?"),
    record("3", "is", pictures.refs("turned-by-exif", "sixteen-bits", "grey"), "a", "a two"),
    record("4", "is this a star ?", (), "green", "two blue"),
)
"""Prompts with none to four pictures, which are of every kind and shape."""


def batch_of(case: Case, records: Sequence[Record], rows: int | None = None) -> Any:
    """(the tokenized records, their batch)."""
    tokenized = [tokenize(row, case.processor, 2**20, 2**20) for row in records]
    longest = [len(r.ids) for row in tokenized for r in row.responses]
    batch = pad_batch(
        tokenized,
        case.processor,
        rows=rows or len(records),
        prompt_sizes=(max(len(row.prompt_ids) for row in tokenized) + 3,),
        response_sizes=(max(longest, default=0) + 2,),
    )
    return tokenized, batch


@functools.partial(jax.jit, static_argnames="model")
def response_logits(model, params, batch):
    """[B, R, T, V]: what predicts each response token; small models only."""
    module = model.bind(params)
    return next_token_logits(module, shift_right(*module.hidden_states(batch)))


Inputs = Callable[[Record, np.ndarray], dict[str, Any]]
"""(record, its ids) -> what transformers' model wants beside `input_ids`."""


def no_images(record: Record, ids: np.ndarray) -> dict[str, Any]:
    return {}


@torch.no_grad()
def check_logits(
    case: Case,
    records: Sequence[Record],
    inputs: Inputs = no_images,
    tolerance: float = TOLERANCE,
) -> None:
    """Logits of every response, all in one batch here, each in a row of its own there."""
    tokenized, batch = batch_of(case, records)
    ours = np.asarray(response_logits(case.model, case.params, batch))
    for row, (source, tokens) in enumerate(zip(records, tokenized, strict=True)):
        for column, response in enumerate(tokens.responses):
            ids = np.concatenate([tokens.prompt_ids, response.ids])
            theirs = case.theirs(
                input_ids=torch.tensor(ids[None]).long(), **inputs(source, ids)
            ).logits[0, len(tokens.prompt_ids) - 1 : -1]
            assert theirs.std() > 0.5
            np.testing.assert_allclose(
                ours[row, column, : len(response.ids)], theirs.numpy(), rtol=0, atol=tolerance
            )


def in_float64(case: Case) -> Case:
    """The case with transformers' model in float64, for decoders in which its float32 rounds more
    than ours."""
    theirs = copy.deepcopy(case.theirs).double()
    theirs.set_experts_implementation("eager")  # torch's grouped products take no float64
    return dataclasses.replace(case, theirs=theirs)


@torch.no_grad()
def check_greedy(
    case: Case, records: Sequence[Record], inputs: Inputs = no_images, length: int = 64
) -> None:
    """Greedy decoding of `length` tokens, prompts of different lengths in one batch."""
    tokenized, batch = batch_of(case, [dataclasses.replace(r, responses=()) for r in records])
    tokens = sample(
        case.model,
        case.params,
        batch,
        sample_keys(0, 0, np.arange(len(records)), 1),
        decoding=Decoding(num_samples=1, temperature=0, max_new_tokens=length),
        eos_ids=(case.model.config.decoder.vocab_size,),  # never: all tokens are compared
        pad_id=PAD_ID,
    )
    for row, (source, row_tokens) in enumerate(zip(records, tokenized, strict=True)):
        ids = row_tokens.prompt_ids
        theirs = case.theirs.generate(
            input_ids=torch.tensor(ids[None]).long(),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            **inputs(source, ids),
            do_sample=False,
            max_new_tokens=length,
            eos_token_id=None,
            pad_token_id=PAD_ID,
        )[0, len(ids) :]
        np.testing.assert_array_equal(np.asarray(tokens)[row, 0], theirs.numpy())


def check_round_trip(case: Case, folder: Path) -> None:
    """folder -> ours -> folder: every bit is there again, and transformers misses nothing."""
    save_model(folder, case.model, case.params, case.folder)
    loaded, info = type(case.theirs).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected, actual = case.theirs.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(actual[key], tensor), key
    _, again = load_model(folder)
    before, after = flatten(case.params), flatten(again)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    oldest = safetensors.torch.load_file(folder / "model.safetensors")
    save_again = folder.parent / (folder.name + "-again")
    save_model(save_again, case.model, again, folder)
    for key, tensor in safetensors.torch.load_file(save_again / "model.safetensors").items():
        assert torch.equal(oldest[key], tensor), key


def check_layout_in_memory(case: Case, folder: Path) -> None:
    """The names that transformers 5 has in memory, which some tools write, load too; and every
    parameter has its sharding rule."""
    tensors = {key: tensor.clone() for key, tensor in case.theirs.state_dict().items()}
    assert any(key.startswith("model.language_model.layers.") for key in tensors)
    folder.mkdir()
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    before, after = flatten(case.params), flatten(load_params(folder, case.model))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf, err_msg=path)
    param_shardings(case.model.abstract_params(), case.model.rules, make_mesh())


@torch.no_grad()
def check_layouts(case: Case, pack: Callable[[list[Any], Any, Any], Any], sizes: Any) -> None:
    """Layouts of single images, against what `pack` makes of features that are their own numbers.

    Args:
      case: of a family with any-resolution tiles.
      pack: (features [tiles, n, 1] of each image, sizes, newline) -> transformers' packed ones.
      sizes: int[images, 2].
    """
    processor = case.processor
    for size in sizes.tolist():
        (layout,) = processor.images.layouts(
            processor.config, processor.image_processor, [tuple(size)]
        )
        numbers = torch.arange(layout.features, dtype=torch.float64)
        theirs = pack([numbers.reshape(layout.slots, -1, 1)], [size], torch.tensor([-1.0]))
        ours = (layout.index * layout.weight.astype(np.float64)).sum(axis=1)
        np.testing.assert_allclose(ours, theirs[0][0][:, 0].numpy(), rtol=1e-6, err_msg=str(size))


def many_sizes(tile: int) -> np.ndarray:
    """(height, width) from 1 to 4000 pixels, all orders of magnitude alike; what fills whole
    tiles; and what a sum in floats puts just below a whole feature (147 * (4 / 196) < 3)."""
    rng = np.random.default_rng(0)
    free = np.exp(rng.uniform(0, np.log(4000), (100, 2))).astype(int)
    whole = tile * np.mgrid[1:7, 1:7].reshape(2, -1).T
    below = [[147, 196], [196, 147], [47, 188], [188, 47]]
    return np.concatenate([free, whole, below])


def load(images: Sequence[ImageRef]) -> list[Any]:
    """The images as transformers loads them; their sizes are those of our headers."""
    loaded = [load_image(Image.open(io.BytesIO(image.read()))) for image in images]
    assert [(x.height, x.width) for x in loaded] == [image_size(image) for image in images]
    return loaded


def rendered(case: Case, record: Record) -> str:
    """The text that transformers' processor would be given."""
    return case.processor.render(
        placed(record.prompt, len(record.images), len(record.videos)), True
    )


def check_tokens(case: Case, record: Record, text: str) -> None:
    """Our prompt is the text that transformers' processor expands the rendered one to."""
    tokens = tokenize(record, case.processor, 2**20, 2**20)
    assert tokens.prompt_ids.tolist() == case.processor.encode(text)


def check_pixels(ours: Sequence[np.ndarray], theirs: Sequence[Any]) -> None:
    """Bit for bit, each with tiles of its own number."""
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.dtype == np.float32
        np.testing.assert_array_equal(mine, np.asarray(other))


def transformers_version() -> tuple[int, ...]:
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])
