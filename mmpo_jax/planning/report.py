"""A plan as a text for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jax.sharding import Mesh

from mmpo_jax.parallel.chips import GIB
from mmpo_jax.planning.collectives import summed
from mmpo_jax.planning.planned import Planned, PlannedRun
from mmpo_jax.planning.search import Choice

MEMORY = ("program", "parameters", "optimizer", "other", "temporaries", "peak", "fits")
SPEED = ("program", "TFLOP", "GB moved", "GB sent", "ms", "bound by", "per second")


def told(planned: Planned) -> str:
    """The plan in tables of memory, speed and hours, then what was assumed."""
    topology, memory = planned.topology, planned.topology.chip.memory
    limit = "no limit" if memory is None else f"{memory / GIB:.2f} GiB each"
    devices, sizes = len(topology.devices), _mesh(planned.mesh)
    count = f"{topology.chips} chips"
    if devices != topology.chips:
        count += f" of {topology.chip.devices_per_chip} devices"
    lines = [f"{topology.name}: {count} on {topology.hosts} hosts, {limit}; {sizes}", ""]
    for run in planned.runs:
        program = run.run.program
        line = f"{program.name}: {program.checkpoint}, {program.dtype}, {program.shape}"
        if program.mesh.shape != planned.mesh.shape:
            line += f", {_mesh(program.mesh)}"
        lines.append(line)
    lines += ["", *_memory(planned.runs)]
    if any(run.roofline for run in planned.runs):
        lines += ["", "At the roofline, of one run (a token of every place in decode):"]
        lines += table(SPEED, map(_speed_row, planned.runs))
    lines += ["", *_exchange_lines(planned.runs)]
    lines += _hours(planned)
    if planned.notes:
        lines += ["", "Assumed:", *(f"- {note}" for note in planned.notes)]
    return "\n".join(lines)


def _mesh(mesh: Mesh) -> str:
    """Sizes of its axes."""
    return "mesh " + " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())


def told_choices(choices: Sequence[Choice]) -> str:
    """What a search has compiled, the fastest that fits in front."""
    rows = []
    for choice in choices:
        peaks = [run.peak for run in choice.planned.runs if run.peak is not None]
        rows.append(
            [
                choice.overrides,
                f"{max(peaks, default=0.0) / GIB:.2f}",
                f"{choice.seconds / 3600:.4g}",
                "yes" if choice.planned.fits else "NO",
            ]
        )
    return "\n".join(table(("choice", "peak GiB", "hours", "fits"), rows))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table in which columns of numbers are flush right."""
    cells = [list(header), *map(list, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if place == 0 or place == len(widths) - 1 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    ]


def _memory(runs: Sequence[PlannedRun]) -> list[str]:
    peaks = [run.peak for run in runs if run.peak is not None]
    name, unit = ("GiB", GIB) if max(peaks, default=GIB) >= GIB / 10 else ("MiB", 2**20)
    rows = [_memory_row(run, unit) for run in runs]
    return [f"{name} of a device:", *table(MEMORY, rows)]


def _memory_row(run: PlannedRun, unit: int) -> list[str]:
    held, compiled = run.run.program.held, run.compiled
    parameters, optimizer = held["parameters"], held.get("optimizer", 0.0)
    other = sum(held.values()) - parameters - optimizer
    temporaries = None if compiled is None else compiled.temporaries
    peak = run.peak
    numbers = (parameters, optimizer, other, temporaries, peak)
    return [
        run.run.program.name,
        *("" if number is None else f"{number / unit:.2f}" for number in numbers),
        "yes" if run.fits else "NO",
    ]


def _speed_row(run: PlannedRun) -> list[str]:
    program, line = run.run.program, run.roofline
    if line is None:
        return [program.name, *[""] * 6]
    compiled = run.compiled
    sent = program.work.exchanged
    if compiled is not None and compiled.collectives is not None:
        sent = sum(one.sent for one in compiled.collectives)
    rates = ", ".join(f"{amount(rate)} {name}" for name, rate in run.rates.items())
    return [
        program.name,
        f"{program.work.flops / 1e12:,.2f}",
        f"{program.work.bytes / 1e9:,.2f}",
        f"{sent / 1e9:,.2f}" + ("*" if line.exchange_estimated else ""),
        f"{line.seconds * 1e3:,.2f}",
        line.bound,
        rates,
    ]


def amount(number: float) -> str:
    """A number with three digits or all before the point."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _exchange_lines(runs: Sequence[PlannedRun]) -> list[str]:
    lines = []
    for run in runs:
        compiled = run.compiled
        if compiled is None or not compiled.collectives:
            continue
        parts = ", ".join(
            f"{kind} {size / 1e6:,.1f} MB" for kind, size in summed(compiled.collectives).items()
        )
        lines.append(f"{run.run.program.name} sends: {parts}")
    if any(run.roofline and run.roofline.exchange_estimated for run in runs):
        lines.append("* counted from how parameters and activations are split")
    return lines


def _hours(planned: Planned) -> list[str]:
    stages = planned.stage_seconds()
    if not stages:
        return []
    lines = ["", "Hours at the roofline, which nothing reaches (30 to 60 % of it is usual):"]
    lines += [f"  {stage}: {seconds / 3600:.3g}" for stage, seconds in stages.items()]
    if planned.seconds is not None:
        hours = planned.seconds / 3600
        lines.append(f"  all: {hours:.3g}, {hours * planned.topology.chips:.4g} chip-hours")
    return lines
