"""nltk's English data: found where nltk finds them, in the layouts of its old and new versions.

Sentence ends are `punkt_tab` or `punkt`, the tagger `averaged_perceptron_tagger_eng` or
`averaged_perceptron_tagger`, each a folder or a zip; the newer layout is taken where a folder of
the search path has both. The older ones are pickles, of which sets, dicts and numbers are made and
no code is run.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

from mmpo_jax.core.errors import MmpoError


@dataclasses.dataclass(frozen=True)
class Package:
    """A package of nltk's data, unpacked or not."""

    name: str
    path: str
    read: Callable[[str], bytes]
    """The content of one of its files; OSError or KeyError where there is none."""

    def text(self, file: str) -> str:
        return self.read(file).decode("utf-8")


@dataclasses.dataclass(frozen=True)
class Punkt:
    """What Punkt knows of English, see `nltk.tokenize.punkt.PunktParameters`."""

    package: str
    abbrev_types: set[str]
    collocations: set[tuple[str, str]]
    sent_starters: set[str]
    ortho_context: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Tagger:
    """Weights of nltk's averaged perceptron."""

    package: str
    weights: dict[str, dict[str, float]]
    tagdict: dict[str, str]
    classes: set[str]


@dataclasses.dataclass(frozen=True)
class Nouns:
    """WordNet's nouns."""

    package: str
    lemmas: frozenset[str]
    exceptions: dict[str, list[str]]
    """Irregular form -> lemmas."""


def search_path() -> list[str]:
    """The folders of nltk's data, in the order in which nltk looks: those of NLTK_DATA first."""
    check_nltk()
    from nltk import data

    named = [folder for folder in os.environ.get("NLTK_DATA", "").split(os.pathsep) if folder]
    return list(dict.fromkeys([*named, *data.path]))


def load_punkt() -> Punkt:
    """What divides texts into sentences.

    Raises:
      MmpoError: it is not installed, or damaged.
    """
    package = _find("tokenizers", "punkt_tab", "punkt")
    with _named(package):
        if package.name == "punkt_tab":
            pairs = [line.split("\t") for line in _lines(package, "english/collocations.tab")]
            context = [line.split("\t") for line in _lines(package, "english/ortho_context.tab")]
            return Punkt(
                package.name,
                set(_lines(package, "english/abbrev_types.txt")),
                {(first, second) for first, second in pairs},
                set(_lines(package, "english/sent_starters.txt")),
                {word: int(flags) for word, flags in context},
            )
        try:
            pickled = package.read("PY3/english.pickle")
        except (OSError, KeyError):
            pickled = package.read("english.pickle")
        found = _unpickle(pickled)["_params"].__dict__
        return Punkt(
            package.name,
            found["abbrev_types"],
            found["collocations"],
            found["sent_starters"],
            dict(found["ortho_context"]),
        )


def load_tagger() -> Tagger:
    """What says whether a word is a noun.

    Raises:
      MmpoError: it is not installed, or damaged.
    """
    name = "averaged_perceptron_tagger"
    package = _find("taggers", f"{name}_eng", name)
    with _named(package):
        if package.name == name:
            weights, tagdict, classes = _unpickle(package.read(f"{name}.pickle"))
        else:
            weights, tagdict, classes = (
                json.loads(package.read(f"{name}_eng.{part}.json"))
                for part in ("weights", "tagdict", "classes")
            )
        return Tagger(package.name, weights, tagdict, set(classes))


def load_nouns() -> Nouns:
    """What finds the singular of a noun.

    Raises:
      MmpoError: it is not installed, or damaged.
    """
    package = _find("corpora", "wordnet")
    with _named(package):
        entries = package.text("index.noun").splitlines()
        exceptions = [line.split() for line in _lines(package, "noun.exc")]
        return Nouns(
            package.name,
            frozenset(line.split(" ", 1)[0] for line in entries if line[:1] != " "),
            {form: lemmas for form, *lemmas in exceptions},
        )


def _lines(package: Package, file: str) -> list[str]:
    return [line for line in package.text(file).split("\n") if line.strip()]


def _find(kind: str, *names: str) -> Package:
    """The package of the first of these names, in the first folder of the search path that has any.

    Raises:
      MmpoError: there is none, and how to get it.
    """
    searched = search_path()
    for root in searched:
        for name in names:
            folder = os.path.join(root, kind, name)
            if os.path.isdir(folder):
                return Package(name, folder, functools.partial(_read_file, folder))
            if os.path.isfile(f"{folder}.zip"):
                packed = f"{folder}.zip"
                return Package(name, packed, functools.partial(_read_zip, packed, name))
    raise MmpoError(
        f"nltk's data has no {kind}/{' or '.join(names)} in {', '.join(searched)}; get it with "
        f"python -m nltk.downloader {names[0]}, or put the zip of github.com/nltk/nltk_data, "
        f"packages/{kind}, into a folder {kind} and name the folder above it in NLTK_DATA"
    )


def _read_file(folder: str, file: str) -> bytes:
    with open(os.path.join(folder, file), "rb") as opened:
        return opened.read()


def _read_zip(path: str, name: str, file: str) -> bytes:
    with zipfile.ZipFile(path) as packed:
        return packed.read(f"{name}/{file}")


@contextlib.contextmanager
def _named(package: Package) -> Iterator[None]:
    """Says which package cannot be read."""
    try:
        yield
    except (
        OSError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        EOFError,
        zipfile.BadZipFile,
        pickle.UnpicklingError,
    ) as error:
        raise MmpoError(
            f"{package.path}: cannot be read as nltk's {package.name}: {error}; get it again"
        ) from error


def check_nltk() -> None:
    """Checks that nltk is there.

    Raises:
      MmpoError: it is not; how to install it.
    """
    try:
        import nltk  # noqa: F401
    except ImportError as error:
        raise MmpoError(
            "words are found by nltk, which is not installed: pip install 'mmpo_jax[evaluation]'"
        ) from error


class _Inert:
    """Stands for an object of nltk's in a pickle: keeps its state and does nothing."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __getitem__(self, name: str) -> Any:
        return self.__dict__[name]


_MADE: dict[tuple[str, str], type] = {
    ("builtins", "set"): set,
    ("builtins", "int"): int,
    ("builtins", "long"): int,
    ("collections", "defaultdict"): collections.defaultdict,
}
"""What pickles of nltk's data may hold; of whatever else nltk wrote into them nothing is made."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = "builtins" if module == "__builtin__" else module
        if module == "nltk.tokenize.punkt":
            return _Inert
        if (module, name) in _MADE:
            return _MADE[module, name]
        raise pickle.UnpicklingError(f"it holds {module}.{name}, which nltk's data does not")


def _unpickle(data: bytes) -> Any:
    return _Unpickler(io.BytesIO(data)).load()
