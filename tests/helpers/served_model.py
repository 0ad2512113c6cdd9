"""A chat server that tests give as the user's command; what it sees is in a file of notes.

    python served_model.py PORT NOTES [--slow SECONDS] [--dies STATUS] [--dies-after N] [--stubborn]

It imports nothing but the standard library, so it is up at once.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest has it

from helpers.chat_server import ChatTestServer, images, question, reply

WORDS = ("red", "blue", "star", "ring", "two", "a", "there", "is")
NAME = "round-model"
CUT = 5
"""One in so many answers is cut at its limit."""


def text_of(seed):
    """What is said under a seed."""
    return " ".join(random.Random(seed).choices(WORDS, k=4))


def is_cut(seed):
    return seed % CUT == 0


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("notes")
    parser.add_argument("--slow", type=float, default=0.0)
    parser.add_argument("--dies", type=int)
    parser.add_argument("--dies-after", type=int, default=10**9)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--stubborn", action="store_true")
    options = parser.parse_args()
    if options.stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    folders = {name: os.environ.get(name) for name in ("MMPO_MODEL", "MMPO_ROUND")}
    files = sorted(os.listdir(folders["MMPO_MODEL"])) if folders["MMPO_MODEL"] else []
    note(options.notes, {"pid": os.getpid(), "files": files, **folders})
    print("loading the model", flush=True)
    if options.dies is not None:
        print("no memory for it", file=sys.stderr)
        sys.exit(options.dies)
    time.sleep(options.slow)
    answered = 0

    def script(body, seen):
        nonlocal answered
        answered += 1
        if answered > options.dies_after:
            os._exit(3)
        shown = [len(data) for _, data in images(body)]
        asked = {"question": question(body), "images": shown, "roles": roles(body)}
        note(options.notes, {**body, "messages": None, **asked})
        seed = body["seed"]
        finish = "length" if is_cut(seed) else "stop"
        return reply(body, text_of(seed), finish=finish, delay=options.delay)

    with ChatTestServer(script, models=(NAME,), port=options.port):
        time.sleep(10**6)


def roles(body):
    return [message["role"] for message in body["messages"]]


def note(path, entry):
    """Adds a line at once."""
    with open(path, "a") as file:
        file.write(json.dumps(entry) + "\n")


if __name__ == "__main__":
    main()
