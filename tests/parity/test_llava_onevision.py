"""LLaVA-OneVision against transformers: bilinear reduction, several images, video frames."""

import dataclasses
import itertools

import pytest
from helpers import pictures

pytest.importorskip("torch")
import torch
import transformers
from helpers import checks

from mmpo_jax.models.config import ModelError
from mmpo_jax.models.model import read_config

pytestmark = pytest.mark.parity

TILE = 28
EDGES = range(TILE, 7 * TILE, TILE)
PINPOINTS = [list(pair) for pair in itertools.product(EDGES, repeat=2)]
IDS = checks.token_ids("<image>", "<video>")
TEXT = checks.TEXT | {"vocab_size": len(IDS)}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 9,  # 3 x 3 features, of which 2 x 2 are left of a video's; one pixel unseen
}
SIGLIP = transformers.SiglipVisionConfig(**VISION, vision_use_head=False)


def make_config(vision, text, **switches):
    return transformers.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IDS["<image>"],
        video_token_index=IDS["<video>"],
        image_grid_pinpoints=PINPOINTS,
        pad_token_id=checks.PAD_ID,
        **switches,
    )


CASES = {
    "siglip-qwen2": make_config(SIGLIP, transformers.Qwen2Config(**TEXT)),
    "tied-layers-max-4": make_config(
        transformers.SiglipVisionConfig(
            **VISION | {"num_hidden_layers": 3, "patch_size": 7}, vision_use_head=False
        ),
        transformers.Qwen2Config(**TEXT, tie_word_embeddings=True),
        vision_feature_layer=[-2, -1],
        vision_aspect_ratio="anyres_max_4",
        multimodal_projector_bias=False,
    ),
    "clip-llama-max-1": make_config(
        transformers.CLIPVisionConfig(**VISION | {"patch_size": 7}),
        transformers.LlamaConfig(**TEXT),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        vision_aspect_ratio="anyres_max_1",
    ),
}
VIDEO = dataclasses.replace(
    checks.record("v", "what is", (), "two", "a"), videos=(pictures.clip(3),)
)
RECORDS = [
    checks.record("0", "what is this ?", pictures.refs("photograph"), "a red star", "two ring"),
    checks.record("1", "a star", pictures.refs("wide", "cmyk"), "blue", "is this a star ?"),
    VIDEO,
    checks.record("2", "?", pictures.refs("tall"), "a star", "blue ?"),
    dataclasses.replace(VIDEO, images=pictures.refs("odd-size")),
    checks.record("3", "?", pictures.refs("wide"), "a star", "blue ?"),
    checks.record("4", "?", pictures.refs("one-pixel"), "a star", "blue ?"),
    checks.record("5", "is", pictures.refs("turned-by-exif", "sixteen-bits", "grey"), "a", "a two"),
    checks.record("6", "is this a star ?", (), "green", "two blue"),
    checks.record("7", "two", pictures.refs("transparent", "palette"), "a red", "star"),
]
VIDEO_SETTINGS = {"size": {"height": TILE, "width": TILE}, "image_mean": [0.5] * 3, "resample": 3}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("onevision") / request.param
    checks.save_tokenizer(folder, "<image>", "<video>", image="<image>", video="<video>")
    checks.write_json(folder / "video_preprocessor_config.json", VIDEO_SETTINGS)
    theirs = transformers.LlavaOnevisionForConditionalGeneration(CASES[request.param])
    images = transformers.LlavaOnevisionImageProcessorPil(
        size={"height": TILE, "width": TILE}, image_grid_pinpoints=PINPOINTS
    )
    return checks.make_case(folder, theirs, images)


@pytest.fixture(scope="module")
def their_images(case):
    """Of one prompt, as transformers' image processor prepares them."""
    processor = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(case.folder)
    return lambda refs: processor([checks.load(refs)], return_tensors="pt")


@pytest.fixture(scope="module")
def inputs(case, their_images):
    def inputs(record, ids):
        made = dict(their_images(record.images)) if record.images else {}
        if record.videos:
            made["pixel_values_videos"] = torch.stack(
                [torch.tensor(x) for x in case.processor.pixels((), record.videos)]
            )
        return made

    return inputs


@pytest.fixture(scope="module")
def their_processor(case):
    """Only what expands placeholders: it cannot be built without torchvision."""
    config = case.theirs.config
    made = object.__new__(transformers.LlavaOnevisionProcessor)
    made.image_processor = transformers.LlavaOnevisionImageProcessorPil.from_pretrained(case.folder)
    made.vision_feature_select_strategy = config.vision_feature_select_strategy
    made.vision_aspect_ratio = config.vision_aspect_ratio
    made.image_token, made.video_token = "<image>", "<video>"
    class_token = config.vision_feature_select_strategy == "default"
    made.num_image_tokens = (TILE // config.vision_config.patch_size) ** 2 + class_token
    return made


def expanded(case, their_processor, their_images, record):
    """The prompt's text as transformers' processor would expand it."""
    made = their_images(record.images) if record.images else {}
    frames = {"pixel_values_videos": [video.frames for video in record.videos]}
    counts = {
        "<image>": [
            their_processor.replace_image_token(made, i).count("<image>")
            for i in range(len(record.images))
        ],
        "<video>": [
            their_processor.replace_video_token(frames, i).count("<video>")
            for i in range(len(record.videos))
        ],
    }
    words = checks.rendered(case, record).split()
    return " ".join(
        " ".join([word] * counts[word].pop(0)) if word in counts else word for word in words
    )


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens_of_one_image(case, their_processor, their_images, name):
    record = checks.record("0", "what is this ?", pictures.refs(name))
    theirs = their_images(record.images)
    checks.check_pixels(case.processor.pixels(record.images), theirs["pixel_values"])
    checks.check_tokens(case, record, expanded(case, their_processor, their_images, record))


def test_pixels_and_tokens_of_several_images(case, their_processor, their_images):
    record = checks.record("0", "a", pictures.refs("wide", "one-pixel", "cmyk", "grey"))
    theirs = their_images(record.images)
    assert theirs["pixel_values"].shape[:2] == (len(record.images), 1)
    checks.check_pixels(case.processor.pixels(record.images), theirs["pixel_values"])
    checks.check_tokens(case, record, expanded(case, their_processor, their_images, record))


def test_tokens_of_videos(case, their_processor, their_images):
    record = dataclasses.replace(VIDEO, videos=(pictures.clip(3), pictures.clip(5)))
    checks.check_tokens(case, record, expanded(case, their_processor, their_images, record))


def test_layouts_of_many_sizes(case):
    ratio = case.theirs.config.vision_aspect_ratio

    def pack(features, sizes, newline):
        return case.theirs.model.pack_image_features(features, sizes, newline, ratio)

    checks.check_layouts(case, pack, checks.many_sizes(TILE))


def test_logits(case, inputs):
    checks.check_logits(case, RECORDS, inputs)


@pytest.mark.slow
def test_greedy_decoding(case, inputs):
    checks.check_greedy(case, RECORDS, inputs)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


def test_other_aspect_ratios_are_refused():
    config = make_config(SIGLIP, transformers.Qwen2Config(**TEXT), vision_aspect_ratio="anyres")
    with pytest.raises(ModelError, match="vision_aspect_ratio is 'anyres'"):
        read_config(config)
