"""LLaVA-NeXT against transformers: any-resolution tiles, unpadding, newlines."""

import types

import pytest
from helpers import pictures

pytest.importorskip("torch")
import transformers
from helpers import checks

from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.models.anyres import tile_grid
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.model import read_config

pytestmark = pytest.mark.parity

TILE = 28
PINPOINTS = [[28, 56], [56, 28], [56, 56], [84, 28], [28, 84]]
IDS = checks.token_ids("<image>")
TEXT = checks.TEXT | {"vocab_size": len(IDS)}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 14,
}
CLIP = transformers.CLIPVisionConfig(**VISION)
# 9 pixels do not divide 28, as 14 do not divide SigLIP's 384: 3 x 3 features, one pixel unseen.
SIGLIP = transformers.SiglipVisionConfig(**VISION | {"patch_size": 9}, vision_use_head=False)


def make_config(vision, text, **switches):
    return transformers.LlavaNextConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS["<image>"],
        image_grid_pinpoints=PINPOINTS,
        pad_token_id=checks.PAD_ID,
        **switches,
    )


CASES = {
    "clip-vicuna": make_config(CLIP, transformers.LlamaConfig(**TEXT | {"num_key_value_heads": 4})),
    "clip-mistral-layers": make_config(
        transformers.CLIPVisionConfig(**VISION | {"patch_size": 7}, hidden_act="gelu"),
        transformers.MistralConfig(**TEXT, sliding_window=None),
        vision_feature_layer=[-2, 1, -1],
        multimodal_projector_bias=False,
    ),
    "siglip-yi-tied": make_config(
        SIGLIP,
        transformers.LlamaConfig(**TEXT, rope_parameters={"rope_theta": 5e6}),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    ),
    "clip-qwen2": make_config(
        CLIP, transformers.Qwen2Config(**TEXT), projector_hidden_act="gelu_pytorch_tanh"
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("next") / request.param
    checks.save_tokenizer(folder, "<image>", image="<image>")
    theirs = transformers.LlavaNextForConditionalGeneration(CASES[request.param])
    images = transformers.LlavaNextImageProcessorPil(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
    )
    return checks.make_case(folder, theirs, images)


@pytest.fixture(scope="module")
def their_processor(case):
    config = case.theirs.config
    return transformers.LlavaNextProcessor(
        transformers.LlavaNextImageProcessorPil.from_pretrained(case.folder),
        transformers.AutoTokenizer.from_pretrained(case.folder),
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=int(config.vision_feature_select_strategy == "default"),
    )


@pytest.fixture(scope="module")
def inputs(their_processor):
    def inputs(record, ids):
        if not record.images:
            return {}
        images = checks.load(record.images)
        return dict(their_processor.image_processor(images=images, return_tensors="pt"))

    return inputs


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens(case, their_processor, name):
    record = checks.record("0", "what is this ?", pictures.refs(name))
    (image,) = checks.load(record.images)
    text = checks.rendered(case, record)
    expected = their_processor(images=image, text=text, return_tensors="np")
    checks.check_pixels(case.processor.pixels(record.images), expected["pixel_values"])
    tokens = tokenize(record, case.processor, 2**20, 2**20)
    assert tokens.prompt_ids.tolist() == expected["input_ids"][0].tolist()


def test_layouts_of_many_sizes(case):
    strategy = case.theirs.config.vision_feature_select_strategy

    def pack(features, sizes, newline):
        return case.theirs.model.pack_image_features(features, sizes, strategy, newline)

    checks.check_layouts(case, pack, checks.many_sizes(TILE))


def test_logits(case, inputs):
    checks.check_logits(case, checks.RECORDS, inputs)


def test_greedy_decoding(case, inputs):
    checks.check_greedy(case, checks.RECORDS, inputs)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


def test_features_that_form_no_square_are_refused():
    text = transformers.LlamaConfig(**TEXT)
    for vision, strategy in ((CLIP, "full"), (SIGLIP, "default")):
        config = make_config(vision, text, vision_feature_select_strategy=strategy)
        with pytest.raises(ModelError, match=f"vision_feature_select_strategy is '{strategy}'"):
            read_config(config)


def test_resolutions_that_tiles_do_not_fill_are_refused():
    processor = types.SimpleNamespace(image_grid_pinpoints=[[28, 28], [28, 57]])
    assert tile_grid(processor, (20, 20), TILE) == (1, 1)
    with pytest.raises(ModelError, match=r"has \[28, 57\], which is no multiple of .* 28"):
        tile_grid(processor, (20, 40), TILE)
