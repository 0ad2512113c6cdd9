"""SmolVLM and Idefics3 against transformers: tiles with their rows and columns, pixel shuffle."""

import dataclasses
import itertools
import re
import types

import numpy as np
import pytest
from helpers import pictures

pytest.importorskip("torch")
import torch
import transformers
from helpers import checks
from helpers.word_splits import byte_level, metaspace
from tokenizers import Tokenizer, models, trainers
from transformers.image_processing_backends import PilBackend
from transformers.image_utils import SizeDict
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.modeling_smolvlm import SmolVLMVisionEmbeddings
from transformers.models.smolvlm.video_processing_smolvlm import SmolVLMVideoProcessor
from transformers.video_utils import VideoMetadata

from mmpo_jax.core.errors import DataError
from mmpo_jax.models import smolvlm_video
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import smolvlm
from mmpo_jax.models.family import Clip
from mmpo_jax.models.model import read_config
from mmpo_jax.parallel.mesh import make_mesh, param_shardings

pytestmark = pytest.mark.parity

TILE = 28
FAKE, WHOLE = "<fake_token_around_image>", "<global-img>"
PLACES = tuple(
    f"<row_{row}_col_{column}>" for row, column in itertools.product(range(1, 5), repeat=2)
)
MEDIA = ("<image>", FAKE, WHOLE, *PLACES)
IDS = checks.token_ids(*MEDIA)
TEXT = checks.TEXT | {"vocab_size": len(IDS)}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": TILE,
    "patch_size": 7,
}
CUT = {"size": {"longest_edge": 4 * TILE}, "max_image_size": {"longest_edge": TILE}}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A config, and the image processor beside it."""

    config: object
    processor: object


def make_config(kind, text, vision, **switches):
    return kind(
        vision_config=VISION | vision,
        text_config=text,
        image_token_id=IDS["<image>"],
        pad_token_id=checks.PAD_ID,
        **switches,
    )


CASES = {
    "smolvlm2": Kind(
        make_config(transformers.SmolVLMConfig, transformers.LlamaConfig(**TEXT), {}),
        transformers.SmolVLMImageProcessorPil(**CUT),
    ),
    # As SmolVLM2-2.2B: pixels at the edge that fill no patch, squares of three by three.
    "idefics3-thirds-tied": Kind(
        make_config(
            transformers.Idefics3Config,
            transformers.LlamaConfig(**TEXT, tie_word_embeddings=True, attention_bias=True),
            {"patch_size": 9, "hidden_act": "gelu", "layer_norm_eps": 1e-3},
            scale_factor=3,
            tie_word_embeddings=True,
        ),
        transformers.Idefics3ImageProcessorPil(**CUT | {"size": {"longest_edge": 50}}),
    ),
    "whole-images": Kind(
        make_config(
            transformers.SmolVLMConfig,
            transformers.MistralConfig(**TEXT, sliding_window=40),
            {"num_attention_heads": 4, "hidden_act": "relu"},
            scale_factor=1,
        ),
        transformers.SmolVLMImageProcessorPil(**CUT, do_image_splitting=False),
    ),
    # No tile is larger than the picture it is cut from.
    "own-sizes": Kind(
        make_config(
            transformers.Idefics3Config,
            transformers.Qwen2Config(**TEXT),
            {"patch_size": 7},
            scale_factor=4,
        ),
        transformers.Idefics3ImageProcessorPil(**CUT, do_resize=False, resample=2),
    ),
}
VIDEO = dataclasses.replace(
    checks.record("v", "what is", (), "two", "a"), videos=(pictures.clip(3),)
)
RECORDS = [
    checks.record("0", "what is this ?", pictures.refs("photograph"), "a red star", "two ring"),
    checks.record("1", "a star", pictures.refs("odd-size", "cmyk"), "blue", "is this a star ?"),
    checks.record("2", "?", pictures.refs("one-pixel", "transparent", "palette"), "a", "?"),
    checks.record("3", "is", pictures.refs("turned-by-exif", "sixteen-bits", "grey"), "a", "a two"),
    checks.record("4", "is this a star ?", (), "green", "two blue"),
]
FILMED = [
    VIDEO,
    dataclasses.replace(VIDEO, id="w", images=pictures.refs("odd-size")),
    checks.record("5", "is this a star ?", (), "green", "two blue"),
]
SMALL = [record for record in RECORDS if record.id != "0"]
"""Those without the photograph, of which tiles of its own size are many."""


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smolvlm") / request.param
    checks.save_tokenizer(folder, *MEDIA, image="<image>", video="<video>")
    kind = CASES[request.param]
    if kind.config.model_type == "smolvlm":
        settings = CUT | {"resample": 1, "image_std": [0.3, 0.4, 0.5]}
        checks.write_json(folder / "video_preprocessor_config.json", settings)
    theirs = transformers.AutoModelForImageTextToText.from_config(kind.config)
    return checks.make_case(folder, theirs, kind.processor)


@pytest.fixture(scope="module")
def their_images(case):
    def their_images(refs):
        processor = case.processor.image_processor
        return processor([checks.load(refs)], return_row_col_info=True, return_tensors="pt")

    return their_images


@pytest.fixture(scope="module")
def inputs(case, their_images):
    def inputs(record, ids):
        shown = [their_images(record.images)["pixel_values"][0]] if record.images else []
        shown += [torch.tensor(x) for x in case.processor.pixels((), record.videos)]
        return {"pixel_values": torch.cat(shown)[None]} if shown else {}

    return inputs


@pytest.fixture(scope="module")
def records(case):
    still = SMALL if case.processor.image_processor.do_resize is False else RECORDS
    return still + (FILMED if case.processor.videos else [])


def expanded(kind, features, made, text):
    """A prompt's text as transformers' processor would expand it.

    SmolVLM's cannot be built without torchvision, hence only the methods.
    """
    smol = kind == "smolvlm"
    theirs = object.__new__(
        transformers.SmolVLMProcessor if smol else transformers.Idefics3Processor
    )
    theirs.fake_image_token, theirs.image_token = FAKE, "<image>"
    theirs.global_image_token = theirs.global_image_tag = WHOLE
    theirs.image_seq_len = features
    number = itertools.count()
    return re.sub("<image>", lambda _: theirs.replace_image_token(made, next(number)), text)


def told(monkeypatch, features, video, metadata):
    """What transformers' processor says of a video; its words for numbers are another package's."""
    monkeypatch.setattr(processing_smolvlm, "num2words", smolvlm_video.in_words)
    theirs = object.__new__(transformers.SmolVLMProcessor)
    theirs.fake_image_token, theirs.image_token, theirs.global_image_token = FAKE, "<image>", WHOLE
    theirs.image_seq_len = features
    shown = {"pixel_values": np.zeros((1, video, 3, 1, 1)), "video_metadata": [metadata]}
    return theirs.replace_video_token(shown, 0)


@pytest.mark.parametrize("split", [byte_level, metaspace])
@pytest.mark.parametrize(
    ("clip", "metadata"),
    [
        (Clip(3, (30, 40)), VideoMetadata(3, frames_indices=[0, 1, 2])),
        (Clip(30, (30, 40)), VideoMetadata(30, frames_indices=list(range(30)))),
        (Clip(2, (30, 40), 0.1), VideoMetadata(2, 0.1, frames_indices=[0, 1])),
        (
            Clip(3, (30, 40), 3 / 3700 * 25, (0.0, 61.04, 147.96)),
            VideoMetadata(3700, 25, duration=148.0, frames_indices=[0, 1526, 3699]),
        ),
        (
            Clip(2, (30, 40), 2 / 200_000 * 20, (0.0, 9000.0)),
            VideoMetadata(200_000, 20, duration=10_000.0, frames_indices=[0, 180_000]),
        ),
    ],
    ids=["three", "thirty", "slow", "file", "hours"],
)
@pytest.mark.parametrize("text", ["User: <video>What is this", "a\n<video>\n<video>", "<video> is"])
def test_texts_around_frames_are_tokenized_as_in_the_whole_text(
    monkeypatch, split, clip, metadata, text
):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split()
    lines = "User: You are provided the following series of two frames from a 0:00:02 [H:MM:SS] "
    lines += "video.\n\nFrame from 00:00:\n\n\nWhat is this\n" * 5
    special = ["<image>", FAKE, WHOLE]
    tokenizer.train_from_iterator([lines], trainers.BpeTrainer(special_tokens=special))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    said = told(monkeypatch, 4, clip.frames, metadata)
    expected = tokenizer(text.replace("<video>", said))["input_ids"]
    place = smolvlm.video_token(None, tokenizer)
    config = types.SimpleNamespace(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), num_image_tokens=4
    )
    (plain,) = smolvlm.video_layouts(config, {}, [clip])
    framed = smolvlm.frame_video(tokenizer, plain).ids.tolist()
    ids = tokenizer(text.replace(*smolvlm.SMOLVLM.images.spelled(tokenizer)))["input_ids"]
    ours = [[token] if token != place else framed for token in ids]
    assert list(itertools.chain(*ours)) == expected


def test_tokens_of_several_media(case, their_images, monkeypatch):
    if not case.processor.videos:
        pytest.skip("it has none")
    refs = pictures.refs("odd-size", "grey")
    videos = (pictures.clip(3), dataclasses.replace(pictures.clip(5), fps=0.5))
    record = dataclasses.replace(VIDEO, images=refs, videos=videos)
    features = case.model.config.num_image_tokens
    metadata = VideoMetadata(3, frames_indices=list(range(3))), VideoMetadata(5, 0.5)
    metadata[1].frames_indices = list(range(5))
    written, spelled = smolvlm.SMOLVLM.images.spelled(None)
    whole = checks.rendered(case, record).replace(spelled, written)
    whole = expanded("smolvlm", features, their_images(refs), whole)
    for video, known in zip(videos, metadata, strict=True):
        said = told(monkeypatch, features, len(video.frames), known)
        whole = whole.replace("<video>", said, 1)
    checks.check_tokens(case, record, whole)


def test_frames_are_resized_twice_and_normalised(case):
    if not case.processor.videos:
        pytest.skip("it has none")
    clip = pictures.clip(3)
    shown = torch.tensor(
        np.stack([np.asarray(x).transpose(2, 0, 1) for x in checks.load(clip.frames)])
    )
    for size in (4 * TILE * 3 // 4, 4 * TILE), (TILE, TILE):
        shown = torch.nn.functional.interpolate(shown, size, mode="lanczos", antialias=True)
    deviation = np.array([0.3, 0.4, 0.5])[:, None, None]
    (ours,) = case.processor.pixels((), [clip])
    np.testing.assert_allclose(ours, (shown.numpy() / 255 - 0.5) / deviation, rtol=0, atol=1e-5)


def test_older_settings_of_videos():
    """In `video_sampling` of the image processor's file."""
    shown = checks.load(pictures.clip(2).frames)
    settings = CUT | {
        "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 40}}
    }
    ours = smolvlm_video.frame_pixels(settings, shown, (3, TILE, TILE))
    newer = CUT | {"size": {"longest_edge": 40}}
    np.testing.assert_array_equal(ours, smolvlm_video.frame_pixels(newer, shown, (3, TILE, TILE)))
    with pytest.raises(ModelError, match=r"make frames of shape \(3, 28, 28\)"):
        smolvlm_video.frame_pixels(settings, shown, (3, 56, 56))
    with pytest.raises(ModelError, match="this version wants longest_edge"):
        smolvlm_video.frame_pixels(CUT | {"size": {"height": 9, "width": 9}}, shown, (3, 28, 28))


@pytest.mark.parametrize(
    "asked",
    [{"fps": 1, "num_frames": 64}, {"fps": 2, "num_frames": 5}, {"fps": 0.3, "num_frames": 2}],
)
def test_frames_of_a_file_are_those_of_transformers(asked):
    older = {"video_sampling": {"fps": asked["fps"], "max_frames": asked["num_frames"]}}
    choose = SmolVLMVideoProcessor.sample_frames
    for total, rate in [
        (1, 25.0),
        (2, 30.0),
        (7, 1.0),
        (100, 29.97),
        (301, 24.0),
        (1777, 25.0),
        (60, 0.5),
    ]:
        metadata = VideoMetadata(total, rate, duration=total / rate)
        expected = choose(types.SimpleNamespace(**asked), metadata).tolist()
        for settings in (asked, older, asked | {"do_sample_frames": True}):
            assert smolvlm_video.spread(settings, total, rate).tolist() == expected


def test_all_frames_of_a_file_are_shown_where_none_are_asked_for():
    for settings in ({}, {"do_sample_frames": False, "fps": 1, "num_frames": 2}):
        assert smolvlm_video.spread(settings, 5, 2.0).tolist() == [0, 1, 2, 3, 4]
    assert smolvlm_video.spread({"fps": 1}, 50, None).tolist() == [0, 49]
    with pytest.raises(ModelError, match="num_frames is 4, but its fps is missing"):
        smolvlm_video.spread({"num_frames": 4}, 50, 25.0)


def test_numbers_in_words():
    said = {0: "zero", 7: "seven", 12: "twelve", 20: "twenty", 64: "sixty-four", 100: "one hundred"}
    said |= {101: "one hundred and one", 320: "three hundred and twenty"}
    said |= {999: "nine hundred and ninety-nine"}
    assert {number: smolvlm_video.in_words(number) for number in said} == said
    theirs = pytest.importorskip("num2words").num2words
    assert all(smolvlm_video.in_words(number) == theirs(number) for number in range(1000))


def test_more_frames_than_words_are_refused():
    config = types.SimpleNamespace(image_token_id=4, num_image_tokens=1)
    with pytest.raises(DataError, match="a video of 1000 frames"):
        smolvlm.video_layouts(config, {}, [Clip(1000, (9, 9))])


def check_text(case, record, made):
    config = case.model.config
    text = expanded(config.family, config.num_image_tokens, made, checks.rendered(case, record))
    checks.check_tokens(case, record, text)


@pytest.mark.parametrize("name", pictures.IMAGES)
def test_pixels_and_tokens_of_one_image(case, their_images, name):
    if name in ("wide", "tall") and not case.processor.image_processor.do_resize:
        pytest.skip("thousands of tiles")
    record = checks.record("0", "what is this ?", pictures.refs(name))
    made = their_images(record.images)
    checks.check_pixels(case.processor.pixels(record.images), [made["pixel_values"][0]])
    assert made["pixel_attention_mask"].all()  # which is why the tower has none
    if max(made["rows"][0][0], made["cols"][0][0]) <= 4:  # of more the vocabulary has no names
        check_text(case, record, made)


def test_pixels_and_tokens_of_several_images(case, their_images):
    refs = pictures.refs("odd-size", "grey", "one-pixel", "turned-by-exif")
    record = checks.record("0", "what is this ?", refs)
    made = their_images(refs)
    ours = case.processor.pixels(refs)
    checks.check_pixels([np.concatenate(ours)], [made["pixel_values"][0]])
    check_text(case, record, made)


def test_an_image_of_the_most_pixels(case):
    if not case.processor.image_processor.do_resize:
        pytest.skip("thousands of tiles")
    noise = pictures.encode(pictures.noise("RGB", 4000, 3000), "JPEG")
    ref = dataclasses.replace(pictures.refs("odd-size")[0], data=noise)
    processor = case.processor.image_processor
    theirs = processor(checks.load([ref]), return_tensors="np")["pixel_values"]
    checks.check_pixels(case.processor.pixels([ref]), [theirs[0]])
    (layout,) = case.processor.layouts([ref])
    assert layout.slots == theirs.shape[1]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"size": {"longest_edge": 2048}, "max_image_size": {"longest_edge": 512}},
        {"size": {"longest_edge": 5000}},
        {"do_resize": False},
        {"do_image_splitting": False},
    ],
)
def test_grids_of_many_sizes(monkeypatch, settings):
    """transformers' own steps, over arrays that have shapes and nothing else."""
    processor = transformers.SmolVLMImageProcessorPil(**settings)
    tile = processor.max_image_size["longest_edge"]

    def shaped(self, image, size, **_):
        return np.broadcast_to(np.uint8(0), (3, size.height, size.width))

    monkeypatch.setattr(PilBackend, "resize", shaped)
    for height, width in checks.many_sizes(tile).tolist():
        image = np.broadcast_to(np.uint8(0), (3, height, width))
        if processor.do_resize:
            image = processor.resize(image, SizeDict(**dict(processor.size)))
        rows = columns = 0
        if processor.do_image_splitting:
            image = processor.resize_for_vision_encoder(image, tile)
            tiles, rows, columns = processor.split_images(image, {"longest_edge": tile})
            assert {piece.shape for piece in tiles} == {(3, tile, tile)}
        assert smolvlm.tile_grid(processor, (height, width)) == (rows, columns), (height, width)


@pytest.mark.parametrize("named", [True, False], ids=["places-are-tokens", "places-are-text"])
@pytest.mark.parametrize("split", [byte_level, metaspace])
@pytest.mark.parametrize("grid", [(0, 0), (1, 2), (3, 1), (2, 3)])
def test_places_are_tokenized_as_in_the_whole_text(split, named, grid):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split()
    special = ["<image>", FAKE, *((WHOLE, *PLACES) if named else ())]
    lines = "user\n\nwhat is\nthis\n\n<row_1_col_2>\n" * 5
    tokenizer.train_from_iterator([lines], trainers.BpeTrainer(special_tokens=special))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    rows, columns = grid
    processor = types.SimpleNamespace(do_image_splitting=False)
    if rows:
        processor = transformers.SmolVLMImageProcessorPil(**CUT, do_resize=False)
    config = types.SimpleNamespace(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"), num_image_tokens=3
    )
    size = (rows * TILE, columns * TILE)
    (layout,) = smolvlm.layouts(config, processor, [size])
    ids = smolvlm.frame_image(tokenizer, layout).ids.tolist()
    text = expanded("smolvlm", 3, {"rows": [[rows]], "cols": [[columns]]}, "a\n<image>\nis")
    before, after = (tokenizer(part)["input_ids"] for part in ("a\n", f"{FAKE}\nis"))
    whole = tokenizer(text)["input_ids"]
    assert whole == [*before, *ids, *after[1:]]


def test_logits(case, records, inputs):
    checks.check_logits(case, records, inputs)


@pytest.mark.parametrize("length", [8, pytest.param(64, marks=pytest.mark.slow)])
def test_greedy_decoding(case, records, inputs, length):
    checks.check_greedy(case, records, inputs, length)


def test_round_trip(case, tmp_path):
    checks.check_round_trip(case, tmp_path / "out")
    param_shardings(case.model.abstract_params(), case.model.rules, make_mesh())


@pytest.mark.parametrize("side", [1, 2, 3, 4, 14, 16, 24, 26, 27, 32])
def test_patches_of_a_whole_tile_have_their_own_positions(side):
    config = transformers.SmolVLMVisionConfig(hidden_size=1, image_size=side, patch_size=1)
    embeddings = SmolVLMVisionEmbeddings(config)
    torch.nn.init.zeros_(embeddings.patch_embedding.bias)
    embeddings.position_embedding.weight.data[:, 0] = torch.arange(side**2)
    pixels = torch.zeros(1, 3, side, side)
    made = embeddings(pixels, torch.ones(1, side, side, dtype=torch.bool))
    assert made[0, :, 0].tolist() == list(range(side**2))
    assert smolvlm.has_own_positions(side)


@pytest.mark.parametrize(
    ("vision", "switches", "message"),
    [
        ({}, {"scale_factor": 3}, "scale_factor is 3; it has to divide the tower's 4 patches"),
        ({"hidden_act": "tanh"}, {}, "hidden_act is 'tanh'"),
        ({"image_size": 7 * 25}, {}, "rounds the positions of 25 patches"),
        ({"image_size": [28, 28]}, {}, r"image_size is \[28, 28\]"),
    ],
)
def test_what_is_not_implemented_is_refused(vision, switches, message):
    text = transformers.LlamaConfig(**TEXT)
    config = make_config(transformers.SmolVLMConfig, text, vision, **switches)
    with pytest.raises(ModelError, match=message):
        read_config(config)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_image_size": {"longest_edge": 30}}, "max_image_size.longest_edge is 30"),
        ({"size": {"height": 50, "width": 50}}, "size is .*50"),
    ],
)
def test_other_tiles_are_refused(settings, message):
    config = read_config(CASES["smolvlm2"].config)
    processor = transformers.SmolVLMImageProcessorPil(**CUT | settings)
    with pytest.raises(ModelError, match=message):
        smolvlm.check_processor(config, processor)


def test_a_tokenizer_without_marks_is_refused(case):
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder)
    tokenizer.get_added_vocab = lambda: {"<image>": 4}
    (layout,) = smolvlm.layouts(case.model.config, case.processor.image_processor, [(9, 9)])
    with pytest.raises(ModelError, match="the tokenizer has no token <fake_token_around_image>"):
        smolvlm.frame_image(tokenizer, layout)
