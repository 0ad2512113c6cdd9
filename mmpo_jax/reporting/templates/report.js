"use strict";
// Charts that say the values below the pointer, and prompts that are filtered, sorted and browsed.
// All texts of runs become text nodes; nothing here makes markup of them.

const PER_PAGE = 20;
const STOP_WORDS = new Set("a an and are as at by for in is it its of on or that the there this to with".split(" "));

const byId = (id) => document.getElementById(id);

function make(tag, attributes, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

const show = (value) => (value === null || value === undefined ? "–" : Number.isInteger(value) ? String(value) : value.toPrecision(4).replace(/\.?0+$/, ""));
const probability = (value) => (value === null ? "unknown" : value.toFixed(3));
const many = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// --- tips ---------------------------------------------------------------------------------------

const tip = byId("tip");

function tell(text, x, y) {
  tip.textContent = text;
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  tip.style.left = `${Math.max(6, Math.min(x + 14, innerWidth - box.width - 6))}px`;
  tip.style.top = `${y + 18 + box.height > innerHeight ? y - box.height - 10 : y + 18}px`;
}

const untell = () => { tip.hidden = true; };

// --- charts -------------------------------------------------------------------------------------

function watchChart(svg) {
  const chart = JSON.parse(svg.dataset.chart);
  const [left, right, top, bottom, width, height] = chart.box;
  const [x0, x1] = chart.x;
  const places = [...new Set(chart.lines.flatMap((line) => line.points.map((point) => point[0])))].sort((a, b) => a - b);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  cursor.setAttribute("y1", top);
  cursor.setAttribute("y2", height - bottom);
  let at = -1;
  const leave = () => { cursor.remove(); untell(); at = -1; };
  function point(place, clientX, clientY) {
    at = place;
    const x = places[place];
    const px = left + ((x - x0) / (x1 - x0)) * (width - left - right);
    cursor.setAttribute("x1", px);
    cursor.setAttribute("x2", px);
    svg.append(cursor);
    const lines = [`${chart.name} ${show(x)}`];
    for (const line of chart.lines) {
      const nearest = line.points.reduce((best, one) => (best === null || Math.abs(one[0] - x) < Math.abs(best[0] - x) ? one : best), null);
      if (nearest === null || Math.abs(nearest[0] - x) > (x1 - x0) / 40) continue;
      const band = nearest.length > 2 ? ` (${show(nearest[2])} to ${show(nearest[3])})` : "";
      lines.push(`${line.name}: ${show(nearest[1])}${band}`);
    }
    const box = svg.getBoundingClientRect();
    tell(lines.join("\n"), clientX ?? box.left + (px / width) * box.width, clientY ?? box.top + box.height / 2);
  }
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = x0 + ((((event.clientX - box.left) / box.width) * width - left) / (width - left - right)) * (x1 - x0);
    let best = 0;
    places.forEach((place, index) => { if (Math.abs(place - x) < Math.abs(places[best] - x)) best = index; });
    if (places.length) point(best, event.clientX, event.clientY);
  });
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("blur", leave);
  svg.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (event.key === "Escape") leave();
    if (step === undefined || !places.length) return;
    event.preventDefault();
    point(Math.max(0, Math.min(places.length - 1, at + step)));
  });
}

document.querySelectorAll("svg.chart").forEach(watchChart);

// --- prompts ------------------------------------------------------------------------------------

async function unpack(text) {
  const binary = atob(text.trim());
  const bytes = new Uint8Array(binary.length);
  for (let place = 0; place < binary.length; place += 1) bytes[place] = binary.charCodeAt(place);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

const words = (text) => text.split(/(\s+)/).filter((piece) => piece !== "");
const bare = (word) => word.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "");

/** Which words of `ours` are in a longest common subsequence with `theirs`. */
function common(ours, theirs) {
  const rows = ours.length, columns = theirs.length;
  const kept = new Array(rows).fill(false);
  if (rows * columns > 4e6) return kept.fill(true); // too long to compare
  const table = new Uint16Array((rows + 1) * (columns + 1));
  for (let i = rows - 1; i >= 0; i -= 1) {
    for (let j = columns - 1; j >= 0; j -= 1) {
      const here = i * (columns + 1) + j;
      table[here] = ours[i] === theirs[j] ? table[here + columns + 2] + 1 : Math.max(table[here + columns + 1], table[here + 1]);
    }
  }
  for (let i = 0, j = 0; i < rows && j < columns;) {
    const here = i * (columns + 1) + j;
    if (ours[i] === theirs[j]) { kept[i] = true; i += 1; j += 1; }
    else if (table[here + columns + 1] >= table[here + 1]) i += 1;
    else j += 1;
  }
  return kept;
}

const spoken = (text) => words(text).filter((piece) => /\S/.test(piece));

function saidText(text, against, mark) {
  const paragraph = make("p", { class: text.trim() ? "said" : "said empty" });
  if (!text.trim()) { paragraph.append("(nothing)"); return paragraph; }
  const kept = against === null ? null : common(spoken(text), spoken(against));
  let place = 0;
  for (const piece of words(text)) {
    if (!/\S/.test(piece)) { paragraph.append(piece); continue; }
    const differs = kept !== null && !kept[place];
    paragraph.append(make("span", { class: differs ? mark : null, "data-word": bare(piece) }, piece));
    place += 1;
  }
  return paragraph;
}

const VERDICTS = { ok: ["✓", "accepted"], no: ["✗", "rejected"], open: ["?", "not answered"] };
const verdictOf = ([, , yes, no]) => (yes === null || no === null ? "open" : yes > no ? "ok" : "no");

function claimItem(claim, paragraph) {
  const [text, question, yes, no] = claim;
  const verdict = verdictOf(claim);
  const [mark, name] = VERDICTS[verdict];
  const told = question === null && verdict === "no"
    ? "could not be read as a claim, which counts as rejected"
    : `p(yes) ${probability(yes)}   p(no) ${probability(no)}`;
  const item = make("li", { class: `claim ${verdict}`, tabindex: "0", "aria-label": `${name}: ${text} ${told}` },
    make("span", { class: "mark-text", "aria-hidden": "true" }, mark), make("span", {}, text));
  const about = new Set(spoken(text).map(bare).filter((word) => word && !STOP_WORDS.has(word)));
  const light = (on) => paragraph.querySelectorAll("[data-word]").forEach((span) => span.classList.toggle("lit", on && about.has(span.dataset.word)));
  const enter = (event) => {
    light(true);
    const box = item.getBoundingClientRect();
    tell(`${name}: ${told}${question ? `\n${question}` : ""}`, event.clientX ?? box.left, event.clientY ?? box.bottom - 14);
  };
  const leave = () => { light(false); untell(); };
  item.addEventListener("pointerenter", enter);
  item.addEventListener("focus", enter);
  item.addEventListener("pointerleave", leave);
  item.addEventListener("blur", leave);
  return item;
}

/** A response as the page shows it; `side` is chosen, rejected or nothing. */
function responseBlock(response, side, against) {
  const [sample, source, text, finished, score, reason, claims, details] = response;
  const paragraph = saidText(text, against, side === "rejected" ? "only-rejected" : "only-chosen");
  const title = side ? `${side[0].toUpperCase()}${side.slice(1)}` : `Sample ${sample}`;
  const header = make("header", {}, make("b", {}, title), side ? make("span", {}, `sample ${sample}`) : null,
    source ? make("span", {}, `of ${source}`) : null, finished ? null : make("span", {}, "cut off"),
    reason ? make("span", { class: "badge no" }, `no score: ${reason}`) : null,
    score === null ? null : make("span", { class: "score" }, `score ${show(score)}`));
  const block = make("div", { class: `response ${side || ""}${reason ? " failed" : ""}` }, header, paragraph);
  if (claims.length) block.append(make("ul", { class: "claims", "aria-label": "Claims" }, ...claims.map((claim) => claimItem(claim, paragraph))));
  for (const [name, value] of Object.entries(details)) {
    block.append(make("p", { class: "more-said" }, `${name}: ${typeof value === "string" ? value : JSON.stringify(value)}`));
  }
  return block;
}

class Browser {
  constructor(data, pictures) {
    this.runs = data.runs;
    this.prompts = data.prompts;
    this.pictures = pictures;
    this.page = 0;
    this.found = [];
    this.fields = Object.fromEntries(["text", "show", "benchmark", "place", "sort"].map((name) => [name, byId(`f-${name}`)]));
    this.diff = byId("f-diff");
    this.fillPlaces();
    if (!this.prompts.some((prompt) => prompt.n.change !== null)) this.fields.sort.querySelector("[value=change]").disabled = true;
    this.readHash();
    for (const field of Object.values(this.fields)) field.addEventListener("input", () => { this.page = 0; this.update(); });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    this.diff.addEventListener("change", () => this.draw());
    byId("previous").addEventListener("click", () => this.turn(-1));
    byId("next").addEventListener("click", () => this.turn(1));
    document.addEventListener("keydown", (event) => this.pressed(event));
    this.update();
  }

  placeName(run, round) {
    const [name, kind] = this.runs[run];
    const place = kind === "evaluate" ? "model" : round === 0 ? "start" : kind === "align" ? `round ${round}` : `update ${round.toLocaleString("en")}`;
    return this.runs.length > 1 ? `${name}, ${place}` : place;
  }

  fillPlaces() {
    const places = new Map();
    for (const prompt of this.prompts) {
      for (const seen of prompt.seen) {
        if (this.runs.length > 1) places.set(`${seen.run}`, this.runs[seen.run][0]);
        places.set(`${seen.run}/${seen.round}`, this.placeName(seen.run, seen.round));
      }
    }
    const order = [...places.keys()].sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    for (const place of order) this.fields.place.append(make("option", { value: place }, places.get(place)));
    this.fields.place.parentElement.hidden = order.length < 2;
    const benchmarks = [...new Set(this.prompts.map((prompt) => prompt.b))];
    for (const name of benchmarks) this.fields.benchmark.append(make("option", { value: name || "rounds" }, name || "rounds"));
    this.fields.benchmark.parentElement.hidden = benchmarks.length < 2;
  }

  readHash() {
    const given = new URLSearchParams(location.hash.replace(/^#prompts\??/, ""));
    for (const [name, field] of Object.entries(this.fields)) if (given.has(name)) field.value = given.get(name);
    this.page = Math.max(0, (parseInt(given.get("page"), 10) || 1) - 1);
  }

  writeHash() {
    const given = new URLSearchParams();
    for (const [name, field] of Object.entries(this.fields)) if (field.value) given.set(name, field.value);
    if (this.page) given.set("page", this.page + 1);
    if (given.size || location.hash.startsWith("#prompts?")) history.replaceState(null, "", `#prompts?${given}`);
  }

  textOf(prompt) {
    if (prompt.text === undefined) {
      const said = prompt.seen.flatMap((seen) => seen.r.flatMap((r) => [r[2], r[5] || "", ...r[6].map((claim) => claim[0])]));
      prompt.text = [prompt.id, prompt.q, ...prompt.names, ...said].join("\n").toLowerCase();
    }
    return prompt.text;
  }

  isAt(prompt, place) {
    const [run, round] = place.split("/").map(Number);
    return prompt.seen.some((seen) => seen.run === run && (round === undefined || seen.round === round));
  }

  update() {
    const { show: shown, benchmark, place, sort } = Object.fromEntries(Object.entries(this.fields).map(([name, field]) => [name, field.value]));
    const sought = this.fields.text.value.toLowerCase().split(/\s+/).filter(Boolean);
    const passes = { "": () => true, rejected: (n) => n.rejected > 0, failed: (n) => n.failed > 0, pairs: (n) => n.pairs > 0, unpaired: (n) => n.pairs === 0 }[shown];
    this.found = this.prompts.filter((prompt) => passes(prompt.n) && (!benchmark || (prompt.b || "rounds") === benchmark) && (!place || this.isAt(prompt, place)) && sought.every((word) => this.textOf(prompt).includes(word)));
    if (sort) this.found.sort((a, b) => (b.n[sort] ?? -Infinity) - (a.n[sort] ?? -Infinity) || 0);
    this.page = Math.min(this.page, Math.max(0, Math.ceil(this.found.length / PER_PAGE) - 1));
    byId("count").textContent = `${this.found.length.toLocaleString("en")} of ${many(this.prompts.length, "prompt")}`;
    this.writeHash();
    this.draw();
  }

  turn(by) {
    const pages = Math.max(1, Math.ceil(this.found.length / PER_PAGE));
    const page = Math.max(0, Math.min(pages - 1, this.page + by));
    if (page === this.page) return;
    this.page = page;
    this.writeHash();
    this.draw();
    byId("prompts").scrollIntoView();
    byId("cards").querySelector(".prompt")?.focus({ preventScroll: true });
  }

  draw() {
    untell();
    const pages = Math.max(1, Math.ceil(this.found.length / PER_PAGE));
    const shown = this.found.slice(this.page * PER_PAGE, (this.page + 1) * PER_PAGE);
    byId("cards").replaceChildren(...(shown.length ? shown.map((prompt) => this.card(prompt)) : [make("p", { class: "nothing" }, "No prompt is like that.")]));
    byId("page").textContent = `${this.page + 1} / ${pages}`;
    byId("previous").disabled = this.page === 0;
    byId("next").disabled = this.page >= pages - 1;
  }

  card(prompt) {
    const { n } = prompt;
    const badges = prompt.b ? [make("span", { class: "badge" }, prompt.b)] : [];
    if (n.claims) badges.push(make("span", { class: `badge ${n.rejected ? "no" : "ok"}` }, `${n.rejected ? "✗" : "✓"} ${n.rejected} of ${many(n.claims, "claim")} rejected`));
    if (n.failed) badges.push(make("span", { class: "badge no" }, `${many(n.failed, "response")} without a score`));
    if (n.margin !== null) badges.push(make("span", { class: "badge" }, `margin ${show(n.margin)}`));
    if (n.change !== null) badges.push(make("span", { class: "badge" }, `changed ${Math.round(100 * n.change)} %`));
    const asked = make("div", { class: "asked" }, ...prompt.pictures.map((number, place) => this.picture(number, prompt.names[place])));
    asked.append(make("p", { class: "question" }, prompt.q || "(the question is not known)"));
    if (prompt.names.length) asked.append(make("p", { class: "names" }, prompt.names.join(", ")));
    const said = make("div", { class: "content" });
    const card = make("article", { class: "prompt", tabindex: "-1", "aria-label": `Prompt ${prompt.id}` },
      make("header", {}, make("h3", {}, prompt.id), ...badges), make("div", { class: "cols" }, asked, said));
    this.fill(said, prompt);
    return card;
  }

  picture(number, name) {
    if (number === null) return make("p", { class: "missing" }, "the picture could not be opened");
    const image = make("img", { src: `data:image/webp;base64,${this.pictures[number]}`, alt: `Picture ${name}`, loading: "lazy", decoding: "async" });
    image.addEventListener("load", () => image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= 96));
    return image;
  }

  fill(said, prompt) {
    const { seen } = prompt;
    if (seen.every((one) => one.r.length === 1 && !one.p.length)) {
      const first = seen[0].r[0][2];
      said.append(make("div", { class: "side" }, ...seen.map((one, place) => {
        const block = responseBlock(one.r[0], "", place && this.diff.checked ? first : null);
        block.querySelector("b").textContent = this.placeName(one.run, one.round);
        return block;
      })));
      return;
    }
    const panel = make("div", {});
    const choose = (place) => {
      [...tabs.children].forEach((tab, index) => { tab.setAttribute("aria-selected", String(index === place)); tab.tabIndex = index === place ? 0 : -1; });
      panel.replaceChildren(...this.sighting(seen[place]));
    };
    const tabs = make("div", { class: "tabs", role: "tablist", "aria-label": "Rounds" });
    if (seen.length > 1 || this.fields.place.options.length > 2) {
      seen.forEach((one, place) => {
        const tab = make("button", { type: "button", role: "tab" }, this.placeName(one.run, one.round));
        tab.addEventListener("click", () => choose(place));
        tabs.append(tab);
      });
      tabs.addEventListener("keydown", (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (by === undefined) return;
        const place = ([...tabs.children].indexOf(document.activeElement) + by + seen.length) % seen.length;
        choose(place);
        tabs.children[place].focus();
      });
      said.append(tabs);
    }
    said.append(panel);
    choose(0);
  }

  sighting(one) {
    const parts = [];
    for (const [chosen, rejected, margin] of one.p) {
      const [better, worse] = [one.r[chosen], one.r[rejected]];
      parts.push(make("div", { class: "side" },
        responseBlock(better, "chosen", this.diff.checked ? worse[2] : null),
        responseBlock(worse, "rejected", this.diff.checked ? better[2] : null)));
      parts.push(make("p", { class: "margin" }, `margin ${show(margin)}`));
    }
    const list = make("div", { class: "side" });
    const all = make("details", {}, make("summary", {}, one.p.length ? `All ${many(one.r.length, "response")}` : many(one.r.length, "response")), list);
    const fill = () => { if (!list.children.length) list.append(...one.r.map((response) => responseBlock(response, "", null))); };
    all.addEventListener("toggle", fill);
    if (!one.p.length) { all.open = true; fill(); }
    parts.push(all);
    return parts;
  }

  pressed(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") { untell(); if (document.activeElement === this.fields.text) this.fields.text.blur(); }
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement?.tagName)) return;
    const cards = [...byId("cards").querySelectorAll(".prompt")];
    const current = cards.findIndex((card) => card.contains(document.activeElement));
    const go = (place) => { const card = cards[Math.max(0, Math.min(cards.length - 1, place))]; card?.focus(); card?.scrollIntoView({ block: "nearest" }); };
    const actions = {
      "/": () => { this.fields.text.focus(); this.fields.text.scrollIntoView({ block: "nearest" }); },
      j: () => go(current + 1),
      k: () => go(current - 1),
      n: () => this.turn(1),
      p: () => this.turn(-1),
      o: () => { const all = cards[Math.max(0, current)]?.querySelector("details"); if (all) all.open = !all.open; },
    };
    if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
  }
}

async function start() {
  if (!byId("prompts")) return;
  try {
    window.report = new Browser(await unpack(byId("data").textContent), byId("pictures").textContent.split(" "));
    document.documentElement.dataset.ready = "true";
  } catch (error) {
    byId("count").textContent = `The prompts cannot be shown: ${error}. It takes a browser of 2023 or later.`;
    throw error;
  }
}

start();
