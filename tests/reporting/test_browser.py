"""The page in a real browser: it says nothing on its console and asks nobody for anything, filters
and sorts as the stages say, shows text as text, and can be used by keys, on phones and on paper."""

import contextlib

import pytest
from helpers.browser import NoBrowser, opened_browser, opened_page
from helpers.report_runs import EVIL, write_alignment, write_training

from mmpo_jax.reporting.browse import read_prompts
from mmpo_jax.reporting.page import write_report
from mmpo_jax.reporting.runs import read_runs

CONTRAST = """() => {
  const channel = (value) => {
    value /= 255;
    return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
  };
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
  const behind = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const colour = parse(getComputedStyle(at).backgroundColor);
      if (colour.length === 3 || colour[3] === 1) return colour;
    }
    return [255, 255, 255];
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const low = [];
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, text = walker.currentNode.data.trim();
    if (!text || !element.checkVisibility() || element.closest("script, [disabled]")) continue;
    const style = getComputedStyle(element);
    const own = parse(element.closest("svg") ? style.fill : style.color);
    const [one, other] = [light(own), light(behind(element))].sort((a, b) => b - a);
    if ((one + 0.05) / (other + 0.05) < 4.5) low.push(element.className + ": " + text);
  }
  return low;
}"""


@pytest.fixture(scope="module")
def browser():
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(opened_browser())
        except NoBrowser as missing:
            pytest.skip(str(missing))
        yield opened


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """(file, its prompts) of an alignment whose rounds have the same prompts."""
    folder = tmp_path_factory.mktemp("report")
    run = write_alignment(folder / "run", prompts=60, same_prompts=True, texts=[EVIL])
    write_report([str(run)], str(folder / "report.html"))
    return folder / "report.html", read_prompts(read_runs([str(run)]), None)[0]


def ids(page):
    return page.locator("#cards .prompt h3").all_text_contents()


def count(page):
    return page.locator("#count").inner_text()


def test_filters_and_sorting(browser, report):
    file, prompts = report
    with opened_page(browser, file) as page:
        assert ids(page) == [prompt.id for prompt in prompts[:20]]
        for show, chosen in {
            "rejected": [p for p in prompts if p.rejected],
            "failed": [p for p in prompts if p.failed],
            "pairs": [p for p in prompts if p.margin is not None],
            "unpaired": [p for p in prompts if p.margin is None],
            "": prompts,
        }.items():
            page.select_option("#f-show", show)
            assert count(page) == f"{len(chosen)} of 60 prompts"
            assert ids(page) == [prompt.id for prompt in chosen[:20]]
        for sort, key in {
            "margin": lambda p: -1 if p.margin is None else p.margin,
            "rejected": lambda p: p.rejected,
            "failed": lambda p: p.failed,
            "change": lambda p: p.change,
        }.items():
            page.select_option("#f-sort", sort)
            by_key = sorted(prompts, key=lambda p: -key(p))
            assert ids(page) == [prompt.id for prompt in by_key[:20]]
        page.fill("#f-text", "p0007 BICYCLE")
        said = [one.text for seen in prompts[7].seen for one in seen.responses]
        assert ids(page) == (["p0007"] if any("bicycle" in text for text in said) else [])
        page.fill("#f-text", "nobody says this")
        assert page.locator("#cards").inner_text() == "No prompt is like that."


def test_texts_are_texts(browser, report):
    file, _ = report
    with opened_page(browser, file) as page:
        page.fill("#f-text", "onerror")
        card = page.locator(".prompt").first
        if not card.locator("details").get_attribute("open"):
            card.locator("summary").click()
        assert EVIL in [text.strip() for text in card.locator(".said").all_inner_texts()]
        assert page.evaluate("window.hacked") is None
        assert page.locator(".said img, .said script").count() == 0


def test_pairs_claims_and_their_probabilities(browser, report):
    file, prompts = report
    prompt = next(p for p in prompts[1:] if p.seen[0].pairs)
    seen = prompt.seen[0]
    chosen, rejected = (seen.responses[getattr(seen.pairs[0], s)] for s in ("chosen", "rejected"))
    with opened_page(browser, file) as page:
        page.fill("#f-text", prompt.id)
        card = page.locator(".prompt").first
        assert card.locator("img").evaluate(
            "image => image.decode().then(() => image.naturalWidth)"
        )
        for side, response in (("chosen", chosen), ("rejected", rejected)):
            block = card.locator(f".response.{side}").first
            assert block.locator(".said").inner_text() == response.text
            only = {*block.locator(f".only-{side}").all_inner_texts()}
            other = rejected if side == "chosen" else chosen
            assert {*response.text.split()} - {*other.text.split()} <= only
            marks = block.locator(".claim .mark-text").all_inner_texts()
            assert marks == ["✓" if yes > no else "✗" for *_, yes, no in response.claims]
        _, question, yes, no = chosen.claims[0]
        card.locator(".response.chosen .claim").first.hover()
        told = page.locator("#tip").inner_text()
        assert f"{yes:.3f}" in told and f"{no:.3f}" in told and question in told
        page.uncheck("#f-diff")
        assert page.locator(".only-chosen, .only-rejected").count() == 0
        card.get_by_role("tab", name="round 2").click()
        card.locator("summary").click()
        said = [one.text for one in prompt.seen[1].responses]
        card.locator("details .said").last.wait_for()
        assert card.locator("details .said").all_text_contents() == said


def test_keys_and_links(browser, report):
    file, prompts = report
    with opened_page(browser, file) as page:
        page.keyboard.press("/")
        assert page.evaluate("document.activeElement.id") == "f-text"
        page.keyboard.press("Escape")
        for _ in range(2):
            page.keyboard.press("j")
        focused = "document.activeElement.querySelector('h3').textContent"
        assert page.evaluate(focused) == prompts[1].id
        page.keyboard.press("k")
        assert page.evaluate(focused) == prompts[0].id
        page.keyboard.press("n")
        assert ids(page) == [prompt.id for prompt in prompts[20:40]]
        page.select_option("#f-sort", "rejected")
        there = ids(page)
        url = page.url
        page.goto("about:blank")
        page.goto(url)  # a link to what is shown
        page.wait_for_selector("html[data-ready]", state="attached")
        assert ids(page) == there
        chart = page.locator("svg.chart").first
        chart.focus()
        page.keyboard.press("ArrowRight")
        assert page.locator("#tip").inner_text().startswith("round 0\nsampled: 0.48\ngreedy: 0.4")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_can_be_read(browser, report, scheme):
    with opened_page(browser, report[0], color_scheme=scheme) as page:
        assert page.evaluate(CONTRAST) == []
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 20, 22)"
        assert dark == (scheme == "dark")


def test_phones_and_paper(browser, report):
    with opened_page(browser, report[0], viewport={"width": 360, "height": 700}) as page:
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    with opened_page(browser, report[0]) as page:
        assert len(page.pdf(format="A4")) > 50_000
        unnamed = page.evaluate(
            "[...document.querySelectorAll('input, select, button, svg.chart, img')].filter((e) => "
            "!(e.labels?.length || e.textContent.trim() || e.ariaLabel || e.alt)).length"
        )
        assert unnamed == 0


def test_several_runs(browser, tmp_path):
    folders = [str(write_alignment(tmp_path / f"seed{s}", 5, seed=s)) for s in range(3)]
    folders.append(str(write_training(tmp_path / "train")))
    write_report(folders, str(tmp_path / "report.html"))
    with opened_page(browser, tmp_path / "report.html") as page:
        assert page.locator(".run").count() == 4
        page.select_option("#f-place", "1/2")
        assert count(page) == "5 of 10 prompts"
        page.select_option("#f-place", "2")
        assert count(page) == "10 of 10 prompts"


def test_benchmarks(browser, tmp_path):
    run = write_alignment(tmp_path / "run", prompts=5, questions=4)
    write_report([str(run)], str(tmp_path / "report.html"))
    with opened_page(browser, tmp_path / "report.html") as page:
        page.select_option("#f-benchmark", "picture world")
        assert ids(page) == ["q0", "q1", "q2"]
        blocks = page.locator(".prompt").first.locator(".response")
        assert blocks.locator("b").all_text_contents() == ["start", "round 1", "round 2"]
        new = blocks.nth(2).locator(".only-chosen").all_text_contents()
        assert new == ["and", "a", "star"]
        page.select_option("#f-benchmark", "rounds")
        assert count(page) == "10 of 13 prompts"
