"""Prompts that are read in the authors' scripts, which are never run."""

import pytest
from etils import epath

from mmpo_jax.benchmarks.benchmark import Files
from mmpo_jax.benchmarks.scripts import Script, official_name, script_of
from mmpo_jax.core.errors import DataError

TEXT = """
import no_such_package
NAME = compute()
NAME = "one" "two"
def ask(first, second):
    NAME = "inside"
    text = f'''{first}: {NAME}
  {second}'''
    other = f"{first.strip()}"
    return text
raise SystemExit
"""


@pytest.fixture
def script(tmp_path):
    (tmp_path / "ask.py").write_text(TEXT)
    found = script_of(Files(epath.Path(tmp_path), "here"), "none.py", "ask.py")
    assert found is not None
    return found


def test_constants_and_texts(script, tmp_path):
    assert script.constant("NAME") == "onetwo"
    assert script.constant("NAME", "ask") == "inside"
    values = {"first": "{a}", "second": "b", "NAME": "c"}
    assert script.filled(values, "text", "ask") == "{a}: c\n  b"
    assert script_of(Files(epath.Path(tmp_path), "here"), "none.py") is None


def test_what_a_script_lacks_is_named(script, tmp_path):
    with pytest.raises(DataError, match="has no constant OTHER"):
        script.constant("OTHER")
    with pytest.raises(DataError, match="has no function answer"):
        script.constant("NAME", "answer")
    with pytest.raises(DataError, match="ask has no text nothing"):
        script.filled({}, "nothing", "ask")
    with pytest.raises(DataError, match=r"has 'first.strip\(\)' in it, which is none of first"):
        script.filled({"first": "a"}, "other", "ask")
    (tmp_path / "bad.py").write_text("def:")
    with pytest.raises(DataError, match="is no Python file"):
        Script(epath.Path(tmp_path / "bad.py"))


def test_a_prompt_in_other_words_has_another_name():
    assert official_name("x", "a") != official_name("x", "b")
