"""Which of AMBER's words count as similar: the table, and the script that makes it.

    python -m mmpo_jax.benchmarks.similar_words --data DIR --spacy en_core_web_lg
    python -m mmpo_jax.benchmarks.similar_words --data DIR --vectors glove.840B.300d.txt

AMBER asks spaCy whether two words' vectors have a cosine above 0.8. Only the words of its relations
are ever compared, so a list of the pairs that do is all that is left to know of a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
from etils import epath

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.files import fingerprint_bytes, read_bytes, write_atomic, write_json
from mmpo_jax.core.progress import counted

SOURCE = "github.com/junyangwang0410/AMBER, data/"
TABLE = "similar_words.json"
ORIGIN = "similar_words.made_by.json"
"""Beside the table: what it was made of."""

THRESHOLD = 0.8
"""Cosines above it count as similar."""

MODULE = "mmpo_jax.benchmarks.similar_words"
"""This one, as it is called."""


@dataclasses.dataclass(frozen=True)
class SimilarWords:
    """The pairs of words that count as similar."""

    pairs: frozenset[frozenset[str]]
    made_by: str
    """The model of the vectors, or that nobody said."""

    def similar(self, one: str, other: str) -> bool:
        return one == other or frozenset((one, other)) in self.pairs


def read_similar_words(folder: epath.Path) -> SimilarWords:
    """The table in AMBER's folder.

    Raises:
      MmpoError: it is missing, and how to make it; or it is no list of pairs of words.
    """
    path = folder / TABLE
    if not path.exists():
        raise MmpoError(
            f"{path}: is missing; it says which words have similar vectors. Make it once: "
            f"python -m {MODULE} --data {folder} --spacy en_core_web_lg "
            "(or --vectors FILE, of GloVe or word2vec as text)"
        )
    content = read_bytes(path)
    try:
        pairs = json.loads(content)
    except ValueError as error:
        raise MmpoError(f"{path}: is no JSON: {error}") from error
    if not isinstance(pairs, list):
        raise MmpoError(f"{path}: is no list of pairs of words")
    for number, pair in enumerate(pairs, 1):
        if (
            not isinstance(pair, list)
            or len(pair) != 2
            or not all(isinstance(word, str) for word in pair)
        ):
            raise MmpoError(f"{path}, pair {number}: is no pair of words but {pair!r:.80}")
    return SimilarWords(frozenset(map(frozenset, pairs)), _origin(folder, content))


def _origin(folder: epath.Path, table: bytes) -> str:
    """What made a table, if the file beside it is about this very table."""
    unknown = f"unknown vectors, SHA-256 of the table {fingerprint_bytes(table)[:16]}"
    try:
        told = json.loads(read_bytes(folder / ORIGIN))
        return str(told["made_by"]) if told["sha256"] == fingerprint_bytes(table) else unknown
    except (MmpoError, ValueError, KeyError, TypeError):
        return unknown


def amber_folder(root: epath.Path) -> epath.Path:
    """The folder of AMBER's files in a folder or repository of it.

    Raises:
      MmpoError: it has none of them.
    """
    folder = next(
        (folder for folder in (root, root / "data") if (folder / "annotations.json").exists()), None
    )
    if folder is None:
        raise MmpoError(f"{root}: has no annotations.json; it is part of {SOURCE}")
    return folder


def read_relations(folder: epath.Path) -> dict[str, list[str]]:
    """AMBER's words with their associations, `relation.json`.

    Raises:
      MmpoError: it is missing or is no table of lists.
    """
    path = folder / "relation.json"
    try:
        relations = json.loads(read_bytes(path))
    except (OSError, ValueError) as error:
        raise MmpoError(f"{path}: cannot be read: {error}") from error
    if not isinstance(relations, dict) or not all(
        isinstance(words, list) and all(isinstance(word, str) for word in words)
        for words in relations.values()
    ):
        raise MmpoError(f"{path}: is no table of words with their associations")
    return relations


def read_text(path: epath.Path) -> str:
    """A file of AMBER's.

    Raises:
      MmpoError: it is missing or is no text.
    """
    try:
        return read_bytes(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MmpoError(f"{path}: cannot be read: {error}") from error


def words_of(relations: Mapping[str, Sequence[str]]) -> list[str]:
    """All words that are ever compared, sorted."""
    return sorted({*relations, *itertools.chain.from_iterable(relations.values())})


def by_spacy(
    words: Sequence[str], model: str
) -> tuple[Callable[[str, str], float], str, list[str]]:
    """(similarity of two words, what computes it, words without a vector) by spaCy, as AMBER does.

    Raises:
      MmpoError: spaCy or the model is not installed, or the model has no vectors.
    """
    try:
        import spacy
    except ImportError as error:
        raise MmpoError("--spacy: spaCy is not installed: pip install spacy") from error
    try:
        nlp = spacy.load(model)
    except OSError as error:
        raise MmpoError(f"--spacy {model}: {error}; python -m spacy download {model}") from error
    if not len(nlp.vocab.vectors):
        raise MmpoError(f"--spacy {model}: the model has no word vectors; take {model[:-3]}_lg")
    documents = {word: nlp(word) for word in words}
    without = [word for word, document in documents.items() if not document.vector_norm]

    def similarity(one: str, other: str) -> float:
        if one in without or other in without:  # spaCy says 0 too, with a warning
            return 0.0
        return float(documents[one].similarity(documents[other]))

    return similarity, f"spaCy {spacy.__version__}, {model} {nlp.meta['version']}", without


def by_vectors(
    words: Sequence[str], path: str
) -> tuple[Callable[[str, str], float], str, list[str]]:
    """(similarity of two words, what computes it, words without a vector) by a file of vectors.

    The vector of a word is that of the word as it is written, else in lower case; of one with a
    hyphen it is the sum of its parts', hyphens included, as spaCy divides such words.

    Raises:
      MmpoError: the file cannot be read as lines of a word and its numbers.
    """
    parts = {word: _parts(word) for word in words}
    forms = {form for word in words for part in parts[word] for form in _forms(part)}
    known = dict(_vectors(path, forms))

    def one(word: str) -> np.ndarray | None:
        return next((known[form] for form in _forms(word) if form in known), None)

    vectors: dict[str, np.ndarray] = {}
    for word in words:
        found = [one(part) for part in parts[word]]
        total = sum((vector for vector in found if vector is not None), np.zeros(1))
        if np.linalg.norm(total):
            vectors[word] = total / np.linalg.norm(total)
    return (
        lambda one, other: (
            float(vectors[one] @ vectors[other]) if one in vectors and other in vectors else 0.0
        ),
        f"vectors of {os.path.basename(path)}",
        [word for word in words if word not in vectors],
    )


def _parts(word: str) -> list[str]:
    """air-conditioning: air, -, conditioning."""
    return [part for part in "\0-\0".join(word.split("-")).split("\0") if part]


def _forms(word: str) -> tuple[str, ...]:
    return (word, word.lower())


def _vectors(path: str, wanted: set[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Those of the wanted words that a text file of vectors has, [D], float64.

    A first line of two numbers, as word2vec has, is passed over. Words may hold blanks.
    """
    size = 0
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            lines = counted(cast(Iterable[bytes], file), "reading vectors", "lines")
            for number, line in enumerate(lines, 1):
                fields = line.decode("utf-8", errors="replace").rstrip("\n").rstrip().split(" ")
                if number == 1 and len(fields) == 2:
                    continue
                size = size or len(fields) - 1
                if len(fields) <= size or size < 2:
                    raise MmpoError(f"{path}, line {number}: is no word with its numbers")
                word = " ".join(fields[:-size])
                if word in wanted:
                    yield word, np.array(fields[-size:], np.float64)
    except (OSError, EOFError, ValueError) as error:
        raise MmpoError(f"{path}: cannot be read as words with their vectors: {error}") from error


def similar_pairs(words: Sequence[str], similarity: Callable[[str, str], float]) -> list[list[str]]:
    """The pairs of different words above the threshold."""
    return [
        [one, other]
        for one, other in itertools.combinations(words, 2)
        if similarity(one, other) > THRESHOLD
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", required=True, help="AMBER's folder, with relation.json")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--spacy", metavar="MODEL", help="an installed model with vectors")
    source.add_argument("--vectors", metavar="FILE", help="GloVe or word2vec as text, perhaps .gz")
    options = parser.parse_args(arguments)
    folder = amber_folder(epath.Path(options.data))
    words = words_of(read_relations(folder))
    similarity, made_by, without = (
        by_spacy(words, options.spacy) if options.spacy else by_vectors(words, options.vectors)
    )
    if len(without) == len(words):
        raise MmpoError(f"{made_by}: none of AMBER's {len(words)} words is among them")
    pairs = similar_pairs(words, similarity)
    table = json.dumps(pairs, ensure_ascii=False).replace("], ", "],\n ").encode() + b"\n"
    origin = {
        "made_by": made_by,
        "sha256": fingerprint_bytes(table),
        "threshold": THRESHOLD,
        "words": len(words),
        "pairs": len(pairs),
        "words_without_a_vector": without,
    }
    write_atomic(folder / TABLE, table)
    write_json(folder / ORIGIN, origin)
    print(f"{folder / TABLE}: {len(pairs)} pairs of {len(words)} words, by {made_by}")
    if without:
        print(f"without a vector, similar to themselves alone: {', '.join(without)}")


if __name__ == "__main__":
    try:
        main()
    except MmpoError as error:
        sys.exit(f"error: {error}")
