"""What a server is sent, and what makes two requests the same."""

import base64
import dataclasses
import io
import json

import numpy as np
import pytest
from etils import epath
from helpers import pictures
from PIL import Image

from mmpo_jax.chat.images import data_url
from mmpo_jax.chat.requests import ChatMessage, ChatRequest
from mmpo_jax.chat.server import ChatServer
from mmpo_jax.core.errors import DataError
from mmpo_jax.data.images import open_image
from mmpo_jax.data.records import Edit, ImageRef, VideoRef

SERVER = ChatServer(url="http://host/v1", model="judge")
PLAIN = ChatRequest((ChatMessage.user("Is it red?"),), max_tokens=5)


def body(request, server=SERVER, left_out=()):
    return json.loads(request.body(server, left_out))


def decoded(url):
    head, _, data = url.partition(";base64,")
    return head, base64.b64decode(data)


def test_a_plain_request():
    assert body(PLAIN) == {
        "model": "judge",
        "messages": [{"role": "user", "content": "Is it red?"}],
        "max_tokens": 5,
        "temperature": 0.0,
    }


def test_all_fields():
    request = ChatRequest(
        (ChatMessage.system("Judge."), ChatMessage.user("Red?"), ChatMessage.assistant("Yes")),
        max_tokens=1,
        temperature=0.5,
        top_p=0.9,
        seed=7,
        response_format={"type": "json_object"},
        top_logprobs=20,
        n=3,
        attempt=2,
    )
    server = ChatServer(url="http://host/v1", model="judge", extra_body={"top_k": 5})
    sent = body(request, server)
    assert sent.pop("messages")[0] == {"role": "system", "content": "Judge."}
    assert sent == {
        "model": "judge",
        "max_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "n": 3,
        "seed": 9,
        "response_format": {"type": "json_object"},
        "logprobs": True,
        "top_logprobs": 20,
        "top_k": 5,
    }
    less = body(request, server, {"response_format", "top_logprobs", "seed", "max_tokens"})
    assert less.keys() == {
        "model",
        "messages",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "n",
        "top_k",
    }
    assert request.optional_fields() == ["response_format", "top_logprobs", "seed"]
    assert PLAIN.optional_fields() == []


def test_images_stand_in_front_of_the_question():
    image = pictures.refs("photograph")[0]
    request = ChatRequest((ChatMessage.user("Red?", [image, image]),), max_tokens=5)
    assert request.media == (image, image)
    server = ChatServer(url="http://host/v1", model="judge", image_detail="low")
    content = body(request, server)["messages"][0]["content"]
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[0]["image_url"] == {"url": data_url(image), "detail": "low"}


def test_a_video_is_some_of_its_frames():
    frames = [encoded("JPEG", quality=60 + number) for number in range(6)]
    video = VideoRef("clip", tuple(ImageRef(f"{n}", data) for n, data in enumerate(frames)))
    request = ChatRequest((ChatMessage.user("Red?", [video]),), max_tokens=5)
    assert request.media == (video,)
    server = ChatServer(url="http://host/v1", model="judge", image_detail="low", video_frames=3)
    *shown, text = body(request, server)["messages"][0]["content"]
    expected = [{"url": data_url(video.frames[n]), "detail": "low"} for n in (1, 3, 5)]
    assert [part["image_url"] for part in shown] == expected
    assert text == {"type": "text", "text": "Red?"}
    *shown, _ = body(request, SERVER)["messages"][0]["content"]
    assert len(shown) == 6
    asked = [[video], [video.frames[0]], [VideoRef("clip", video.frames[:5])]]
    keys = [ChatRequest((ChatMessage.user("Red?", shown),), 5).key(SERVER) for shown in asked]
    assert len({*keys, request.key(server)}) == 4


def encoded(kind, **options):
    return pictures.encode(pictures.noise("RGB", 30, 20), kind, **options)


MANY = encoded("MPO", save_all=True, append_images=[pictures.noise("RGB", 30, 20)])


@pytest.mark.parametrize(
    ("data", "mime"),
    [
        (pictures.IMAGES["turned-by-exif"], "image/jpeg"),
        (pictures.IMAGES["cmyk"], "image/jpeg"),
        (MANY, "image/jpeg"),
        (encoded("PNG"), "image/png"),
        (encoded("WEBP"), "image/webp"),
        (encoded("GIF"), "image/gif"),
        (encoded("BMP"), "image/bmp"),
    ],
)
def test_original_bytes_are_sent(data, mime, tmp_path):
    path = tmp_path / "a.dat"  # the name is not trusted
    path.write_bytes(data)
    for image in (ImageRef("a", data), ImageRef("a", path=epath.Path(path))):
        assert decoded(data_url(image)) == (f"data:{mime}", data)


@pytest.mark.parametrize("edit", [None, Edit("black"), Edit("crop", 3), Edit("rotate", 3)])
def test_what_cannot_be_sent_as_it_is_becomes_png(edit):
    data = encoded("JPEG") if edit else encoded("TIFF")
    image = ImageRef("a", data, edit=edit)
    head, sent = decoded(data_url(image))
    assert head == "data:image/png"
    np.testing.assert_array_equal(Image.open(io.BytesIO(sent)), open_image(image))


@pytest.mark.parametrize("kind", ["noise", "blank", "masked"])
def test_changes_of_what_a_model_is_given_cannot_be_sent(kind):
    with pytest.raises(DataError, match=kind):
        data_url(ImageRef("a", encoded("PNG"), edit=Edit(kind)))


def test_a_file_that_changed_is_read_again(tmp_path):
    path = tmp_path / "a.png"
    image = ImageRef("a", path=epath.Path(path))
    for width in (10, 20):
        path.write_bytes(pictures.encode(pictures.noise("RGB", width, 10)))
        assert Image.open(io.BytesIO(decoded(data_url(image))[1])).width == width


def test_the_key_is_of_all_that_the_reply_depends_on():
    photograph, grey = pictures.refs("photograph", "grey")
    base = ChatRequest((ChatMessage.user("Red?", [photograph]),), max_tokens=5)
    turned = dataclasses.replace(photograph, edit=Edit("rotate"))
    requests = [
        base,
        *(
            dataclasses.replace(base, messages=messages)
            for messages in (
                (ChatMessage.user("Blue?", [photograph]),),
                (ChatMessage.user("Red?", [grey]),),
                (ChatMessage.user("Red?", [turned]),),
                (ChatMessage.user("Red?"),),
                (ChatMessage("user", ("Red?", photograph)),),
                (ChatMessage.system("Judge."), *base.messages),
                (ChatMessage.assistant("Red?"),),
            )
        ),
        *(
            dataclasses.replace(base, **change)
            for change in (
                {"max_tokens": 6},
                {"temperature": 1.0},
                {"top_p": 0.5},
                {"seed": 0},
                {"seed": 1},
                {"response_format": {"type": "json_object"}},
                {"top_logprobs": 0},
                {"top_logprobs": 5},
                {"n": 2},
                {"attempt": 1},
            )
        ),
    ]
    keys = [request.key(SERVER) for request in requests]
    keys += [base.key(ChatServer(url="http://host/v1", model="other"))]
    assert len(set(keys)) == len(keys)


def test_the_key_is_of_contents_and_not_of_places(tmp_path):
    data = encoded("PNG")
    (tmp_path / "a.png").write_bytes(data)
    images = ImageRef("one", data), ImageRef("two", path=epath.Path(tmp_path / "a.png"))
    keys = {ChatRequest((ChatMessage.user("Red?", [i]),), 5).key(SERVER) for i in images}
    assert len(keys) == 1
    with pytest.raises(DataError, match=r"b\.png"):
        missing = ImageRef("b", path=epath.Path(tmp_path / "b.png"))
        ChatRequest((ChatMessage.user("Red?", [missing]),), 5).key(SERVER)
    # An asking under another number is another even where its seed is that of an earlier one.
    first = dataclasses.replace(PLAIN, seed=1)
    second = dataclasses.replace(PLAIN, seed=0, attempt=1)
    assert first.key(SERVER) != second.key(SERVER)
