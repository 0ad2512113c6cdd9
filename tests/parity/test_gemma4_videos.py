"""Videos of Gemma 4: how frames lie in slots, what stands between them, what is refused."""

import types

import numpy as np
import pytest
from helpers import pictures

pytest.importorskip("torch")
import transformers
from helpers import checks, families, gemma_media
from helpers.gemma_media import SOFT_TOKENS, VIDEO
from helpers.word_splits import byte_level, metaspace
from tokenizers import Tokenizer, models, trainers
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import VideoMetadata

from mmpo_jax.core.errors import DataError
from mmpo_jax.data.processor import Processor
from mmpo_jax.data.records import ImageRef, VideoRef
from mmpo_jax.models import gemma_media as ours
from mmpo_jax.models.config import ModelError
from mmpo_jax.models.families import FAMILIES
from mmpo_jax.models.family import Clip

pytestmark = pytest.mark.parity


@pytest.mark.parametrize(("name", "per_token"), [("gemma4", 4), ("gemma4_unified", 1)])
def test_frames_have_the_room_of_an_image(family_case, name, per_token):
    """Where an image has four times as many tokens, four frames lie in a slot."""
    processor, video = family_case(name).processor, pictures.clip(6)
    config, room = processor.config, 4 * SOFT_TOKENS
    (alone,) = processor.pixels((), [video])
    assert alone.shape[:2] == (6, per_token * SOFT_TOKENS)
    settings = processor.video_settings | {"slot_tokens": room}
    (made,) = processor.videos.pixels(config, settings, [checks.load(video.frames)])
    (layout,) = processor.videos.layouts(config, settings, [Clip(6, (150, 200))])
    tokens = len(layout.index) // 6
    assert made.shape[:2] == (2, per_token * room)
    assert (layout.slots, layout.features) == (2, 2 * room)
    for frame in range(6):
        slot, place = divmod(frame, 4)
        at = per_token * place * tokens
        shown = made[slot, at : at + per_token * tokens]
        np.testing.assert_array_equal(shown, alone[frame, : per_token * tokens])
        first = room * slot + place * tokens
        own = layout.index[frame * tokens : (frame + 1) * tokens, 0]
        np.testing.assert_array_equal(own, first + np.arange(tokens))
    assert not made[1, 2 * per_token * tokens :].any()
    grid = processor.images.describe(config, [layout], 3)["grid"]
    assert grid.tolist() == [[9, 7, 4], [9, 7, 2], [0, 0, 0]]


@pytest.mark.parametrize("split", [byte_level, metaspace])
@pytest.mark.parametrize("processor", ["Gemma4Processor", "Gemma4UnifiedProcessor"])
@pytest.mark.parametrize(
    ("clip", "metadata"),
    [
        (Clip(3, (30, 40)), VideoMetadata(3, frames_indices=[0, 1, 2])),
        (Clip(30, (30, 40)), VideoMetadata(30, frames_indices=list(range(30)))),
        (Clip(3, (30, 40), 0.1), VideoMetadata(3, 0.1, frames_indices=[0, 1, 2])),
        (
            Clip(3, (30, 40), 3 / 3700 * 25, (0.0, 61.04, 147.96)),
            VideoMetadata(3700, 25, frames_indices=[0, 1526, 3699]),
        ),
        (
            Clip(2, (30, 40), 2 / 200_000 * 20, (0.0, 9000.0)),
            VideoMetadata(200_000, 20, frames_indices=[0, 180_000]),
        ),
    ],
    ids=["three", "thirty", "slow", "file", "hours"],
)
@pytest.mark.parametrize(
    "text", [f"User: {VIDEO}What is this", f"a\n\n{VIDEO}\n\n{VIDEO}", f"{VIDEO} is"]
)
def test_times_are_tokenized_as_in_the_whole_text(split, processor, clip, metadata, text):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = split()
    lines = "User: 00:00 \n\n00:01 what is this 02:27\n" * 5
    named = gemma_media.NAMED
    trainer = trainers.BpeTrainer(special_tokens=list(named.values()))
    tokenizer.train_from_iterator([lines], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=named
    )
    place = ours.video_token(None, tokenizer)
    said = gemma_media.expanded(
        getattr(transformers, processor), text, [], [(6, metadata)] * text.count(VIDEO)
    )
    expected = tokenizer(said)["input_ids"]
    config = types.SimpleNamespace(video_token_id=place, edge=8)
    settings = {"max_soft_tokens": 8, "slot_tokens": 70}
    (plain,) = ours.video_layouts(config, settings, [clip])
    assert len(plain.ids) == 6 * clip.frames
    framed = ours.frame_video(tokenizer, plain).ids.tolist()
    ids = tokenizer(text.replace(*ours.spelled(tokenizer)))["input_ids"]
    made = [framed if token == place else [token] for token in ids]
    assert [token for part in made for token in part] == expected


def test_seconds_that_are_cut_out_are_a_video_of_their_own(family_case):
    """Its first frame is at 00:00, which stands in front of every video."""
    pytest.importorskip("av")
    from helpers import clips

    file = ImageRef("clip.mp4", clips.encode(24, 8, (56, 84)))
    video = VideoRef("clip", fps=3.0, file=file, seconds=(1.25, None))
    processor = family_case("gemma4").processor
    (layout,) = processor.layouts((), [video])
    assert layout.times == (0.0, 0.25, 0.625, 1.0, 1.375)
    config = types.SimpleNamespace(video_token_id=layout.ids[1], edge=8)
    cut = Clip(3, (30, 40), 1.0, (1526 / 25, 1551 / 25, 3100 / 25))
    (plain,) = ours.video_layouts(config, processor.video_settings, [cut])
    assert [ours.clock(seconds) for seconds in plain.times] == ["00:00", "00:01", "01:02"]


def test_a_tokenizer_of_another_id_is_refused(family_case):
    """transformers finds no place for the features then."""
    processor = family_case("gemma4").processor
    config = types.SimpleNamespace(video_token_id=9, edge=8)
    (layout,) = ours.video_layouts(config, processor.video_settings, [Clip(2, (30, 40))])
    written = processor.tokenizer.convert_tokens_to_ids(VIDEO)
    with pytest.raises(ModelError, match=rf"video_token_id is 9, and the tokenizer's .* {written}"):
        ours.frame_video(processor.tokenizer, layout)


@pytest.mark.parametrize("name", ["gemma4", "gemma4_unified"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_resize": False}, "video_preprocessor_config.json: do_resize is False"),
        ({"patch_size": 5}, "video_preprocessor_config.json: patch_size is 5"),
        ({"pooling_kernel_size": 3}, "video_preprocessor_config.json: pooling_kernel_size is 3"),
        ({"max_soft_tokens": 64}, "max_soft_tokens is 64; this version implements 70, 140"),
        ({"max_soft_tokens": 140}, "max_soft_tokens is 140, and that of preprocessor.* 70"),
    ],
)
def test_video_processors_that_do_not_fit(family_case, name, settings, message):
    case = family_case(name)
    known = families.VIDEO_SETTINGS[name] | settings
    with pytest.raises(ModelError, match=message):
        FAMILIES[name].videos.read_settings(
            case.model.config, known, case.processor.image_processor
        )


def test_frames_of_a_file_are_those_of_transformers(family_case):
    """Thirty-two where the file does not say how many, and at a rate where a row asks for one."""
    case = family_case("gemma4")
    videos, given = FAMILIES["gemma4"].videos, families.GEMMA4_SETTINGS
    known = videos.read_settings(
        case.model.config, given | {"fps": None}, case.processor.image_processor
    )
    theirs = types.SimpleNamespace(num_frames=32, fps=None)
    for total, rate in [(32, 25.0), (100, 29.97), (301, 24.0), (1777, 25.0), (60, 0.5)]:
        metadata = VideoMetadata(total, rate, duration=total / rate)
        expected = BaseVideoProcessor.sample_frames(theirs, metadata, num_frames=32)
        assert videos.sample(known, total, rate).tolist() == expected.tolist()
        at_a_rate = types.SimpleNamespace(num_frames=None, fps=None)
        expected = BaseVideoProcessor.sample_frames(at_a_rate, metadata, fps=0.25)
        found = videos.sample(known | {"num_frames": None, "fps": 0.25}, total, rate)
        assert found.tolist() == expected.tolist()
    with pytest.raises(DataError, match="32 frames are to be shown of a video of 31"):
        videos.sample(known, 31, 25.0)
    with pytest.raises(ModelError, match="num_frames is 32 and its fps 2"):
        videos.sample(known | {"fps": 2}, 100, 25.0)


def test_rescaling_and_normalising_are_settings(family_case):
    case = family_case("gemma4")
    video = pictures.clip(1)

    def shown(**settings):
        known = case.processor.video_settings | settings
        (made,) = case.processor.videos.pixels(
            case.model.config, known, [checks.load(video.frames)]
        )
        return made

    plain = shown(do_rescale=False, do_normalize=False)
    assert plain.max() > 200 and np.array_equal(plain, plain.round())
    np.testing.assert_array_equal(shown(), plain / np.float32(255))
    scaled = shown(do_normalize=False, rescale_factor=0.5)
    np.testing.assert_array_equal(scaled, plain * np.float32(0.5))
    mean, deviation = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    made = shown(image_mean=mean, image_std=deviation)[0, : 63 * 4].reshape(-1, 16, 3)
    expected = plain[0, : 63 * 4].reshape(-1, 16, 3).astype(np.float64) / 255
    np.testing.assert_allclose(made, (expected - mean) / deviation, rtol=0, atol=1e-6)


def test_frames_of_different_sizes_are_refused(family_case):
    frames = (*pictures.clip(1).frames, *pictures.refs("odd-size"))
    with pytest.raises(DataError, match=r"uneven: the frames of a video have different sizes"):
        family_case("gemma4").processor.pixels((), [VideoRef("uneven", frames)])


def test_a_checkpoint_without_a_token_for_videos(family_case, tmp_path):
    """It takes images as before, and the token typed in a text stays text."""
    case = family_case("gemma4")
    checks.save_tokenizer(tmp_path, "<image>", "<boi>", "<eoi>", image="<image>", video=VIDEO)
    named = transformers.AutoTokenizer.from_pretrained(
        tmp_path, extra_special_tokens=gemma_media.NAMED
    )
    named.save_pretrained(tmp_path)
    case.processor.image_processor.save_pretrained(tmp_path)
    processor = Processor(tmp_path, case.model.config)
    (layout,) = processor.layouts(pictures.refs("odd-size"))
    assert layout.slots == 1
    record = checks.record("0", f"what is {VIDEO} ?")
    text = processor.render(record.prompt, True)
    assert VIDEO not in text
    assert processor.placeholders[-1] not in processor.encode(text)
    with pytest.raises(ModelError, match="video_token_id"):
        processor.layouts((), [pictures.clip(2)])
