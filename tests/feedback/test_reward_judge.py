"""Rewards as judges: the user's own function, its values and its errors; rules of the registry."""

import json
import math
import re

import pytest
from helpers.judged import prompt, responses_of

from mmpo_jax.core.errors import DataError, MmpoError
from mmpo_jax.feedback.reward_judge import RewardJudge
from mmpo_jax.recipes.rewards import SECTIONS
from mmpo_jax.rewards import user_function

TEXTS = {"p": ["a", "b b", "c"], "q": ["d"]}


@pytest.fixture(autouse=True)
def fresh():
    """A file that changed is another command's."""
    user_function.load_function.cache_clear()
    yield
    user_function.load_function.cache_clear()


@pytest.fixture
def judge_of(tmp_path):
    """Makes judges of a file's source."""

    def judge_of(source, name="judge", **options):
        file = tmp_path / "mine.py"
        file.write_text(source)
        section = SECTIONS["python"].model_validate(
            {"type": "python", "function": f"{file}:{name}", **options}
        )
        return RewardJudge(section)

    return judge_of


def scores(judge, folder, texts=TEXTS, **options):
    return judge.judge(responses_of(folder / "round-1", texts, **options)).table.to_pylist()


def test_a_number_for_every_text(judge_of, tmp_path):
    judge = judge_of(
        "def judge(question, texts, *, more=0):\n"
        "    assert question.images[0].read().startswith(b'\\x89PNG')\n"
        "    return [len(text) + more + (question.text == 'what is in q ?') for text in texts]\n",
        arguments={"more": 10},
    )
    assert [row["score"] for row in scores(judge, tmp_path)] == [11, 13, 11, 12]


def test_none_is_no_verdict_and_mappings_have_details(judge_of, tmp_path):
    judge = judge_of(
        "import numpy as np\n"
        "def judge(question, texts):\n"
        "    for text in texts:\n"
        "        if text == 'a': yield None\n"
        "        elif text == 'c': yield {'score': float('nan'), 'why': 'blurred'}\n"
        "        else: yield {'score': np.float32(0.5), 'words': np.int64(2),\n"
        "                     'parts': np.ones(2), 'bad': float('nan'), 'text': '\\ud83d'}\n"
    )
    rows = scores(judge, tmp_path)
    assert [row["reason"] for row in rows] == ["no_verdict", None, "no_verdict", None]
    assert math.isnan(rows[0]["score"]) and rows[1]["score"] == 0.5
    assert json.loads(rows[1]["details"]) == {
        "words": 2,
        "parts": [1.0, 1.0],
        "bad": None,
        "text": "?",
    }
    assert json.loads(rows[2]["details"]) == {"why": "blurred"}


def test_of_a_module(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_judges.py").write_text(
        "def judge(question, texts):\n    return [len(t) for t in texts]\n"
    )
    section = SECTIONS["python"](type="python", function="my_judges.judge")
    assert [row["score"] for row in scores(RewardJudge(section), tmp_path)] == [1, 3, 1, 1]


def test_the_weight_turns_it(judge_of, tmp_path):
    judge = judge_of("def judge(question, texts): return [len(t) for t in texts]", weight=-2)
    assert [row["score"] for row in scores(judge, tmp_path)] == [-2, -6, -2, -2]


@pytest.mark.parametrize(
    ("returns", "told"),
    [
        ("[1]", "gave 1 values for 3 texts"),
        ("[1] * 9", "gave 9 values for 3 texts"),
        ("None", "not None"),
        ("1.0", "not 1.0"),
        ("['good'] * 3", "not ['good', 'good', 'good']"),
        ("{'score': 1}", "not {'score': 1}"),
        ("[{'value': 1}] * 3", "not [{'value': 1}"),
        ("[float('inf'), 0, 0]", "gave inf"),
        ("[0, 0, {'score': float('-inf')}]", "gave -inf"),
        ("[{'score': 1, 'why': {1, 2}}] * len(texts)", "is no JSON"),
    ],
)
def test_what_is_no_value_for_each(judge_of, tmp_path, returns, told):
    judge = judge_of(f"def judge(question, texts): return {returns}")
    with pytest.raises(DataError, match=re.escape(told)) as caught:
        scores(judge, tmp_path)
    assert "'p'" in str(caught.value)
    if "JSON" not in told:
        assert "mine.py:judge" in str(caught.value)


@pytest.mark.parametrize(
    "body", ["raise KeyError('box')", "helper()", "yield 1.0\n    raise KeyError('box')"]
)
def test_errors_of_the_users_code_name_function_file_and_prompt(judge_of, tmp_path, body):
    judge = judge_of(
        "def helper():\n    raise KeyError('box')\n\n"
        f"def judge(question, texts):\n    if question.id == 'p': return [0] * 3\n    {body}\n"
        if "yield" not in body
        else "def judge(question, texts):\n"
        "    if question.id == 'p':\n        yield from [0] * 3\n        return\n"
        f"    {body}\n"
    )
    with pytest.raises(DataError) as caught:
        scores(judge, tmp_path)
    told = str(caught.value)
    assert "mine.py:judge, prompt 'q': KeyError: 'box'" in told
    line = {"helper()": 2, "raise KeyError('box')": 6}.get(body, 6)
    assert told.endswith(f"mine.py, line {line})")


@pytest.mark.parametrize(
    ("source", "name", "told"),
    [
        ("raise ValueError('no key')", "judge", "ValueError: no key"),
        ("def judge(:", "judge", "SyntaxError"),
        ("x = 1", "judge", "has no function 'judge'"),
        ("judge = 1", "judge", "has no function 'judge'"),
        ("def judge(question): return []", "judge", "is called with (question, texts)"),
        ("def judge(question, texts, *, box): ...", "judge", "argument: 'box'"),
    ],
)
def test_what_cannot_be_called_is_refused_at_once(judge_of, source, name, told):
    with pytest.raises(MmpoError, match=re.escape(told)) as caught:
        judge_of(source, name)
    assert "mine.py:judge" in str(caught.value)


@pytest.mark.parametrize("function", ["judge", "nowhere.py:judge", "no_such_module.judge", ":f"])
def test_what_is_not_there(function, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = SECTIONS["python"](type="python", function=function)
    with pytest.raises(MmpoError, match=re.escape(function)):
        RewardJudge(section)


@pytest.mark.parametrize(
    "source",
    [
        "def judge(question, texts): return [{0}] * len(texts)",
        "class Judge:\n    def __call__(self, question, texts): return [{0}] * len(texts)\n"
        "judge = Judge()",
        "import functools\ndef f(question, texts, n): return [{0}] * len(texts)\n"
        "judge = functools.partial(f, n=1)",
    ],
)
def test_scores_are_made_again_when_the_file_changes(judge_of, tmp_path, source):
    source = source.replace("{0}", "{}")
    assert scores(judge_of(source.format(1)), tmp_path)[0]["score"] == 1
    before = (tmp_path / "round-1" / "judge.parquet").stat().st_mtime_ns
    fresh_key = judge_of(source.format(1)).key
    assert scores(judge_of(source.format(1)), tmp_path)[0]["score"] == 1
    assert (tmp_path / "round-1" / "judge.parquet").stat().st_mtime_ns == before
    user_function.load_function.cache_clear()
    changed = judge_of(source.format(2))
    assert changed.key != fresh_key
    assert scores(changed, tmp_path)[0]["score"] == 2


def test_rules_compare_with_the_solution(tmp_path):
    judge = RewardJudge(SECTIONS["exact_match"](type="exact_match"))
    records = [prompt("p", 0, answer="red"), prompt("q", 1, answer="blue")]
    judge.check(records)
    rows = scores(judge, tmp_path, {"p": ["Red.", "blue"], "q": ["blue"]}, records=records)
    assert [row["score"] for row in rows] == [1, 0, 1]
    with pytest.raises(DataError, match="feedback: prompt 'z': exact_match"):
        judge.check([*records, prompt("z")])
