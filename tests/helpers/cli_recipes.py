"""Recipes and rows that tests of the commands run on."""

import json


def recipe(tmp_path, model, **changes):
    return {
        "output": str(tmp_path / "out"),
        "model": str(model),
        "lengths": {"prompt": [24], "response": [16]},
        "data": {"source": "picture_world", "size": 3, "image_size": 24},
        **changes,
    }


POSSIBLE = {
    "train": {"training": {"objective": {"type": "sft"}}},
    "align": {"sampling": {"max_new_tokens": 4}},
    "generate": {},
    "score": {},
    "evaluate": {"evaluation": {"type": "picture_world", "size": 2, "image_size": 24}},
}
"""What a command needs beside the keys above: their defaults do not go together."""


def write_rows(folder, rows):
    """A JSONL file; strings are taken as lines."""
    path = folder / "rows.jsonl"
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)
