"""Gemma 4 12B against transformers: squares of pixels without a vision transformer."""

import numpy as np
import pytest
from helpers import pictures

pytest.importorskip("torch")
import torch
import transformers
from helpers import checks, gemma_media
from helpers.gemma_media import FILMED, IDS, RECORDS, SOFT_TOKENS, TEXT, clip, strip
from transformers.video_utils import VideoMetadata

from mmpo_jax.checkpoints.huggingface import save_model
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import FAMILIES
from mmpo_jax.models.families.gemma4_unified import Gemma4UnifiedImageProcessorPil
from mmpo_jax.models.model import read_config

pytestmark = pytest.mark.parity

PROCESSOR = transformers.Gemma4UnifiedProcessor
SLIDING, FULL = "sliding_attention", "full_attention"
VISION = {
    "patch_size": 4,
    "pooling_kernel_size": 2,
    "mm_embed_dim": 24,
    "output_proj_dims": 24,
    "mm_posemb_size": 80,
}


def make_config(text=(), vision=(), **switches):
    own = {key: x for key, x in TEXT.items() if key != "hidden_size_per_layer_input"}
    return transformers.Gemma4UnifiedConfig(
        text_config=own | {"sliding_window": 72} | dict(text),
        vision_config=VISION | dict(vision),
        image_token_id=IDS["<image>"],
        video_token_id=IDS[gemma_media.VIDEO],
        boi_token_id=IDS["<boi>"],
        eoi_token_id=IDS["<eoi>"],
        **switches,
    )


CASES = {
    "12b": make_config(
        {
            "num_hidden_layers": 6,
            "layer_types": ([SLIDING] * 2 + [FULL]) * 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 5.0,
        }
    ),
    "causal-shared-layers": make_config(
        {
            "num_hidden_layers": 6,
            "layer_types": [SLIDING, FULL] * 3,
            "num_kv_shared_layers": 2,
            "use_double_wide_mlp": True,
            "use_bidirectional_attention": None,
            "sliding_window": 9,
            "attention_bias": True,
        },
        {"patch_size": 6, "mm_embed_dim": 16, "output_proj_dims": 16},
    ),
    "squares-of-three-untied": make_config(
        {"global_head_dim": 8, "hidden_activation": "silu", "num_key_value_heads": 4},
        {"pooling_kernel_size": 3, "rms_norm_eps": 1e-3},
        tie_word_embeddings=False,
    ),
}


def settings(config):
    """Of the image processor, as its file has them."""
    vision = config.vision_config
    return {
        "image_processor_type": "Gemma4UnifiedImageProcessor",
        "patch_size": vision.patch_size,
        "pooling_kernel_size": vision.pooling_kernel_size,
        "max_soft_tokens": SOFT_TOKENS,
    }


def edge_of(config):
    """Pixels along a square."""
    return config.vision_config.patch_size * config.vision_config.pooling_kernel_size


def squares(config, image):
    """(squares of an image [1, N, numbers], column and row of each int64[1, N, 2]), resized
    and cut by torch: transformers' own class cannot be imported without torchvision."""
    pixels = torch.tensor(np.array(image)).permute(2, 0, 1)[None]
    scaled = gemma_media.resized(config, pixels) * (1 / 255)
    return gemma_media.cut(scaled, edge_of(config))


def padded(found, value):
    return gemma_media.padded(found, SOFT_TOKENS, value)


def make_case(folder, config):
    gemma_media.save_files(folder, config)
    checks.write_json(folder / "preprocessor_config.json", settings(config))
    config._attn_implementation = "eager"
    return checks.make_case(folder, transformers.Gemma4UnifiedForConditionalGeneration(config))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gemma4_unified") / request.param
    return make_case(folder, CASES[request.param])


def inputs_of(case):
    config = case.theirs.config

    def inputs(record, ids):
        made = {}
        if record.images:
            cut = [squares(config, image) for image in checks.load(record.images)]
            made["pixel_values"] = torch.cat([padded(values, 0) for values, _ in cut])
            made["image_position_ids"] = torch.cat([padded(places, -1) for _, places in cut])
        if record.videos:
            made |= gemma_media.their_videos(config, record, edge_of(config))
        return made | {"mm_token_type_ids": gemma_media.kinds(ids)} if made else {}

    return inputs


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens(case, name):
    record = checks.record("0", "what is this ?", pictures.refs(name))
    (image,) = checks.load(record.images)
    values, places = squares(case.theirs.config, image)
    checks.check_pixels(case.processor.pixels(record.images), [padded(values, 0)])
    tokens = tokenize(record, case.processor, 2**20, 2**20)
    text, counts = checks.rendered(case, record), [values.shape[1]]
    checks.check_tokens(case, record, gemma_media.expanded(PROCESSOR, text, counts, []))
    grid = case.processor.images.describe(case.model.config, tokens.layouts, 2)["grid"]
    assert grid.tolist() == [[*(places[0].max(dim=0).values + 1).tolist(), 1], [0, 0, 0]]


def test_pixels_and_tokens_of_videos(case):
    """Frames as torch resizes them; of each kind as many in a slot as there is room for."""
    videos, config = (clip(3, 0.5), strip(5)), case.theirs.config
    record = gemma_media.filmed("v", videos, ("grey",))
    (image,) = checks.load(record.images)
    counts, known = [squares(config, image)[0].shape[1]], []
    for made, video, each in zip(case.processor.pixels((), videos), videos, (1, 2), strict=True):
        values, _ = gemma_media.their_video(config, video, edge_of(config))
        slots = [values[at : at + each].flatten(0, 1) for at in range(0, len(values), each)]
        checks.check_pixels(made, [padded(slot[None], 0)[0] for slot in slots])
        metadata = VideoMetadata(len(values), video.fps, frames_indices=list(range(len(values))))
        known.append((values.shape[1], metadata))
    text = checks.rendered(case, record).replace("00:00 <|video|>", "<|video|>")
    expected = gemma_media.expanded(PROCESSOR, text, counts, known)
    assert "00:04 <boi>" in expected
    checks.check_tokens(case, record, expected)


def test_logits(case):
    checks.check_logits(case, RECORDS, inputs_of(case))


def test_logits_about_videos(case):
    """Alone, behind images, and several, in one batch."""
    checks.check_logits(case, FILMED, inputs_of(case))


@pytest.mark.slow
def test_greedy_decoding(case, monkeypatch):
    gemma_media.only_in_prompts(case, monkeypatch)
    checks.check_greedy(case, RECORDS, inputs_of(case))


def test_greedy_decoding_of_a_few_tokens(case, monkeypatch):
    gemma_media.only_in_prompts(case, monkeypatch)
    checks.check_greedy(case, RECORDS[:2], inputs_of(case), length=6)


@pytest.mark.slow
def test_greedy_decoding_about_videos(case, monkeypatch):
    gemma_media.only_in_prompts(case, monkeypatch)
    checks.check_greedy(case, FILMED, inputs_of(case))


@pytest.mark.parametrize("case", ["12b"], indirect=True)
def test_greedy_decoding_of_a_few_tokens_about_videos(case, monkeypatch):
    gemma_media.only_in_prompts(case, monkeypatch)
    checks.check_greedy(case, FILMED[:2], inputs_of(case), length=6)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


def test_what_is_for_audio_is_left_out(tmp_path):
    case = make_case(tmp_path / "audio", make_config(audio_config={"audio_embed_dim": 16}))
    assert any(".embed_audio." in name for name in case.theirs.state_dict())
    checks.check_logits(case, RECORDS, inputs_of(case))
    save_model(tmp_path / "saved", case.model, case.params, case.folder)
    again, info = type(case.theirs).from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.audio_config is None


@pytest.mark.parametrize(
    ("text", "vision", "message"),
    [
        ({"use_bidirectional_attention": "all"}, {}, "use_bidirectional_attention is 'all'"),
        ({"num_kv_shared_layers": 2}, {}, "num_kv_shared_layers is 2, which leaves no full"),
        ({}, {"output_proj_dims": 12}, "output_proj_dims is 12, and mm_embed_dim 24"),
    ],
)
def test_refusals(text, vision, message):
    with pytest.raises(ModelError, match=message):
        read_config(make_config(text, vision))


@pytest.mark.parametrize(
    ("text", "vision", "changed", "message"),
    [
        ({}, {}, {"patch_size": 5}, "patch_size is 5"),
        ({}, {}, {"pooling_kernel_size": 5}, "pooling_kernel_size is 5"),
        ({"sliding_window": 69}, {}, {}, "layers have windows of 69 tokens"),
        ({}, {"mm_posemb_size": 69}, {}, "there are positions for 69 of a line"),
    ],
)
def test_image_processors_that_do_not_fit(text, vision, changed, message):
    config = make_config(text, vision)
    known = settings(config) | changed
    del known["image_processor_type"]
    processor = Gemma4UnifiedImageProcessorPil(**known)
    model = read_config(config)
    with pytest.raises(ModelError, match=message):
        FAMILIES["gemma4_unified"].images.check(model, processor)
