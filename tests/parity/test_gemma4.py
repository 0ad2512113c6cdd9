"""Gemma 4 against transformers: images of any shape, heads that differ by layer, images that see
themselves whole in local layers."""

import numpy as np
import pytest
from helpers import pictures

pytest.importorskip("torch")
import torch
import transformers
from helpers import checks
from transformers.models.gemma4 import image_processing_pil_gemma4 as theirs_pil

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families.gemma4 import grid_of
from mmpo_jax.models.model import read_config
from mmpo_jax.training.step import trainable_paths

pytestmark = pytest.mark.parity

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
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "position_embedding_size": 160,
}
EXPERTS = {
    "enable_moe_block": True,
    "num_experts": 8,
    "top_k_experts": 2,
    "moe_intermediate_size": 24,
}
LOCAL = {"rope_type": "default", "rope_theta": 100.0}


def make_config(text, vision=None, **switches):
    return transformers.Gemma4Config(
        text_config=TEXT | text,
        vision_config=VISION | (vision or {}),
        image_token_id=IDS["<image>"],
        boi_token_id=IDS["<boi>"],
        eoi_token_id=IDS["<eoi>"],
        **switches,
    )


CASES = {
    # As published: two repeats of five and one, keys that are values, a limit of the logits.
    "31b": make_config(
        {
            "num_hidden_layers": 12,
            "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 5.0,
        },
        {"standardize": True},
    ),
    "own-values-causal": make_config(
        {
            "use_bidirectional_attention": None,
            "attention_bias": True,
            "hidden_activation": "silu",
            "rope_parameters": {
                "sliding_attention": LOCAL,
                "full_attention": {
                    "rope_type": "proportional",
                    "rope_theta": 1e6,
                    "partial_rotary_factor": 0.5,
                    "factor": 2.0,
                },
            },
        },
        {"num_key_value_heads": 1, "hidden_activation": "silu"},
    ),
    "one-head-size-untied": make_config(
        {"global_head_dim": 8, "sliding_window": 9, "num_key_value_heads": 4},
        {"patch_size": 6, "rope_parameters": {"rope_type": "axial", "rope_theta": 10.0}},
        tie_word_embeddings=False,
    ),
    "26b": make_config(
        EXPERTS
        | {
            "num_hidden_layers": 6,
            "layer_types": (["sliding_attention"] * 2 + ["full_attention"]) * 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 5.0,
        },
        {"standardize": True},
    ),
    # 2 F is D: axes of joined experts cannot be told apart by their lengths.
    "mixture-causal-one-expert": make_config(
        EXPERTS
        | {
            "num_experts": 5,
            "top_k_experts": 1,
            "moe_intermediate_size": 16,
            "use_bidirectional_attention": None,
            "attention_bias": True,
            "hidden_activation": "silu",
        },
        {"num_key_value_heads": 1},
    ),
    "mixture-all-experts-untied": make_config(
        EXPERTS
        | {
            "num_experts": 3,
            "top_k_experts": 3,
            "moe_intermediate_size": 32,
            "global_head_dim": 8,
            "sliding_window": 9,
        },
        tie_word_embeddings=False,
    ),
}
RECORDS = [
    checks.record("0", "what is this ?", pictures.refs("photograph"), "a red star", "two ring"),
    checks.record("1", "a star", pictures.refs("wide", "cmyk"), "blue", "is this a star ?"),
    checks.record("2", "?", pictures.refs("tall", "transparent", "grey"), "a", "?"),
    checks.record("3", "is this a star ?", (), "green", "two blue"),
]


def image_processor(config):
    return transformers.Gemma4ImageProcessorPil(
        patch_size=config.vision_config.patch_size,
        max_soft_tokens=SOFT_TOKENS,
        pooling_kernel_size=config.vision_config.pooling_kernel_size,
    )


@torch.no_grad()
def with_buffers(theirs):
    """Numbers that are no parameters, as far from 0 and 1 as trained ones."""
    generator = torch.Generator().manual_seed(2)
    for name, buffer in theirs.named_buffers():
        if name.endswith(("layer_scalar", "std_scale", "std_bias")):
            buffer.copy_(0.8 + 0.2 * torch.randn(buffer.shape, generator=generator))
    return theirs


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma4") / request.param
    checks.save_tokenizer(folder, *NAMED.values(), image="<image>")
    named = transformers.AutoTokenizer.from_pretrained(folder, extra_special_tokens=NAMED)
    named.save_pretrained(folder)
    config = CASES[request.param]
    config._attn_implementation = "eager"
    theirs = with_buffers(transformers.Gemma4ForConditionalGeneration(config))
    return checks.make_case(folder, theirs, image_processor(config), seed=1)


@pytest.fixture(scope="module")
def inputs(case):
    processor = image_processor(case.theirs.config)

    def inputs(record, ids):
        if not record.images:
            return {}
        made = processor(images=checks.load(record.images), return_tensors="pt")
        types = torch.tensor((ids == IDS["<image>"])[None]).long()
        return {
            "pixel_values": made["pixel_values"],
            "image_position_ids": made["image_position_ids"],
            "mm_token_type_ids": types,
        }

    return inputs


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens(case, name):
    """The processor's own class needs a video processor; what it does to an image is its count."""
    record = checks.record("0", "what is this ?", pictures.refs(name))
    made = image_processor(case.theirs.config)(images=checks.load(record.images))
    checks.check_pixels(case.processor.pixels(record.images), [made["pixel_values"]])
    tokens = tokenize(record, case.processor, 2**20, 2**20)
    (count,) = made["num_soft_tokens_per_image"]
    text = checks.rendered(case, record)
    checks.check_tokens(
        case, record, text.replace("<image>", f"<boi> {'<image> ' * int(count)}<eoi>")
    )
    grid = case.processor.images.describe(case.model.config, tokens.layouts, 2)["grid"]
    positions = np.asarray(made["image_position_ids"])[0]
    assert grid.tolist() == [(positions.max(axis=0) + 1).tolist(), [0, 0]]


def test_grids_of_many_sizes():
    tower = read_config(CASES["31b"]).vision
    for height, width in checks.many_sizes(28).tolist():
        options = {"patch_size": 4, "max_patches": 4 * SOFT_TOKENS, "pooling_kernel_size": 2}
        expected = theirs_pil.get_aspect_ratio_preserving_size(height, width, **options)
        columns, rows = grid_of(tower, SOFT_TOKENS, (height, width))
        assert (8 * rows, 8 * columns) == expected


def test_images_that_become_nothing_are_refused():
    tower = read_config(CASES["31b"]).vision
    with pytest.raises(DataError, match="0 tokens"):
        grid_of(tower, 0, (3, 3))


def reference(case):
    """Mixtures are held against float64."""
    return checks.in_float64(case) if case.model.config.decoder.experts else case


def test_logits(case, inputs):
    checks.check_logits(reference(case), RECORDS, inputs)


def test_greedy_decoding(case, inputs, monkeypatch):
    """A placeholder that is sampled is text here; transformers would embed padding for it."""
    theirs = reference(case)
    inner = theirs.theirs.model
    shown = inner.get_placeholder_mask

    def in_prompts(input_ids=None, inputs_embeds=None):
        masks = shown(input_ids, inputs_embeds)
        is_step = masks[0].shape[1] == 1
        return tuple(mask & (not is_step) for mask in masks)

    monkeypatch.setattr(inner, "get_placeholder_mask", in_prompts)
    checks.check_greedy(theirs, RECORDS, inputs)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


def test_buffers_are_not_trained(case):
    from mmpo_jax.core.trees import flatten

    paths = list(flatten(case.params))
    left = {path.rsplit("/")[-1] for path in set(paths) - set(trainable_paths(paths, ()))}
    standard = {"std_bias", "std_scale"} & {path.rsplit("/")[-1] for path in paths}
    assert left == {"layer_scalar", *standard}


@pytest.mark.parametrize(
    ("text", "vision", "switches", "message"),
    [
        ({"hidden_size_per_layer_input": 8}, {}, {}, "hidden_size_per_layer_input is 8"),
        ({"num_kv_shared_layers": 1}, {}, {}, "num_kv_shared_layers is 1"),
        ({"enable_moe_block": True}, {}, {}, "num_experts is None"),
        (EXPERTS | {"moe_intermediate_size": None}, {}, {}, "moe_intermediate_size is None"),
        ({"use_bidirectional_attention": "all"}, {}, {}, "use_bidirectional_attention is 'all'"),
        ({"hidden_activation": "tanh"}, {}, {}, "hidden_activation is 'tanh'"),
        ({}, {"use_clipped_linears": True}, {}, "use_clipped_linears is True"),
        ({}, {"hidden_activation": "tanh"}, {}, "hidden_activation is 'tanh'"),
        ({}, {}, {"audio_config": {}}, "audio_config"),
    ],
)
def test_refusals(text, vision, switches, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config(text, vision, **switches))


@pytest.mark.parametrize("setting", ["patch_size", "pooling_kernel_size"])
def test_another_image_processor_is_refused(case, setting):
    processor = image_processor(case.theirs.config)
    setattr(processor, setting, 5)
    with pytest.raises(ModelError, match=f"{setting} is 5"):
        case.processor.images.check(case.model.config, processor)
