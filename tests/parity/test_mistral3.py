"""Mistral Small 3 and Ministral 3 against transformers: images of any size, lines that end with a
token, queries that grow."""

import importlib.util
import itertools
import sys

import numpy as np
import pytest
from helpers import pictures

pytest.importorskip("torch")
import transformers
from helpers import checks
from transformers.models.pixtral import image_processing_pil_pixtral as theirs_pil

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.media_pixels import MediaError
from mmpo_jax.data.tokenization import tokenize
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import mistral3
from mmpo_jax.models.model import read_config
from mmpo_jax.models.rope import rope_tables

pytestmark = pytest.mark.parity

MEDIA = ("[IMG]", mistral3.BREAK, mistral3.END)
IDS = checks.token_ids(*MEDIA)
TEXT = checks.TEXT | {"vocab_size": len(IDS)}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 112,
    "patch_size": 7,
}
LARGEST = {"size": {"longest_edge": 112}}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}


def make_config(text, vision=None, **switches):
    return transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**VISION | (vision or {})),
        text_config=text,
        image_token_index=IDS["[IMG]"],
        **switches,
    )


CASES = {
    "small-3.1": make_config(
        transformers.MistralConfig(**TEXT, head_dim=16, sliding_window=None),
        tie_word_embeddings=False,
    ),
    # As Ministral-3-3B: tied, and prompts of several original lengths.
    "ministral3-tied": make_config(
        transformers.Ministral3Config(
            **TEXT, head_dim=8, rope_parameters=YARN, tie_word_embeddings=True
        ),
        {"hidden_act": "silu"},
        projector_hidden_act="relu",
        multimodal_projector_bias=True,
        tie_word_embeddings=True,
    ),
    "thirds-window": make_config(
        transformers.Ministral3Config(
            **TEXT,
            head_dim=8,
            sliding_window=20,
            rope_parameters=YARN | {"factor": 2.0, "mscale": 0.5, "llama_4_scaling_beta": 0.1},
        ),
        {"patch_size": 5, "rope_parameters": {"rope_type": "axial", "rope_theta": 100.0}},
        spatial_merge_size=3,
        vision_feature_layer=[-1],
        tie_word_embeddings=False,
    ),
    "unmerged": make_config(
        transformers.MistralConfig(**TEXT, sliding_window=None),
        {"patch_size": 14, "num_hidden_layers": 2, "num_attention_heads": 4},
        spatial_merge_size=1,
        vision_feature_layer=2,
        tie_word_embeddings=False,
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral3") / request.param
    checks.save_tokenizer(folder, *MEDIA, image="[IMG]")
    config = CASES[request.param]
    theirs = transformers.Mistral3ForConditionalGeneration(config)
    patch = config.vision_config.patch_size
    return checks.make_case(
        folder, theirs, transformers.PixtralImageProcessorPil(**LARGEST, patch_size=patch)
    )


@pytest.fixture(scope="module")
def their_images(case):
    """As transformers' processor of the whole model asks for images."""
    config = case.theirs.config
    edge = config.vision_config.patch_size * config.spatial_merge_size

    def their_images(refs):
        processor = case.processor.image_processor
        return processor(checks.load(refs), patch_size=edge, return_tensors="pt")

    return their_images


@pytest.fixture(scope="module")
def inputs(their_images):
    return lambda record, ids: dict(their_images(record.images)) if record.images else {}


@pytest.fixture(scope="module")
def processor_class():
    """transformers' processor of the whole model. Its file wants torchvision for one function,
    which the processor in Pillow has too."""
    name = "transformers.models.pixtral.{}_pixtral"
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            patch.setitem(sys.modules, name.format("image_processing"), theirs_pil)
        return importlib.import_module(name.format("processing")).PixtralProcessor


def expanded(processor_class, config, made, text):
    """A prompt's text as transformers' processor would expand it, by its method alone."""
    theirs = object.__new__(processor_class)
    theirs.image_token, theirs.image_break_token, theirs.image_end_token = MEDIA
    theirs.patch_size = config.vision_config.patch_size
    theirs.spatial_merge_size = config.spatial_merge_size
    sizes = {"image_sizes": np.asarray(made["image_sizes"])}
    number = itertools.count()
    pieces = text.split("[IMG]")
    images = [theirs.replace_image_token(sizes, next(number)) for _ in pieces[1:]]
    spaced = [image.replace("][", "] [") for image in images]
    return "".join(itertools.chain(*zip(pieces, [*spaced, ""], strict=True)))


def check_media(case, processor_class, record, made):
    """Pixels, once they are put together again, tokens and what the tower is told of patches."""
    config = case.model.config
    tower, edge = config.vision, config.edge
    tokens = tokenize(record, case.processor, 2**20, 2**20)
    slots = sum(layout.slots for layout in tokens.layouts)
    described = case.processor.images.describe(config, tokens.layouts, slots)
    shown = np.concatenate(case.processor.pixels(record.images))
    assert shown.dtype == np.float32
    channels, patch = tower.num_channels, tower.patch_size
    flat = shown.reshape(-1, channels, patch, patch)
    frames = described["frames"].reshape(-1)
    places = described["places"].reshape(-1, 2)
    for number, (height, width) in enumerate(np.asarray(made["image_sizes"]).tolist()):
        own = frames == number + 1
        assert own.sum() == height * width // patch**2 and not (height % edge or width % edge)
        rebuilt = np.zeros((channels, height, width), np.float32)
        for (row, column), piece in zip(places[own] * patch, flat[own], strict=True):
            rebuilt[:, row : row + patch, column : column + patch] = piece
        theirs = np.asarray(made["pixel_values"][number])[:, :height, :width]
        np.testing.assert_array_equal(rebuilt, theirs)
    text = checks.rendered(case, record)
    text = expanded(processor_class, case.theirs.config, made, text)
    checks.check_tokens(case, record, text)


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens_of_one_image(case, processor_class, their_images, name):
    record = checks.record("0", "what is this ?", pictures.refs(name))
    check_media(case, processor_class, record, their_images(record.images))


def test_pixels_and_tokens_of_several_images(case, processor_class, their_images):
    record = checks.record("0", "a", pictures.refs("wide", "grey", "one-pixel", "photograph"))
    check_media(case, processor_class, record, their_images(record.images))


@pytest.mark.parametrize("size", [{"longest_edge": 112}, {"height": 90, "width": 200}])
def test_grids_of_many_sizes(size):
    config = read_config(CASES["small-3.1"])
    processor = transformers.PixtralImageProcessorPil(size=size)
    limits = tuple(size.values()) * (3 - len(size))
    for height, width in checks.many_sizes(14).tolist():
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        expected = theirs_pil.get_resize_output_image_size(
            image, limits, (config.edge, config.edge), "channels_first"
        )
        if not all(expected):
            with pytest.raises(DataError, match=f"{width} x {height} pixels are too narrow"):
                mistral3.image_grid(config, processor, (height, width))
            continue
        _, rows, columns = mistral3.image_grid(config, processor, (height, width))
        assert (rows * config.edge, columns * config.edge) == expected


def test_images_that_become_nothing_are_refused(case):
    line = pictures.encode(pictures.noise("RGB", 4000, 1))
    with pytest.raises(MediaError, match="4000 x 1 pixels are too narrow") as caught:
        case.processor.layouts([type(pictures.refs("grey")[0])("line", line)])
    assert caught.value.reason == "image_size"


def test_logits(case, inputs):
    checks.check_logits(case, checks.RECORDS, inputs)


@pytest.mark.parametrize("length", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_greedy_decoding(case, inputs, length):
    checks.check_greedy(case, checks.RECORDS, inputs, length)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    checks.check_layout_in_memory(case, tmp_path / "memory")


def without(name):
    return {key: x for key, x in YARN.items() if key != name}


@pytest.mark.parametrize(
    ("text", "vision", "switches", "message"),
    [
        ({}, {"hidden_act": "tanh"}, {}, "vision_config.hidden_act is 'tanh'"),
        ({}, {"patch_size": [7, 7]}, {}, r"vision_config.patch_size is \[7, 7\]"),
        ({}, {"num_attention_heads": 16}, {}, "heads of 2 channels, expected a multiple of 4"),
        ({}, {}, {"vision_feature_layer": -2}, "vision_feature_layer is -2"),
        ({}, {}, {"vision_feature_layer": [-2, -1]}, r"vision_feature_layer is \[-2, -1\]"),
        ({}, {}, {"projector_hidden_act": "tanh"}, "projector_hidden_act is 'tanh'"),
        (
            {"rope_parameters": without("llama_4_scaling_beta")},
            {},
            {},
            "text_config.rope_parameters has no llama_4_scaling_beta",
        ),
    ],
)
def test_what_is_not_implemented_is_refused(text, vision, switches, message):
    decoder = transformers.Ministral3Config(
        **TEXT | {"head_dim": 8, "rope_parameters": YARN} | text
    )
    with pytest.raises(ModelError, match=message):
        read_config(make_config(decoder, vision, **switches))


@pytest.mark.parametrize("settings", [{"do_resize": False}, {"do_center_crop": True}])
def test_another_image_processor_is_refused(settings):
    processor = transformers.PixtralImageProcessorPil(**LARGEST, **settings)
    ((name, value),) = settings.items()
    with pytest.raises(ModelError, match=f"{name} is {value}"):
        mistral3.check_processor(read_config(CASES["small-3.1"]), processor)


def test_a_tokenizer_without_ends_of_lines_is_refused(case):
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder)
    tokenizer.get_added_vocab = lambda: {"[IMG]": 4, "[IMG_BREAK]": 5}
    (layout,) = mistral3.layouts(case.model.config, case.processor.image_processor, [(30, 30)])
    with pytest.raises(ModelError, match=r"the tokenizer has no token \[IMG_END\]"):
        mistral3.frame_image(tokenizer, layout)


def test_queries_grow_with_their_position():
    """By hand: 1 + b log(1 + the whole original lengths behind), of queries alone."""
    decoder = read_config(CASES["ministral3-tied"]).decoder
    of_query, of_key = decoder.attentions[0].ropes
    positions = np.arange(64, dtype=np.int32)[None, None]
    (query, _), (key, _) = rope_tables(positions, of_query), rope_tables(positions, of_key)
    growth = 1 + 0.5 * np.log(1 + np.arange(64) // 16)
    np.testing.assert_allclose(query[0, :, 0], key[0, :, 0] * growth[:, None], rtol=1e-6)
