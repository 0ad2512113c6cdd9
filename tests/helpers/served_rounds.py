"""A round whose splitter and labeler are served, and a server of both with faults."""

from __future__ import annotations

import collections
import json
import math
import threading
from pathlib import Path
from typing import Any

from helpers.chat_server import Answer, Body, Cut, Hang, Result, error, images, question, reply
from helpers.small_rounds import make_recipe

from mmpo_jax.chat.journal import FILE
from mmpo_jax.core.files import fingerprint_bytes

MODELS = ("splitter", "labeler")


def words_of(text: str) -> list[str]:
    return list(dict.fromkeys(text.split()))


def claims(words: list[str]) -> str:
    """The reply of style `json`: every different word is a claim."""
    return json.dumps({"claims": [{"claim": w, "question": f"is there {w} ?"} for w in words]})


def right_reply(body: Body) -> Answer:
    """What a splitter (of both styles) or a labeler says that works."""
    text = question(body)
    if body["model"] == "labeler":
        asked = text.encode() + b"".join(data for _, data in images(body))
        p_yes = 0.02 + 0.96 * int(fingerprint_bytes(asked)[:2], 16) / 255
        return reply(body, "Yes", [("Yes", math.log(p_yes)), ("No", math.log(1 - p_yes))])
    if "### Sentences:" in text:
        facts = text.partition("### Sentences:\n")[2].splitlines()
        return reply(body, "### Modified sentences:\n" + "\n".join(f"{f} ?" for f in facts))
    words = words_of(text.rpartition("Answer: ")[2])
    if "### Facts:" in text:
        return reply(body, "### Facts:\n" + "\n".join(f"- {word}" for word in words))
    return reply(body, claims(words))


def _changed(body: Body, change: Any) -> Answer:
    """The right reply with another text."""
    answer = right_reply(body)
    message = answer.body["choices"][0]["message"]
    message["content"] = change(message["content"])
    return answer


FAULTS: dict[str, Any] = {
    "limited": lambda body: error(429, "slow down"),
    "limited, wait": lambda body: error(429, "slow down", retry_after="0.05"),
    "broken": lambda body: error(500, "internal error"),
    "silent": lambda body: Hang(),
    "cut": lambda body: Cut(),
    "cut at once": lambda body: Cut(0),
    "no JSON": lambda body: Answer(b'{"choices": ['),
    "empty": lambda body: reply(body, ""),
    "no choices": lambda body: Answer({"choices": []}),
}
UNREADABLE: dict[str, Any] = {
    "talk": lambda body: _changed(body, lambda text: f"Sure! {text} Is that right?"),
    "half": lambda body: _changed(body, lambda text: text[: len(text) // 2]),
    "too few": lambda body: _changed(body, lambda text: text.rpartition("\n")[0] or "none"),
    "too many": lambda body: _changed(body, lambda text: text + "\n- more ?"),
}
"""Replies of splitters that cannot be read."""
NUMBERS = "too few", "too many"
"""Those that only the number of questions gives away, beside that of facts."""


class Feedback:
    """A server's script: right replies, and now and then one of some faults, once a request."""

    def __init__(self, faults: dict[str, Any], delay: float = 0.0) -> None:
        self.faults, self.delay = faults, delay
        self.right: collections.Counter[str] = collections.Counter()
        """How often a request got its right reply, by its body."""
        self.met: collections.Counter[str] = collections.Counter()
        self._seen: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, body: Body, seen: int) -> Result:
        text = json.dumps([body["model"], body["messages"]], sort_keys=True)
        number = int(fingerprint_bytes(text.encode())[:8], 16)
        names = [name for name in self.faults if _can_tell(name, body)]
        with self._lock:
            first = text not in self._seen
            self._seen.add(text)
            if first and names and number % 2:
                name = min(names, key=self.met.__getitem__)  # the rarest so far
                self.met[name] += 1
                return self.faults[name](body)
            self.right[text] += 1
        answer = right_reply(body)
        return Answer(answer.body, delay=self.delay)


def _can_tell(name: str, body: dict[str, Any]) -> bool:
    """Whether a fault in the reply to a request is one that can be noticed."""
    if name in NUMBERS:
        return _is_split(body) and "### Modified sentences" in question(body)
    return name not in UNREADABLE or _is_split(body)


def _is_split(body: Body) -> bool:
    return body["model"] == "splitter"


def served_recipe(output: Path, model: Path, url: str, style: str = "json", **changes: Any) -> Any:
    """`small_rounds.make_recipe` of one round with served splitter and labeler.

    Args:
      output, model: folders.
      url: of the server.
      style: of the splitter.
      **changes: `server`, options of both sections; `feedback`, of the judge; others of the recipe.
    """
    server = {"type": "chat", "url": url, "max_concurrent": 4, **changes.pop("server", {})}
    feedback = {
        "splitter": {**server, "model": "splitter", "style": style},
        "labeler": {**server, "model": "labeler"},
        "max_failed": 0,
        **changes.pop("feedback", {}),
    }
    training = {
        "optimizer": {"learning_rate": 1e-3},
        "batch_size": 4,
        "max_steps": 2,
        "log_every": 1,
        "save_every": 2,
    }
    changes = {"rounds": 1, "evaluation": None, "training": training, **changes}
    return make_recipe(output, model, feedback=feedback, **changes)


def journal_keys(output: Path) -> list[str]:
    """Keys of all lines of the journals of a run, but for what a kill left of one."""
    lines = [
        line
        for path in sorted((output / "chat").glob(f"*/{FILE}"))
        for line in path.read_bytes().splitlines(keepends=True)
        if line.endswith(b"\n")
    ]
    return [json.loads(line)["key"] for line in lines]


def result_files(folder: Path) -> dict[str, bytes]:
    """What has to be the same however a run went: its verdicts, its pairs, its weights."""
    names = ("generate.parquet", "conquer.parquet", "judge.parquet", "pairs.parquet")
    found = [*(folder / "round-1" / name for name in names), folder / "model/model.safetensors"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
