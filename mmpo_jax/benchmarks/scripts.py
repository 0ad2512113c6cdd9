"""Words of official scripts, read from the scripts: nothing of them is run.

What authors ask a judge is in their Python files. Where one of these lies beside a benchmark's
data, the judge is asked in its words, and numbers can be compared with the authors'; else in ours,
under a name of its own.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from mmpo_jax.benchmarks.benchmark import Files
from mmpo_jax.core.errors import DataError
from mmpo_jax.core.files import fingerprint_json, read_bytes


class Script:
    """The constants of a Python file."""

    def __init__(self, path: epath.Path):
        """
        Raises:
          DataError: it cannot be read, or is no Python.
        """
        self.name = str(path)
        try:
            self._tree = ast.parse(read_bytes(path).decode())
        except (SyntaxError, ValueError) as error:
            raise DataError(f"{path}: is no Python file: {error}") from error

    def constant(self, name: str, function: str | None = None) -> Any:
        """The first literal that a name is given, in all of the file or in a function.

        Raises:
          DataError: there is none.
        """
        for node in ast.walk(self._scope(function)):
            if not isinstance(node, ast.Assign):
                continue
            if any(isinstance(target, ast.Name) and target.id == name for target in node.targets):
                try:
                    return ast.literal_eval(node.value)
                except ValueError:
                    continue
        raise DataError(f"{self.name}: has no constant {name}")

    def filled(self, values: Mapping[str, str], name: str, function: str) -> str:
        """What a function gives a name by an f-string, with values for what is in that.

        Raises:
          DataError: there is no such f-string, or it has other places.
        """
        for node in ast.walk(self._scope(function)):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.JoinedStr):
                targets = [one.id for one in node.targets if isinstance(one, ast.Name)]
                if name in targets:
                    return "".join(self._pieces(node.value, values))
        raise DataError(f"{self.name}: {function} has no text {name}")

    def _pieces(self, text: ast.JoinedStr, values: Mapping[str, str]) -> Iterator[str]:
        for piece in text.values:
            if isinstance(piece, ast.Constant):
                yield str(piece.value)
            elif isinstance(piece, ast.FormattedValue):
                if not isinstance(piece.value, ast.Name) or piece.value.id not in values:
                    raise DataError(
                        f"{self.name}: its text has {ast.unparse(piece.value)!r} in it, which is "
                        f"none of {', '.join(values)}"
                    )
                yield values[piece.value.id]

    def _scope(self, function: str | None) -> ast.AST:
        if function is None:
            return self._tree
        for node in ast.walk(self._tree):
            if isinstance(node, ast.FunctionDef) and node.name == function:
                return node
        raise DataError(f"{self.name}: has no function {function}")


def script_of(files: Files, *names: str) -> Script | None:
    """The first of some scripts that lies beside a benchmark's files."""
    folder = files.root if files.root.is_dir() else files.root.parent
    found = next((folder / name for name in names if (folder / name).exists()), None)
    return None if found is None else Script(found)


def official_name(benchmark: str, *texts: str) -> str:
    """Name of a prompt in a script's words, which are part of it as a digest."""
    return f"{benchmark}-official-{fingerprint_json(texts)[:8]}"
