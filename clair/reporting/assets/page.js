
"use strict";
// What all pages share. Text from users reaches the document as text nodes and attribute values, never as markup;
// the page's policy makes the browser refuse anything else.

const read = (id) => JSON.parse(document.getElementById(id).textContent);

const present = (children) => children.flat(Infinity).filter((child) => child != null && child !== false);

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, set] of Object.entries(value)) node.style.setProperty(key, set);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...present(children));
  return node;
}

// el("p", {class: "soft"}, "text", el("b", null, "bold")): an element; strings become text, never markup.
const el = (name, attributes, ...children) => fill(document.createElement(name), attributes, children);
const svg = (name, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);

// Numbers as people read them: whole ones with thousands, others to three digits that matter.
function told(value) {
  if (value == null || Number.isNaN(value)) return "–";
  if (typeof value !== "number") return String(value);
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return value.toLocaleString("en", { maximumFractionDigits: Math.abs(value) < 10 ? 2 : Math.abs(value) < 100 ? 1 : 0 });
}
const fixed = (value) => (Number.isNaN(value) ? "–" : value.toFixed(2));
const percent = (part, whole) => (whole ? `${told((100 * part) / whole)} %` : "–");
const words = (name) => name.replaceAll("_", " ");

// What the browser remembers between visits; nothing, where it may not.
const memory = {
  get(key) { try { return localStorage.getItem(key); } catch { return null; } },
  set(key, value) { try { localStorage.setItem(key, value); } catch { /* a private window, a full disk */ } },
};

// A button that goes through auto, light and dark.
function themeButton(button) {
  const themes = ["auto", "light", "dark"];
  const signs = { auto: "◐", light: "☀", dark: "☾" };
  let now = themes.includes(memory.get("clair-theme")) ? memory.get("clair-theme") : "auto";
  const apply = () => {
    document.documentElement.dataset.theme = now;
    button.textContent = signs[now];
    button.setAttribute("aria-label", `Theme: ${now}`);
    button.title = `Theme: ${now}`;
  };
  button.addEventListener("click", () => {
    now = themes[(themes.indexOf(now) + 1) % themes.length];
    memory.set("clair-theme", now);
    apply();
  });
  apply();
}

// A table; the first column names the rows, numbers stand right.
function table(heads, rows) {
  const side = (value) => (typeof value === "number" ? "number" : null);
  return el("table", null,
    el("thead", null, el("tr", null, heads.map((head, at) =>
      el("th", { scope: "col", class: rows.length && side(rows[0][at]) }, head)))),
    el("tbody", null, rows.map((row) => el("tr", null, row.map((value, at) =>
      el(at ? "td" : "th", { scope: at ? null : "row", class: side(value) }, value instanceof Node ? value : told(value)))))));
}

// A histogram as clair.reporting.html_page.histogram tells it. `pick(lo, hi, last)` is called for the bin that is clicked or entered.
function histogram(plot, label, pick) {
  const [width, height, floor] = [340, 132, 112];
  const bins = plot.counts.length;
  const step = width / bins;
  const most = Math.max(1, ...plot.counts);
  const every = Math.ceil(bins / (bins > 15 ? 5 : 8));
  const range = (at) => `${told(plot.edges[at])} to ${told(plot.edges[at + 1])}`;
  const bars = plot.counts.map((count, at) => {
    const size = count ? Math.max(1.5, (count / most) * (floor - 8)) : 0;
    const name = `${label} ${range(at)}: ${told(count)} (${percent(count, plot.n)})`;
    return svg("g", { class: "bin", role: "button", tabindex: -1, "aria-label": name, "data-at": at },
      svg("rect", { class: "bar", x: at * step + 0.75, width: step - 1.5, y: floor - size, height: size, rx: 1.5 }),
      svg("rect", { class: "hit", x: at * step, width: step, y: 0, height: floor }),
      svg("title", null, name));
  });
  const ticks = plot.edges.map((edge, at) => at % every === 0 || at === bins
    ? svg("text", { x: at * step, y: floor + 14, "text-anchor": at === 0 ? "start" : at === bins ? "end" : "middle" },
        bins - at < every && at !== bins ? "" : told(edge))
    : null);
  const middle = plot.n ? place(plot.edges, plot.q50) * step : null;
  const figure = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `Distribution of ${label}` },
    bars, svg("line", { class: "axis", x1: 0, x2: width, y1: floor + 0.5, y2: floor + 0.5 }), ticks,
    middle !== null && svg("line", { class: "median", x1: middle, x2: middle, y1: 0, y2: floor, "pointer-events": "none" }));
  if (pick && plot.n) pickable(figure, bars, (at) => pick(plot.edges[at], plot.edges[at + 1], at === bins - 1));
  return figure;
}

// Where a value lies among edges that are drawn at equal distances.
function place(edges, value) {
  let at = edges.findIndex((edge, i) => i + 1 < edges.length && value < edges[i + 1]);
  if (at < 0) at = edges.length - 2;
  return at + Math.min(1, Math.max(0, (value - edges[at]) / (edges[at + 1] - edges[at])));
}

// One stop for the Tab key; arrows go through the bins, Enter picks.
function pickable(figure, bars, pick) {
  let now = 0;
  bars[0].setAttribute("tabindex", 0);
  const focus = (at) => {
    bars[now].setAttribute("tabindex", -1);
    now = Math.min(bars.length - 1, Math.max(0, at));
    bars[now].setAttribute("tabindex", 0);
    bars[now].focus();
  };
  figure.addEventListener("click", (event) => {
    const bin = event.target.closest(".bin");
    if (bin) pick(Number(bin.dataset.at));
  });
  figure.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) focus(now + step);
    else if (event.key === "Enter" || event.key === " ") pick(now);
    else return;
    event.preventDefault();
  });
}

// Counts on a logarithmic grid, with the diagonal where both axes are equal.
function heatmap(grid, cells, [lo, hi], xName, yName) {
  const [size, left, low] = [240, 44, 14];
  const step = size / cells;
  const most = Math.max(1, ...grid.map(([, , count]) => count));
  const scale = (value) => (Math.log(value / lo) / Math.log(hi / lo)) * size;
  const marks = roundMarks(lo, hi);
  return svg("svg", { class: "plot", viewBox: `0 0 ${size + left + 8} ${size + 46}`, role: "img", "aria-label": `${yName} against ${xName}` },
    svg("g", { transform: `translate(${left} ${low})` },
      svg("rect", { x: 0, y: 0, width: size, height: size, fill: "none", class: "axis", "stroke-opacity": 0.5 }),
      grid.map(([x, y, count]) =>
        svg("rect", { class: "cell", x: x * step, y: size - (y + 1) * step, width: step, height: step, rx: 1,
          "fill-opacity": (0.12 + 0.88 * Math.sqrt(count / most)).toFixed(3) }, svg("title", null, told(count)))),
      svg("line", { class: "diagonal", x1: 0, y1: size, x2: size, y2: 0 }),
      marks.map((mark) => [
        svg("text", { x: scale(mark), y: size + 14, "text-anchor": "middle" }, told(mark)),
        svg("text", { x: -6, y: size - scale(mark) + 3.5, "text-anchor": "end" }, told(mark))]),
      svg("text", { x: size / 2, y: size + 29, "text-anchor": "middle" }, xName),
      svg("text", { transform: `translate(-34 ${size / 2}) rotate(-90)`, "text-anchor": "middle" }, yName)));
}

function roundMarks(lo, hi) {
  const all = [];
  for (let power = 1; power <= hi; power *= 10) for (const step of [1, 2, 5]) all.push(step * power);
  const inside = all.filter((mark) => mark >= lo && mark <= hi);
  return inside.length > 6 ? inside.filter((mark) => /^1/.test(String(mark))) : inside;
}

// A word diff as clair.reporting.html_page.diff tells it, in one text: what is gone struck out, what is new marked.
const diffInline = (parts) => text(parts.map((part) => marked(part[0], part[1])));

// The same as its two texts, exactly.
const diffSides = (parts) => [
  text(parts.filter(([kind]) => kind <= 0).map((part) => marked(part[0], part[2] ?? part[1]))),
  text(parts.filter(([kind]) => kind >= 0).map((part) => marked(part[0], part[1])))];

const text = (children) => el("div", { class: "text", dir: "auto" }, children);

function marked(kind, words) {
  if (kind === 0) return words;
  // White space at the beginning and around line ends stays outside, so that no empty line is coloured.
  return words.split(/(^\s+|\s*\n\s*)/).map((piece) => (piece.trim() ? el(kind < 0 ? "del" : "ins", null, piece) : piece));
}

// A list of `count` rows of equal height in `box`; `draw(at)` makes one. Only rows in sight are in the document.
function virtualList(box, height, draw) {
  const shown = el("div", { role: "presentation" });
  const canvas = el("div", { role: "presentation" }, shown);
  box.append(canvas);
  let count = 0, first = -1, last = -1;
  const paint = () => {
    const from = Math.max(0, Math.floor(box.scrollTop / height) - 8);
    const to = Math.min(count, Math.ceil((box.scrollTop + box.clientHeight) / height) + 8);
    if (from === first && to === last) return;
    [first, last] = [from, to];
    shown.style.setProperty("transform", `translateY(${from * height}px)`);
    shown.replaceChildren(...Array.from({ length: Math.max(0, to - from) }, (_, i) => draw(from + i)));
  };
  const refresh = () => { first = -1; paint(); };
  box.addEventListener("scroll", () => requestAnimationFrame(paint), { passive: true });
  new ResizeObserver(refresh).observe(box);
  return {
    refresh,
    set(rows) { count = rows; canvas.style.setProperty("height", `${rows * height}px`); refresh(); },
    reveal(at) {
      const top = at * height;
      if (top < box.scrollTop) box.scrollTop = top;
      else if (top + height > box.scrollTop + box.clientHeight) box.scrollTop = top + height - box.clientHeight;
      refresh();
    },
    page: () => Math.max(1, Math.floor(box.clientHeight / height) - 1),
    at: (event) => Math.floor((event.clientY - box.getBoundingClientRect().top + box.scrollTop) / height),
  };
}

// Mark where any of the `terms` stands in a part of the document, without touching it.
function highlight(root, terms) {
  if (!globalThis.CSS?.highlights) return;
  CSS.highlights.delete("found");
  if (!terms.length) return;
  const ranges = [];
  const walker = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
  while (walker.nextNode() && ranges.length < 2000) {
    const content = walker.currentNode.data.toLowerCase();
    if (content.length !== walker.currentNode.data.length) continue; // İ and its like change length
    for (const term of terms) {
      for (let at = content.indexOf(term); at >= 0; at = content.indexOf(term, at + term.length)) {
        const range = new Range();
        range.setStart(walker.currentNode, at);
        range.setEnd(walker.currentNode, at + term.length);
        ranges.push(range);
      }
    }
  }
  CSS.highlights.set("found", new Highlight(...ranges));
}

// Hand a text to the user as a file.
function download(name, content) {
  const url = URL.createObjectURL(new Blob([content], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}
