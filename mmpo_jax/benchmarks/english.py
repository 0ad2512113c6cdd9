"""English texts as words, their parts of speech and their singulars, by nltk and its data."""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable
from typing import Any, Literal

from mmpo_jax.benchmarks.nltk_data import (
    Nouns,
    Punkt,
    Tagger,
    check_nltk,
    load_nouns,
    load_punkt,
    load_tagger,
)

ENDINGS = (
    ("s", ""),
    ("ses", "s"),
    ("ves", "f"),
    ("xes", "x"),
    ("zes", "z"),
    ("ches", "ch"),
    ("shes", "sh"),
    ("men", "man"),
    ("ies", "y"),
)
"""WordNet's endings of plural nouns, and those of their singulars."""


Tokenizer = Literal["nltk_3.8", "installed"]

_SIGNS = {
    "re_boundary_realignment": re.compile(r"""["')\]}]+?(?:\s+|(?=--)|$)""", re.MULTILINE),
    "_re_non_word_chars": property(lambda self: r"""(?:[)";}\]*:@'({\[?!])"""),
}
"""Of nltk 3.8: signs behind which a sentence may go on, and those that are no part of words."""


def _word_rules(tokenizer: Any) -> dict[str, Any]:
    """The rules of nltk 3.8 by which it divided words, where those of later versions differ."""
    quote = re.compile(r"(')(?!re|ve|ll|m|t|s|d|n)(\w)\b", re.IGNORECASE)
    return {
        "STARTING_QUOTES": [*tokenizer.STARTING_QUOTES[:-1], (quote, r"\1 \2")],
        "ENDING_QUOTES": [rule for rule in tokenizer.ENDING_QUOTES if rule[0].pattern != r"\s+"],
        "PUNCTUATION": [rule for rule in tokenizer.PUNCTUATION if not rule[0].search("\u2014")],
    }


class English:
    """What nltk's `word_tokenize`, `pos_tag` and `WordNetLemmatizer` say of English.

    Words are divided as nltk 3.8 does, which benchmarks were made with, or as the installed one
    does: later ones also divide at dashes and quote signs. Data are read when they are needed.
    """

    def __init__(self, tokenizer: Tokenizer = "nltk_3.8") -> None:
        self._tokenizer = tokenizer
        self._singulars: dict[str, str] = {}

    def tokens(self, text: str) -> list[str]:
        """The words and signs of a text."""
        sentences, words = self._tokenizers
        return [word for sentence in sentences(text) for word in words(sentence)]

    def tags(self, tokens: list[str]) -> list[tuple[str, str]]:
        """Every token with its part of speech, under Penn Treebank's names."""
        return list(self._tagger.tag(tokens))

    def singular(self, word: str) -> str:
        """The shortest of the nouns in WordNet that a word is a form of; else the word itself."""
        if word not in self._singulars:
            self._singulars[word] = min(nouns_of(word, self._nouns), key=len, default=word)
        return self._singulars[word]

    def check(self) -> None:
        """
        Raises:
          MmpoError: nltk or some of its data are missing, or damaged.
        """
        _ = self._tokenizers, self._tagger, self._nouns

    def made_with(self) -> dict[str, str]:
        """nltk's version, and the names of the data that were used so far."""
        import nltk

        parts = ("_punkt", "_tagger_weights", "_nouns")
        used = [self.__dict__[part].package for part in parts if part in self.__dict__]
        version = "" if self._tokenizer == "installed" else ", words divided as by 3.8"
        return {"nltk": nltk.__version__ + version, "nltk_data": ", ".join(used)}

    @functools.cached_property
    def _tokenizers(self) -> tuple[Callable[[str], list[str]], Callable[[str], list[str]]]:
        """What divides a text into sentences, and a sentence into words."""
        check_nltk()
        from nltk.tokenize.destructive import NLTKWordTokenizer
        from nltk.tokenize.punkt import (
            PunktLanguageVars,
            PunktParameters,
            PunktSentenceTokenizer,
        )

        known = PunktParameters()
        known.abbrev_types = self._punkt.abbrev_types
        known.collocations = self._punkt.collocations
        known.sent_starters = self._punkt.sent_starters
        known.ortho_context = collections.defaultdict(int, self._punkt.ortho_context)
        signs: Any = PunktLanguageVars
        words: Any = NLTKWordTokenizer
        if self._tokenizer == "nltk_3.8":
            signs = type("Signs", (signs,), _SIGNS)
            words = type("Words", (words,), _word_rules(words))
        sentences = PunktSentenceTokenizer(lang_vars=signs())
        sentences._params = known  # as nltk's own loader of `punkt_tab` does
        return sentences.tokenize, words().tokenize

    @functools.cached_property
    def _tagger(self) -> Any:
        check_nltk()
        from nltk.tag.perceptron import PerceptronTagger

        tagger = PerceptronTagger(load=False)
        tagger.model.weights = self._tagger_weights.weights
        tagger.tagdict = self._tagger_weights.tagdict
        tagger.classes = tagger.model.classes = self._tagger_weights.classes
        return tagger

    @functools.cached_property
    def _punkt(self) -> Punkt:
        return load_punkt()

    @functools.cached_property
    def _tagger_weights(self) -> Tagger:
        return load_tagger()

    @functools.cached_property
    def _nouns(self) -> Nouns:
        return load_nouns()


def nouns_of(word: str, nouns: Nouns) -> list[str]:
    """The nouns that a word is a form of, by WordNet's rule.

    Irregular forms are listed; of others the endings are taken off, and once more of what that
    left where it is no noun, as nltk does up to 3.8 (later versions do it once).
    """

    def known(forms: list[str]) -> list[str]:
        return [form for form in forms if form in nouns.lemmas]

    if word in nouns.exceptions:
        return known([word, *nouns.exceptions[word]])
    shorter = _without_endings([word])
    found = known([word, *shorter])
    while shorter and not found:
        shorter = _without_endings(shorter)
        found = known(shorter)
    return found


def _without_endings(words: list[str]) -> list[str]:
    return [
        word[: -len(ending)] + singular
        for word in words
        for ending, singular in ENDINGS
        if word.endswith(ending)
    ]
