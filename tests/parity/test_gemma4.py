"""Gemma 4 against transformers: images of any shape, heads that differ by layer, images that see
themselves whole in local layers."""

import numpy as np
import pytest
from helpers import pictures

pytest.importorskip("torch")
import safetensors.torch
import torch
import transformers
from helpers import checks, gemma_media
from helpers.gemma_media import FILMED, IDS, RECORDS, SOFT_TOKENS, TEXT, clip, strip
from transformers.models.gemma4 import image_processing_pil_gemma4 as theirs_pil
from transformers.video_utils import VideoMetadata

from mmpo_jax.checkpoints.huggingface import load_model, save_model
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.trees import flatten
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.gemma_media import grid_of
from mmpo_jax.models.model import read_config
from mmpo_jax.training.step import trainable_paths

pytestmark = pytest.mark.parity

AUDIO = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "subsampling_conv_channels": [4, 4],
    "output_proj_dims": 16,
    "use_clipped_linears": False,
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
SMALL = {
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": len(IDS),
    "use_bidirectional_attention": None,
}
"""Of E2B and E4B."""
LOCAL = {"rope_type": "default", "rope_theta": 100.0}


def make_config(text, vision=None, **switches):
    return transformers.Gemma4Config(
        text_config=TEXT | text,
        vision_config=VISION | (vision or {}),
        image_token_id=IDS["<image>"],
        video_token_id=IDS[gemma_media.VIDEO],
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
    "e2b": make_config(
        SMALL
        | {
            "num_hidden_layers": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 4,
            "num_kv_shared_layers": 4,
            "use_double_wide_mlp": True,
            "num_key_value_heads": 1,
            "final_logit_softcapping": 5.0,
        },
        {"use_clipped_linears": True},
    ),
    "one-shared-layer-untied": make_config(
        SMALL
        | {
            "num_kv_shared_layers": 1,
            "vocab_size_per_layer_input": len(IDS) + 5,
            "use_bidirectional_attention": "vision",
            "hidden_activation": "silu",
        },
        {"use_clipped_linears": True, "standardize": True},
        tie_word_embeddings=False,
    ),
    "per-layer-alone": make_config(
        SMALL
        | {"use_double_wide_mlp": True, "attention_bias": True, "final_logit_softcapping": 5.0}
    ),
    "shared-layers-with-experts": make_config(
        SMALL
        | EXPERTS
        | {
            "num_hidden_layers": 6,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "num_kv_shared_layers": 4,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "sliding_window": 9,
        }
    ),
}


def image_processor(config):
    return transformers.Gemma4ImageProcessorPil(
        patch_size=config.vision_config.patch_size,
        max_soft_tokens=SOFT_TOKENS,
        pooling_kernel_size=config.vision_config.pooling_kernel_size,
    )


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma4") / request.param
    config = CASES[request.param]
    gemma_media.save_files(folder, config)
    config._attn_implementation = "eager"
    theirs = transformers.Gemma4ForConditionalGeneration(config)
    # Through twelve layers with norms around 1, float32 rounds by more than the tolerance.
    return checks.make_case(folder, theirs, image_processor(config), seed=1, norm=0.7)


@pytest.fixture(scope="module")
def inputs(case):
    return inputs_of(case)


def inputs_of(case):
    processor = image_processor(case.theirs.config)

    def inputs(record, ids):
        made = {}
        if record.images:
            made = dict(processor(images=checks.load(record.images), return_tensors="pt"))
            del made["num_soft_tokens_per_image"]
        if record.videos:
            patch = case.theirs.config.vision_config.patch_size
            made |= gemma_media.their_videos(case.theirs.config, record, patch)
        return made | {"mm_token_type_ids": gemma_media.kinds(ids)} if made else {}

    return inputs


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens(case, name):
    record = checks.record("0", "what is this ?", pictures.refs(name))
    made = image_processor(case.theirs.config)(images=checks.load(record.images))
    checks.check_pixels(case.processor.pixels(record.images), [made["pixel_values"]])
    tokens = tokenize(record, case.processor, 2**20, 2**20)
    (count,) = made["num_soft_tokens_per_image"]
    text = checks.rendered(case, record)
    checks.check_tokens(
        case, record, gemma_media.expanded(transformers.Gemma4Processor, text, [int(count)], [])
    )
    grid = case.processor.images.describe(case.model.config, tokens.layouts, 2)["grid"]
    squares = (np.asarray(made["image_position_ids"])[0].max(axis=0) + 1) // 2
    assert grid.tolist() == [[*squares, 1], [0, 0, 0]]


def test_pixels_and_tokens_of_videos(case):
    """Frames as torch resizes them; of each kind as many in a slot as there is room for."""
    videos = (clip(3, 0.5), strip(5), clip(2, 1 / 65))
    record = gemma_media.filmed("v", videos, ("odd-size", "grey"))
    config = case.theirs.config
    ours, per_slot = case.processor.pixels((), videos), [1, 2, 1]
    counts = []
    for made, video, each in zip(ours, videos, per_slot, strict=True):
        values, places = gemma_media.their_video(config, video, config.vision_config.patch_size)
        slots = [values[at : at + each].flatten(0, 1) for at in range(0, len(values), each)]
        whole = [gemma_media.padded(slot[None], 4 * SOFT_TOKENS, 0)[0] for slot in slots]
        checks.check_pixels(made, whole)
        counts.append(places.shape[1] // 4)
    metadata = [
        VideoMetadata(3, 0.5, frames_indices=[0, 1, 2]),
        VideoMetadata(5, frames_indices=[0, 1, 2, 3, 4]),
        VideoMetadata(2, 1 / 65, frames_indices=[0, 1]),
    ]
    images = image_processor(config)(images=checks.load(record.images), return_tensors="np")
    text = checks.rendered(case, record).replace("00:00 <|video|>", "<|video|>")
    expected = gemma_media.expanded(
        transformers.Gemma4Processor,
        text,
        [int(count) for count in images["num_soft_tokens_per_image"]],
        list(zip(counts, metadata, strict=True)),
    )
    assert "00:02 <boi>" in expected and "01:05 <boi>" in expected
    checks.check_tokens(case, record, expected)


def test_grids_of_many_sizes():
    tower = read_config(CASES["31b"]).vision
    for height, width in checks.many_sizes(28).tolist():
        options = {"patch_size": 4, "max_patches": 4 * SOFT_TOKENS, "pooling_kernel_size": 2}
        expected = theirs_pil.get_aspect_ratio_preserving_size(height, width, **options)
        columns, rows = grid_of(tower.pool * tower.patch_size, SOFT_TOKENS, (height, width))
        assert (8 * rows, 8 * columns) == expected


def test_images_that_become_nothing_are_refused():
    with pytest.raises(DataError, match="0 tokens"):
        grid_of(8, 0, (3, 3))


def reference(case):
    """Mixtures are held against float64."""
    return checks.in_float64(case) if case.model.config.decoder.experts else case


def test_logits(case, inputs):
    checks.check_logits(reference(case), RECORDS, inputs)


def test_logits_about_videos(case, inputs):
    """Alone, behind images, and several, in one batch."""
    checks.check_logits(reference(case), FILMED, inputs)


def test_greedy_decoding(case, inputs, monkeypatch):
    """A placeholder that is sampled is text here; transformers would embed padding for it."""
    theirs = reference(case)
    gemma_media.only_in_prompts(theirs, monkeypatch)
    checks.check_greedy(theirs, RECORDS, inputs)


@pytest.mark.slow
def test_greedy_decoding_about_videos(case, inputs, monkeypatch):
    theirs = reference(case)
    gemma_media.only_in_prompts(theirs, monkeypatch)
    checks.check_greedy(theirs, FILMED, inputs)


@pytest.mark.parametrize("case", ["31b", "e2b"], indirect=True)
def test_greedy_decoding_of_a_few_tokens_about_videos(case, inputs, monkeypatch):
    gemma_media.only_in_prompts(case, monkeypatch)
    checks.check_greedy(case, FILMED[:2], inputs, length=6)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


def test_buffers_are_not_trained(case):
    paths = list(flatten(case.params))
    left = {path.rsplit("/")[-1] for path in set(paths) - set(trainable_paths(paths, ()))}
    standard = {"std_bias", "std_scale"} & {path.rsplit("/")[-1] for path in paths}
    limits = {path.rsplit("/")[-1] for path in paths if path.endswith(("_min", "_max"))}
    assert left == {"layer_scalar", *standard, *limits}
    assert bool(limits) == case.theirs.config.vision_config.use_clipped_linears


def test_parts_for_audio_are_left_out(tmp_path):
    """They are not read, and a saved folder has none."""
    config = make_config(SMALL, audio_config=AUDIO)
    folder = tmp_path / "audio"
    gemma_media.save_files(folder, config)
    theirs = transformers.Gemma4ForConditionalGeneration(config)
    assert any(".audio_tower." in name for name in theirs.state_dict())
    case = checks.make_case(folder, theirs, image_processor(config), seed=1)
    checks.check_logits(case, RECORDS, inputs_of(case))
    saved = tmp_path / "saved"
    save_model(saved, case.model, case.params, case.folder)
    again, info = type(theirs).from_pretrained(saved, output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.audio_config is None
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_keys_of_layers_that_read_others_are_not_read(tmp_path):
    """Published files have them, and transformers ignores them."""
    config = CASES["one-shared-layer-untied"]
    folder = tmp_path / "more"
    gemma_media.save_files(folder, config)
    theirs = transformers.Gemma4ForConditionalGeneration(config)
    case = checks.make_case(folder, theirs, image_processor(config))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    more = {f"model.language_model.layers.3.self_attn.{x}_proj.weight": 0 for x in "kv"}
    more["model.language_model.layers.3.self_attn.k_norm.weight"] = 0
    assert not more.keys() & tensors.keys()
    tensors |= {name: torch.zeros(2, 2) for name in more}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    found = flatten(load_model(folder)[1])
    assert found.keys() == flatten(case.params).keys()
    other = tensors | {"model.language_model.layers.0.self_attn.k_more.weight": torch.zeros(2)}
    safetensors.torch.save_file(other, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"unexpected tensor .*layers\.0\.self_attn\.k_more"):
        load_model(folder)


@pytest.mark.parametrize(
    ("text", "vision", "switches", "message"),
    [
        (SMALL | {"vocab_size_per_layer_input": 9}, {}, {}, "vocab_size_per_layer_input is 9"),
        (SMALL | {"pad_token_id": None}, {}, {}, "pad_token_id None"),
        ({"num_kv_shared_layers": 2}, {}, {}, "num_kv_shared_layers is 2, which leaves no full"),
        ({"num_kv_shared_layers": 4}, {}, {}, "num_kv_shared_layers is 4, which leaves no full"),
        ({"enable_moe_block": True}, {}, {}, "num_experts is None"),
        (EXPERTS | {"moe_intermediate_size": None}, {}, {}, "moe_intermediate_size is None"),
        ({"use_bidirectional_attention": "all"}, {}, {}, "use_bidirectional_attention is 'all'"),
        ({"hidden_activation": "tanh"}, {}, {}, "hidden_activation is 'tanh'"),
        ({}, {"hidden_activation": "tanh"}, {}, "hidden_activation is 'tanh'"),
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
