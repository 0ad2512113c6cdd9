"""Video files: decoded, checked once, named where they are broken, in rows and tables."""

import base64
import dataclasses
import io
import sys
from fractions import Fraction

import numpy as np
import pytest

pytest.importorskip("av")
import av
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


DAMAGED = 64
"""Bytes."""


def moving(codec, kind="mp4", size=(96, 128), pixels="yuv420p", times=None, **options):
    """An encoded clip of noise before a plane that moves."""
    random = np.random.default_rng(0)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10, options=options)
        (stream.height, stream.width), stream.pix_fmt = size, pixels
        stream.codec_context.time_base = Fraction(1, 10)
        for number in range(30):
            picture = np.full((*size, 3), 5 * number, np.uint8)
            picture[20:60, number : number + 40] = random.integers(0, 255, (40, 40, 3))
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number if times is None else times[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("codec", "kind"),
    [("libx264", "mp4"), ("mpeg4", "mp4"), ("libvpx-vp9", "webm"), ("libvpx-vp9", "mp4")],
)
def test_damage_in_the_middle_is_seen(codec, kind):
    """FFmpeg would hide it: random bytes at many places, one at a time."""
    whole = moving(codec, kind)
    assert video_problem(ref(whole)) is None
    random = np.random.default_rng(1)
    for share in np.linspace(0.2, 0.9, 12):
        place = int(share * len(whole))
        noise = random.bytes(DAMAGED)
        data = whole[:place] + noise + whole[place + DAMAGED :]
        reason, detail = video_problem(ref(data)) or ("none", f"at {place} of {len(whole)}")
        assert (reason, "clip.mp4 is damaged" in detail) == ("image_broken", True), detail


TIMES = [2 * number + number % 3 // 2 for number in range(30)]


@pytest.mark.parametrize(
    "clip",
    [
        {"codec": "libx264", "crf": "35", "bf": "3"},
        {"codec": "libx264", "size": (97, 131), "pixels": "yuv444p"},
        {"codec": "libx264", "times": TIMES},
        {"codec": "libx264", "kind": "matroska"},
        {"codec": "libvpx-vp9", "kind": "webm"},
        {"codec": "libvpx-vp9", "kind": "webm", "size": (97, 131), "lag-in-frames": "16"},
        {"codec": "libvpx-vp9", "kind": "webm", "times": TIMES},
        {"codec": "libvpx", "kind": "webm", "auto-alt-ref": "1", "lag-in-frames": "16"},
        {"codec": "libx265", "x265-params": "log-level=none"},
        {"codec": "libsvtav1"},
    ],
    ids=str,
)
def test_sound_clips_of_many_kinds(clip):
    """As FFmpeg's own decoder has them."""
    data = moving(**clip)
    assert video_problem(ref(data)) is None
    with av.open(io.BytesIO(data)) as container:
        expected = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(expected) == 30
    found = [np.asarray(frame) for frame in read_frames(ref(data), range(30))]
    np.testing.assert_array_equal(found, expected)


TEN_BITS = base64.b64decode(
    """
GkXfo59ChoEBQveBAULygQRC84EIQoKEd2VibUKHgQJChYECGFOAZwH/////////EU2bdKtNu4tTq4QVSalmU6yB
oU27i1OrhBZUrmtTrIG7TbuMU6uEElTDZ1OsggEI7AEAAAAAAABoAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA
AAAAAAAAAAAAAAAVSalmlSrXsYMPQkBNgIRMYXZmV0GETGF2ZhZUrmvIrgEAAAAAAAA/14EBc8WIAAAAAAAAAAGc
gQAitZyDdW5kiIEAhoVWX1ZQOYOBASPjg4QF9eEA4JCwgRC6gRCagQJVsIRVuYEBElTDZ7Bzc61jwItjxYgAAAAA
AAAAAWfInEWjh0VOQ09ERVJEh49MYXZjIGxpYnZweC12cDkfQ7Z11+eBAKOogQAAgJJJg0IAAHgAewAcEg4MewAA
GGAAABC//LE///7tj////LgAAKOTgQBkAJYAQJIcAFkAAAMgAABCQKOTgQDIAJYAQJKcAFgAAAMgAABCQA==
"""
)
"""Three red frames of VP9 with ten bits a sample, which PyAV's encoder does not make."""


def test_more_than_eight_bits_a_sample():
    """Which the stricter decoder of VP9 takes in some builds alone."""
    file = ref(TEN_BITS)
    assert video_problem(file) is None
    assert video_facts(VideoRef("clip", file=file)).frames == 3
    red, green, blue = np.asarray(read_frames(file, [2])[0])[8, 8]
    assert red > 200 and max(green, blue) < 50


def test_a_clip_that_was_cut_out_without_being_encoded_again():
    """Its first frames look at some that are not there."""
    whole = moving("libx264", **{"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"})
    buffer = io.BytesIO()
    with av.open(io.BytesIO(whole)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        source.seek(1_500_000)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    file = ref(buffer.getvalue())
    assert video_problem(file) is None
    assert video_facts(VideoRef("clip", file=file)).frames == 18


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
