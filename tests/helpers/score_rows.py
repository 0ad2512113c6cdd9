"""Rows that tests of `mmpo score` run on, and what they do with rows."""

import json

ASK = "what is in the picture ?"
SHORT, LONG = "a red star", "a green ring and two blue rings and a red star and a white circle ."
PAIRS = [
    {"id": "a", "images": ["0.png"], "prompt": ASK, "chosen": LONG, "rejected": "a ring"},
    {"id": "b", "prompt": "is there a star ? " * 6, "chosen": "yes", "rejected": SHORT},
    {
        "id": "c",
        "images": ["1.png"],
        "prompt": [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ASK}]},
            {"role": "assistant", "content": SHORT},
            {"role": "user", "content": "is the star blue ?"},
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "no"}]}],
        "rejected": [{"role": "assistant", "content": "yes"}],
    },
]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
