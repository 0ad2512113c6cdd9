"""How large the page of 1,000 prompts is and how soon it opens: photographs as large as any, ten
responses of 90 words with eight claims each.

    python benchmarks/report_page.py          # needs playwright and a Chromium, see docs/report.md
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from helpers.browser import opened_browser
from helpers.report_runs import large_prompts, write_alignment

from mmpo_jax.reporting.page import render
from mmpo_jax.reporting.runs import read_runs

TRIES = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=1000)
    count = parser.parse_args().prompts
    with tempfile.TemporaryDirectory() as folder:
        runs = read_runs([str(write_alignment(Path(folder) / "run", prompts=2))])
        prompts = large_prompts(count)
        begun = time.perf_counter()
        pages = list(render(runs, prompts, count, "report.html"))
        made = time.perf_counter() - begun
        for name, data in pages:
            (Path(folder) / name).write_bytes(data)
        sizes = ", ".join(f"{len(data) / 1e6:.1f} MB" for _, data in pages)
        print(f"{count} prompts: {sizes} in {made:.1f} s")
        with opened_browser() as browser:
            for _ in range(TRIES):
                page = browser.new_page()
                begun = time.perf_counter()
                page.goto((Path(folder) / "report.html").as_uri())
                page.wait_for_selector("html[data-ready]", state="attached")
                shown = time.perf_counter() - begun
                begun = time.perf_counter()
                page.fill("#f-text", "prompt-7")
                page.select_option("#f-sort", "rejected")
                filtered = time.perf_counter() - begun
                print(f"opened in {shown:.2f} s, filtered and sorted in {filtered:.2f} s")
                page.close()


if __name__ == "__main__":
    main()
