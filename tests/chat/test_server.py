"""The options of a chat server, and that its key is written nowhere."""

from pathlib import Path

import pydantic
import pytest

from mmpo_jax.chat.server import HIDDEN, ChatServer, hide_key, read_key
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.sections import Section
from mmpo_jax.recipes.files import _explain

URL = "http://host:8000/v1"
KEY = "sk-0123456789abcdef"


def test_addresses():
    assert ChatServer(url=URL + "/", model="m").url == URL
    for url in (
        "host:8000/v1",
        "ftp://host/v1",
        "http://",
        URL + "?a=b",
        URL + "/chat/completions",
    ):
        with pytest.raises(pydantic.ValidationError):
            ChatServer(url=url, model="m")


@pytest.mark.parametrize(
    "options",
    [
        {"url": f"http://user:{KEY}@host/v1"},
        {"api_key_env": KEY},
        {"api_key_env": "hf_0123456789abcdef"},
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(options):
    class Recipe(Section):
        judge: ChatServer

    values = {"url": URL, "model": "m"} | options
    with pytest.raises(pydantic.ValidationError) as found:
        Recipe(judge=values)
    told = [_explain(Recipe, problem, {"judge": values}) for problem in found.value.errors()]
    assert "judge." in told[0] and "key" in told[0]
    assert "0123456789abcdef" not in f"{told} {found.value}"


def test_fields_of_the_client_are_not_set_beside_it():
    with pytest.raises(pydantic.ValidationError, match="temperature itself"):
        ChatServer(url=URL, model="m", extra_body={"temperature": 1})
    with pytest.raises(pydantic.ValidationError):
        ChatServer(url=URL, model="m", extra_body={"a": float("nan")})


def test_the_identity_has_what_replies_depend_on():
    plain = ChatServer(url=URL, model="m")
    patient = ChatServer(url=URL, model="m", timeout=1, max_retries=9, max_concurrent=2)
    assert plain.identity() == patient.identity()
    for other in (
        {"url": "http://other/v1"},
        {"model": "n"},
        {"extra_body": {"a": 1}},
        {"image_detail": "low"},
        {"video_frames": 4},
    ):
        assert ChatServer(**({"url": URL, "model": "m"} | other)).identity() != plain.identity()


def test_the_key_comes_from_the_environment(monkeypatch):
    assert read_key(ChatServer(url=URL, model="m")) is None
    server = ChatServer(url=URL, model="m", api_key_env="JUDGE_KEY")
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(MmpoError, match="JUDGE_KEY"):
        read_key(server)
    monkeypatch.setenv("JUDGE_KEY", f"{KEY}\n")
    assert read_key(server) == KEY
    assert KEY not in repr(server) and KEY not in server.model_dump_json()
    monkeypatch.setenv("JUDGE_KEY", "two words")
    with pytest.raises(MmpoError, match="JUDGE_KEY") as found:
        read_key(server)
    assert "two words" not in str(found.value)


def test_what_a_server_repeats_of_the_key_is_hidden():
    body = {"a": [f"no: {KEY}!", 3, None], KEY: True}
    assert hide_key(body, KEY) == {"a": [f"no: {HIDDEN}!", 3, None], HIDDEN: True}
    assert hide_key("EMPTY", "EMPTY") == "EMPTY"
    assert hide_key(KEY, None) == KEY


def test_every_key_is_in_the_documentation_with_its_default():
    page = (Path(__file__).parents[2] / "docs" / "feedback.md").read_text()
    section = page.partition("## The chat client")[2]
    table = section.partition("| key | default |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip(" `") for cell in row.split("|")[1:3]] for row in table]
    defaults = {
        name: "" if field.is_required() else field.get_default(call_default_factory=True)
        for name, field in ChatServer.model_fields.items()
    }
    said = {name: "none" if value is None else value for name, value in defaults.items()}
    assert [name for name, _ in cells] == list(said)
    assert [text for _, text in cells] == [
        f"{value:g}" if isinstance(value, float) else f"{value}" for value in said.values()
    ]
