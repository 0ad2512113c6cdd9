"""What the server refuses, with the reason; and that it stays up whatever comes."""

import asyncio
import base64
import contextlib
import io
import json
import random
import re

import pytest

pytest.importorskip("uvicorn", reason="needs pip install 'mmpo_jax[bridges]'")

import httpx2
import PIL.Image
from helpers import served
from helpers.served import body, data_url, picture, user

from mmpo_jax.serving.warm_up import warm_up


def image(url):
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"role": "user", "content": [part, {"type": "text", "text": "a"}]}


def png(width, height):
    file = io.BytesIO()
    PIL.Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()


TOO_LARGE = "image messages[0].content[0] has 2000 x 1000 pixels; this server takes 1 megapixels"
BAD = {
    "no JSON": (b'{"model":', "Invalid JSON"),
    "another encoding": (b'{"model": "\xff"}', "Invalid JSON"),
    "a list": (b"[]", "object"),
    "deep": (b'{"model": ' + b"[" * 10_000, "Invalid JSON"),
    "NaN": (b'{"model": "m", "messages": [], "temperature": NaN}', "temperature: .*finite"),
    "no messages": (body(), "messages: .* at least 1 item"),
    "no model": ({"messages": [user("a")]}, "model: Field required"),
    "a role": (body({"role": "king", "content": "a"}), r"messages\[0\].role: "),
    "a field": (body(user("a"), temprature=1), "temprature: this server knows no such field"),
    "a kind of part": (
        body({"role": "user", "content": [{"type": "input_audio"}]}),
        r"messages\[0\].content.*input_audio",
    ),
    "n": (body(user("a"), n=0), "n: .*greater than or equal to 1"),
    "many": (body(user("a"), n=65), "n: at most 64"),
    "top_p": (body(user("a"), top_p=0), "top_p: "),
    "temperature": (body(user("a"), temperature=-1), "temperature: "),
    "top_logprobs": (body(user("a"), logprobs=True, top_logprobs=21), "top_logprobs: "),
    "top_logprobs alone": (body(user("a"), top_logprobs=2), "needs logprobs: true"),
    "a penalty": (body(user("a"), frequency_penalty=1), "frequency_penalty: this server does not"),
    "tools": (body(user("a"), tools=[{}]), "tools: this server does not do that"),
    "an empty stop": (body(user("a"), stop=[""]), "stop: "),
    "an answer last": (body(user("a"), {"role": "assistant", "content": "b"}), "the last one is"),
    "only a system": (body({"role": "system", "content": "a"}), "nobody says anything"),
    "a surrogate": (b'{"model": "picture_world", "messages": [{"role": "user", "content": "\\ud800"'
                    b"}]}", "Invalid JSON|no valid Unicode"),
    "template": (
        body(user("a"), chat_template_kwargs={"chat_template": "{{ 1 }}"}),
        "the chat template knows no chat_template",
    ),
    "http": (body(image("http://127.0.0.1/a.png")), "this server opens no http: URLs"),
    "https": (body(image("https://127.0.0.1/a.png")), "this server opens no https: URLs"),
    "file": (body(image("file:///etc/passwd")), "this server opens no file: URLs"),
    "path": (body(image("/etc/passwd")), "an image is a data URL"),
    "text": (body(image("data:text/plain;base64,YQ==")), "a data URL of an image begins with"),
    "plain": (body(image("data:image/png,abc")), "a data URL of an image begins with"),
    "base64": (body(image("data:image/png;base64,a?b")), "no base64"),
    "no image": (body(image(data_url(b"abc"))), "is not an image of a known format"),
    "half an image": (body(image(data_url(picture(0)[:200]))), r"image messages.* is damaged"),
    "an oversize image": (body(image(data_url(png(2000, 1000)))), re.escape(TOO_LARGE)),
    "a bomb": (body(image(data_url(png(20_000, 20_000)))), "too large to decode safely"),
    "an image that an assistant shows": (
        body(user("a"), {"role": "assistant", "content": image(data_url(picture(0)))["content"]},
             user("b")),
        "the assistant shows no images",
    ),
    "many images": (
        body({"role": "user", "content": image(data_url(picture(0)))["content"][:1] * 17}),
        "more than 16 images",
    ),
}  # fmt: skip


def post(service, data, **more):
    content = data if isinstance(data, bytes) else json.dumps(data).encode()
    return httpx2.post(f"{service[1]}/chat/completions", content=content, timeout=60, **more)


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_told_why(service, name):
    data, told = BAD[name]
    reply = post(service, data)
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert re.search(told, error["message"]) and len(error["message"]) < 500
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"


def test_bodies_and_routes(service):
    large = post(service, b"a" * (2**20 + 1))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    nowhere = httpx2.get(f"{service[1]}/completions")
    assert nowhere.status_code == 404 and "Not Found" in nowhere.json()["error"]["message"]
    wrong = httpx2.get(f"{service[1]}/chat/completions")
    assert wrong.status_code == 405 and "error" in wrong.json()
    health = httpx2.get(service[1].replace("/v1", "/health"))
    assert health.json() == {"status": "ok", "requests": 0}


def test_a_key_is_asked_for(checkpoint):
    with served.service(checkpoint, key="a-long-key") as made:
        for headers in ({}, {"Authorization": "Bearer another"}, {"Authorization": "a-long-key"}):
            for reply in (
                post(made, body(user("a")), headers=headers),
                httpx2.get(f"{made[1]}/models", headers=headers),
            ):
                assert reply.status_code == 401
                assert "a-long-key" not in reply.text
        right = {"Authorization": "Bearer a-long-key"}
        assert httpx2.get(f"{made[1]}/models", headers=right).status_code == 200


ASKED = [
    ("describe the picture .", picture(0)),
    ("what is in the picture ?", picture(1, 96)),
    ("is there a star ?", picture(2)),
    ("is there a red circle ?",),
    ("describe the picture . " * 9, picture(3)),
    ("list the things in the picture .", picture(4), picture(5)),
]


@pytest.mark.slow
def test_64_at_once_among_those_who_hang_up(service, greedy):
    """Right answers are right, whatever others do."""
    answers = dict(zip(ASKED, greedy(ASKED), strict=True))
    rng = random.Random(0)

    async def right(client, number):
        text, *pictures = asked = ASKED[number % len(ASKED)]
        n = 1 + number % 3
        reply = await client.post("chat/completions", json=body(user(text, *pictures), n=n))
        assert reply.status_code == 200, reply.text
        said = [choice["message"]["content"] for choice in reply.json()["choices"]]
        assert said == [answers[asked]] * n

    async def gone(client, number):
        """Hangs up after a while: before the answer, or in the middle of a stream."""
        long = {"n": 8, "temperature": 2, "max_tokens": 500, "stream": bool(number % 2)}
        asked = client.post("chat/completions", json=body(user(*ASKED[0])) | long)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asked, rng.uniform(0.01, 0.3))

    async def wrong(client, number):
        data, _ = list(BAD.values())[number % len(BAD)]
        content = data if isinstance(data, bytes) else json.dumps(data).encode()
        assert (await client.post("chat/completions", content=content)).status_code == 400

    async def all_at_once():
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=service[1], timeout=300, limits=limits) as client:
            kinds = [right, right, gone, wrong]
            await asyncio.gather(*(kinds[n % 4](client, n // 4 * 2 + n % 2) for n in range(64)))

    asyncio.run(all_at_once())
    served.wait_until_idle(service[0])
    assert (
        post(service, body(user(*ASKED[0]))).json()["choices"][0]["message"]["content"]
        == (answers[ASKED[0]])
    )


def test_more_than_enough_are_refused(checkpoint):
    """The limit counts who waits, and those who hung up make room."""
    with served.service(checkpoint, max_requests=2, max_samples=4) as made:
        url = f"{made[1]}/chat/completions"
        long = body(user("a"), n=64, temperature=3, max_tokens=900, stream=True)
        with (
            httpx2.stream("POST", url, json=long, timeout=60) as first,
            httpx2.stream("POST", url, json=long, timeout=60) as second,
        ):
            assert first.status_code == second.status_code == 200
            refused = post(made, body(user("a")))
            assert refused.status_code == 429
            assert 1 <= int(refused.headers["Retry-After"]) <= 60
            assert refused.json()["error"]["code"] == "too_many_requests"
        served.wait_until_idle(made[0])
        assert post(made, body(user("a"))).status_code == 200
        made[0].is_ending = True
        ending = post(made, body(user("a")))
        assert ending.status_code == 503 and "Retry-After" in ending.headers
        assert httpx2.get(made[1].replace("/v1", "/health")).status_code == 503


def test_more_than_there_is_room_for_is_refused(checkpoint):
    """The bodies of all requests count, until these are answered."""
    with served.service(checkpoint, max_held_mb=1) as made:
        waits = body(user("a"), n=64, temperature=3, max_tokens=900, stream=True)
        large = body(user("a"), user="u" * 600_000)
        assert post(made, large).status_code == 200  # so there is room for one
        waits["user"] = large["user"]
        with httpx2.stream("POST", f"{made[1]}/chat/completions", json=waits, timeout=60) as first:
            assert first.status_code == 200
            refused = post(made, large)
            assert refused.status_code == 429 and "Retry-After" in refused.headers
            assert "have 1 MiB" in refused.json()["error"]["message"]
            assert post(made, body(user("a"))).status_code == 200
        served.wait_until_idle(made[0])
        assert made[0].held_bytes == 0
        assert post(made, large).status_code == 200


def test_devices_that_fail(checkpoint, monkeypatch):
    """Who was served is told, and the next ones are served."""
    with served.service(checkpoint) as made:
        engine = made[0].worker._engine
        monkeypatch.setattr(engine, "_decode", lambda: 1 / 0)
        reply = post(made, body(user("a")))
        assert reply.status_code == 500
        assert reply.json()["error"]["message"] == "the devices failed: ZeroDivisionError"
        stream = post(made, body(user("a"), stream=True))
        assert '"the devices failed: ZeroDivisionError"' in stream.text
        monkeypatch.undo()
        assert post(made, body(user("a"))).status_code == 200
        served.wait_until_idle(made[0])


def test_devices_that_fail_again_and_again(checkpoint, monkeypatch):
    """The server is told to end, and leaves nobody waiting who was let in before."""
    with served.service(checkpoint) as made:
        monkeypatch.setattr(made[0].worker._engine, "_decode", lambda: 1 / 0)
        assert [post(made, body(user("a"))).status_code for _ in range(3)] == [500] * 3
        assert post(made, body(user("a"))).status_code == 503
        made[0].is_ending = False
        assert post(made, body(user("a"))).status_code == 500


def test_a_request_that_fails_alone(checkpoint, monkeypatch):
    """However often its client tries again, the server goes on, as it answers what it could."""
    with served.service(checkpoint) as made:
        warm_up(made[0])
        engine = made[0].worker._engine
        decode = engine._decode

        def fails_at_long_prompts():
            asked = [seat.asked for seat in engine._taken()]
            return 1 / 0 if any(len(one.record.prompt_ids) > 40 for one in asked) else decode()

        monkeypatch.setattr(engine, "_decode", fails_at_long_prompts)
        long = body(user("a star " * 50))
        assert [post(made, long).status_code for _ in range(5)] == [500] * 5
        assert post(made, body(user("a"))).status_code == 200
        served.wait_until_idle(made[0])


def test_numbers_that_devices_cannot_hold(service, greedy):
    """They mean what they say: all tokens, and the most likely one."""
    (answer,) = greedy(ASKED[:1])
    for more in ({"temperature": 1e-300}, {"temperature": 1, "top_p": 1e-300}):
        reply = post(service, body(user(*ASKED[0])) | more | {"top_k": 2**40})
        assert reply.json()["choices"][0]["message"]["content"] == answer


def test_data_urls_may_be_of_any_format(service):
    """As VLMEvalKit sends JPEG, and others what they have."""
    answers = set()
    for kind in ("png", "bmp", "webp"):
        file = io.BytesIO()
        options = {"lossless": True} if kind == "webp" else {}
        PIL.Image.open(io.BytesIO(picture(0))).save(file, kind, **options)
        url = f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
        reply = post(service, body(image(url)))
        answers.add(reply.json()["choices"][0]["message"]["content"])
    assert len(answers) == 1
