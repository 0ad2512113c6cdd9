"""Self-reward with the true answer in its prompt: it is told, checked, and part of the key."""

import pyarrow as pa
import pytest

from mmpo_jax.core.errors import DataError
from mmpo_jax.core.stages import StageOutput
from mmpo_jax.data.records import Record, Turn
from mmpo_jax.feedback.judge import Responses
from mmpo_jax.feedback.self_reward import SelfRewardJudge
from mmpo_jax.feedback.text_model import Reply
from mmpo_jax.generation.responses import GENERATED
from mmpo_jax.recipes.feedback import SelfRewardFeedback

WITHOUT = "{question} {answer}"
WITH = "{question} True: {solution} Said: {answer}"


class Echo:
    """Remembers what it is asked, and finds everything worth 5."""

    def __init__(self):
        self.asked = []

    def say(self, asks, schema=None):
        self.asked += [ask.text for ask in asks]
        return [Reply("Score: 5") for _ in asks]

    def reject(self, asks, schema=None):
        pass

    def release(self):
        pass


def record(solution):
    prompt = (Turn("user", "what is it ?"),)
    return Record("a", (), prompt, (), extra={"answer": solution})


def judged(folder, prompt, solution):
    """What is asked."""
    model = Echo()
    options = SelfRewardFeedback(prompt=prompt)
    row = {"prompt_id": "a", "sample": 0, "text": "a {solution}", "finished": True}
    generated = StageOutput(pa.Table.from_pylist([row], schema=GENERATED), "fingerprint")
    judge = SelfRewardJudge(options, model, "key")
    judge.check([record(solution)])
    output = judge.judge(Responses(str(folder), [record(solution)], generated))
    assert output.table["score"].to_pylist() == [5.0]
    return model.asked


def test_the_truth_is_told(tmp_path):
    asked = judged(tmp_path, WITH, "a {answer}")
    assert asked == ["what is it ? True: a {answer} Said: a {solution}"]


def test_another_truth_is_judged_again_only_where_it_is_told(tmp_path):
    for prompt, times in ((WITH, 1), (WITHOUT, 0)):
        folder = tmp_path / str(times)
        assert len(judged(folder, prompt, "a star")) == 1
        assert len(judged(folder, prompt, "a ring")) == times
        assert judged(folder, prompt, "a ring") == []


def test_rows_without_it(tmp_path):
    with pytest.raises(DataError, match="prompt 'a' has no text as its answer"):
        judged(tmp_path, WITH, {"boxes": []})
    assert judged(tmp_path, WITHOUT, {"boxes": []})
