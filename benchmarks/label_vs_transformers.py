"""Yes/no questions about images: transformers and mmpo_jax ask the same labeler, side by side.

What `mmpo align` asks about an image: the claims of ten responses, eight each, so 80 questions of
real lengths about a picture of 576 tokens. The labeler is the LLaVA-shaped model of
`dpo_vs_trl.py`, in float32; what each side is timed for begins with JPEG files and texts, and ends
with the probabilities of yes and no. transformers is run as it is used, every question with the
picture, in batches of several sizes, and as somebody could write it by hand: the picture's keys and
values are computed once and go in front of batches of its questions. Each side is a process of its
own; they take turns, on other pictures and questions every time.

    python benchmarks/label_vs_transformers.py
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from checkpoint import ANSWERS, IMAGE_TOKENS, make_checkpoint, picture, random_words

TOLERANCE = 1e-4
"""Of a probability."""
SUFFIX_WORDS = 6
"""Tokens of "Please answer yes or no.", which follows every question."""
SPREAD = 20.0
"""Factor of the head's rows of yes and no, so that a random model is sure of some answers."""
DEPTH = 4.0
"""Factor of the decoder's matrices, so that its answers depend on more than the last token."""

Probabilities = list[list[tuple[float, float]]]
"""(yes, no) of every question of every picture."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both sides are run with."""

    images: int = 4
    responses: int = 10
    """To each image."""
    claims: int = 8
    """Of each response."""
    repeats: int = 5
    """Timed runs of our side after one that is not timed; transformers has at most as many."""
    their_images: int = 2
    """Pictures that transformers is asked about in every run; each takes it seconds."""
    their_repeats: int = 3
    batch_size: int = 16
    """Ours, as in a recipe."""
    seed: int = 1


class Item(NamedTuple):
    """A picture as a JPEG, and questions about it."""

    jpeg: bytes
    questions: tuple[str, ...]


def make_items(settings: Settings, run: int) -> list[Item]:
    """The pictures and questions of a run: one of few words begins a question, as in English."""
    import numpy as np

    random = np.random.default_rng([settings.seed, run])
    count = settings.responses * settings.claims
    suffix = random_words(np.random.default_rng(settings.seed), SUFFIX_WORDS)
    items = []
    for _ in range(settings.images):
        lengths = np.clip(random.normal(11, 3, count).round().astype(int), 6, 20)
        firsts = random.integers(0, 4, count)
        questions = (
            f"w{first} {random_words(random, length - 1)} {suffix}"
            for first, length in zip(firsts, lengths, strict=True)
        )
        items.append(Item(picture(random), tuple(questions)))
    return items


def make_labeler(folder: str, seed: int) -> None:
    """The checkpoint, with verdicts that are not all alike."""
    import torch
    import transformers

    make_checkpoint(folder, seed)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype="float32")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight[tokenizer.convert_tokens_to_ids(list(ANSWERS))] *= SPREAD
        for matrix in model.model.language_model.layers.parameters():
            matrix *= DEPTH if matrix.ndim > 1 else 1
    model.save_pretrained(folder)


def ours(folder: str, settings: Settings) -> Callable[[Sequence[Item]], Probabilities]:
    """The labeler of `mmpo align`."""
    from mmpo_jax.checkpoints.checkpoint import load_checkpoint
    from mmpo_jax.data.lengths import Lengths
    from mmpo_jax.data.records import ImageRef
    from mmpo_jax.feedback.labeler import CheckpointLabeler
    from mmpo_jax.parallel.mesh import make_mesh

    mesh = make_mesh()
    checkpoint = load_checkpoint(folder, mesh)
    lengths = Lengths(prompt=(IMAGE_TOKENS + 64,), response=(32,))
    labeler = CheckpointLabeler(checkpoint, mesh, lengths, batch_size=settings.batch_size)

    def ask(items: Sequence[Item]) -> Probabilities:
        asked = [
            (str(number), (ImageRef(f"{hash(item.jpeg)}", item.jpeg),), item.questions)
            for number, item in enumerate(items)
        ]
        return [[answer[:2] for answer in row] for row in labeler.answer(asked)]

    return ask


class Transformers:
    """The same model in torch."""

    def __init__(self, folder: str):
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        self.processor = transformers.AutoProcessor.from_pretrained(folder)
        self.processor.tokenizer.padding_side = "left"
        self.model = transformers.AutoModelForImageTextToText.from_pretrained(
            folder, dtype="float32", attn_implementation="sdpa"
        ).eval()
        words = self.processor.tokenizer.convert_tokens_to_ids(list(ANSWERS))
        self.yes, self.no = words[:2], words[2:]

    def ask(self, items: Sequence[Item], batch_size: int) -> Probabilities:
        """Every question with its picture, in batches; the head at the last token alone."""
        import torch

        answers = []
        for item in items:
            shown, row = opened(item), []
            for start in range(0, len(item.questions), batch_size):
                inputs = self._inputs(shown, item.questions[start : start + batch_size])
                with torch.inference_mode():
                    logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]
                row += self._read(logits)
            answers.append(row)
        return answers

    def ask_behind_prefix(self, items: Sequence[Item], batch_size: int) -> Probabilities:
        """The picture and what all questions begin with once, their keys and values repeated for
        batches of questions; questions of like lengths together, padded on the right."""
        import torch

        answers = []
        for item in items:
            begun = self._inputs(opened(item), [""])
            prefix = begun["input_ids"][0].tolist()
            end = prefix.index(self.model.config.image_token_id) + IMAGE_TOKENS
            begun["input_ids"] = begun["input_ids"][:, :end]
            begun["attention_mask"] = begun["attention_mask"][:, :end]
            tokenizer = self.processor.tokenizer
            texts = [self._text(question).split("<image>")[1] for question in item.questions]
            rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
            order = sorted(range(len(rows)), key=lambda place: len(rows[place]))
            found: list[Any] = [None] * len(rows)
            with torch.inference_mode():
                kept = self.model(**begun, use_cache=True, logits_to_keep=1).past_key_values
                for start in range(0, len(rows), batch_size):
                    places = order[start : start + batch_size]
                    logits = self._behind(kept, [rows[place] for place in places], end)
                    for place, pair in zip(places, self._read(logits), strict=True):
                        found[place] = pair
            answers.append(found)
        return answers

    def _behind(self, kept: Any, rows: list[list[int]], end: int) -> Any:
        """Logits behind the last token of every row, after a prefix of `end` tokens."""
        import copy

        import torch

        lengths = torch.tensor([len(row) for row in rows])
        longest, pad = int(lengths.max()), self.processor.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        cache = copy.deepcopy(kept)
        cache.batch_repeat_interleave(len(rows))
        mask = torch.arange(end + longest)[None] < end + lengths[:, None]
        hidden = self.model.model.language_model(
            input_ids=ids,
            attention_mask=mask.long(),
            past_key_values=cache,
            position_ids=torch.arange(end, end + longest)[None].expand(len(rows), -1),
        ).last_hidden_state
        return self.model.lm_head(hidden[torch.arange(len(rows)), lengths - 1])

    def _text(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def _inputs(self, shown: Any, questions: Sequence[str]) -> Any:
        return self.processor(
            images=[shown] * len(questions),
            text=[self._text(question) for question in questions],
            add_special_tokens=False,
            padding=True,
            return_tensors="pt",
        )

    def _read(self, logits: Any) -> list[tuple[float, float]]:
        p = logits.float().softmax(dim=-1)
        sums = (p[:, self.yes].sum(dim=-1).tolist(), p[:, self.no].sum(dim=-1).tolist())
        return list(zip(*sums, strict=True))


def opened(item: Item) -> Any:
    """The picture, decoded."""
    from PIL import Image

    return Image.open(io.BytesIO(item.jpeg)).convert("RGB")


def work(folder: str, settings: Settings, side: str) -> None:
    """A side's process: reads runs as lines of JSON, does them and writes what came out."""
    said = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        asked = Transformers(folder) if side == "transformers" else ours(folder, settings)
        for line in sys.stdin:
            order = json.loads(line)
            items = make_items(settings, order["run"])
            begun, cpu = time.perf_counter(), time.process_time()
            if isinstance(asked, Transformers):
                items = items[: settings.their_images]
                way = asked.ask_behind_prefix if order["prefix"] else asked.ask
                answers = way(items, order["batch_size"])
            else:
                answers = asked(items)
            seconds, cpu = time.perf_counter() - begun, time.process_time() - cpu
            result = {"seconds": seconds, "cpu_seconds": cpu, "answers": answers}
            print(json.dumps(result), file=said, flush=True)


@contextlib.contextmanager
def worker(side: str, folder: str) -> Iterator[Callable[..., dict]]:
    """A side's process, as a function that has it do a run."""
    command = [sys.executable, __file__, *sys.argv[1:], "--worker", side, "--folder", folder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def run(number: int, **how: Any) -> dict:
            print(json.dumps({"run": number, **how}), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


def measure(folder: str, settings: Settings, sizes: Sequence[int]) -> dict[str, list[dict]]:
    """Way -> its timed runs; the ways take turns, and the run of a number is the same of all."""
    ways = {f"transformers, {size} at a time": (False, size) for size in sizes}
    ways |= {f"picture once, {size} at a time": (True, size) for size in sizes if size > 1}
    runs: dict[str, list[dict]] = {"mmpo_jax": [], **{way: [] for way in ways}}
    with worker("ours", folder) as us, worker("transformers", folder) as them:
        for number in range(1 + settings.repeats):
            runs["mmpo_jax"].append(us(number))
            if number > settings.their_repeats:
                continue
            for way, (prefix, size) in ways.items():
                runs[way].append(them(number, prefix=prefix, batch_size=size))
    return runs


def largest_difference(ours: list[dict], theirs: list[dict]) -> tuple[float, int]:
    """(of a probability, how many verdicts differ) over all runs that both sides did."""
    difference, differing = 0.0, 0
    for our, their in zip(ours, theirs, strict=False):
        for row, other in zip(our["answers"], their["answers"], strict=False):
            for (yes, no), (their_yes, their_no) in zip(row, other, strict=True):
                difference = max(difference, abs(yes - their_yes), abs(no - their_no))
                differing += (yes > no) != (their_yes > their_no)
    return difference, differing


def summary(runs: dict[str, list[dict]]) -> dict[str, dict]:
    """Medians of the timed runs, by way."""
    found = {}
    ours = runs["mmpo_jax"]
    for way, done in runs.items():
        timed = done[1:]
        asked = sum(len(row) for row in done[0]["answers"])
        difference, differing = largest_difference(ours, done)
        found[way] = {
            "questions_per_second": asked / statistics.median(x["seconds"] for x in timed),
            "questions_per_cpu_second": asked / statistics.median(x["cpu_seconds"] for x in timed),
            "first_seconds": done[0]["seconds"],
            "largest_difference": difference,
            "verdicts_that_differ": differing,
        }
    return found


def show(found: dict[str, dict]) -> None:
    titles = "questions/s", "ratio", "per CPU s", "ratio", "difference"
    print(f"\n{'':32}" + "".join(f"{title:>13}" for title in titles))
    ours = found["mmpo_jax"]
    for way, one in found.items():
        columns = []
        for key in ("questions_per_second", "questions_per_cpu_second"):
            columns += [f"{one[key]:.1f}", f"{ours[key] / one[key]:.2f}" if one is not ours else ""]
        columns.append(f"{one['largest_difference']:.1e}" if one is not ours else "")
        print(f"{way:32}" + "".join(f"{column:>13}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for field in dataclasses.fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        parser.add_argument(flag, type=int, default=field.default)
    parser.add_argument("--sizes", type=int, nargs="*", default=[1, 4, 16, 40])
    parser.add_argument("--json", help="also write the figures to this file")
    parser.add_argument("--worker", choices=("transformers", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: getattr(arguments, name) for name in names})
    if arguments.worker:
        work(arguments.folder, settings, arguments.worker)
        return
    with tempfile.TemporaryDirectory() as folder:
        make_labeler(folder, settings.seed)
        runs = measure(folder, settings, arguments.sizes)
    answers = [pair for run in runs["mmpo_jax"] for row in run["answers"] for pair in row]
    accepted = sum(yes > no for yes, no in answers) / len(answers)
    found = summary(runs)
    show(found)
    print(
        f"{100 * accepted:.0f} % of the verdicts are yes; first run of ours, which compiles: ",
        end="",
    )
    print(f"{found['mmpo_jax']['first_seconds']:.1f} s")
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"settings": dataclasses.asdict(settings), "ways": found}, file, indent=2)
    if any(
        one["largest_difference"] > TOLERANCE or one["verdicts_that_differ"]
        for one in found.values()
    ):
        sys.exit("the sides did not answer the same")


if __name__ == "__main__":
    main()
