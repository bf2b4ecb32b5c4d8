
// Browsing and marking: the list, what it lists, the decisions. Full texts are parsed when the first is asked for.
const METRICS = Object.keys(D.metrics);
const NUMBERS = Object.fromEntries(METRICS.map((name) => [name, Float64Array.from(R.numbers[name], (v) => v ?? NaN)]));
const measure = (name, i) => metric(name, NUMBERS[name][i]);
const ROW_HEIGHT = 58;

let texts = null;
const textOf = (i) => (texts ??= read("texts"))[i];

/* Decisions: by pair id, remembered by the browser under the dataset's fingerprint until they are saved. */
const marks = new Map();
const done = [];
const MEMORY = `clair-report:${D.fingerprint}`;

function setMark(id, mark) {
  if (mark) marks.set(id, mark); else marks.delete(id);
}

function remember() {
  memory.set(MEMORY, JSON.stringify([...marks]));
  const counts = { keep: 0, drop: 0 };
  for (const mark of marks.values()) counts[mark] += 1;
  byId("tally").textContent = marks.size ? `${told(counts.keep)} keep, ${told(counts.drop)} drop` : "";
  byId("save").disabled = !marks.size;
}

// Written by hand, because a JavaScript object would reorder ids that look like numbers.
function decisions() {
  const ids = [...marks.keys()].sort((a, b) => (a < b ? -1 : 1));
  const lines = ids.map((id) => `    ${JSON.stringify(id)}: ${JSON.stringify(marks.get(id))}`);
  return `{\n  "format": ${D.format},\n  "dataset": ${JSON.stringify(D.fingerprint)},\n  "decisions": {\n${lines.join(",\n")}\n  }\n}\n`;
}

async function openDecisions(file) {
  let found;
  try {
    found = JSON.parse(await file.text());
    if (found.format !== D.format || typeof found.decisions !== "object") throw new Error("it holds no decisions");
  } catch (error) {
    say(`${file.name} could not be opened: ${error.message}`);
    return;
  }
  const known = new Set(R.id);
  let taken = 0, left = 0;
  for (const [id, mark] of Object.entries(found.decisions)) {
    if (known.has(id) && (mark === "keep" || mark === "drop")) { setMark(id, mark); taken += 1; } else left += 1;
  }
  remember();
  update(true);
  say(`${told(taken)} decisions opened${left ? `, ${told(left)} left out: no pair of theirs is in this page` : ""}`);
}

const say = (words) => { byId("tally").textContent = words; };

/* What is listed: for pairs and for dropped rows each its own search, choice, order and place. */
const fresh = (show) => ({ search: "", show, sort: "file", down: false, ranges: new Map(), list: [], at: 0 });
const FULL = new Set(read("full"));
const usual = FULL.size < R.id.length ? "text" : "all";
const views = { pairs: fresh(usual), dropped: fresh("all") };
let kind = "pairs";
let sides = false;
const view = () => views[kind];
const current = () => view().list[view().at];

const SHOWS = {
  all: ["all", () => true],
  text: ["with full text", (i) => FULL.has(i)],
  train: ["train", (i) => !R.test[i]],
  test: ["test", (i) => R.test[i]],
  unmarked: ["not marked", (i) => !marks.has(R.id[i])],
  keep: ["marked keep", (i) => marks.get(R.id[i]) === "keep"],
  drop: ["marked drop", (i) => marks.get(R.id[i]) === "drop"],
};

const searched = { pairs: [], dropped: [] };
function haystack(i) {
  return (searched[kind][i] ??= (kind === "pairs" ? pairWords(i) : [X.id[i], X.detail[i], X.reasons[X.reason[i]].name].join("\n")).toLowerCase());
}

function pairWords(i) {
  const full = textOf(i);
  if (!full) return `${R.id[i]}\n${R.opening[i]}`;
  const side = (sign) => full.diff.filter(([which]) => which * sign >= 0).map((part) => part[1]).join("");
  return [R.id[i], ...full.prompt.map(([, said]) => said), side(1), side(-1), full.reasoning].join("\n");
}

let without = 0; // how many rows fit but for their missing text

// Words, or "several words" in quotes.
const terms = () => [...view().search.toLowerCase().matchAll(/"([^"]+)"|\S+/g)].map(([all, quoted]) => quoted ?? all);

function listed() {
  const v = view();
  const asked = terms();
  const shown = kind === "pairs" ? SHOWS[v.show][1] : (i) => v.show === "all" || X.reason[i] === Number(v.show);
  const ranges = kind === "pairs" ? [...v.ranges] : [];
  const inside = (i) => ranges.every(([name, [lo, hi, last]]) => {
    const value = NUMBERS[name][i];
    return value >= lo && (last || value < hi);
  });
  const list = [];
  without = 0;
  const count = (kind === "pairs" ? R : X).id.length;
  for (let i = 0; i < count; i++) {
    const text = v.show !== "text" || FULL.has(i);
    if ((!text || shown(i)) && inside(i) && (!asked.length || asked.every((term) => haystack(i).includes(term)))) {
      if (text) list.push(i); else without += 1;
    }
  }
  return sorted(list, v);
}

function sorted(list, v) {
  if (v.sort === "reason") list.sort((a, b) => X.reason[a] - X.reason[b] || a - b);
  else if (v.sort !== "file") {
    const column = NUMBERS[v.sort];
    const key = (i) => (Number.isNaN(column[i]) ? (v.down ? -Infinity : Infinity) : column[i]);
    return list.sort((a, b) => (v.down ? key(b) - key(a) : key(a) - key(b)) || a - b);
  }
  return v.down ? list.reverse() : list;
}

/* Drawing. */
const list = virtualList(byId("list"), ROW_HEIGHT, (at) => drawRow(at));

// List anew. `stay` keeps the row that is chosen, where it is still listed.
function update(stay) {
  const v = view();
  const before = current();
  v.list = listed();
  const again = stay ? v.list.indexOf(before) : -1;
  v.at = again >= 0 ? again : stay ? Math.min(v.at, Math.max(0, v.list.length - 1)) : 0;
  const all = kind === "pairs" ? O.counts.pairs : O.counts.dropped;
  const here = (kind === "pairs" ? R : X).id.length;
  byId("told").textContent = `${told(v.list.length)} of ${told(all)} ${kind === "pairs" ? "pairs" : "dropped rows"}` +
    (here < all ? `; this page lists ${told(here)}` : "") +
    (without ? `, and ${told(without)} of which only the numbers are here` : "") +
    (v.search && kind === "pairs" && FULL.size < here ? `; searched the openings of those without text` : "");
  byId("ranges").replaceChildren(...(kind === "pairs" ? [...v.ranges] : []).map(([name, [lo, hi]]) =>
    el("button", { type: "button", onclick: () => { v.ranges.delete(name); update(true); } }, `${words(name)} ${told(lo)} to ${told(hi)} ×`)));
  list.set(v.list.length);
  choose(v.at);
}

function choose(at) {
  const v = view();
  v.at = Math.min(Math.max(0, at), Math.max(0, v.list.length - 1));
  list.reveal(v.at);
  if (v.list.length) byId("list").setAttribute("aria-activedescendant", `row-${v.at}`);
  else byId("list").removeAttribute("aria-activedescendant");
  drawDetail();
}

function drawRow(at) {
  const v = view();
  const i = v.list[at];
  const mark = kind === "pairs" ? marks.get(R.id[i]) : null;
  const place = { id: `row-${at}`, role: "option", "aria-selected": String(at === v.at), "aria-posinset": at + 1, "aria-setsize": v.list.length };
  if (kind === "dropped") {
    const reason = X.reasons[X.reason[i]].name.split(".");
    return el("div", { ...place, class: "row" }, el("span", { class: "mark" }),
      el("span", { class: "opening", dir: "auto" }, X.detail[i] || reason[1]), el("span", { class: "value" }, words(reason[1]), el("small", null, reason[0])),
      el("span", { class: "under id" }, X.id[i]));
  }
  const shown = v.sort === "file" ? "jaccard" : v.sort;
  return el("div", { ...place, class: `row ${mark ?? ""}` },
    el("span", { class: "mark", "aria-label": mark ? `marked ${mark}` : null }, { keep: "✓", drop: "✗" }[mark] ?? ""),
    el("span", { class: "opening", dir: "auto" }, R.opening[i] || "(no text)"),
    el("span", { class: "value" }, measure(shown, i), el("small", null, words(shown))),
    el("span", { class: "under" }, el("span", { class: "id" }, R.id[i]), R.test[i] ? " · test" : "", FULL.has(i) ? "" : " · numbers only"));
}

function drawDetail() {
  const i = current();
  const parts = i === undefined ? [el("p", { class: "nothing" }, nothing())] : kind === "pairs" ? pairDetail(i) : dropDetail(i);
  byId("detail").replaceChildren(...present(parts));
  byId("detail").scrollTop = 0;
  highlight(byId("detail"), terms());
}

function nothing() {
  if (kind === "dropped" && !X.id.length) return "Nothing was dropped: every prompt gave a pair.";
  return "Nothing fits. Empty the search, or choose “all”.";
}

function pairDetail(i) {
  const id = R.id[i];
  const full = textOf(i);
  const button = (mark, key) => el("button", { type: "button", class: mark, "aria-pressed": String(marks.get(id) === mark),
    "aria-keyshortcuts": key, onclick: () => decide(mark) }, `${mark === "keep" ? "✓ Keep" : "✗ Drop"} `, el("kbd", null, key));
  const head = el("div", { class: "head wide" }, el("span", { class: "id" }, id), R.test[i] ? el("span", { class: "soft" }, "test split") : null,
    el("div", { class: "buttons" }, button("keep", "a"), button("drop", "d")));
  const numbers = el("dl", { class: "numbers wide" }, METRICS.map((name) =>
    el("div", { title: D.metrics[name] }, el("dt", null, words(name)), el("dd", null, measure(name, i)))));
  if (!full) {
    return [head, numbers, el("h3", null, "Task"), el("div", { class: "turn text", dir: "auto" }, `${R.opening[i]} …`),
      el("p", { class: "notice" }, `The full text of ${told(FULL.size)} pairs is in this page, and not of this one. For a page with it: `,
        el("code", null, `clair report DIR --filter 'id=${id}'`))];
  }
  return [head, numbers, ...taskParts(full), ...answerParts(full), ...reasoningParts(full)];
}

function taskParts(full) {
  return [el("h3", null, "Task"), ...full.prompt.map(([role, said]) => el("div", { class: "turn" },
    full.prompt.length > 1 || role !== "user" ? el("div", { class: "soft" }, role) : null, el("div", { class: "long" }, text(said))))];
}

function answerParts(full) {
  const { chosen, rejected } = full.models;
  const by = (name) => (name ? [" by ", el("bdi", null, name)] : "");
  const change = el("button", { type: "button", "aria-keyshortcuts": "s", onclick: changeSides }, sides ? "in one text " : "side by side ", el("kbd", null, "s"));
  if (!sides) {
    return [el("h3", null, "From rejected to chosen", change, el("span", { class: "soft" }, "rejected", by(rejected), ", chosen", by(chosen))),
      el("div", { class: "answer" }, diffInline(full.diff))];
  }
  const [loser, winner] = diffSides(full.diff);
  return [el("h3", null, "Rejected and chosen", change),
    el("div", { class: "sides wide" },
      el("div", null, el("p", { class: "soft" }, "rejected", by(rejected)), el("div", { class: "answer" }, loser)),
      el("div", null, el("p", { class: "soft" }, "chosen", by(chosen)), el("div", { class: "answer" }, winner)))];
}

const reasoningParts = (full) => (full.reasoning ? [el("h3", null, "Reasoning"), el("div", { class: "turn" }, text(full.reasoning))] : []);

function dropDetail(i) {
  const { name, help } = X.reasons[X.reason[i]];
  const [stage, reason] = name.split(".");
  return [el("div", { class: "head" }, el("h2", null, words(reason)), el("span", { class: "id" }, X.id[i])),
    el("dl", { class: "facts" }, el("dt", null, "stage"), el("dd", null, stage), el("dt", null, "reason"), el("dd", null, reason),
      help ? [el("dt", null, "meaning"), el("dd", null, help)] : null),
    el("h3", null, "Detail"), el("div", { class: "answer" }, text(X.detail[i] || "–")),
    X.failed[i] ? el("p", { class: "notice" }, "The request got no reply. Run the same clair build again to try it again.") : null];
}

function changeSides() {
  sides = !sides;
  drawDetail();
}

/* Marking. */
function decide(mark) {
  if (kind !== "pairs" || current() === undefined) return;
  const id = R.id[current()];
  const before = marks.get(id);
  done.push([id, before]);
  setMark(id, before === mark ? null : mark);
  remember();
  const gone = ["unmarked", "keep", "drop"].includes(view().show);
  const at = view().at;
  if (gone) update(true);
  choose(gone ? view().at : before === mark ? at : at + 1);
}

function undo() {
  const last = done.pop();
  if (!last || kind !== "pairs") return;
  setMark(...last);
  remember();
  update(true);
  const at = view().list.findIndex((i) => R.id[i] === last[0]);
  if (at >= 0) choose(at);
}

/* Going about. */
function go(where) {
  if (location.hash !== `#${where}`) history.pushState(null, "", `#${where}`);
  route();
}

// Go to rows that something else chose.
function look(where, chosen) {
  Object.assign(views[where], { search: "", at: 0, ...chosen });
  go(where);
}

function route() {
  const where = { "#pairs": "pairs", "#dropped": "dropped" }[location.hash] ?? "overview";
  byId("overview-page").hidden = where !== "overview";
  byId("browse").hidden = where === "overview";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${where}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (where === "overview") return;
  kind = where;
  tools();
  update(true);
}

function tools() {
  const v = view();
  const option = (value, told) => el("option", { value }, told);
  const shows = kind === "pairs" ? Object.entries(SHOWS).map(([name, [label]]) => option(name, label))
    : [option("all", "all reasons"), ...X.reasons.map(({ name, count }, at) => option(at, `${name} (${told(count)})`))];
  const sorts = kind === "pairs" ? METRICS.map((name) => option(name, `by ${words(name)}`)) : [option("reason", "by reason")];
  byId("show").replaceChildren(...shows);
  byId("sort").replaceChildren(option("file", "in file order"), ...sorts);
  byId("show").value = v.show;
  byId("sort").value = v.sort;
  byId("search").value = v.search;
  orderButton();
}

function orderButton() {
  byId("order").textContent = view().down ? "↓" : "↑";
  byId("order").setAttribute("aria-label", view().down ? "Downwards: largest or last first" : "Upwards: smallest or first first");
  byId("order").title = view().down ? "largest or last first" : "smallest or first first";
}

const KEYS = {
  j: ["j ↓", "next row", () => choose(view().at + 1)],
  k: ["k ↑", "row before", () => choose(view().at - 1)],
  a: ["a", "keep, and on to the next; again takes it back", () => decide("keep")],
  d: ["d", "drop, and on to the next; again takes it back", () => decide("drop")],
  u: ["u", "undo the last mark", undo],
  s: ["s", "both answers side by side, or in one text", changeSides],
  " ": ["space", "read on in a long pair; with shift, back", (event) => byId("detail").scrollBy(0, (event.shiftKey ? -0.8 : 0.8) * byId("detail").clientHeight)],
  "/": ["/", "search", () => byId("search").select()],
  "?": ["?", "these keys", () => byId("keys").showModal()],
};
const ALSO = {
  ArrowDown: KEYS.j[2], ArrowUp: KEYS.k[2],
  PageDown: () => choose(view().at + list.page()), PageUp: () => choose(view().at - list.page()),
  Home: () => choose(0), End: () => choose(view().list.length - 1),
};

function keydown(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  const inField = event.target.matches("input, select, textarea");
  if (inField) {
    if (event.key === "Escape" || (event.key === "Enter" && event.target.id === "search")) byId("list").focus();
    return;
  }
  if (event.key === " " && event.target.matches("button, summary, a, .bin")) return;
  const browsing = !byId("browse").hidden;
  const inDetail = byId("detail").contains(event.target);
  const act = KEYS[event.key]?.[2] ?? (browsing && !inDetail ? ALSO[event.key] : null);
  if (!act) return;
  event.preventDefault();
  if (!browsing && event.key !== "?") go("pairs");
  if (browsing || "/?".includes(event.key)) act(event);
}

function drawKeys() {
  const dialog = byId("keys");
  const close = el("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Close");
  dialog.append(el("h2", null, "Keys"), el("dl", null, Object.values(KEYS).map(([keys, what]) =>
    [el("dt", null, keys.split(" ").map((key) => [el("kbd", null, key), " "])), el("dd", null, what)])), close);
}

function start() {
  byId("name").textContent = D.name;
  byId("count-pairs").textContent = told(O.counts.pairs);
  byId("count-dropped").textContent = told(O.counts.dropped);
  for (const [id, mark] of JSON.parse(memory.get(MEMORY) ?? "[]")) marks.set(id, mark);
  themeButton(byId("theme"));
  drawKeys();
  drawOverview();
  remember();
  let waiting = 0;
  byId("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { view().search = byId("search").value; update(true); }, 120);
  });
  byId("show").addEventListener("change", () => { view().show = byId("show").value; update(false); });
  byId("sort").addEventListener("change", () => { view().sort = byId("sort").value; update(false); });
  byId("order").addEventListener("click", () => { view().down = !view().down; orderButton(); update(false); });
  byId("list").addEventListener("click", (event) => choose(list.at(event)));
  byId("save").addEventListener("click", () => download(`${D.name}-decisions.json`, decisions()));
  byId("help").addEventListener("click", () => byId("keys").showModal());
  byId("open").addEventListener("change", (event) => { if (event.target.files[0]) openDecisions(event.target.files[0]); event.target.value = ""; });
  addEventListener("keydown", keydown);
  addEventListener("hashchange", route);
  route();
  document.documentElement.dataset.ready = "yes";
}

start();
