"""Programs through the compiler: what they take of a device's memory, and what they exchange."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Sequence

import jax

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.planning.collectives import Collective, find_collectives
from mmpo_jax.planning.programs import Program

KERNELS = r'(?:kernel_name = "|%)splash_mha_([a-z]+)_\w+[.\d]*(?:"| = )'
"""Calls of splash attention's kernels, in a program before or after it is compiled."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a program; bytes of one device."""

    peak: float
    """Arguments, temporaries and code together; all that is known where it does not fit."""
    arguments: float | None
    temporaries: float | None
    """What it needs while it runs, and gives back."""
    collectives: tuple[Collective, ...] | None
    """None where the compiler ran out of memory, or cannot print the program."""
    seconds: float
    """Of the processor, for tracing and compiling."""
    refused: bool = False
    """Whether the compiler ran out of the device's memory."""


def compile_program(program: Program, optimised: bool = True, dump: str | None = None) -> Compiled:
    """Compiles a program for the devices of its mesh.

    Args:
      program: of a recipe.
      optimised: whether the compiler optimises; without, it takes a quarter of the time, memory
        comes out a few per cent lower, as nothing is fetched ahead of its use, and other exchanges
        may be chosen.
      dump: file for the optimised HLO.

    Raises:
      MmpoError: the compiler fails for another reason than memory, or what should be computed by
        splash attention is not.
    """
    started = time.process_time()
    with jax.set_mesh(program.mesh), _optimisation(optimised):
        try:
            lowered = program.lower()
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            used = re.search(r"\(([0-9.]+)([GMT])\) exceeds|Used ([0-9.]+)([GMT]) of", str(error))
            if used is None:
                raise MmpoError(f"{program.name}: the compiler fails: {error}") from error
            unit = {"M": 2**20, "G": 2**30, "T": 2**40}[used[2] or used[4]]
            peak = float(used[1] or used[3]) * unit
            spent = time.process_time() - started
            return Compiled(peak, None, None, None, spent, refused=True)
    spent = time.process_time() - started
    collectives = None
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # libtpu 0.0.52 cannot print v5p's
        text = compiled.as_text()
        collectives = tuple(find_collectives(text))
        if dump is not None:
            with open(dump, "w") as file:
                file.write(text)
    memory = compiled.memory_analysis()
    kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
    arguments = float(memory.argument_size_in_bytes)
    temporaries = float(memory.temp_size_in_bytes + kept)
    peak = arguments + temporaries + memory.generated_code_size_in_bytes
    return Compiled(peak, arguments, temporaries, collectives, spent)


@contextlib.contextmanager
def _optimisation(optimised: bool):
    before = getattr(jax.config, "jax_optimization_level")  # noqa: B009 (mypy does not know it)
    if not optimised:
        jax.config.update("jax_optimization_level", "O0")
    try:
        yield
    finally:
        jax.config.update("jax_optimization_level", before)


def splash_kernels(program: str) -> Sequence[str]:
    """Splash attention's kernels that a program calls: "fwd", "dq", "dkv"."""
    return sorted(re.findall(KERNELS, program))
