"""How long `mmpo train` takes to its first step, cold and resumed, and what memory it takes.

Preference pairs about small JPEG pictures, as files and inside Parquet, with prompts of 640 tokens
in the shapes of `dpo_vs_trl.py`; and pairs of texts of 160 tokens. A run is started, killed after
its first checkpoint, and started again. Every opening of a data file and of a picture is counted,
in all processes.

    python benchmarks/start_up.py                # 83,000 rows with pictures, 100,000 of text
    python benchmarks/start_up.py --rows 5000    # as many of pictures, and of text in proportion
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from checkpoint import IMAGE_TOKENS, make_checkpoint
from PIL import Image

ROWS, TEXT_ROWS = 83_000, 100_000
FEW = 64
"""Rows of the run whose memory is the model's."""
PROMPT_TOKENS, TEXT_TOKENS = 640, 160
RESPONSE_WORDS = 60
TEXT_WORDS = (30, 66, 66)
"""Of a prompt and two responses, which give some 160 tokens for each dialogue."""
BATCH_SIZE = 4
SETTLED = 3.0
"""Seconds after which a file counts as settled."""
KINDS = ("files", "parquet", "texts")
_SYLLABLES = ("ka", "lo", "mi", "ter", "sun", "ber", "an", "dor", "ve", "quil", "ost", "ra", "tion")
_HOOK = """
import os, sys
_log = os.open(os.environ["READS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def _hear(event, arguments):
    if event == "open" and str(arguments[0]).endswith((".jpg", ".parquet", ".jsonl")):
        if os.environ["DATA"] in str(arguments[0]):
            os.write(_log, (str(arguments[0]) + "\\n").encode())
sys.addaudithook(_hear)
"""


@dataclasses.dataclass(frozen=True)
class Start:
    """One start of a run, up to the end of a step."""

    seconds: float
    processor_seconds: float
    """Of all processes."""
    peak: float
    """MiB, of the process that trains."""
    peak_of_all: float
    """MiB, of all processes; what they share counts once."""
    reads: collections.Counter[str]
    """Openings by file."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=ROWS, help="with pictures; texts in proportion")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", help="file for the figures")
    options = parser.parse_args()
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.kinds:
            rows = options.rows if kind != "texts" else options.rows * TEXT_ROWS // ROWS
            figures[kind] = measure(Path(folder), kind, rows, options.workers)
            print_figures(kind, figures[kind])
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=1))


def measure(folder: Path, kind: str, rows: int, workers: int) -> dict[str, Any]:
    """The figures of a kind of data."""
    model, few, data = folder / f"{kind}-model", folder / f"{kind}-few", folder / f"{kind}-data"
    for made in (model, few, data):
        made.mkdir()
    if kind == "texts":
        make_text_checkpoint(model)
    else:
        make_checkpoint(str(model))
    make_rows(few, kind, FEW)
    make_rows(data, kind, rows)
    time.sleep(SETTLED)
    of_model = [start(folder, model, few, f"{kind}-few-run", workers) for _ in range(2)]
    cold, again = (start(folder, model, data, f"{kind}-run", workers) for _ in range(2))
    images = [count for name, count in cold.reads.items() if name.endswith(".jpg")]
    seen_again = sum(count for name, count in again.reads.items() if name.endswith(".jpg"))
    return {
        "rows": rows,
        "seconds to the first step": [cold.seconds, again.seconds],
        "processor seconds": [cold.processor_seconds, again.processor_seconds],
        "peak memory, MiB": [cold.peak, again.peak],
        "the same of all processes": [cold.peak_of_all, again.peak_of_all],
        "peak memory above the model's": [
            one.peak - few_rows.peak for one, few_rows in zip((cold, again), of_model, strict=True)
        ],
        "most openings of a picture": [max(images, default=0), 0],
        "openings of pictures": [sum(images), seen_again],
        "openings of data files": [
            sum(count for name, count in one.reads.items() if not name.endswith(".jpg"))
            for one in (cold, again)
        ],
    }


def print_figures(kind: str, figures: dict[str, Any]) -> None:
    """A table."""
    print(f"\n{kind}: {figures['rows']} rows\n\n| | cold | resumed |\n|---|---|---|")
    for name, values in figures.items():
        if isinstance(values, list):
            print(f"| {name} | " + " | ".join(f"{value:,.0f}" for value in values) + " |")
    sys.stdout.flush()


def start(folder: Path, model: Path, data: Path, run: str, workers: int) -> Start:
    """Starts a run, or goes on with it, and kills it when a step is done and its checkpoint is
    there, or a later one's that has replaced it."""
    texts = run.startswith("texts")
    name = next(name for name in ("rows.parquet", "rows.jsonl") if (data / name).exists())
    recipe = {
        "model": str(model),
        "output": str(folder / run),
        "data": {"source": "file", "path": str(data / name)},
        "lengths": {
            "prompt": [TEXT_TOKENS if texts else PROMPT_TOKENS],
            "response": [TEXT_TOKENS],
        },
        "training": {
            "objective": {"type": "dpo"},
            "batch_size": BATCH_SIZE,
            "epochs": 10_000,
            "max_steps": 10_000,
            "log_every": 1,
            "save_every": 1,
            "workers": workers,
        },
    }
    file, hook, reads = folder / f"{run}.yaml", folder / "hook", folder / f"{run}.reads"
    reads.unlink(missing_ok=True)
    file.write_text(json.dumps(recipe))  # JSON is YAML
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(_HOOK)
    path = os.pathsep.join(filter(None, [str(hook), os.environ.get("PYTHONPATH")]))
    more = {"PYTHONPATH": path, "READS": str(reads), "DATA": str(data)}
    more |= {"MMPO_CACHE": str(folder / f"{run}-cache"), "PYTHONUNBUFFERED": "1"}
    begun = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "mmpo_jax.cli", "train", str(file)],
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    watch = Watch(process.pid)
    said = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            said.append(line)
            if line.startswith("step "):
                break
        else:
            raise SystemExit("".join(said[-20:]))
        seconds = time.perf_counter() - begun
        watch.close()
        step = int(line.removeprefix("step ").split("/")[0])
        while process.poll() is None and not _saved(folder / run / "checkpoints", step):
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    counts = collections.Counter(reads.read_text().splitlines()) if reads.exists() else {}
    return Start(seconds, watch.seconds, watch.peak, watch.of_all, collections.Counter(counts))


def _saved(checkpoints: Path, step: int) -> bool:
    """Whether there is a checkpoint of the step or of a later one."""
    steps = [path.name for path in checkpoints.iterdir()] if checkpoints.exists() else []
    return any(name.isdecimal() and int(name) >= step for name in steps)


class Watch:
    """Looks at a process and its children twice a second."""

    def __init__(self, pid: int):
        self.pid, self.peak, self.of_all = pid, 0.0, 0.0
        self._used: dict[int, float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    @property
    def seconds(self) -> float:
        """Processor time of all."""
        return sum(self._used.values())

    def close(self) -> None:
        """Looks no more."""
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.5):
            self._take()
        self._take()

    def _take(self) -> None:
        together = 0.0
        for pid in _family(self.pid):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                status = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # it has ended
                continue
            ticks = int(fields[11]) + int(fields[12])
            self._used[pid] = ticks / os.sysconf("SC_CLK_TCK")
            together += _kib(rollup, "Pss:") / 1024
            if pid == self.pid:
                self.peak = max(self.peak, _kib(status, "VmHWM:") / 1024)
        self.of_all = max(self.of_all, together)


def _kib(text: str, name: str) -> float:
    return next((float(line.split()[1]) for line in text.splitlines() if line.startswith(name)), 0)


def _family(pid: int) -> Iterator[int]:
    """A process and all below it."""
    yield pid
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(c) for task in tasks for c in (task / "children").read_text().split()]
    except OSError:
        return
    for child in children:
        yield from _family(child)


def make_rows(folder: Path, kind: str, count: int) -> None:
    """Writes preference pairs: `rows.jsonl`, with pictures beside it, or `rows.parquet`."""
    rows = (_row(kind, number, folder) for number in range(count))
    if kind != "parquet":
        with open(folder / "rows.jsonl", "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    writer = None
    while part := list(itertools.islice(rows, 1000)):
        table = pa.Table.from_pylist(part)
        writer = writer or pq.ParquetWriter(folder / "rows.parquet", table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def _row(kind: str, number: int, folder: Path) -> dict[str, Any]:
    draw = random.Random(number)
    if kind == "texts":
        texts = [_text(draw, words) for words in (20, 45, 45)]
        return {
            "id": str(number),
            **dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)),
        }
    # The template adds BOS, "USER:" and "ASSISTANT:".
    words = [PROMPT_TOKENS - IMAGE_TOKENS - 3, RESPONSE_WORDS, RESPONSE_WORDS]
    texts = [" ".join(f"w{draw.randrange(30_000)}" for _ in range(count)) for count in words]
    picture = _picture(number)
    if kind == "files":
        name = f"images/{number % 100:02d}/{number}.jpg"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture)
        images: list[Any] = [name]
    else:
        images = [{"bytes": picture, "path": None}]
    row = {"id": str(number), "images": images}
    return {**row, **dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))}


def _picture(number: int) -> bytes:
    coarse = np.random.default_rng(number).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(coarse).resize((160, 120), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def _words() -> list[str]:
    draw = random.Random(0)
    return ["".join(draw.choices(_SYLLABLES, k=draw.randint(1, 4))) for _ in range(5000)]


_WORDS = _words()


def _text(draw: random.Random, words: int) -> str:
    return " ".join(draw.choices(_WORDS, k=words))


def make_text_checkpoint(folder: Path) -> None:
    """Writes a small Llama with random weights, a BPE tokenizer and ChatML's template."""
    import tokenizers
    import torch
    import transformers

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=special,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    draw = random.Random(1)
    backend.train_from_iterator([_text(draw, 50) for _ in range(2000)], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
