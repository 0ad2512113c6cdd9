"""Gemma 3 against transformers: averaged patches, local and global layers, images that see
themselves whole."""

import numpy as np
import pytest
from helpers import pictures

pytest.importorskip("torch")
import torch
import transformers
from helpers import checks
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import placed
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.model import read_config

pytestmark = pytest.mark.parity

TILE = 28
NAMED = {"image_token": "<image>", "boi_token": "<boi>", "eoi_token": "<eoi>"}
IDS = checks.token_ids(*NAMED.values())
TEXT = checks.TEXT | {"vocab_size": len(IDS), "head_dim": 8}
SIGLIP = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 7,
    "vision_use_head": False,
}


def make_config(text, vision=None, **switches):
    return transformers.Gemma3Config(
        text_config=TEXT | text,
        vision_config=SIGLIP | (vision or {}),
        image_token_index=IDS["<image>"],
        boi_token_index=IDS["<boi>"],
        eoi_token_index=IDS["<eoi>"],
        **{"mm_tokens_per_image": 4} | switches,
    )


CASES = {
    # Two repeats of five and one, and four more, as published; windows shorter than an image.
    "published-pattern": make_config({"num_hidden_layers": 16, "sliding_window": 3}),
    "scaled-rope": make_config(
        {
            "num_hidden_layers": 3,
            "sliding_window": 14,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "query_pre_attn_scalar": 12,
            "num_key_value_heads": 1,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
        mm_tokens_per_image=16,
    ),
    "biases-untied": make_config(
        {
            "attention_bias": True,
            "hidden_activation": "silu",
            "layer_types": ["full_attention"] * 2,
        },
        {"patch_size": 14, "layer_norm_eps": 1e-3, "hidden_act": "gelu"},
        mm_tokens_per_image=1,
        tie_word_embeddings=False,
    ),
}
SAID = {"type": "text", "text": "\nis this a "}
RECORDS = [
    checks.record("0", "what is this ?", pictures.refs("photograph"), "a red star", "two ring"),
    checks.record("1", "a star", pictures.refs("wide", "cmyk"), "blue", "is this a star ?"),
    checks.record("2", "?", pictures.refs("tall", "one-pixel", "transparent"), "a", "?"),
    checks.record("3", "is this a star ?", (), "green", "two blue"),
]


def save_tokenizer(folder):
    checks.save_tokenizer(folder, *NAMED.values(), image="<boi>")
    named = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=NAMED)
    named.save_pretrained(folder)


def image_processor(**settings):
    return transformers.Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE}, **settings)


def made(folder, config):
    save_tokenizer(folder)
    config._attn_implementation = "eager"
    theirs = transformers.Gemma3ForConditionalGeneration(config)
    projection = theirs.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, generator=torch.Generator().manual_seed(1))
    return checks.make_case(folder, theirs, image_processor())


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("gemma3") / request.param, CASES[request.param])


@pytest.fixture(scope="module")
def their_processor(case):
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessorPil.from_pretrained(case.folder),
        transformers.AutoTokenizer.from_pretrained(case.folder),
        image_seq_length=case.theirs.config.mm_tokens_per_image,
    )


def inputs(record, ids):
    if not record.images:
        return {}
    pixels = image_processor()(images=checks.load(record.images), return_tensors="pt")
    types = torch.tensor((ids == IDS["<image>"])[None]).long()
    return {"pixel_values": pixels["pixel_values"], "token_type_ids": types}


def as_written(processor, record):
    """What the chat template itself writes."""
    begin, stands = processor._spelled
    turns = placed(record.prompt, len(record.images), 0)
    return processor.render(turns, True).replace(stands, begin)


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens(case, their_processor, name):
    record = checks.record("0", "what is this ?", pictures.refs(name))
    (image,) = checks.load(record.images)
    text = as_written(case.processor, record)
    expected = their_processor(images=image, text=text, return_tensors="np")
    checks.check_pixels(case.processor.pixels(record.images), expected["pixel_values"][None])
    tokens = tokenize(record, case.processor, 2**20, 2**20)
    assert tokens.prompt_ids.tolist() == expected["input_ids"][0].tolist()


def test_lines_around_images_are_tokenized_with_the_text(tmp_path):
    """A tokenizer that has tokens for several line breaks makes one of those on both sides."""
    theirs = transformers.Gemma3ForConditionalGeneration(CASES["biases-untied"])
    theirs.save_pretrained(tmp_path)
    image_processor().save_pretrained(tmp_path)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated")
    special = ["<pad>", "<s>", "</s>", "<unk>", *NAMED.values()]
    trainer = trainers.BpeTrainer(
        vocab_size=len(IDS), special_tokens=special, show_progress=False, min_frequency=1
    )
    tokenizer.train_from_iterator(["\n\n\n\n\n"] * 9, trainer)
    template = "{% for m in messages %}user\n{% for p in m['content'] %}"
    template += "{{ '<boi>' if p['type'] == 'image' else p['text'] }}{% endfor %}\n{% endfor %}"
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=NAMED,
        chat_template=template,
    ).save_pretrained(tmp_path)
    processor = Processor(tmp_path, read_config(theirs.config))
    record = checks.record("0", "\nis this a <boi> ?", pictures.refs("photograph"))
    ours = tokenize(record, processor, 2**20, 2**20).prompt_ids
    (image,) = checks.load(record.images)
    theirs_too = transformers.Gemma3Processor(
        image_processor(), transformers.AutoTokenizer.from_pretrained(tmp_path), image_seq_length=1
    )
    text = processor.tokenizer.apply_chat_template(
        [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": "\nis this a "}],
            }
        ],
        tokenize=False,
    )
    expected = theirs_too(images=image, text=text, return_tensors="np")["input_ids"][0].tolist()
    begin = ours.tolist().index(IDS["<boi>"])
    assert ours.tolist()[: begin + 4] == expected[: begin + 4]
    assert (ours == IDS["<boi>"]).sum() == 1  # what somebody typed is text


def test_logits(case):
    checks.check_logits(case, RECORDS, inputs)


def test_greedy_decoding(case):
    checks.check_greedy(case, RECORDS, inputs)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


def test_pan_and_scan_is_refused(tmp_path):
    save_tokenizer(tmp_path)
    image_processor(do_pan_and_scan=True).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="do_pan_and_scan is True"):
        Processor(tmp_path, read_config(CASES["biases-untied"]))


@pytest.mark.parametrize(
    ("text", "switches", "message"),
    [
        ({"final_logit_softcapping": 30.0}, {}, "final_logit_softcapping is 30.0"),
        ({"attn_logit_softcapping": 50.0}, {}, "attn_logit_softcapping is 50.0"),
        ({"use_bidirectional_attention": True}, {}, "use_bidirectional_attention is True"),
        ({"hidden_activation": "tanh"}, {}, "hidden_activation is 'tanh'"),
        ({}, {"mm_tokens_per_image": 9}, "mm_tokens_per_image is 9.*4 patches"),
        ({}, {"mm_tokens_per_image": 8}, "mm_tokens_per_image is 8"),
    ],
)
def test_refusals(text, switches, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config(text, **switches))


def test_averages_are_those_of_squares(case):
    """Of the patches' own numbers."""
    projector = case.model.bind(case.params).multi_modal_projector
    side = case.model.config.vision.side
    count = side // projector.side
    projector.mm_soft_emb_norm = lambda x: x
    projector.mm_input_projection_weight = np.eye(1, dtype=np.float32)
    rows, columns = np.mgrid[:side, :side].reshape(2, -1).astype(np.float32)
    found = [projector(x[None, :, None])[0, :, 0] for x in (rows, columns)]
    expected = np.mgrid[: projector.side, : projector.side].reshape(2, -1) * count
    np.testing.assert_allclose(found, expected + (count - 1) / 2)
