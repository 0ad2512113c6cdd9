"""What devices exchange in a compiled program, read from its text."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

BITS = {"pred": 8, "bf16": 16, "f16": 16, "token": 0, "opaque": 0}
"""Bits of a number by XLA's names, where these do not say it."""


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of a program."""

    kind: str
    """One of `KINDS`."""
    bytes: int
    """Bytes of what every device has of it when it is done; of a reduce-scatter before."""
    group: tuple[int, ...]
    """The devices of one group, by their places in the mesh; of a permute one pair that differs."""
    times: int
    """How often: the trips of the loops around it."""

    @property
    def sent(self) -> float:
        """Bytes that a device sends over all times, as rings exchange them: 2 (n - 1) / n of an
        all-reduce, (n - 1) / n of the others, all of a permute."""
        share = 1.0
        if self.kind != "collective-permute":
            share = (len(self.group) - 1) / len(self.group)
        return self.times * self.bytes * share * (2 if self.kind == "all-reduce" else 1)


def find_collectives(program: str, loops: int = 1) -> list[Collective]:
    """All exchanges of a program, those in loops with their trip counts.

    On TPUs one all-gather may be spread over several fused computations, which have its channel in
    common; it counts once. A reduce-scatter is an all-reduce in a computation of that name.

    Args:
      program: optimised HLO, as `Compiled.as_text` gives it.
      loops: trips of loops whose text does not say them, as of those that data end.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations = _computations(program)
    devices = _device_count(program)
    entry = next((name for name, lines in computations.items() if lines.is_entry), None)
    if entry is None:
        raise ValueError("this is no HLO module: no ENTRY")
    found: dict[object, Collective] = {}
    for name, times in _trips(computations, entry, loops):
        for line in computations[name].lines:
            collective = _read(line, name, devices, times)
            if collective is None:
                continue
            channel = re.search(r"channel_id=(\d+)", line)
            key = (collective.kind, channel[1]) if channel else (name, line)
            before = found.get(key)
            if before is None or before.times < times:
                found[key] = collective
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class _Computation:
    lines: list[str]
    is_entry: bool


def _computations(program: str) -> dict[str, _Computation]:
    """name -> its lines. What a kernel says of itself may go on in lines of its own."""
    found: dict[str, _Computation] = {}
    current: _Computation | None = None
    for line in program.splitlines():
        begins = re.match(r"(ENTRY )?%?([\w.~-]+) \(.*\{$", line)
        if begins:
            current = found[begins[2]] = _Computation([], bool(begins[1]))
        elif line == "}":
            current = None
        elif current is not None and line[:1] == " ":
            current.lines.append(line)
    return found


def _trips(
    computations: Mapping[str, _Computation], entry: str, loops: int
) -> Iterator[tuple[str, int]]:
    """(computation, how often it runs) for every call of it."""
    waiting = [(entry, 1)]
    while waiting:
        name, times = waiting.pop()
        yield name, times
        for line in computations[name].lines:
            for called, inner in _called(computations, line, loops):
                if called in computations:
                    waiting.append((called, times * inner))


def _called(
    computations: Mapping[str, _Computation], line: str, loops: int
) -> list[tuple[str, int]]:
    body = re.search(r"\bbody=%?([\w.~-]+)", line)
    if body:
        condition = re.search(r"\bcondition=%?([\w.~-]+)", line)
        parts = [computations[name[1]].lines for name in (condition, body) if name]
        return [(body[1], _trip_count(line, *parts) or loops)]
    single = re.findall(
        r"\b(?:calls|to_apply|called_computation|true_computation|"
        r"false_computation)=%?([\w.~-]+)",
        line,
    )
    several = re.search(r"\b(?:branch_computations|calls)=\{([^}]*)\}", line)
    names = re.findall(r"%?([\w.~-]+)", several[1]) if several else []
    return [(name, 1) for name in (*single, *names)]


def _trip_count(line: str, condition: Sequence[str], body: Sequence[str]) -> int | None:
    """Trips of a loop: what the compiler has noted; or else how often its counter, which starts at
    0, is less than a constant."""
    noted = re.search(r'known_trip_count["\\]*:\s*\{["\\]*n["\\]*:["\\]*(\d+)', line)
    if noted:
        return int(noted[1])
    compared = re.search(r"compare\((%[\w.~-]+), (%[\w.~-]+)\), direction=LT", _root(condition))
    limit = _constant(condition, compared[2]) if compared else None
    if compared is None or limit is None:
        return None
    counter = re.search(r"index=(\d+)", _definition(condition, compared[1]))
    return math.ceil(limit / (_step(body, int(counter[1])) if counter else 1))


def _step(body: Sequence[str], place: int) -> int:
    """What a loop adds to its counter, which has a place in the tuple that it carries; 1 where that
    is not said there."""
    carried = _root(body).rpartition(" tuple(")[2]
    names = re.findall(r"%[\w.~-]+", carried.partition(")")[0])
    added = re.search(r" add\((%[\w.~-]+), (%[\w.~-]+)\)", _definition(body, names[place]))
    if added is None:
        return 1
    return _constant(body, added[1]) or _constant(body, added[2]) or 1


def _root(lines: Sequence[str]) -> str:
    return next((line for line in lines if line.lstrip().startswith("ROOT")), "")


def _definition(lines: Sequence[str], name: str) -> str:
    start = re.compile(rf"\s*(?:ROOT )?{re.escape(name)} = ")
    return next((line for line in lines if start.match(line)), "")


def _constant(lines: Sequence[str], name: str) -> int | None:
    value = re.search(r" constant\((\d+)\)", _definition(lines, name))
    return int(value[1]) if value else None


def _read(line: str, computation: str, devices: int, times: int) -> Collective | None:
    said = re.match(rf"\s*(?:ROOT )?%?[\w.~-]+ = (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
    if said is None:
        return None
    shapes, kind = _shape_bytes(said[1]), said[2]
    if said[3] and kind != "all-reduce" and len(shapes) > 1:
        shapes = shapes[1:2]  # (operand, result, ...)
    size = sum(shapes)
    group = _group(line, kind, devices)
    if kind == "reduce-scatter":
        size *= len(group)
    elif kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    return Collective(kind, size, group, times) if len(group) > 1 else None


def _shape_bytes(text: str) -> list[int]:
    """Bytes of every array of a shape or a tuple of shapes."""
    return [
        math.prod(int(size) for size in sizes.split(",") if size) * _bits(name) // 8
        for name, sizes in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", text)
    ]


def _bits(name: str) -> int:
    if name in BITS:
        return BITS[name]
    digits = re.match(r"[a-z]+(\d+)", name)
    return int(digits[1]) if digits else 0


def _group(line: str, kind: str, devices: int) -> tuple[int, ...]:
    """One group of the devices that exchange with each other."""
    if kind == "collective-permute":
        pairs = re.findall(r"\{(\d+),(\d+)\}", line.partition("source_target_pairs=")[2])
        return next(((int(a), int(b)) for a, b in pairs if a != b), ())
    text = line.partition("replica_groups=")[2]
    listed = re.match(r"\{\{([\d,]+)\}", text)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    tiled = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text)
    if tiled:
        shape, sizes = (tuple(map(int, tiled[i].split(","))) for i in (1, 2))
        numbers = np.arange(math.prod(sizes)).reshape(sizes)
        if tiled[3]:
            numbers = numbers.transpose([int(axis) for axis in tiled[3].split(",")])
        return tuple(numbers.reshape(shape)[0].tolist())
    named = re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", text)
    if named:
        axes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        numbers = np.arange(math.prod(map(int, axes.values()))).reshape(
            [int(size) for size in axes.values()]
        )
        used = re.findall(r"'(\w+)'", named[2])
        index = tuple(slice(None) if axis in used else 0 for axis in axes)
        return tuple(numbers[index].ravel().tolist())
    return tuple(range(devices))


@functools.lru_cache(maxsize=1)
def _device_count(program: str) -> int:
    counts = [
        re.search(rf"{name}=(\d+)", program[:100_000])
        for name in ("num_partitions", "replica_count")
    ]
    return max((int(count[1]) for count in counts if count), default=1)


def summed(collectives: Sequence[Collective]) -> dict[str, float]:
    """kind -> bytes that a device sends, the most first."""
    totals: dict[str, float] = {}
    for collective in collectives:
        totals[collective.kind] = totals.get(collective.kind, 0.0) + collective.sent
    return dict(sorted(totals.items(), key=lambda item: -item[1]))
