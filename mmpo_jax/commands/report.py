"""`mmpo report`: one page about runs, for a person to look at."""

from __future__ import annotations

import argparse
import os

from mmpo_jax.core.errors import MmpoError
from mmpo_jax.core.output import check_writable
from mmpo_jax.reporting.page import FILE, PROMPTS, write_report


def main(options: argparse.Namespace) -> None:
    """
    Raises:
      MmpoError: a folder is no run, or the output cannot be written.
    """
    output = options.output or os.path.join(options.runs[0], FILE)
    if options.output is None and len(options.runs) > 1:
        raise MmpoError("--output: give the file of a page about several runs")
    if not output.endswith(".html"):
        raise MmpoError(f"--output {output}: give a file that ends with .html")
    check_writable(output, is_file=True)
    told = write_report(options.runs, output, parse_prompts(options.prompts))
    print(f"report: {', '.join(told.files)} ({told.size / 1e6:.1f} MB, {told.prompts:,} prompts)")


def parse_prompts(text: str | None) -> int | None:
    """The value of `--prompts`: a number, or None for all.

    Raises:
      MmpoError: it is neither.
    """
    if text is None:
        return PROMPTS
    if text == "all":
        return None
    if not text.isdecimal():
        raise MmpoError(f"--prompts {text}: give a number, or all")
    return int(text)
