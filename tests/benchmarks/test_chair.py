"""CHAIR on small annotations of COCO: numbers counted by hand, in all layouts of captions."""

import json

import pytest
from helpers.benchmarks import assert_rows_add_up
from helpers.coco import make_coco
from helpers.nltk_data import make_nltk_data

from mmpo_jax.benchmarks.benchmark import Files
from mmpo_jax.benchmarks.chair import questions
from mmpo_jax.benchmarks.score_files import score_answers
from mmpo_jax.core.errors import MmpoError

pytest.importorskip("nltk")

IMAGES = {
    17: (["dog", "chair"], ["A puppy near tables.", "Two people."]),
    139: (["toilet"], ["the toilet seat"]),
    1000: ([], ["nothing"]),
}
HELD = {17: {"dog", "chair", "dining table", "person"}, 139: {"toilet"}, 1000: set()}
CAPTIONS = {
    17: ("The dog and a man see a bus, buses and dogs.", ["dog", "person", "car", "dog"]),
    139: (
        "A seat on the toilet. Women with a bow tie on a motor bike.",
        ["toilet", "person", "tie"],
    ),
    1000: ("Sky.", []),
}
"""Captions and the classes that they name: "bus" is cut to "bu", a toilet's seat is no chair, and
the table's stray blank hides the motor bike."""


@pytest.fixture
def score(tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(make_nltk_data(tmp_path / "nltk")))
    make_coco(tmp_path / "coco", IMAGES)

    def run(content, name="captions.json", **options):
        (tmp_path / name).write_text(content)
        out = str(tmp_path / "out.json")
        return score_answers("chair", str(tmp_path / "coco"), str(tmp_path / name), out, options)

    return run


def expected():
    invented = [[c for c in named if c not in HELD[i]] for i, (_, named) in CAPTIONS.items()]
    mentions = sum(len(named) for _, named in CAPTIONS.values())
    return {
        "CHAIRs": sum(map(bool, invented)) / len(CAPTIONS),
        "CHAIRi": sum(map(len, invented)) / mentions,
    }


def test_all_layouts_of_captions(score):
    rows = [{"image_id": image, "caption": text} for image, (text, _) in CAPTIONS.items()]
    scores = score(json.dumps(rows))
    assert scores.metrics == expected() == {"CHAIRs": 2 / 3, "CHAIRi": 3 / 7}
    for row, (image, (_, named)) in zip(scores.rows, CAPTIONS.items(), strict=True):
        assert [name for _, name in row["mentioned"]] == named
        assert set(row["in_the_image"]) == HELD[image]
    assert scores.beside["CHAIRs_of_captions_with_objects"] == 1
    assert scores.beside["recall"] == 3 / 5
    assert_rows_add_up("chair", scores)
    whole = {"overall": {"CIDEr": 1.25}, "imgToEval": {str(r["image_id"]): r for r in rows}}
    assert score(json.dumps(whole, indent=1)).metrics == {"CIDEr": 1.25, **expected()}
    ours = [
        {"id": f"COCO_val2014_{row['image_id']:012d}.jpg", "response": row["caption"]}
        for row in rows
    ]
    lines = "\n".join(map(json.dumps, ours))
    assert score(lines, "captions.jsonl").metrics == expected()


def test_questions_for_a_model(tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(make_nltk_data(tmp_path / "nltk")))
    make_coco(tmp_path, IMAGES)
    path = tmp_path / "captions_val2014.json"
    rows = [{"id": n, "file_name": f"COCO_val2014_{n:012d}.jpg"} for n in range(9)]
    path.write_text(json.dumps({"images": rows, "annotations": []}))
    for row in rows:
        (tmp_path / row["file_name"]).write_bytes(b"")
    (asked,) = questions(Files(tmp_path, ""), count=4, prompt="What is it?")
    assert len({record.id for record in asked.records}) == 4
    assert asked.records == questions(Files(tmp_path, ""), count=4, prompt="What is it?")[0].records
    (tmp_path / "instances_train2014.json").unlink()
    with pytest.raises(MmpoError, match=r"has no instances_train2014.json; it is part of"):
        questions(Files(tmp_path, ""))


def test_singulars_of_wordnet_keep_the_bus(score):
    rows = [{"image_id": 17, "caption": "A bus and a wine glass"}]
    assert score(json.dumps(rows)).beside["mentions"] == 1
    scores = score(json.dumps(rows), singulars="wordnet")
    assert scores.beside["mentions"] == 2 and "wordnet" in scores.made_with["nltk_data"]


def test_what_is_missing(score, tmp_path):
    with pytest.raises(MmpoError, match=r"image 3 and 1 others are in none of COCO's files"):
        score(json.dumps([{"image_id": n, "caption": "a"} for n in (3, 4)]))
    with pytest.raises(MmpoError, match=r"row 1: 'x' is no image of COCO"):
        score(json.dumps([{"image_id": "x", "caption": "a"}]))
    (tmp_path / "coco" / "instances_val2014.json").write_text("{}")
    row = json.dumps([{"image_id": 17, "caption": "a"}])
    with pytest.raises(MmpoError, match=r"instances_val2014.json: has no list of `annotations`"):
        score(row)
    (tmp_path / "coco" / "instances_val2014.json").unlink()
    with pytest.raises(
        MmpoError, match=r"has no instances_val2014.json; it is part of images.coco"
    ):
        score(row)
    (tmp_path / "coco" / "synonyms.txt").unlink()
    with pytest.raises(MmpoError, match=r"has no synonyms.txt; it is part of .*LisaAnne"):
        score(row)
