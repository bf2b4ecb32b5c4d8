
// The comparison of a base and its tuned models. `D` is what apo/evaluation/compare/html.py wrote.
const D = read("data");
const C = D.comparison;
const byId = (id) => document.getElementById(id);
const points = (share, digits = 1) => (share == null ? "–" : `${share < 0 ? "−" : ""}${(100 * Math.abs(share)).toFixed(digits)}`);
const signed = (share) => (share == null ? "–" : `${share > 0 ? "+" : ""}${points(share)}`);
const span = (interval, write = signed) => (interval ? `${write(interval[0])} to ${write(interval[1])}` : "no interval");
const chance = (p) => (p == null ? "–" : p < 0.001 ? "< 0.001" : p.toFixed(3));
const seen = (one) => (!one.delta_ci95 ? "bare" : one.delta_ci95[0] > 0 ? "better" : one.delta_ci95[1] < 0 ? "worse" : "open");
// What is left of it after the correction for many comparisons.
const verdictOf = (one) => (seen(one) !== "bare" && one.p_holm >= 0.05 ? "open" : seen(one));
const partName = (part) => part.benchmark ?? (part.split ? words(part.split) : "overall");
const plural = (count, word) => `${told(count)} ${word}${count === 1 ? "" : "s"}`;
const OVERALL = C.parts[0];

/* Overview. */
function drawOverview() {
  const card = (title, lead, ...children) => el("section", { class: "card" }, el("h2", null, title), lead ? el("p", { class: "lead" }, lead) : null, ...children);
  byId("overview-page").replaceChildren(...present([
    el("div", { class: "verdicts" }, C.tuned.map(verdict)),
    C.best ? el("p", { class: "notice" }, bestWords()) : null,
    card("Scores", "Per cent of rows, with the 95 % interval. Rows about the same passage, or of the same question, count as one draw.", el("div", { class: "scroll" }, scores())),
    C.tuned.length > 1 ? card("Difference to the base", "Tuned minus base, paired by row, in points.", el("div", { class: "scroll" }, forest(C.tuned.map((model, at) => line(model.name, OVERALL.tuned[at], OVERALL, "head"))))) : null,
    card("Where it changed", "Tuned minus base, paired by row, in points, with 95 % intervals clustered by passage, or question without one. Of many benchmarks one shows a difference by chance: coloured are those whose corrected p is below 0.05.", ...byPart()),
    card("What this could have seen", null, ...power()),
    card("What was compared", null, facts()),
  ]));
}

function verdict(model, at) {
  const one = OVERALL.tuned[at];
  const kind = verdictOf(one);
  const many = C.tuned.length > 1 ? `, corrected for ${C.tuned.length} models ${chance(one.p_holm)}` : "";
  const said = { better: "is better than", worse: "is worse than", open: "shows no difference to", bare: "against" }[kind];
  return el("section", { class: `card verdict ${kind}` },
    el("h2", null, el("bdi", null, model.name), ` ${said} `, el("bdi", null, C.base.name)),
    el("p", { class: "points" }, el("b", null, signed(one.delta)), el("small", null, ` points${OVERALL.split ? ` of ${words(OVERALL.split)}` : ""}, 95 % interval ${span(one.delta_ci95)}`)),
    el("p", null, one.p == null ? `No error can be estimated: ${one.no_interval}.` : `p ${chance(one.p)}${many}. ${plural(one.better, "row")} better, ${told(one.worse)} worse, of ${told(OVERALL.rows)}.`),
    one.p_sign == null ? null : el("p", { class: "soft" }, `Few questions or passages differ, ${told(one.differing)}: p is the larger of its own and that of the exact sign test, ${chance(one.p_sign)}.`),
    open(one.delta_bracket) ? el("p", { class: "soft" }, `Were all that is unresolved wrong or right, it would be anything from ${span(one.delta_bracket)}.`) : null,
    kind === "open" && C.power[at] ? el("p", { class: "soft" }, `A true difference under ${points(C.power[at].detectable)} points would mostly be missed here.`) : null);
}

function bestWords() {
  const b = C.best;
  return [`The best of ${told(b.of)}, `, el("bdi", null, b.name), `, leads by ${signed(b.delta)} points, of which choosing the best accounts for about ${points(b.selection_bias)}. `,
    `Corrected for that: ${signed(b.corrected)}, 95 % interval ${span(b.ci95)}. Better still: choose on one set of questions and report on another.`];
}

function scores() {
  const parts = C.parts.filter((part) => part.level !== "benchmark");
  const cell = (one) => el("span", null, points(one.score), el("small", null, one.ci95 ? span(one.ci95, points) : "one question"),
    open(one.bracket) ? el("small", null, `bracket ${span(one.bracket, points)}`) : null);
  const row = (model, pick, more) => [el("bdi", null, model.name), ...parts.map((part) => cell(pick(part))), more(model)];
  const left = (model) => el("span", null, told(model.unresolved), model.fallbacks ? el("small", null, `${told(model.fallbacks)} drawn at random`) : null);
  const made = table(["", ...parts.map(partName), "unresolved"], [
    row(C.base, (part) => part.base, left), ...C.tuned.map((model, at) => row(model, (part) => part.tuned[at], left))]);
  made.classList.add("scores");
  return made;
}

/* Why a difference has no interval, in short. */
const NONE = { "a single question": "one question", "no score differs": "none differs", "no question differs": "none differs", "every question differs by the same amount": "no spread" };

/* Whether something unresolved leaves a bracket open. */
function open(bracket) {
  return bracket[1] - bracket[0] > 1e-12;
}

/* A plot of differences with their intervals. */
const line = (name, one, part, look) => ({ name, one, rows: part.rows, questions: part.questions, look });

function forest(lines) {
  const [left, right, width, height] = [215, 225, 1060, 25];
  // Wide enough for every difference and for the whole intervals of the bold lines; what is wider runs off with an arrow.
  const ends = lines.flatMap(({ one, look }) => [one.delta, ...(look === "head" ? one.delta_ci95 ?? [] : [])]);
  const reach = Math.min(100, Math.max(5, ...ends.map((value) => 100 * Math.abs(value))) * 1.15);
  const x = (share) => left + ((100 * Math.max(-reach / 100, Math.min(reach / 100, share)) + reach) / (2 * reach)) * (width - left - right);
  const floor = lines.length * height + 8;
  const step = [1, 2, 5, 10, 20, 25, 50].find((size) => reach / size <= 5) ?? 50;
  const ticks = [];
  for (let at = -Math.floor(reach / step) * step; at <= reach; at += step) ticks.push(at);
  return svg("svg", { class: "plot forest", viewBox: `0 0 ${width} ${floor + 34}`, role: "img", "aria-label": "Differences with 95 % intervals, in points" },
    lines.map((_, at) => (at % 2 ? null : svg("rect", { class: "band", x: 0, y: at * height + 4, width, height, rx: 4 }))),
    ticks.map((at) => [svg("line", { class: at ? "grid" : "zero", x1: x(at / 100), x2: x(at / 100), y1: 4, y2: floor }),
      svg("text", { class: "tick", x: x(at / 100), y: floor + 14, "text-anchor": "middle" }, at > 0 ? `+${at}` : String(at).replace("-", "−"))]),
    svg("text", { class: "tick", x: x(0), y: floor + 29, "text-anchor": "middle" }, "points, tuned minus base"),
    lines.map((item, at) => forestLine(item, at * height + height / 2 + 4, x, reach / 100, width)));
}

function forestLine({ name, one, rows, questions, look }, y, x, reach, width) {
  const ci = one.delta_ci95;
  const size = ci ? Math.min(5.5, 2.2 + Math.sqrt(questions) / 6) : 3;
  const said = `${name}: ${signed(one.delta)} points, ${ci ? `95 % interval ${span(ci)}` : one.no_interval}; ${plural(rows, "row")} of ${plural(questions, "question")}`;
  return svg("g", { class: verdictOf(one) },
    svg("title", null, said),
    svg("text", { class: look, x: look === "under" ? 18 : 6, y: y + 4 }, name.length > 30 ? `…${name.slice(-29)}` : name),
    ci ? svg("line", { class: "whisker", x1: x(ci[0]), x2: x(ci[1]), y1: y, y2: y }) : null,
    ci && ci[0] < -reach ? svg("text", { class: "told", x: x(-reach) - 3, y: y + 4, "text-anchor": "end" }, "‹") : null,
    ci && ci[1] > reach ? svg("text", { class: "told", x: x(reach) + 3, y: y + 4 }, "›") : null,
    svg("circle", { class: "dot", cx: x(one.delta), cy: y, r: size }),
    svg("text", { x: width - 212, y: y + 4 }, signed(one.delta)),
    svg("text", { class: "told", x: width - 162, y: y + 4 }, ci ? span(ci) : NONE[one.no_interval] ?? "few differ"),
    svg("text", { class: "told", x: width - 6, y: y + 4, "text-anchor": "end" }, one.p_holm == null ? "" : `p ${chance(one.p_holm)}`));
}

function byPart() {
  const place = el("div", { class: "scroll" });
  const draw = (at) => place.replaceChildren(forest(C.parts.map((part) => line(partName(part), part.tuned[at], part, part.level === "benchmark" ? "under" : "head"))));
  const choice = modelChoice("part-model", draw);
  draw(0);
  return [choice, place, el("p", { class: "soft" }, "p: corrected (Holm) for the number of models, of splits and of benchmarks. Dots grow with the number of questions; a hollow one has no interval.")];
}

function modelChoice(id, changed) {
  if (C.tuned.length === 1) return null;
  return el("div", { class: "choose" }, el("label", { for: id }, "Tuned model"),
    el("select", { id, onchange: (event) => changed(Number(event.target.value)) }, C.tuned.map((model, at) => el("option", { value: at }, model.name))));
}

/* Power. */
function power() {
  const place = el("div");
  const draw = (at) => place.replaceChildren(...present(C.power[at] ? powerOf(C.power[at]) : [el("p", null, "No error can be estimated, so nothing can be foretold.")]));
  const choice = modelChoice("power-model", draw);
  draw(0);
  return [choice, place];
}

function powerOf(p) {
  const wanted = points(p.difference);
  const within = p.variance_within;
  const designs = p.by_samples.filter((one) => within > 1e-12 || one.samples === p.samples).map((one) => [`${plural(one.samples, "answer")} to each row`, told(one.questions), points(one.se, 2), points(one.detectable)]);
  const splits = p.splits.map((one) => [el("bdi", null, one.name), told(one.questions), points(one.se, 2), points(one.detectable)]);
  const count = p.samples_needed;
  const more = within === null ? "Every question was answered once, so what more answers would bring is not known; evaluate with --samples 2 to see."
    : within < 1e-12 ? "Rows of one question agree wholly, so more answers to each would show no more: only more questions do."
    : count === null ? `No number of answers to each row would see ${wanted} points: the questions differ too much among themselves.`
    : count > p.samples ? `${told(count)} answers to each row would see ${wanted} points.` : null;
  return [el("p", { class: "lead" }, `A true difference of ${points(p.detectable)} points is found in 8 of 10 such evaluations (two-sided, 5 %), one of ${wanted} in ${(10 * p.power).toFixed(1)} of 10. `,
    `To see ${wanted} points takes about ${told(p.questions_needed)} distinct questions, each asked once; here are ${told(C.questions)}. `, more),
  designs.length || splits.length ? el("div", { class: "scroll" }, table(["design", "questions", "standard error", "sees, 8 times of 10"], [...designs, ...splits])) : null];
}

function facts() {
  const none = (value) => value === null || (typeof value === "object" && !Object.keys(value).length);
  const flat = Object.entries(C.compared).map(([name, value]) => [words(name), none(value) ? "none" : typeof value === "string" ? value : JSON.stringify(value)]);
  const all = [["rows", told(C.rows)], ["distinct questions", told(C.questions)], ["clusters", told(C.clusters)], ...flat,
    ...[C.base, ...C.tuned].map((model) => [model.name, `${model.model} (${model.identity.slice(0, 24)}), ${model.folder}`])];
  return [el("dl", { class: "facts" }, all.map(([name, value]) => [el("dt", null, el("bdi", null, name)), el("dd", null, value)]))];
}

/* Changed answers: a list beside what it lists. */
const F = D.changes;
const ROW_HEIGHT = 58;
const KINDS = ["right to wrong", "wrong to right", "worse", "better"];
const state = { search: "", model: 0, benchmark: "", kind: "right to wrong", list: [], at: 0, sides: true };
const places = (change) => `${change.split} ${change.benchmark}`;
const terms = () => [...state.search.toLowerCase().matchAll(/"([^"]+)"|\S+/g)].map(([all, quoted]) => quoted ?? all);
const side = (change, sign) => change.diff.filter(([kind]) => kind * sign >= 0).map((part) => (sign < 0 ? part[2] ?? part[1] : part[1])).join("");
const hay = [];
const haystack = (i) => (hay[i] ??= [F[i].prompt, ...F[i].target, side(F[i], -1), side(F[i], 1), ...F[i].judged].join("\n").toLowerCase());
const fits = (change, but) => (but === "model" || change.model === state.model) &&
  (but === "benchmark" || !state.benchmark || places(change) === state.benchmark) && (but === "kind" || !state.kind || change.kind === state.kind);
const list = virtualList(byId("list"), ROW_HEIGHT, (at) => drawRow(at));

function update() {
  const asked = terms();
  state.list = F.map((_, i) => i).filter((i) => fits(F[i]) && asked.every((term) => haystack(i).includes(term)));
  byId("told").textContent = `${plural(state.list.length, "answer")}${D.left_out ? `; ${told(D.left_out)} smaller changes are not in this page` : ""}`;
  drawChoices();
  list.set(state.list.length);
  choose(0);
}

function drawChoices() {
  const counted = F.filter((change) => fits(change, "kind"));
  byId("kinds").replaceChildren(...["", ...KINDS].map((kind) => {
    const count = counted.filter((change) => !kind || change.kind === kind).length;
    return el("button", { type: "button", "aria-pressed": String(kind === state.kind), onclick: () => { state.kind = kind; update(); } }, `${kind || "all"} ${told(count)}`);
  }));
  const benchmarks = [...new Set(F.filter((change) => fits(change, "benchmark")).map(places))].sort();
  if (state.benchmark && !benchmarks.includes(state.benchmark)) benchmarks.push(state.benchmark);
  byId("benchmark").replaceChildren(el("option", { value: "" }, "all benchmarks"), ...benchmarks.map((name) => el("option", { value: name }, name)));
  byId("benchmark").value = state.benchmark;
}

function choose(at) {
  state.at = Math.min(Math.max(0, at), Math.max(0, state.list.length - 1));
  list.reveal(state.at);
  if (state.list.length) byId("list").setAttribute("aria-activedescendant", `row-${state.at}`);
  else byId("list").removeAttribute("aria-activedescendant");
  drawDetail();
}

function drawRow(at) {
  const change = F[state.list[at]];
  const up = change.scores[1] > change.scores[0];
  return el("div", { id: `row-${at}`, class: "row", role: "option", "aria-selected": String(at === state.at), "aria-posinset": at + 1, "aria-setsize": state.list.length },
    el("span", { class: `mark ${up ? "up" : "down"}`, "aria-hidden": "true" }, up ? "▲" : "▼"),
    el("span", { class: "opening", dir: "auto" }, change.opening),
    el("span", { class: "value" }, `${told(change.scores[0])} → ${told(change.scores[1])}`, el("small", null, change.kind)),
    el("span", { class: "under" }, `${change.benchmark} · ${words(change.split)} ${change.row}`));
}

function drawDetail() {
  const change = F[state.list[state.at]];
  const parts = change ? detail(change) : [el("p", { class: "nothing" }, F.length ? "Nothing fits. Empty the search, or choose “all”." : "No answer changed its score.")];
  byId("detail").replaceChildren(...present(parts));
  byId("detail").scrollTop = 0;
  highlight(byId("detail"), terms());
}

function detail(change) {
  const head = el("div", { class: "head wide" }, el("h2", null, change.kind), el("span", { class: "soft" }, `${change.benchmark} · ${words(change.split)}, row ${change.row}${change.sample ? `, sample ${change.sample}` : ""}`));
  const turn = el("button", { type: "button", "aria-keyshortcuts": "s", onclick: changeSides }, state.sides ? "word by word " : "side by side ", el("kbd", null, "s"));
  const names = [C.base.name, C.tuned[change.model].name];
  const judged = (at) => (change.judged[at] ? el("div", { class: "judged" }, text(change.judged[at])) : null);
  const badge = (at) => {
    const score = change.scores[at];
    const look = score >= 1 ? "right" : score <= 0 ? "wrong" : "partly";
    const notes = [change.truncated[at] ? "cut off" : null, change.unresolved[at] ? `unresolved: ${words(change.unresolved[at])}` : null].filter(Boolean).join(", ");
    return el("p", { class: "side-head" }, el("bdi", null, names[at]), el("span", { class: look }, score >= 1 ? "right" : score <= 0 ? "wrong" : told(score)), notes ? el("span", { class: "soft" }, notes) : null);
  };
  const both = [side(change, -1), side(change, 1)];
  const answers = state.sides
    ? el("div", { class: "sides wide" }, [0, 1].map((at) => el("div", null, badge(at), el("div", { class: "answer" }, text(both[at])), judged(at))))
    : el("div", null, badge(0), badge(1), el("div", { class: "answer" }, diffInline(change.diff)));
  return [head, el("h3", null, "Question"), el("div", { class: "turn" }, el("div", { class: "long" }, text(change.prompt))),
    el("h3", null, OVERALL.split ? "Instructions" : change.target.length > 1 ? "Right answers" : "Right answer"), el("div", { class: "targets" }, change.target.map((target) => text(target))),
    el("h3", null, "From base to tuned", turn), answers];
}

function changeSides() {
  state.sides = !state.sides;
  drawDetail();
}

/* Going about. */
function route() {
  const where = location.hash === "#changes" ? "changes" : "overview";
  byId("overview-page").hidden = where !== "overview";
  byId("browse").hidden = where === "overview";
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === `#${where}`) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (where === "changes") list.refresh();
}

const KEYS = {
  j: ["j ↓", "next answer", () => choose(state.at + 1)],
  k: ["k ↑", "answer before", () => choose(state.at - 1)],
  s: ["s", "both answers side by side, or word by word in one text", changeSides],
  "/": ["/", "search", () => byId("search").select()],
  "?": ["?", "these keys", () => byId("keys").showModal()],
};
const ALSO = {
  ArrowDown: KEYS.j[2], ArrowUp: KEYS.k[2],
  PageDown: () => choose(state.at + list.page()), PageUp: () => choose(state.at - list.page()),
  Home: () => choose(0), End: () => choose(state.list.length - 1),
};

function keydown(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  if (event.target.matches("input, select")) {
    if (event.key === "Escape" || (event.key === "Enter" && event.target.id === "search")) byId("list").focus();
    return;
  }
  const browsing = !byId("browse").hidden;
  const act = KEYS[event.key]?.[2] ?? (browsing && !byId("detail").contains(event.target) ? ALSO[event.key] : null);
  if (!act || (!browsing && event.key !== "?")) return;
  event.preventDefault();
  act(event);
}

function start() {
  byId("name").textContent = `${C.base.name} and ${C.tuned.length > 1 ? plural(C.tuned.length, "tuned model") : C.tuned[0].name}`;
  byId("count-changes").textContent = told(F.length + D.left_out);
  themeButton(byId("theme"));
  const dialog = byId("keys");
  dialog.append(el("h2", null, "Keys"), el("dl", null, Object.values(KEYS).map(([keys, what]) =>
    [el("dt", null, keys.split(" ").map((key) => [el("kbd", null, key), " "])), el("dd", null, what)])),
  el("button", { type: "button", class: "primary", onclick: () => dialog.close() }, "Close"));
  byId("model").replaceChildren(...C.tuned.map((model, at) => el("option", { value: at }, model.name)));
  byId("model").hidden = C.tuned.length === 1;
  if (!F.some((change) => change.model === 0 && change.kind === state.kind)) state.kind = "";
  let waiting = 0;
  byId("search").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => { state.search = byId("search").value; update(); }, 120);
  });
  byId("model").addEventListener("change", () => { state.model = Number(byId("model").value); update(); });
  byId("benchmark").addEventListener("change", () => { state.benchmark = byId("benchmark").value; update(); });
  byId("list").addEventListener("click", (event) => choose(list.at(event)));
  byId("help").addEventListener("click", () => dialog.showModal());
  addEventListener("keydown", keydown);
  addEventListener("hashchange", route);
  drawOverview();
  update();
  route();
  document.documentElement.dataset.ready = "yes";
}

start();
