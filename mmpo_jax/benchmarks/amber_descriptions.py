"""What descriptions say of AMBER's pictures: nouns that are there, invented, or expected to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mmpo_jax.benchmarks.english import English, Tokenizer
from mmpo_jax.benchmarks.similar_words import (
    SimilarWords,
    read_relations,
    read_similar_words,
    read_text,
    words_of,
)
from mmpo_jax.benchmarks.tables import Row
from mmpo_jax.core.errors import MmpoError


@dataclasses.dataclass(frozen=True)
class Verdicts:
    """What the nouns of a description say of its picture."""

    unsafe: tuple[str, ...]
    """Nouns that are nowhere in the picture."""
    covered: frozenset[int]
    """Places of objects in the picture that are mentioned."""
    hit: frozenset[int]
    """Places of expected inventions that are mentioned."""


@dataclasses.dataclass(frozen=True)
class Descriptions:
    """What descriptions are scored with."""

    relations: Mapping[str, Sequence[str]]
    words: frozenset[str]
    """All words that count; other nouns are not looked at."""
    safe: frozenset[str]
    similar: SimilarWords
    english: English

    @classmethod
    def read(cls, folder: epath.Path, tokenizer: Tokenizer = "nltk_3.8") -> Descriptions:
        """From AMBER's folder and nltk's data.

        Raises:
          MmpoError: a file is missing; where to get it.
        """
        relations = read_relations(folder)
        safe = frozenset(read_text(folder / "safe_words.txt").splitlines())
        similar = read_similar_words(folder)
        return cls(relations, frozenset(words_of(relations)), safe, similar, English(tokenizer))

    def nouns(self, text: str) -> list[str]:
        """The singulars of all words that are tagged as nouns."""
        tagged = self.english.tags(self.english.tokens(text))
        return [self.english.singular(word) for word, tag in tagged if tag.startswith("NN")]

    def score(self, question: Row, text: str, sums: dict[str, float]) -> dict[str, Any]:
        """What a description names; adds it to the sums, under the script's names."""
        said_nouns = self.nouns(text)
        nouns = [noun for noun in said_nouns if noun in self.words]
        truth, hallu = (
            _words(question, "truth", self.relations),
            _words(question, "hallu", self.relations),
        )
        verdicts = judge(nouns, truth, hallu, self.relations, self.safe, self.similar.similar)
        sums["chair_score"] += len(verdicts.unsafe)
        sums["chair_num"] += len(nouns)
        sums["safe_cover_score"] += len(verdicts.covered)
        sums["safe_cover_num"] += len(truth)
        sums["hallu_cover_score"] += len(verdicts.hit)
        sums["hallu_cover_num"] += len(hallu)
        sums["non_hallu_score"] += not verdicts.unsafe
        sums["non_hallu_num"] += 1
        capitals = [noun for noun in said_nouns if noun not in self.words]
        return {
            "nouns": nouns,
            "unsafe": list(verdicts.unsafe),
            "covered": [truth[place] for place in sorted(verdicts.covered)],
            "hit": [hallu[place] for place in sorted(verdicts.hit)],
            "words": len(text.split()),
            "nouns_lost_to_capitals": sum(
                self.english.singular(noun.lower()) in self.words for noun in capitals
            ),
        }

    def made_with(self) -> dict[str, str]:
        return {"similar_words": self.similar.made_by, **self.english.made_with()}


def judge(
    nouns: Sequence[str],
    truth: Sequence[str],
    hallu: Sequence[str],
    relations: Mapping[str, Sequence[str]],
    safe: frozenset[str],
    similar: Callable[[str, str], bool],
) -> Verdicts:
    """The official verdicts of a description's nouns, in their order.

    What is in the picture, or may be invented, is a list of all words' associations and then the
    words themselves, and the first fitting one of it counts, for the word that it is listed under.

    Args:
      nouns: of the description, each as often as it stands there.
      truth: words for what is in the picture.
      hallu: words for what models invent there.
      relations: associated words of every word.
      safe: words that are always right, and count for nothing.
      similar: whether two words mean about the same.
    """
    in_picture, inventions = _with_relations(truth, relations), _with_relations(hallu, relations)
    unsafe: list[str] = []
    covered: set[int] = set()
    hit: set[int] = set()
    for noun in nouns:
        if noun in safe:
            continue
        named = next((place for word, place in in_picture if word == noun), None)
        if named is not None:
            covered.add(named)
            continue
        for fits in (noun.__eq__, lambda word, noun=noun: similar(noun, word)):
            hit.update([place for word, place in inventions if fits(word)][:1])
        alike = next((place for word, place in in_picture if similar(noun, word)), None)
        if alike is None:
            unsafe.append(noun)
        else:
            covered.add(alike)
    return Verdicts(tuple(unsafe), frozenset(covered), frozenset(hit))


def _with_relations(
    words: Sequence[str], relations: Mapping[str, Sequence[str]]
) -> list[tuple[str, int]]:
    """(word, place of the word that it stands for): associations first, then the words."""
    associated = [(other, place) for place, word in enumerate(words) for other in relations[word]]
    return associated + [(word, place) for place, word in enumerate(words)]


def _words(question: Row, key: str, relations: Mapping[str, Sequence[str]]) -> list[str]:
    """The words of an annotation, all of which have relations.

    Raises:
      MmpoError: one has none.
    """
    words = question.need(key)
    unknown = [word for word in words if word not in relations]
    if unknown:
        raise MmpoError(f"{question.name}: {unknown[0]!r} of {key!r} is not in relation.json")
    return list(words)
