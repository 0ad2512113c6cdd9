"""A real browser without a window, for tests of pages.

It is the Chromium that `MMPO_CHROMIUM` names, one on the path, or Playwright's own.
"""

import contextlib
import dataclasses
import os
import shutil

NAMES = (
    *("chromium", "chromium-browser", "chromium-headless-shell", "headless_shell"),
    *("google-chrome", "google-chrome-stable", "chrome"),
)


class NoBrowser(Exception):
    """There is none; the message says how to get one."""


@contextlib.contextmanager
def opened_browser():
    """
    Raises:
      NoBrowser: Playwright or a Chromium is missing.
    """
    try:
        from playwright.sync_api import sync_playwright
    except ImportError as error:
        raise NoBrowser("no browser: pip install playwright") from error
    with sync_playwright() as playwright:
        found = os.environ.get("MMPO_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), "")
        found = found or playwright.chromium.executable_path
        if not os.path.exists(found):
            told = "install chromium, run `playwright install chromium`, or set MMPO_CHROMIUM"
            raise NoBrowser(f"no browser: {told}")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened_page(browser, file, **context):
    """A page of a file that has come to its prompts; fails where the console says anything, or
    anybody is asked for anything."""
    said = []

    def requested(request):
        if not request.url.startswith(("file:", "data:", "blob:", "about:")):
            said.append(f"asked for {request.url:.200}")

    with contextlib.closing(browser.new_context(**context)) as opened:
        page = opened.new_page()
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", requested)
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        yield page
        assert said == []


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a browser shows of a report."""

    text: str
    prompts: int
    """Prompts in it."""
    pictures: int
    """Pictures of those on its first page; all of them open."""
    charts: int


def look_at(file):
    """Opens a report, filters and sorts its prompts; fails where the console says anything.

    Raises:
      NoBrowser: see `opened_browser`.
    """
    with opened_browser() as browser, opened_page(browser, file) as page:
        images = page.locator("#cards img")
        opened = images.evaluate_all(
            "images => Promise.all(images.map((image) => "
            "(image.loading = 'eager', image.decode().then(() => image.naturalWidth > 0))))"
        )
        assert all(opened)
        total = page.evaluate("report.prompts.length")
        page.select_option("#f-show", "rejected")
        page.select_option("#f-sort", "rejected")
        counts = page.evaluate("report.found.map((prompt) => prompt.n.rejected)")
        assert counts == sorted(counts, reverse=True) and (not counts or counts[-1] > 0)
        page.select_option("#f-show", "")
        page.fill("#f-text", page.evaluate("report.prompts[0].id"))
        assert 1 <= page.evaluate("report.found.length") <= total
        charts = page.locator("svg.chart").count()
        return Seen(page.inner_text("body"), total, len(opened), charts)
