"""The nouns of an object's name, by spaCy where its model is installed, else by nltk.

The official script of Object HalBench takes spaCy's en_core_web_trf. nltk's tagger sees other parts
of speech now and then, so results say which one it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from mmpo_jax.benchmarks.english import English
from mmpo_jax.core.errors import MmpoError

Nouns = Literal["installed", "spacy", "nltk"]
Parser = Callable[[str], list[tuple[str, str]]]
"""Text -> (lemma, part of speech under Penn Treebank's names) of every word."""

MODEL = "en_core_web_trf"
NOUN_TAGS = ("NNP", "NNPS", "NN", "NNS")


def parser_of(nouns: Nouns, english: English) -> tuple[Parser, str]:
    """(what parses names, how it is called): spaCy's where it is installed or asked for.

    Raises:
      MmpoError: spaCy is asked for, and it or its model is not installed.
    """
    if nouns != "nltk":
        try:
            return _by_spacy()
        except (ImportError, OSError) as error:
            if nouns == "spacy":
                raise MmpoError(
                    f"nouns=spacy: {error}; pip install spacy, and {MODEL} of "
                    "github.com/explosion/spacy-models (what PyPI has of that name is not it)"
                ) from error
    return _by_nltk(english), "nltk"


def noun_runs(parsed: Sequence[tuple[str, str]]) -> list[str]:
    """Nouns that stand next to each other, as one name each."""
    runs: list[list[str]] = [[]]
    for lemma, tag in parsed:
        if tag in NOUN_TAGS:
            runs[-1].append(lemma)
        elif runs[-1]:
            runs.append([])
    return [" ".join(run).strip() for run in runs if run]


def _by_spacy() -> tuple[Parser, str]:
    import spacy

    nlp = spacy.load(MODEL)
    told = f"spaCy {spacy.__version__}, {MODEL} {nlp.meta['version']}"
    return lambda text: [(token.lemma_, token.tag_) for token in nlp(text)], told


def _by_nltk(english: English) -> Parser:
    return lambda text: [
        (english.singular(word) if tag in NOUN_TAGS else word, tag)
        for word, tag in english.tags(english.tokens(text))
    ]
