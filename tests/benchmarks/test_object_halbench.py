"""Object HalBench on small annotations of COCO: numbers counted by hand, by judges and files."""

import json
import sys
import types

import numpy as np
import pytest
from helpers.benchmarks import assert_rows_add_up
from helpers.coco import make_coco
from helpers.nltk_data import make_nltk_data

from mmpo_jax.benchmarks.benchmark import Files
from mmpo_jax.benchmarks.extracted_objects import read_objects
from mmpo_jax.benchmarks.judging import Judge, Said
from mmpo_jax.benchmarks.noun_runs import noun_runs
from mmpo_jax.benchmarks.object_halbench import questions
from mmpo_jax.benchmarks.score_files import score_answers
from mmpo_jax.core.errors import MmpoError

IMAGES = {
    17: (["dog", "chair"], ["A puppy near tables.", "Two people."]),
    139: (["toilet"], ["the toilet seat"]),
    1000: ([], ["nothing"]),
    2000: (["car"], []),
}
HELD = {17: {"dog", "chair", "dining table", "person"}, 139: {"toilet"}, 1000: set(), 2000: {"car"}}
TEXTS = {
    17: "Assistant: The dog, dogs and a man see a bus  and a TV.",
    139: "A seat on the toilet. Women with a bow tie on a motor bike.",
    1000: "Just a sky.",
    2000: "There is something with many wheels in front of me.",
}
REPLIES = {
    17: ["small dog", "dogs", "man", "woman", "bus", "tennis player"],
    139: ["toilet", "seat", "women", "wine glass man"],
    2000: [],
}
NAMED = {17: ["dog", "person", "person", "car"], 139: ["toilet", "person", "wine glass"], 1000: []}
"""Classes that the nouns of the replies name: each noun once, of pairs these alone."""


class FakeModel:
    """A judge that says what it is given, and counts."""

    name, part, max_failed = "fake", None, 1.0

    def __init__(self, replies):
        self.replies, self.asked = replies, []

    def settings(self, prompt):
        return {"temperature": prompt.temperature, "top_p": 1.0, "max_new_tokens": 8, "attempts": 2}

    def key(self, prompt):
        return prompt.name

    def say(self, prompt, questions, attempt):
        self.asked += [question.text for question in questions]
        return [Said(self.replies[int(question.id)], model="fake-1") for question in questions]

    def forget(self, prompt, questions, attempt):
        pass

    def failed(self, reasons):
        pass

    def stop(self, told):
        raise MmpoError(told)


@pytest.fixture
def score(tmp_path, monkeypatch):
    pytest.importorskip("nltk")
    monkeypatch.setenv("NLTK_DATA", str(make_nltk_data(tmp_path / "nltk")))
    make_coco(tmp_path / "coco", IMAGES)
    rows = [
        {"image_id": image, "prompt": "What is there?", "text": text}
        for image, text in TEXTS.items()
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, rows)))
    paths = [str(tmp_path / name) for name in ("coco", "answers.jsonl", "out.json")]

    def run(judge=None, **options):
        return score_answers("object_halbench", *paths, {"nouns": "nltk", **options}, judge)

    return run


def expected(named):
    """The official numbers of the classes that captions name, by arrays."""
    wrong = np.array(
        [[c not in HELD[i] for c in classes].count(True) for i, classes in named.items()]
    )
    sizes = np.array([len(classes) for classes in named.values()])
    right = np.array([len(set(classes) & HELD[i]) for i, classes in named.items()])
    held = np.array([len(HELD[i]) for i in named])
    lengths = [len(TEXTS[i].replace("Assistant:", "").strip().split(" ")) for i in named]
    return {
        "CHAIRs": np.mean(wrong > 0),
        "CHAIRs_refine": np.sum(wrong > 0) / np.sum(sizes > 0),
        "CHAIRi": wrong.sum() / sizes.sum(),
        "obj_rec": right.sum() / held.sum(),
        "sentence_num": len(named),
        "coco_sentence_num": np.sum(sizes > 0),
        "coco_word_count": right.sum(),
        "gt_word_count": held.sum(),
        "avg_word_len": np.mean(lengths),
    }


def assert_numbers(scores, named):
    found = expected(named)
    assert {name: scores.metrics[name] for name in found} == pytest.approx(found)
    assert scores.metrics["Response Hall"] == pytest.approx(100 * found["CHAIRs_refine"])
    assert scores.metrics["Object Correct"] == pytest.approx(100 * (1 - found["CHAIRi"]))
    assert_rows_add_up("object_halbench", scores)


def test_a_judge_is_asked_once(score, tmp_path):
    replies = {17: "Sure:\n" + json.dumps(REPLIES[17]), 139: json.dumps(REPLIES[139]), 2000: "()"}
    folder = str(tmp_path / "judge")
    model = FakeModel(replies)
    scores = score(Judge(model, folder))
    # 1000 is short; 2000 cannot be read, is asked for twice and left out
    assert len(model.asked) == 4 and "something with many wheels" in model.asked[-1]
    assert_numbers(scores, NAMED)
    assert scores.beside["unparsed"] == 1 and scores.beside["unparsed_ratio"] == 0.25
    assert scores.made_with["nouns"] == "nltk"
    again = FakeModel(replies)
    assert score(Judge(again, folder)).metrics == scores.metrics and again.asked == []
    kept = Judge(given=f"{folder}/judgements.jsonl")
    assert score(kept).metrics == scores.metrics
    assert_numbers(score(Judge(again, folder), reading="any_list"), {**NAMED, 2000: []})
    report = json.loads((tmp_path / "out.json").read_text())
    told = report["judges"]["object_halbench-1"]
    assert told["judge"] == "fake" and told["official_judge"] == "gpt-3.5-turbo-0613"


def test_the_judge_is_asked_in_the_words_of_the_script(score, tmp_path):
    script = 'nothing = 1\nprompt_template = """Of {question}: {answer}"""\n'
    (tmp_path / "coco" / "eval_gpt_obj_halbench.py").write_text(script)
    model = FakeModel(dict.fromkeys(TEXTS, "[]"))
    score(Judge(model, str(tmp_path / "judge")))
    assert model.asked[1] == f"Of What is there?: {TEXTS[139]}"


def test_objects_of_files(score, tmp_path):
    path = tmp_path / "objects.jsonl"
    rows = [{"image_id": i, "extract_objs": REPLIES.get(i, [])} for i in TEXTS]
    path.write_text("\n".join(map(json.dumps, rows)))
    assert_numbers(score(Judge(given=str(path))), {**NAMED, 2000: []})
    nouns = {17: ["dog", "man", "woman", "bus"], 139: ["toilet", "seat", "woman", "wine glass"]}
    whole = {"sentences": [{"image_id": i, "words": nouns.get(i, [])} for i in reversed(TEXTS)]}
    hall = tmp_path / "hall_obj_halbench_answer_-1.json"
    hall.write_text(json.dumps(whole, indent=4))
    scores = score(Judge(given=str(hall)))
    assert_numbers(scores, {**NAMED, 2000: []})
    assert "nouns" not in scores.made_with
    rows[-1]["extract_objs"] = "-1\n<no_response>"
    path.write_text("\n".join(map(json.dumps, rows)))
    scores = score(Judge(given=str(path)))
    assert_numbers(scores, NAMED)
    assert scores.beside["unparsed"] == 1
    replies = [{"id": i, "reply": json.dumps(REPLIES.get(i, []))} for i in TEXTS]
    path.write_text("\n".join(map(json.dumps, [*replies[:-1], {"id": 2000, "reply": "()"}])))
    assert_numbers(score(Judge(given=str(path))), NAMED)
    assert_numbers(score(Judge(given=str(path)), reading="any_list"), {**NAMED, 2000: []})
    path.write_text("\n".join(map(json.dumps, [*replies[:-1], {"id": 2000, "reply": None}])))
    scores = score(Judge(given=str(path)))
    assert_numbers(scores, NAMED)
    assert scores.beside["without_judgement"] == 1 and scores.beside["unparsed"] == 0
    path.write_text(json.dumps({**rows[0], "caption": "Another text"}))
    with pytest.raises(MmpoError, match=r"row 1: is about 'Another text', and the description is"):
        score(Judge(given=str(path)))
    path.write_text(json.dumps(rows[0]))
    with pytest.raises(MmpoError, match=r"has no objects of the description of image 139"):
        score(Judge(given=str(path)))


def test_words_without_a_judge(score):
    """Every mention counts, and words are in lower case: "tv" is no "TV" here."""
    named = {17: ["dog", "dog", "person", "car"], 139: ["toilet", "person", "tie", "motorcycle"]}
    assert_numbers(score(objects="words"), {**named, 1000: [], 2000: []})
    with pytest.raises(MmpoError, match="this benchmark needs a judge"):
        score(Judge())


@pytest.mark.parametrize(
    ("reply", "official", "any_list"),
    [
        ('["dog", "cat"]', ["dog", "cat"], ["dog", "cat"]),
        ('So:\n["dog"]', ["dog"], ["dog"]),
        ('```json\n["dog"]\n```', None, ["dog"]),
        ('["dog"]\nThat is all.', None, ["dog"]),
        ("()", None, []),
        ("[]", [], []),
        ('"dog"', ["d", "o", "g"], None),
        ('{"dog": 1}', ["dog"], None),
        ("7", None, None),
        ("[1]", ["1"], None),
        ("no list", None, None),
        ("[dog", None, None),
    ],
)
def test_how_replies_are_read(reply, official, any_list):
    assert read_objects(reply) == official
    assert read_objects(reply, "any_list") == any_list


def test_noun_runs():
    parsed = [("a", "DT"), ("tennis", "NN"), ("player", "NN"), ("in", "IN"), ("park", "NNP")]
    assert noun_runs(parsed) == ["tennis player", "park"]
    assert noun_runs([("a", "DT")]) == []


def test_spacy_is_taken_where_it_is(score, monkeypatch, tmp_path):
    """Another library's parser, which calls everything a verb."""
    path = tmp_path / "objects.jsonl"
    rows = [{"image_id": i, "extract_objs": REPLIES.get(i, [])} for i in TEXTS]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(MmpoError, match=r"nouns=spacy: .*pip install spacy"):
        score(Judge(given=str(path)), nouns="spacy")

    class Model:
        meta = types.MappingProxyType({"version": "3.7.3"})

        def __call__(self, text):
            return [types.SimpleNamespace(lemma_=word, tag_="VB") for word in text.split()]

    fake = types.SimpleNamespace(__version__="3.7.5", load=lambda name: Model())
    monkeypatch.setitem(sys.modules, "spacy", fake)
    scores = score(Judge(given=str(path)), nouns="installed")
    assert scores.made_with["nouns"] == "spaCy 3.7.5, en_core_web_trf 3.7.3"
    assert scores.metrics["coco_sentence_num"] == 1  # of the pair "wine glass" alone


def test_questions_and_answers_by_order(score, tmp_path):
    file = tmp_path / "coco" / "obj_halbench_300_with_image.jsonl"
    rows = [{"image_id": n, "question": f"What is in {n}?", "image": "a.jpg"} for n in TEXTS]
    file.write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "coco" / "a.jpg").write_bytes(b"")
    (asked,) = questions(Files(tmp_path / "coco", ""))
    assert [record.id for record in asked.records] == [str(n) for n in TEXTS]
    assert (asked.max_new_tokens, asked.temperature) == (1024, 0)
    answers = [{"responses": [text]} for text in TEXTS.values()]
    (tmp_path / "answers.jsonl").write_text("\n".join(map(json.dumps, answers)))
    model = FakeModel(dict.fromkeys(TEXTS, "[]"))
    score(Judge(model, str(tmp_path / "judge")))
    assert "What is in 17?" in model.asked[0]
    file.write_text("{")
    with pytest.raises(MmpoError, match=r"300_with_image.jsonl, row 1: "):
        score(objects="words")
    file.unlink()
    with pytest.raises(MmpoError, match=r"has no obj_halbench_300_with_image.jsonl; it is part of"):
        score(objects="words")
