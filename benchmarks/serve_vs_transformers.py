"""Requests to a server with a LLaVA-shaped model: `transformers serve`, batches, and `mmpo serve`.

Clients ask at the same time, each about a picture of its own, for answers of different lengths:
once for one greedy answer, and once for several samples of each. `transformers serve` knows no
`n`, so there a client sends as many requests. The third side is no server: transformers'
`generate` gets all requests at once, sorted by length, in batches of the best of some sizes, which
is what somebody writes who does not need a server; a batch runs until its longest answer ends.

A random model ends no answer by itself, so lengths are those that clients ask for. Greedy answers
of the servers have to be equal. Each side is a process of its own, all take turns, and rates are
medians over the turns; the first turn of each kind, which compiles, is not timed. Processor
seconds are those of the side's process alone: the clients are in another.

    python benchmarks/serve_vs_transformers.py
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import dataclasses
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
from checkpoint import make_checkpoint, picture, random_words

KINDS = ("one", "several")
"""Answers to a request: a greedy one, or several samples."""
BATCHES = (1, 2, 4, 8)
"""Requests at a time of the side that is no server; the best counts."""
PATIENCE = 600
"""Seconds for a server to be up, and for a request."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What all sides are run with."""

    requests: int = 48
    samples: int = 8
    """Answers to a request of the kind `several`."""
    several: int = 12
    """Requests of that kind."""
    shortest: int = 8
    longest: int = 128
    """Tokens of answers, drawn evenly between the two on a logarithmic scale."""
    clients: int = 32
    """Requests at a time."""
    places: int = 16
    """Samples that our server decodes at a time."""
    repeats: int = 3
    seed: int = 0


def make_requests(settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """Kind -> bodies of requests, without model."""
    random = np.random.default_rng(settings.seed)
    made: dict[str, list[dict[str, Any]]] = {}
    for kind, count in (("one", settings.requests), ("several", settings.several)):
        made[kind] = []
        for number in range(count):
            url = f"data:image/jpeg;base64,{base64.b64encode(picture(random)).decode()}"
            low, high = np.log([settings.shortest, settings.longest])
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": random_words(random, int(random.integers(10, 60)))},
            ]
            made[kind].append(
                {
                    "messages": [{"role": "user", "content": content}],
                    "max_tokens": int(np.exp(random.uniform(low, high))),
                    "temperature": 0 if kind == "one" else 1.0,
                    "seed": number,
                    "n": 1 if kind == "one" else settings.samples,
                }
            )
    return made


class Server:
    """A server in a process, and what its processor time is."""

    knows_n = True

    def __init__(self, command: list[str], model: str, log: str):
        self.model, self.url = model, f"http://127.0.0.1:{command[-1]}"
        self.log = open(log, "w")  # noqa: SIM115 (as long as the process)
        self.process = subprocess.Popen(command, stdout=self.log, stderr=self.log)
        self._wait(log)

    def _wait(self, log: str) -> None:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{self.url}/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        with open(log) as file:
            sys.exit(f"no server at {self.url}:\n{file.read()[-3000:]}")

    def processor_seconds(self) -> float:
        with open(f"/proc/{self.process.pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def run(self, bodies: list[dict[str, Any]], settings: Settings) -> list[list[str]]:
        """The answers to every request, from so many clients at a time."""
        if self.knows_n:
            asked = [body | {"model": self.model} for body in bodies]
        else:
            asked = [
                body | {"model": self.model, "n": 1, "seed": number}
                for body in bodies
                for number in range(body["n"])
            ]
        answers = iter(asyncio.run(self._ask(asked, settings.clients)))
        if self.knows_n:
            return list(answers)
        return [[next(answers)[0] for _ in range(body["n"])] for body in bodies]

    async def _ask(self, bodies: list[dict[str, Any]], clients: int) -> list[list[str]]:
        limits = httpx2.Limits(max_connections=clients)
        async with httpx2.AsyncClient(base_url=self.url, timeout=PATIENCE, limits=limits) as client:
            gate = asyncio.Semaphore(clients)

            async def one(body: dict[str, Any]) -> list[str]:
                async with gate:
                    reply = await client.post("/v1/chat/completions", json=body)
                if reply.status_code != 200:
                    raise RuntimeError(f"{self.url}: {reply.status_code}: {reply.text[:500]}")
                choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
                return [choice["message"]["content"] for choice in choices]

            return await asyncio.gather(*map(one, bodies))

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()


class TheirServer(Server):
    knows_n = False


class Batches:
    """transformers' `generate` on all requests, in a process that answers a line for a line."""

    def __init__(self, folder: str, arguments: list[str]):
        command = [sys.executable, __file__, *arguments, "--worker", folder]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        self.best: dict[str, int] = {}

    def run(self, kind: str, size: int) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"kind": kind, "size": size}), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("batches failed")

    def timed(self, kind: str) -> dict[str, float]:
        """With the best size, which is found at the first call."""
        if kind not in self.best:
            tried = {size: self.run(kind, size)["seconds"] for size in BATCHES}
            self.best[kind] = min(tried, key=lambda size: tried[size])
        return self.run(kind, self.best[kind])

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


def work(folder: str, settings: Settings) -> None:
    """The process of `Batches`."""
    import PIL.Image
    import torch
    import transformers

    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32").eval()
    processor = transformers.AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    asked = make_requests(settings)

    def run(bodies: list[dict[str, Any]]) -> None:
        images, texts = [], []
        for body in bodies:
            url, text = body["messages"][0]["content"]
            data = base64.b64decode(url["image_url"]["url"].partition(",")[2])
            images.append(PIL.Image.open(io.BytesIO(data)))
            said = [{"role": "user", "content": [{"type": "image"}, text]}]
            texts.append(processor.apply_chat_template(said, add_generation_prompt=True))
        inputs = processor(
            images=images,
            text=texts,
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            model.generate(
                **inputs,
                do_sample=bodies[0]["temperature"] > 0,
                num_return_sequences=bodies[0]["n"],
                max_new_tokens=max(body["max_tokens"] for body in bodies),
                pad_token_id=processor.tokenizer.pad_token_id,
            )

    for line in sys.stdin:
        order = json.loads(line)
        bodies = sorted(asked[order["kind"]], key=lambda body: body["max_tokens"])
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(bodies), order["size"]):
            run(bodies[start : start + order["size"]])
        result = {"seconds": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
        print(json.dumps(result), file=answers, flush=True)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


@contextlib.contextmanager
def sides(folder: str, settings: Settings, arguments: list[str]) -> Iterator[dict[str, Any]]:
    """Name -> a side that is up."""
    transformers = os.path.join(os.path.dirname(sys.executable), "transformers")
    ours = [sys.executable, "-m", "mmpo_jax.cli", "serve", "--model", folder, "--name", "model"]
    ours += ["--max-samples", str(settings.places), "--max-new-tokens", str(settings.longest)]
    theirs = [transformers, "serve", folder, "--device", "cpu", "--dtype", "float32"]
    with contextlib.ExitStack() as stack:
        made: dict[str, Any] = {}
        for name, command, kind, model in (
            ("mmpo serve", ours, Server, "model"),
            ("transformers serve", theirs, TheirServer, folder),
        ):
            log = os.path.join(folder, f"{name}.log")
            made[name] = kind([*command, "--port", str(free_port())], model, log)
            stack.callback(made[name].close)
        made["transformers, batches"] = Batches(folder, arguments)
        stack.callback(made["transformers, batches"].close)
        yield made


def measure(folder: str, settings: Settings, arguments: list[str]) -> dict[str, Any]:
    """Requests per second, and per second of the processor, by kind and side."""
    asked = make_requests(settings)
    wall: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    cpu: dict[str, dict[str, list[float]]] = {kind: {} for kind in KINDS}
    with sides(folder, settings, arguments) as made:
        for turn in range(1 + settings.repeats):
            for kind in KINDS:
                answers = {}
                for name, side in made.items():
                    if isinstance(side, Batches):
                        result = side.timed(kind)
                    else:
                        began, used = time.perf_counter(), side.processor_seconds()
                        answers[name] = side.run(asked[kind], settings)
                        result = {
                            "seconds": time.perf_counter() - began,
                            "cpu": side.processor_seconds() - used,
                        }
                    if turn:
                        count = len(asked[kind])
                        wall[kind].setdefault(name, []).append(count / result["seconds"])
                        cpu[kind].setdefault(name, []).append(count / result["cpu"])
                if kind == "one":
                    check_equal(*answers.values())
    medians = [
        {
            kind: {name: statistics.median(each) for name, each in by_side.items()}
            for kind, by_side in unit.items()
        }
        for unit in (wall, cpu)
    ]
    return {"requests_per_second": medians[0], "requests_per_cpu_second": medians[1]}


def check_equal(ours: list[list[str]], theirs: list[list[str]]) -> None:
    """Ends where greedy answers differ; a few may, where two words are as likely to rounding."""
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"{same} of {len(ours)} greedy answers of the servers are equal", file=sys.stderr)
    if same < 0.9 * len(ours):
        sys.exit("the two servers give other answers")


def show(result: dict[str, Any]) -> None:
    print(f"{'':34}{'requests/s':>12}{'per processor second':>22}")
    for kind, rates in result["requests_per_second"].items():
        used = result["requests_per_cpu_second"][kind]
        for name, rate in rates.items():
            print(f"{kind + ', ' + name:34}{rate:12.2f}{used[name]:22.2f}")
        for name in list(rates)[1:]:
            ratio = rates["mmpo serve"] / rates[name], used["mmpo serve"] / used[name]
            print(f"  mmpo serve / {name}: {ratio[0]:.2f}; by processor time {ratio[1]:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    if arguments.worker:
        work(arguments.worker, settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(folder, settings.seed)
        result = measure(folder, settings, sys.argv[1:])
    show(result)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"settings": dataclasses.asdict(settings), **result}, file, indent=2)


if __name__ == "__main__":
    main()
