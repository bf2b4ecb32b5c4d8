
// The overview. `D` is what clair/reporting/dataset_report.py wrote. A click goes on to the rows, which report.js lists (`look`).
const D = read("data");
const { rows: R, drops: X, overview: O } = D;
const COUNTS = new Set(["levenshtein", "chosen_words", "rejected_words", "more_words"]);
const metric = (name, value) => (COUNTS.has(name) ? told : fixed)(value);
const byId = (id) => document.getElementById(id);

function drawOverview() {
  const c = O.counts;
  const card = (title, lead, ...children) => el("section", { class: "card" }, el("h2", null, title), lead ? el("p", { class: "lead" }, lead) : null, ...children);
  const tile = (name, value, under) => el("div", { class: "card tile" }, el("dt", null, name), el("dd", null, value, el("small", null, under)));
  const parts = [el("dl", { class: "tiles" }, tiles(c, tile))];
  if (O.position?.biased) {
    parts.push(el("p", { class: "notice" }, `The judge is biased by position: it preferred what was shown first in ${percent(O.position.first, O.position.first + O.position.second)} of its verdicts. Do not trust these labels.`));
  }
  parts.push(card("From prompts to pairs", c.dropped ? "What each stage let through, and why it dropped the rest. Click a reason to see its rows." : "Every prompt gave a pair.", funnel()));
  if (c.pairs) {
    parts.push(card("Contrast", "How far apart chosen and rejected are. The dashed line is the median; click a bar to see its pairs.", contrastPlots()));
    parts.push(card("Length", "A winner that is mostly longer teaches length as well as quality.", lengths()));
  }
  parts.push(card("Calls and tokens", null, calls()));
  parts.push(card("How it was made", null, made()));
  byId("overview-page").replaceChildren(...parts);
}

function tiles(c, tile) {
  const median = (name) => metric(name, O.histograms[name].q50);
  const tokens = Object.values(O.tokens ?? {}).reduce((sum, role) => sum + role.prompt + role.completion, 0);
  return [
    tile("pairs", told(c.pairs), `${told(c.train)} train, ${told(c.test)} test`),
    tile("of the prompts", percent(c.pairs, c.prompts), `gave a pair, of ${told(c.prompts)}`),
    c.pairs ? tile("jaccard", median("jaccard"), "median word overlap") : null,
    c.pairs ? tile("kept", median("kept"), "median share of rejected's words") : null,
    c.pairs ? tile("chosen is longer", percent(O.lengths.longer, c.pairs), `shorter in ${percent(O.lengths.shorter, c.pairs)}`) : null,
    tile("tokens", tokens.toLocaleString("en", { notation: "compact", maximumFractionDigits: 1 }), O.seconds ? `${told(O.seconds)} s of building` : "prompt and completion"),
  ];
}

const STAGES = ["prompts", "target", "weaker", "stronger", "candidate", "checker", "reward", "reviser", "judge", "scores", "filter", "balance", "review"];

function funnel() {
  const stages = Map.groupBy(Object.entries(O.drop_reasons), ([name]) => name.split(".")[0]);
  const rank = (name) => {
    const stage = name.replace(/_\d+$/, ""); // judge_2 is a judge
    return STAGES.includes(stage) ? STAGES.indexOf(stage) : STAGES.length - 1.5;
  };
  let left = O.counts.prompts;
  const share = (part) => `${(100 * part) / Math.max(1, O.counts.prompts)}%`;
  const line = (stage, kept, lost) => [el("span", { class: "stage" }, stage),
    el("div", { class: "track" }, el("div", { class: "left", style: { width: share(kept) } }), lost ? el("div", { class: "lost", style: { width: share(lost) } }) : null),
    el("span", { class: "total" }, told(kept))];
  const lines = [line("prompts", left, 0)];
  for (const [stage, reasons] of [...stages].sort(([a], [b]) => rank(a) - rank(b))) {
    const lost = reasons.reduce((sum, [, count]) => sum + count, 0);
    left -= lost;
    lines.push(line(`after ${stage}`, left, lost), el("div", { class: "reasons" }, reasons.sort(([, a], [, b]) => b - a).map(reasonChip)));
  }
  if (stages.size) lines.push(line("pairs", O.counts.pairs, 0));
  const failed = O.failed ? el("p", { class: "notice" }, `${told(O.failed)} rows failed because a request got no reply; run the same clair build again to try them again.`) : null;
  return [el("div", { class: "funnel" }, lines), failed].filter(Boolean);
}

function reasonChip([name, count]) {
  const at = X.reasons.findIndex((reason) => reason.name === name);
  const open = () => look("dropped", { show: String(at) });
  return el("button", { type: "button", class: "chip", title: X.reasons[at]?.help, onclick: open }, words(name.slice(name.indexOf(".") + 1)), el("b", null, `−${told(count)}`));
}

function contrastPlots() {
  return el("div", { class: "plots" }, Object.entries(O.histograms).map(([name, plot]) => el("figure", null,
    el("figcaption", null, el("b", null, words(name)), ` median ${metric(name, plot.q50)}, mean ${metric(name, plot.mean)}`, el("span", { class: "soft" }, `${D.metrics[name]}; 90 % lie within ${metric(name, plot.q5)} and ${metric(name, plot.q95)}`)),
    histogram(plot, words(name), (lo, hi, last) => look("pairs", { show: usual, sort: name, ranges: new Map([[name, [lo, hi, last]]]) })))));
}

function lengths() {
  const L = O.lengths;
  const pairs = O.counts.pairs;
  const same = pairs - L.longer - L.shorter;
  const kinds = [["longer", L.longer], ["same", same], ["shorter", L.shorter]];
  const label = { longer: "chosen longer", same: "equal", shorter: "chosen shorter" };
  const sign = L.median_more > 0 ? "+" : "";
  return el("div", { class: "two" },
    heatmap(L.grid, L.cells, L.range, "rejected, words", "chosen, words"),
    el("div", null,
      el("div", { class: "split-bar", role: "img", "aria-label": kinds.map(([name, count]) => `${label[name]} ${percent(count, pairs)}`).join(", ") },
        kinds.map(([name, count]) => (count ? el("div", { class: name, style: { flex: String(count) } }) : null))),
      el("div", { class: "key" }, kinds.map(([name, count]) => el("span", null, el("i", { class: name }), `${label[name]} ${percent(count, pairs)}`))),
      el("dl", { class: "facts" },
        el("dt", null, "mean words, chosen"), el("dd", null, told(L.mean.chosen)),
        el("dt", null, "mean words, rejected"), el("dd", null, told(L.mean.rejected)),
        el("dt", null, "median difference"), el("dd", null, `${sign}${told(L.median_more)} words`),
        el("dt", null, "median length ratio"), el("dd", null, fixed(O.histograms.length_ratio.q50))),
      L.balance ? el("p", null, `Balanced: ${L.balance}.`) : null,
      el("p", { class: "soft" }, "In the plot, pairs above the dashed line have the longer winner.")));
}

function calls() {
  const roles = Object.entries(O.tokens ?? {});
  if (!roles.length) return [el("p", { class: "soft" }, "The manifest tells of no calls.")];
  const heads = [...new Set(roles.flatMap(([, tokens]) => Object.keys(tokens)))];
  const named = { prompt: "tokens in", completion: "tokens out" };
  const rows = roles.map(([role, tokens]) => [role, el("bdi", null, O.models?.[role]?.model ?? ""), ...heads.map((head) => tokens[head])]);
  const position = O.position ? el("p", null, `The judge preferred what was shown first in ${percent(O.position.first, O.position.first + O.position.second)} of its verdicts (95 % interval ${told(100 * O.position.ci95[0])} to ${told(100 * O.position.ci95[1])} %); ${told(O.position.ties)} ties.`) : null;
  const cost = O.cost === undefined ? null : el("p", null, "Cost: ", typeof O.cost === "object" ? Object.entries(O.cost ?? {}).map(([k, v]) => `${words(k)} ${told(v)}`).join(", ") : told(O.cost));
  return [el("div", { class: "scroll" }, table(["", "model", ...heads.map((head) => named[head] ?? words(head))], rows)), cost, position, ...(O.scores ?? []).map((text) => el("p", null, `${text[0].toUpperCase()}${text.slice(1)}.`))];
}

function made() {
  const facts = [["pipeline", O.pipeline], ["seed", O.seed], ["python", O.made_by.python], ["clair-apo", O.made_by["clair-apo"]], ["dataset", D.fingerprint]];
  for (const [role, sampling] of Object.entries(O.sampling ?? {})) facts.push([`${role} sampling`, Object.entries(sampling).map(([k, v]) => `${k} ${JSON.stringify(v)}`).join(", ")]);
  for (const review of O.review ?? []) facts.push(["reviewed", `${told(review.kept)} marked keep, ${told(review.dropped)} dropped; decisions ${review.decisions_sha256.slice(0, 12)}`]);
  return [el("dl", { class: "facts" }, facts.filter(([, value]) => value != null).map(([name, value]) => [el("dt", null, name), el("dd", null, String(value))])),
    el("details", null, el("summary", null, "Recipe"), el("pre", null, JSON.stringify(O.recipe, null, 2)))];
}
