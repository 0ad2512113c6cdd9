"""Words by nltk and its data in all layouts, and singulars by the rules of CHAIR's script."""

import os
import pickle

import pytest
from helpers.nltk_data import make_nltk_data

from mmpo_jax.benchmarks.english import English, nouns_of
from mmpo_jax.benchmarks.nltk_data import Nouns, load_punkt, load_tagger
from mmpo_jax.benchmarks.singulars import singular_by_rules
from mmpo_jax.core.errors import MmpoError

pytest.importorskip("nltk")


@pytest.mark.parametrize("zipped", [False, True], ids=["folders", "zips"])
@pytest.mark.parametrize("layout", ["old", "new"])
def test_every_layout_of_the_data(tmp_path, monkeypatch, layout, zipped):
    monkeypatch.setenv("NLTK_DATA", str(make_nltk_data(tmp_path / "first", layout, zipped)))
    later = make_nltk_data(tmp_path / "later", {"old": "new", "new": "old"}[layout])
    monkeypatch.setattr("nltk.data.path", [str(later)])
    english = English()
    tokens = english.tokens("Mr. Bach sees a dog. The cats' women\nsit.")
    assert tokens[:2] == ["Mr.", "Bach"] and tokens[5] == "."
    tagged = [(english.singular(word), tag) for word, tag in english.tags(tokens)]
    assert ("dog", "NN") in tagged and ("woman", "NNS") in tagged and ("sees", "VB") in tagged
    packages = english.made_with()["nltk_data"]
    assert ("punkt_tab" in packages) == ("tagger_eng" in packages) == (layout == "new")


def test_words_are_those_of_nltk_3_8(tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(make_nltk_data(tmp_path)))
    old, installed = English(), English("installed")
    # what nltk 3.8.1 gave
    said = {
        "a scarf—a red one.": ["a", "scarf—a", "red", "one", "."],
        "the dogs'\nbowl": ["the", "dogs'", "bowl"],
        "can't, 'tis": ["ca", "n't", ",", "'t", "is"],
        'He said "no."': ["He", "said", "``", "no", ".", "''"],
        "rock'n'roll": ["rock'n'roll"],
        "It ends.” The next.": ["It", "ends.", "”", "The", "next", "."],
    }
    assert {text: old.tokens(text) for text in said} == said
    assert installed.tokens("a scarf—a red one.") != said["a scarf—a red one."]


def test_data_that_are_missing_or_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("NLTK_DATA", str(tmp_path))
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(MmpoError, match=r"no tokenizers/punkt_tab or punkt in .*nltk.downloader"):
        load_punkt()
    folder = tmp_path / "taggers" / "averaged_perceptron_tagger"
    folder.mkdir(parents=True)
    called = tmp_path / "called"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(called),)

    (folder / f"{folder.name}.pickle").write_bytes(pickle.dumps(({}, Evil(), set())))
    with pytest.raises(MmpoError, match=r"cannot be read as .*it holds posix.mkdir"):
        load_tagger()
    assert not called.exists()


def test_forms_of_nouns():
    nouns = Nouns("", frozenset({"woman", "men", "man", "us", "u"}), {"women": ["woman"]})
    assert nouns_of("women", nouns) == ["woman"]
    assert nouns_of("us", nouns) == ["us", "u"]
    assert nouns_of("womens", nouns) == ["woman"]  # the endings twice
    assert nouns_of("running", nouns) == []


@pytest.mark.parametrize(
    ("word", "singular"),
    [
        ("dogs", "dog"), ("buses", "bus"), ("bus", "bu"), ("glass", "glas"), ("glasses", "glass"),
        ("women", "woman"), ("people", "person"), ("knives", "knife"), ("calves", "calf"),
        ("stoves", "stove"), ("canoes", "cano"), ("cookies", "cookies"), ("ties", "ty"),
        ("scissors", "scissors"), ("mice", "mouse"), ("slice", "slouse"), ("puppies", "puppy"),
        ("sheep", "sheep"), ("couches", "couch"), ("men-of-war", "man-of-war"), ("dogs'", "dog's"),
        ("hour", "hmy"), ("pizza", "pizza"), ("oxen", "ox"), ("bases", "basis"), ("'", "'s"),
        ("geese", "goose"), ("vases", "vase"), ("tennis", "tenni"), ("oxen's", "ox's"),
    ],
)  # fmt: skip
def test_singulars_by_the_rules_of_pattern(word, singular):
    assert singular_by_rules(word) == singular
