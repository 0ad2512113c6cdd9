"""Video files: decoded, checked once, named where they are broken, in rows and tables."""

import dataclasses
import sys

import numpy as np
import pytest

pytest.importorskip("av")
from helpers import clips

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.data import videos
from mmpo_jax.data.images import open_image
from mmpo_jax.data.media_check import check_images, media_problem, with_known_images
from mmpo_jax.data.records import Edit, ImageRef, Record, Turn, VideoFacts, VideoRef
from mmpo_jax.data.videos import read_frames, spread_frames, video_facts, video_problem


def ref(data, name="clip.mp4"):
    return ImageRef(name, data)


def record(video):
    return Record("0", (), (Turn("user", "what is this ?"),), (), (video,))


@pytest.mark.parametrize("kind", ["mp4", "webm"])
def test_facts_and_frames(kind):
    file = ref(clips.encode(25, 10, (48, 64), kind))
    assert video_problem(file) is None
    facts = video_facts(VideoRef("clip", file=file))
    assert facts == VideoFacts(25, pytest.approx(10, rel=0.01), (48, 64))
    frames = read_frames(file, [0, 12, 24, 24])
    assert [frame.size for frame in frames] == [(64, 48)] * 4
    means = [np.asarray(frame).mean() for frame in frames]
    np.testing.assert_allclose(means, [50, 122, 194, 194], atol=6)


def test_what_is_changed_is_changed_in_every_frame():
    file = dataclasses.replace(ref(clips.encode(3)), edit=Edit("black"))
    assert not any(np.asarray(frame).any() for frame in read_frames(file, [0, 2]))


@pytest.mark.parametrize(("count", "numbers"), [(1, [12]), (3, [4, 12, 20]), (30, range(25))])
def test_frames_that_are_spread_over_a_video(count, numbers):
    """The middle of every part: of a file as images, of a list the very frames."""
    file = ref(clips.encode(25, 10))
    decoded = read_frames(file, list(numbers))
    spread = spread_frames(VideoRef("clip", file=file), count)
    assert len(spread) == len(decoded)
    for image, frame in zip(spread, decoded, strict=True):
        assert image.data[:4] == b"\x89PNG"
        np.testing.assert_array_equal(np.asarray(open_image(image)), np.asarray(frame))
    frames = tuple(ref(b"%d" % number, f"{number}") for number in range(25))
    assert spread_frames(VideoRef("clip", frames), count) == [frames[n] for n in numbers]


def test_a_file_is_decoded_once(tmp_path, monkeypatch):
    path = tmp_path / "clip.webm"
    path.write_bytes(clips.encode(7, 5, kind="webm"))
    video = VideoRef("clip", file=ImageRef("clip", path=path))
    assert video_facts(video).frames == 7
    monkeypatch.setattr(videos, "_stream", None)
    assert video_facts(video).frames == 7
    assert video_problem(video.file) is None
    known = with_known_images(record(video)).videos[0]
    assert known.facts.size == (48, 64) and known.file.digest is not None
    assert known.fingerprint() == video.fingerprint()


WHOLE = clips.encode(25)
PLAYLIST = b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", r"video clip\.mp4 is empty"),
        (WHOLE[:400], r"video clip\.mp4 is damaged"),
        (b"nothing of the kind", r"video clip\.mp4 is neither MP4 nor WebM"),
        (PLAYLIST, r"video clip\.mp4 is neither MP4 nor WebM"),
    ],
)
def test_broken_files_are_named(data, message):
    reason, detail = video_problem(ref(data))
    assert reason == "image_broken"
    with pytest.raises(DataError, match=message):
        raise DataError(detail)
    with pytest.raises(DataError, match=message):
        video_facts(VideoRef("clip", file=ref(data)))
    assert media_problem(record(VideoRef("clip", file=ref(data)))) == (reason, detail)


def test_missing_and_broken_files_are_skipped_rows(tmp_path):
    (tmp_path / "good.mp4").write_bytes(WHOLE)
    (tmp_path / "cut.mp4").write_bytes(WHOLE[:300])
    found = [
        dataclasses.replace(
            record(VideoRef(name, file=ImageRef(name, path=tmp_path / name))), row=row
        )
        for row, name in enumerate(("good.mp4", "cut.mp4", "gone.mp4"), 1)
    ]
    good, skipped = check_images(found, "rows.jsonl")
    assert [each.row for each in good] == [1]
    assert [(each.file, each.row, each.reason) for each in skipped] == [
        ("rows.jsonl", 2, "image_broken"),
        ("rows.jsonl", 3, "image_broken"),
    ]
    assert "cut.mp4 is damaged" in skipped[0].detail
    assert "gone.mp4: No such file" in skipped[1].detail


def test_too_large_a_picture(monkeypatch):
    monkeypatch.setattr(videos, "MAX_PIXELS", 48 * 64 - 1)
    reason, detail = video_problem(ref(WHOLE))
    assert reason == "image_too_large" and "64 x 48 pixels" in detail


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MmpoError, match=r"pip install 'mmpo_jax\[video\]'") as caught:
        video_problem(ref(clips_of_old))
    assert not isinstance(caught.value, DataError)


clips_of_old = clips.encode(2)


def test_a_video_has_frames_or_a_file():
    with pytest.raises(ValueError, match="either frames or a file"):
        VideoRef("neither")
    with pytest.raises(ValueError, match="either frames or a file"):
        VideoRef("both", (ref(b"frame"),), file=ref(WHOLE))
