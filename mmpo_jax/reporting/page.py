"""The page: sections from runs, and the files that they are written to."""

from __future__ import annotations

import base64
import dataclasses
import functools
import gzip
import hashlib
import json
import logging
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
import yaml
from etils import epath
from markupsafe import Markup

from mmpo_jax.core.buckets import is_file
from mmpo_jax.core.files import fingerprint_bytes, null_if_not_finite, write_atomic
from mmpo_jax.core.progress import duration
from mmpo_jax.reporting.browse import SeenPrompt, SeenResponse, read_prompts
from mmpo_jax.reporting.charts import draw, legend
from mmpo_jax.reporting.curves import HELD_OUT, speed_charts, training_charts
from mmpo_jax.reporting.measured import Benchmark, Group, chart_benchmark, group_runs, measured
from mmpo_jax.reporting.runs import RunFiles, read_runs, training_warnings
from mmpo_jax.reporting.tables import (
    benchmark_table,
    counts_table,
    sources_table,
    stage_bars,
    tax_table,
)

log = logging.getLogger(__name__)

FILE = "report.html"
MAX_BYTES = 20_000_000
"""Size of a file, at most; what is more goes to further ones."""
PROMPTS = 2000
"""Prompts of a page by default, in every round they were asked in."""
SHOWN_CHARTS = 6
"""Charts of a benchmark that are not folded."""
GZIP_LEVEL = 6
HELD_BACK = 200_000
"""Bytes, at most, that a compressor has taken and not given yet, with what stands around them."""


@dataclasses.dataclass(frozen=True)
class WrittenReport:
    """The files of a report."""

    files: Sequence[str]
    prompts: int
    """Prompts that are in them."""
    size: int
    """Of all files, in bytes."""


def write_report(
    folders: Sequence[str], output: str, prompts: int | None = PROMPTS
) -> WrittenReport:
    """Writes the page of some runs; where prompts do not fit into a file, `NAME-2.html` and so on.

    The same runs give the same bytes.

    Args:
      folders: of the runs.
      output: HTML file.
      prompts: how many are shown at most, of all rounds alike; None for all.

    Raises:
      MmpoError: a folder is no run.
      OSError: a file cannot be written.
    """
    runs = read_runs(folders)
    seen, total = read_prompts(runs, prompts)
    pages = list(render(runs, seen, total, os.path.basename(output)))
    for name, data in pages:
        write_atomic(os.path.join(os.path.dirname(output), name), data)
    _remove_after(output, len(pages))
    names = [os.path.join(os.path.dirname(output), name) for name, _ in pages]
    return WrittenReport(names, len(seen), sum(len(data) for _, data in pages))


def _remove_after(output: str, count: int) -> None:
    """Removes the further files of a longer report that was there before."""
    while is_file(path := _file(output, count + 1)):
        epath.Path(path).unlink()
        count += 1


def _file(output: str, number: int) -> str:
    stem, ending = os.path.splitext(output)
    return output if number == 1 else f"{stem}-{number}{ending}"


def render(
    runs: Sequence[RunFiles], seen: Sequence[SeenPrompt], total: int, name: str
) -> Iterator[tuple[str, bytes]]:
    """(file name, contents) of every file.

    Args:
      runs: what the curves and tables are about.
      seen: prompts to browse.
      total: how often prompts were asked, those left out among them.
      name: of the first file.
    """
    sections = _sections(runs)
    empty = len(_page(sections, 1, [(name, "")], _Packed([], []), "").encode())
    chunks = _chunks(seen, MAX_BYTES - empty)
    files, first = [], 1
    for number, chunk in enumerate(chunks, 1):
        files.append((_file(name, number), f"{first:,}–{first + len(chunk) - 1:,}"))
        first += len(chunk)
    for number, chunk in enumerate(chunks, 1):
        told = _told_prompts(seen, total)
        text = _page(sections, number, files, _pack(runs, chunk), told)
        yield files[number - 1][0], text.encode()


def _told_prompts(seen: Sequence[SeenPrompt], total: int) -> str:
    shown = sum(len(prompt.seen) for prompt in seen)
    told = f"{len(seen):,} prompts"
    if shown != len(seen):
        told += f", asked {shown:,} times in all rounds"
    if shown < total:
        told += (
            f"; {total - shown:,} more are left out, of every round the last ones "
            "(mmpo report --prompts all shows them)"
        )
    return told + "."


# --- prompts as data of the page ------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Packed:
    """Prompts of a file."""

    prompts: Sequence[Mapping[str, Any]]
    pictures: Sequence[str]
    """Base64 of their thumbnails, each once."""
    runs: Sequence[tuple[str, str]] = ()
    """Name and kind."""


def _chunks(seen: Sequence[SeenPrompt], room: int) -> list[list[SeenPrompt]]:
    """Prompts of one file after another, none of which takes more than its room; one at least.

    Their texts are compressed as they will be, which tells the size but for what the compressor
    holds back.
    """
    chunks: list[list[SeenPrompt]] = [[]]
    room -= HELD_BACK
    size, compressor = 0.0, zlib.compressobj(GZIP_LEVEL)
    for prompt in seen:
        text = json.dumps(_packed_prompt(prompt, []), ensure_ascii=False).encode(errors="replace")
        pictures = sum(4 * -(-len(data) // 3) + 16 for data in prompt.thumbnails if data)
        takes = pictures + len(compressor.compress(text)) * 4 / 3
        if size + takes > room and chunks[-1]:
            chunks.append([])
            size, compressor = 0.0, zlib.compressobj(GZIP_LEVEL)
            takes = pictures + len(compressor.compress(text)) * 4 / 3
        chunks[-1].append(prompt)
        size += takes
    return chunks


def _pack(runs: Sequence[RunFiles], seen: Sequence[SeenPrompt]) -> _Packed:
    places: dict[str, int] = {}
    pictures: list[str] = []
    prompts = []
    for prompt in seen:
        numbers: list[int | None] = []
        for data in prompt.thumbnails:
            if data is None:
                numbers.append(None)
                continue
            digest = fingerprint_bytes(data)
            if digest not in places:
                places[digest] = len(pictures)
                pictures.append(base64.b64encode(data).decode())
            numbers.append(places[digest])
        prompts.append(_packed_prompt(prompt, numbers))
    return _Packed(prompts, pictures, [(run.name, run.kind) for run in runs])


def _packed_prompt(prompt: SeenPrompt, pictures: Sequence[int | None]) -> dict[str, Any]:
    responses = [one for each in prompt.seen for one in each.responses]
    return {
        "id": prompt.id,
        "q": prompt.question,
        "b": prompt.benchmark.replace("_", " "),
        "names": list(prompt.images),
        "pictures": list(pictures),
        "seen": [
            {
                "run": each.run,
                "round": each.round,
                "r": [_packed_response(one) for one in each.responses],
                "p": [[pair.chosen, pair.rejected, _short(pair.margin)] for pair in each.pairs],
            }
            for each in prompt.seen
        ],
        "n": {
            "rejected": prompt.rejected,
            "claims": sum(len(one.claims) for one in responses),
            "failed": prompt.failed,
            "pairs": sum(len(each.pairs) for each in prompt.seen),
            "margin": _short(prompt.margin),
            "change": _short(prompt.change),
        },
    }


def _packed_response(one: SeenResponse) -> list[Any]:
    claims = [[text, question, _short(yes), _short(no)] for text, question, yes, no in one.claims]
    return [
        *(one.sample, one.source, one.text, one.finished, _short(one.score), one.reason),
        *(claims, null_if_not_finite(one.details)),
    ]


def _short(value: float | None) -> float | None:
    """Five digits, which is more than anybody reads."""
    return None if value is None else float(f"{value:.5g}")


# --- sections -------------------------------------------------------------------------------------


def _sections(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """What the template shows in the first file."""
    groups = group_runs(runs)
    benchmarks = [_benchmark(each, groups) for each in measured(runs, groups)]
    training, speed = training_charts(runs, groups), speed_charts(runs, groups)
    bars = stage_bars(runs)
    drawn = [line for charts in (*training, *speed) for chart in charts for line in chart.lines]
    return {
        "title": " · ".join(group.label for group in groups),
        "runs": [_run(run) for run in runs],
        "warnings": _warnings(runs),
        "taxes": [table for run in runs if (table := tax_table(run)) is not None],
        "counts": counts_table(runs),
        "sources": sources_table(runs),
        "benchmarks": benchmarks,
        "has_seeds": any(len(group.runs) > 1 for group in groups),
        "training": {"front": training[0], "behind": training[1]},
        "speed": {"front": speed[0], "behind": speed[1]},
        "stages": bars,
        "has_rounds": any(sum(bool(one.curves) for one in run.rounds) > 1 for run in runs),
        "has_held_out": any(HELD_OUT in line.name for line in drawn),
        "has_bins": any(point.low is not None for line in drawn for point in line.points),
    }


def _benchmark(benchmark: Benchmark, groups: Sequence[Group]) -> dict[str, Any]:
    front, behind = chart_benchmark(benchmark, groups)
    return {
        "name": benchmark.name.replace("_", " "),
        "front": front[:SHOWN_CHARTS],
        "behind": [*front[SHOWN_CHARTS:], *behind],
        "table": benchmark_table(benchmark, groups),
    }


def _warnings(runs: Sequence[RunFiles]) -> list[str]:
    """What a person should know first."""
    found: list[str] = []
    for run in runs:
        told = [*run.tax.get("warnings", [])]
        for one in run.rounds:
            told += training_warnings(one.index, one.counts)
        found += told if len(runs) == 1 else [f"{run.name}: {warning}" for warning in told]
    return found


def _run(run: RunFiles) -> dict[str, Any]:
    recipe = run.recipe
    training = recipe.get("training", {})
    data = recipe.get("data", {})
    sources = data if isinstance(data, list) else [data]
    facts = {
        "command": f"mmpo {run.kind}",
        "model": recipe.get("model"),
        "data": ", ".join(str(each.get("path") or each.get("source")) for each in sources if each),
        "objective": " + ".join(each["type"] for each in training.get("objective", [])),
        "judge": recipe.get("feedback", {}).get("type") if run.kind == "align" else None,
        "learning rate": training.get("optimizer", {}).get("learning_rate"),
        "batch size": training.get("batch_size"),
        "seed": recipe.get("seed"),
        "took": _took(run),
    }
    return {
        "name": run.name,
        "state": run.state,
        "is_finished": run.is_finished,
        "facts": [(name, value) for name, value in facts.items() if value not in (None, "")],
        "recipe": yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
        if recipe
        else "",
    }


def _took(run: RunFiles) -> str | None:
    """The time of all stages."""
    seconds = sum(took["seconds"] or 0 for one in run.rounds for took in one.stages.values())
    return duration(seconds) if seconds else None


# --- files ----------------------------------------------------------------------------------------


def _page(
    sections: Mapping[str, Any],
    number: int,
    files: Sequence[tuple[str, str]],
    packed: _Packed,
    told: str,
) -> str:
    environment = _environment()
    script = _source("report.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    given = {"runs": packed.runs, "prompts": packed.prompts}
    text = json.dumps(given, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = gzip.compress(text.encode(errors="replace"), GZIP_LEVEL, mtime=0)
    shown = [
        ("runs", "Runs", True),
        ("benchmarks", "Benchmarks", sections["benchmarks"]),
        ("training", "Training", any(sections["training"].values())),
        ("throughput", "Throughput", sections["stages"] or any(sections["speed"].values())),
    ]
    links = [(name, title) for name, title, there in shown if there and number == 1]
    links += [("prompts", "Prompts")] if packed.prompts else []
    return environment.get_template("report.html.jinja").render(
        **sections,
        number=number,
        files=[{"name": name, "range": range} for name, range in files],
        sections=links,
        prompts={"total": len(packed.prompts), "told": told},
        data=base64.b64encode(data).decode(),
        pictures=" ".join(packed.pictures),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        style=Markup(_source("report.css")),
    )


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mmpo_jax.reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(draw=draw, legend=legend)
    return environment


def _source(name: str) -> str:
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0]
