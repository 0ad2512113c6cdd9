"""Results are uploaded once they are saved, and are not lost where that fails."""

import pydantic
import pytest
from helpers.hub import TOKEN, stand_in

from mmpo_jax.checkpoints.upload import check_hub, upload_result
from mmpo_jax.commands import align, train
from mmpo_jax.core.errors import MmpoError
from mmpo_jax.recipes.hub import Hub

HUB = Hub(repo="me/result", private=True)


@pytest.fixture
def hub(monkeypatch):
    with stand_in(monkeypatch) as hub:
        yield hub


@pytest.fixture
def result(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("a card")
    (tmp_path / "model" / "model.safetensors").write_bytes(bytes(1000))
    return str(tmp_path / "model")


def test_a_result_is_uploaded_with_its_card(hub, result):
    check_hub(HUB)
    assert upload_result(result, HUB) == f"{hub.url}/me/result"
    assert hub.files == {"README.md": b"a card", "model.safetensors": bytes(1000)}
    (asked,) = hub.repos.values()
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert upload_result(result, None) is None


@pytest.mark.parametrize("status", [403, 413])
def test_what_fails_says_what_to_run(hub, result, status, monkeypatch, capfd):
    hub.fails = status
    with pytest.raises(MmpoError) as error:
        upload_result(result, HUB)
    told = str(error.value)
    assert told.startswith(f"{result} is saved, but it did not get to {hub.url}/me/result: ")
    assert f"run `hf upload me/result {result} . --private`, or the same command again" in told
    assert TOKEN not in told and TOKEN not in "".join(capfd.readouterr())


def test_a_hub_out_of_reach(hub, result, monkeypatch, caplog):
    """It is no reason not to begin, and none to lose a result."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    check_hub(HUB)
    assert "http://127.0.0.1:9 is out of reach now" in caplog.text
    with pytest.raises(MmpoError, match="hf upload me/result"):
        upload_result(result, HUB)


def test_tokens_are_looked_at_before_anything_starts(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    with pytest.raises(MmpoError, match="the hub does not take the token") as error:
        check_hub(HUB)
    assert "hf_another" not in str(error.value)
    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: True)
    with pytest.raises(MmpoError, match="HF_HUB_OFFLINE is set"):
        check_hub(HUB)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(MmpoError, match="run `hf auth login`, or set HF_TOKEN"):
        check_hub(HUB)
    check_hub(None)


@pytest.mark.parametrize("repo", ["name", "a/b/c", "a b/c", "me/--"])
def test_names_of_repositories(repo):
    with pytest.raises(pydantic.ValidationError):
        Hub(repo=repo)


def test_commands_check_first_and_upload_last(hub, result, monkeypatch, capsys):
    from mmpo_jax.recipes.align_recipe import AlignRecipe
    from mmpo_jax.recipes.train_recipe import TrainRecipe

    done = []
    monkeypatch.setattr(train, "run_training", lambda recipe: done.append("train") or result)
    monkeypatch.setattr(align, "run_alignment", lambda recipe: done.append("align") or [])
    monkeypatch.setattr(align, "render_table", lambda *given: "")
    monkeypatch.setattr(align, "warnings", lambda *given: [])
    monkeypatch.setattr(align, "render_sources", lambda *given: "")
    common = {"model": "builtin:picture_world", "hub": {"repo": "me/result"}}
    world = {"source": "picture_world"}
    sft = {"objective": [{"type": "sft"}]}
    recipes = {
        train: TrainRecipe(**common, output="out", data=world, training=sft),
        align: AlignRecipe(**common, output=result.removesuffix("/model"), data=world),
    }
    for command, recipe in recipes.items():
        hub.files.clear()
        command.main(recipe)
        assert hub.files.keys() == {"README.md", "model.safetensors"}
        assert f"hub: {hub.url}/me/result" in capsys.readouterr().out
    assert done == ["train", "align"]
    monkeypatch.setenv("HF_TOKEN", "hf_another")
    for command, recipe in recipes.items():
        with pytest.raises(MmpoError):
            command.main(recipe)
    assert done == ["train", "align"]
