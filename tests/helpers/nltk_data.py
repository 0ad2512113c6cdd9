"""Small data of nltk's for tests: a few words, in the layouts of its old and new versions."""

import collections
import json
import pickle
import zipfile

import pytest

NOUNS = (
    *("bench", "bus", "car", "cat", "chair", "child", "dog", "feline", "glass", "grass", "house"),
    *("man", "men", "person", "police", "puppy", "seat", "sheep", "sky", "table", "toilet", "tree"),
    *("tv", "umbrella", "woman"),
)
EXCEPTIONS = {"people": "person", "children": "child", "men": "man", "women": "woman"}


def make_nltk_data(folder, layout="new", zipped=False):
    """Writes tokenizer, tagger and WordNet's nouns; what is no noun here is tagged as a verb."""
    tags = dict.fromkeys(NOUNS, "NN")
    tags |= {f"{word}s": "NNS" for word in NOUNS} | dict.fromkeys(EXCEPTIONS, "NNS")
    tags |= dict.fromkeys(("a", "the", "The", "A"), "DT") | {"Dog": "NN", "TV": "NNP"}
    if layout == "new":
        _write(
            folder,
            "tokenizers",
            "punkt_tab",
            zipped,
            {
                "english/abbrev_types.txt": "mr\n",
                "english/collocations.tab": "s\tbach\n",
                "english/sent_starters.txt": "however\n",
                "english/ortho_context.tab": "the\t30\n",
            },
        )
        name = "averaged_perceptron_tagger_eng"
        _write(
            folder,
            "taggers",
            name,
            zipped,
            {
                f"{name}.weights.json": json.dumps({}),
                f"{name}.tagdict.json": json.dumps(tags),
                f"{name}.classes.json": json.dumps(["DT", "NN", "VB"]),
            },
        )
    else:
        name = "averaged_perceptron_tagger"
        _write(folder, "tokenizers", "punkt", zipped, {"PY3/english.pickle": _punkt()})
        content = pickle.dumps(({}, tags, {"DT", "NN", "VB"}), protocol=2)
        _write(folder, "taggers", name, zipped, {f"{name}.pickle": content})
    entries = "".join(f"{word} n 1 0 1 0 00000000  \n" for word in NOUNS)
    _write(
        folder,
        "corpora",
        "wordnet",
        zipped,
        {
            "index.noun": "  1 A licence.  \n" + entries,
            "noun.exc": "".join(f"{form} {lemma}\n" for form, lemma in EXCEPTIONS.items()),
        },
    )
    return folder


def _punkt():
    punkt = pytest.importorskip("nltk.tokenize.punkt")
    known = punkt.PunktParameters()
    known.abbrev_types, known.collocations = {"mr"}, {("s", "bach")}
    known.sent_starters = {"however"}
    known.ortho_context = collections.defaultdict(int, {"the": 30})
    tokenizer = punkt.PunktSentenceTokenizer()
    tokenizer._params = known
    return pickle.dumps(tokenizer, protocol=2)


def _write(folder, kind, name, zipped, files):
    for file, content in files.items():
        data = content.encode() if isinstance(content, str) else content
        if zipped:
            (folder / kind).mkdir(parents=True, exist_ok=True)
            with zipfile.ZipFile(folder / kind / f"{name}.zip", "a") as packed:
                packed.writestr(f"{name}/{file}", data)
        else:
            path = folder / kind / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
