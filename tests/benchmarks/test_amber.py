"""AMBER by a computation of its own from nouns, on made-up pictures, and the table of words."""

import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from helpers.benchmarks import assert_rows_add_up, published
from helpers.nltk_data import make_nltk_data

from mmpo_jax.benchmarks import similar_words
from mmpo_jax.benchmarks.amber import BLOCKS, questions
from mmpo_jax.benchmarks.amber_descriptions import judge
from mmpo_jax.benchmarks.benchmark import Files
from mmpo_jax.benchmarks.score_files import score_answers
from mmpo_jax.cli import main
from mmpo_jax.core.errors import MmpoError

RELATIONS = {
    "dog": ["puppy", "cat"],
    "cat": ["feline"],
    "sky": [],
    "house": ["tree", "dog"],
    "car": ["bus"],
    "woman": ["person"],
    "person": ["woman", "child"],
    "table": ["seat"],
}
PAIRS = [["puppy", "cat"], ["seat", "bench"], ["bus", "tree"], ["child", "woman"]]
KINDS = {
    "as": "discriminative-attribute-state",
    "an": "discriminative-attribute-number",
    "aa": "discriminative-attribute-action",
    "ha": "discriminative-hallucination",
    "asso": "discriminative-relation",
}


@pytest.fixture
def amber(tmp_path):
    """A folder of AMBER's files: three pictures, and a question of every type."""
    folder = tmp_path / "data"
    folder.mkdir()
    described = [
        {"truth": ["dog", "sky"], "hallu": ["car", "cat"]},
        {"truth": ["house", "dog", "dog"], "hallu": ["woman"]},
        {"truth": ["table", "person"], "hallu": ["house", "car"]},
    ]
    asked = [(kind, truth) for kind in [*KINDS.values(), "relation"] for truth in ("yes", "no")]
    rows = [{"type": "generative", **words} for words in described]
    rows += [{"type": kind, "truth": truth} for kind, truth in asked]
    rows = [{"id": number, **row} for number, row in enumerate(rows, 1)]
    (folder / "annotations.json").write_text(json.dumps(rows))
    (folder / "relation.json").write_text(json.dumps(RELATIONS))
    (folder / "safe_words.txt").write_text("sky\nbus")
    (folder / "similar_words.json").write_text(json.dumps(PAIRS))
    sums = ["chair", "safe_cover", "hallu_cover", "non_hallu"]
    kinds = ["", *(f"{kind}_" for kind in (*KINDS, "ha"))]
    sums += [f"{kind}qa_{part}" for kind in kinds for part in ("correct", "no", "ans_no")]
    lines = [f"{name}_{end}" for name in sums for end in ("score=0", "num=0.001")]
    (folder / "metrics.txt").write_text("\n".join(lines))
    return folder


def by_definition(nouns, truth, hallu):
    """Verdicts by arrays: the first of a list that fits a noun, which its owner is credited for."""
    words = sorted({*RELATIONS, *(w for ws in RELATIONS.values() for w in ws), "bench"})
    same = np.eye(len(words), dtype=bool)
    for one, other in PAIRS:
        same[words.index(one), words.index(other)] = same[words.index(other), words.index(one)] = 1
    alike = {word: dict(zip(words, same[n], strict=True)) for n, word in enumerate(words)}

    def entries(heads):
        listed = [(w, place) for place, head in enumerate(heads) for w in RELATIONS[head]]
        return [*listed, *((head, place) for place, head in enumerate(heads))]

    def first(heads, fits):
        return [place for word, place in entries(heads) if fits(word)][:1]

    unsafe, covered, hit = 0, set(), set()
    for noun in nouns:
        if noun in ("sky", "bus"):
            continue
        exact = first(truth, lambda word, noun=noun: word == noun)
        covered.update(exact)
        if not exact:
            hit.update(first(hallu, lambda word, noun=noun: word == noun))
            hit.update(first(hallu, lambda word, noun=noun: alike[noun][word]))
            near = first(truth, lambda word, noun=noun: alike[noun][word])
            covered.update(near)
            unsafe += not near
    return unsafe, covered, hit


def test_verdicts_of_nouns():
    rng = random.Random(0)
    words = sorted({*RELATIONS, *(w for ws in RELATIONS.values() for w in ws)})
    pairs = similar_words.SimilarWords(frozenset(map(frozenset, PAIRS)), "")
    for _ in range(300):
        nouns = rng.choices(words, k=5)
        truth, hallu = rng.choices(sorted(RELATIONS), k=3), rng.choices(sorted(RELATIONS), k=2)
        safe = frozenset(("sky", "bus"))
        found = judge(nouns, truth, hallu, RELATIONS, safe, pairs.similar)
        expected = by_definition(nouns, truth, hallu)
        assert (len(found.unsafe), found.covered, found.hit) == expected, (nouns, truth, hallu)
    # an association credits the word that it is listed under, not the word itself
    assert judge(["dog"], ["house", "dog"], [], RELATIONS, frozenset(), pairs.similar).covered == {
        0
    }
    # one noun hits two inventions; another one hits one and is right all the same
    two = judge(["tree"], ["sky"], ["car", "house"], RELATIONS, frozenset(), pairs.similar)
    assert (two.unsafe, two.hit) == (("tree",), {0, 1})
    saved = judge(["puppy"], ["cat"], ["dog"], RELATIONS, frozenset(), pairs.similar)
    assert (saved.unsafe, saved.covered, saved.hit) == ((), {0}, {0})


def run(folder, answers, monkeypatch, **options):
    monkeypatch.setenv("NLTK_DATA", str(make_nltk_data(folder.parent / "nltk")))
    (folder.parent / "answers.json").write_text(json.dumps(answers))
    given = str(folder.parent / "answers.json"), str(folder.parent / "out.json")
    return score_answers("amber", str(folder), *given, options)


DESCRIPTIONS = {
    1: ("a dogs, the cat. A car and umbrella", ["dog", "cat", "car"]),
    2: ("Dog. TV. the puppy's house and buses", ["puppy", "house"]),
    3: ("", []),
}


def test_numbers_are_those_of_the_sums(amber, monkeypatch):
    pytest.importorskip("nltk")
    said = ["Yes", "No", "No", "No", "yes", "No.", "No", "No", "Yes", "Yes", "Yes", "No"]
    answers = [{"id": n, "response": text} for n, (text, _) in DESCRIPTIONS.items()]
    answers += [{"id": n, "response": text} for n, text in enumerate(said, 4)]
    scores = run(amber, answers[::-1], monkeypatch)
    rows = json.loads((amber / "annotations.json").read_text())
    counts = np.zeros(4)
    sizes = np.full(4, 0.001)
    for row, (_, nouns) in zip(rows, DESCRIPTIONS.values(), strict=False):
        unsafe, covered, hit = by_definition(nouns, row["truth"], row["hallu"])
        counts += [unsafe, len(covered), not unsafe, len(hit)]
        sizes += [len(nouns), len(row["truth"]), 1, len(row["hallu"])]
    chair, cover, clean, cog = 100 * counts / sizes
    expected = {"CHAIR": chair, "Cover": cover, "Hal": 100 - clean, "Cog": cog}
    truths = [row["truth"] for row in rows[3:]]
    kinds = [row["type"] for row in rows[3:]]
    for block in BLOCKS:
        named = [KINDS[kind.strip("_")] for kind in block.kinds if kind]
        named += ["relation"] if block.name == "Relation " else []
        chosen = [n for n, kind in enumerate(kinds) if not named or kind in named]
        no = np.array([said[n] == "No" for n in chosen])
        truly = np.array([truths[n] == "no" for n in chosen])
        right = [said[n] == truths[n].capitalize() for n in chosen]
        below = 0.001 * len(block.kinds)
        p = round(100 * (no & truly).sum() / (no.sum() + below), 1)
        r = round(100 * (no & truly).sum() / (truly.sum() + below), 1)
        expected[f"{block.name}Accuracy"] = 100 * sum(right) / (len(chosen) + below)
        expected |= {f"{block.name}Precision": p, f"{block.name}Recall": r}
        tail = 0.001 if block.name == "Existence " else 0.0001
        expected[f"{block.name}F1"] = 2 * p * r / (p + r + 100 * tail)
    found = dict(scores.metrics)
    assert found.pop("AMBER Score") == (100 - found["CHAIR"] + found["F1"]) / 2
    assert found == {name: round(value, 1) for name, value in expected.items()}
    assert_rows_add_up("amber", scores, tolerance=0.15)
    assert scores.beside["nouns_lost_to_capitals"] == 1
    assert scores.beside["neither_ratio"] == pytest.approx(2 / 12)
    assert scores.made_with["similar_words"].startswith("unknown vectors, SHA-256")
    by_words = run(amber, answers, monkeypatch, reading="whole_word", evaluation_type="d")
    assert by_words.beside["neither_ratio"] == 0 and "CHAIR" not in by_words.metrics
    # an empty run prints what it begins with, and no score of both
    empty = run(amber, answers[3:], monkeypatch).metrics
    assert empty["Hal"] == 100 and empty["CHAIR"] == 0 and np.isnan(empty["AMBER Score"])


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([{"id": "x", "response": "No"}], "row 1: the id is 'x' and no number"),
        ([{"id": 16, "response": "No"}], "row 1: the id is 16, not one of 1 to 15"),
        ([{"id": 4}], "row 1: has no 'response' or 'answer'"),
    ],
)
def test_answers_that_are_none(amber, monkeypatch, answers, told):
    pytest.importorskip("nltk")
    with pytest.raises(MmpoError, match=told):
        run(amber, answers, monkeypatch)


def test_questions_for_a_model(amber, monkeypatch):
    pytest.importorskip("nltk")
    monkeypatch.setenv("NLTK_DATA", str(make_nltk_data(amber.parent / "nltk")))
    (amber / "query").mkdir()
    rows = [
        {"id": n, "image": "AMBER_1.jpg", "query": "Is it?" if n > 1004 else "Describe it."}
        for n in (1, 1005)
    ]
    (amber / "query" / "query_all.json").write_text(json.dumps(rows))
    (amber / "AMBER_1.jpg").write_bytes(b"")
    described, asked = questions(Files(amber, ""), suffix=" Yes or No?")
    assert [r.id for r in described.records] == ["1"] and described.max_new_tokens == 512
    assert asked.records[0].prompt[0].content == "Is it? Yes or No?"
    assert asked.max_new_tokens == 16
    (amber / "similar_words.json").unlink()
    with pytest.raises(MmpoError, match=r"similar_words.json: is missing"):
        questions(Files(amber, ""))


# The table of similar words -----------------------------------------------------------------------


def test_the_table_is_made_of_vectors(amber, tmp_path, capsys):
    (amber / "relation.json").write_text(json.dumps({"dog": ["puppy", "e-dog"], "TV": ["owl"]}))
    vectors = "3 2\ndog 1 0\npuppy 0.9 0.43\ntv 0 1\n- 0 0\ne 0.5 0.1\nother 1 1\n"
    (tmp_path / "vectors.txt").write_text(vectors)
    arguments = ["--data", str(amber), "--vectors", str(tmp_path / "vectors.txt")]
    similar_words.main(arguments)
    # |puppy| = 0.9975: its cosine with dog is 0.902; that of e + dog with dog 0.998
    pairs = json.loads((amber / "similar_words.json").read_text())
    assert pairs == [["dog", "e-dog"], ["dog", "puppy"], ["e-dog", "puppy"]]
    assert "similar to themselves alone: owl" in capsys.readouterr().out
    table = similar_words.read_similar_words(amber)
    assert table.made_by == "vectors of vectors.txt" and table.similar("puppy", "dog")
    assert table.similar("owl", "owl") and not table.similar("TV", "dog")
    (amber / "similar_words.json").write_text("[]")
    assert similar_words.read_similar_words(amber).made_by.startswith("unknown vectors")
    (tmp_path / "vectors.txt").write_text("hound 1 0\n")
    with pytest.raises(MmpoError, match=r"vectors.txt: none of AMBER's 5 words is among them"):
        similar_words.main(arguments)
    (tmp_path / "vectors.txt").write_text("dog 1 0\npuppy\n")
    with pytest.raises(MmpoError, match=r"vectors.txt, line 2: is no word with its numbers"):
        similar_words.main(arguments)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        (None, "is missing; .* python -m mmpo_jax.benchmarks.similar_words --data"),
        ("{}", "is no list of pairs of words"),
        ('[["a", "b"], ["a"]]', "pair 2: is no pair of words but"),
        ("[", "is no JSON"),
    ],
)
def test_a_table_that_is_none(amber, table, told):
    (amber / "similar_words.json").unlink()
    if table is not None:
        (amber / "similar_words.json").write_text(table)
    with pytest.raises(MmpoError, match=told):
        similar_words.read_similar_words(amber)


# The published files ------------------------------------------------------------------------------


@published
@pytest.mark.parametrize(
    ("said", "numbers"),
    [("No", (66.3, 66.3, 100.0, 79.7)), ("Yes", (33.7, 0.0, 0.0, 0.0))],
)
def test_trivial_answers(tmp_path, said, numbers):
    folder = os.path.join(os.environ["MMPO_EVALUATION_DATA"], "amber")
    answers = [{"id": n, "response": said} for n in range(1005, 15221)]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    command = ["evaluate", "--benchmark", "amber", "--data", folder, "--rule", "evaluation_type=d"]
    command += ["--responses", str(tmp_path / "answers.json"), "--output", str(tmp_path / "o.json")]
    assert main(command) == 0
    metrics = json.loads((tmp_path / "o.json").read_text())["metrics"]
    assert tuple(metrics[name] for name in ("Accuracy", "Precision", "Recall", "F1")) == numbers


@published
def test_what_naming_everything_covers():
    """The first object that a word is associated with is credited, which keeps Cover below 100."""
    folder = Path(os.environ["MMPO_EVALUATION_DATA"]) / "amber"
    relations = json.loads((folder / "relation.json").read_text())
    safe = frozenset((folder / "safe_words.txt").read_text().split("\n"))
    rows = json.loads((folder / "annotations.json").read_text())[:1004]
    everything = sorted({*relations, *(word for words in relations.values() for word in words)})

    def cover(nouns_of):
        verdicts = [
            judge(nouns_of(row), row["truth"], row["hallu"], relations, safe, lambda a, b: a == b)
            for row in rows
        ]
        return round(100 * sum(len(one.covered) for one in verdicts) / 5599.001, 1)

    assert cover(lambda row: row["truth"]) == 93.3
    assert cover(lambda row: everything) == 98.0
