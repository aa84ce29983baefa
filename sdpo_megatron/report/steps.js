// The run, a step of it, and a problem across its steps.

function badge(kind, text) {
  return el("span", { class: `badge ${kind}` }, text);
}

function runView(summary) {
  const notes = summary.notes.map((note) => el("li", {}, visible(note)));
  const boxes = summary.steps.length ? summary.charts.map((chart) => chartBox(chart, summary)) : [];
  const names = [...new Set(summary.warnings.map(([, name]) => name))];
  const warned = names.map((name) => {
    const at = summary.warnings.filter(([, other]) => other === name).map(([step]) => step);
    const range = at.length > 1 ? `in ${at.length} steps from ${at[0]} to ${at[at.length - 1]}` : `in step ${at[0]}`;
    return el("li", {}, "▼ ", el("b", {}, name.replaceAll("_", " ")), ` ${range}`);
  });
  const lists = Object.keys(summary.splits).map((split) => stepList(summary, split));
  const table = (pairs) => el("table", { class: "settings" }, pairs.map(([key, value]) =>
    el("tr", {}, el("td", {}, visible(key)), el("td", {}, visible(typeof value === "string" ? value : JSON.stringify(value))))));
  const view = el(
    "div",
    {},
    notes.length ? el("ul", { class: "notes" }, notes) : "",
    warned.length ? el("ul", { class: "warnings" }, warned) : "",
    boxes.length ? el("div", { class: "charts" }, boxes) : el("p", { class: "quiet" }, summary.evaluations.length ? "" : "No step has ended, so that there is no trend."),
    el("p", {}, el("a", { href: address("problems") }, "All problems, by how often they were answered")),
    lists,
    summary.evaluations.map(([suite, name, lines, ruler]) => fold(`Latest evaluation of ${suite}: ${name}`,
      [el("pre", {}, visible(lines.join("\n"))), el("p", { class: "quiet" }, "Measured with"), table(ruler)], !summary.steps.length)),
    fold("Settings", table(summary.settings), false),
  );
  view.drawn = () => {
    for (const box of boxes) box.draw();
    for (const list of lists) list.begin();
  };
  view.resized = () => boxes.forEach((box) => box.draw());
  view.list = lists[0] && lists[0].list;
  return view;
}

function stepList(summary, split) {
  const at = new Map(summary.steps.map((step, k) => [step, k]));
  const value = (key, step) => (summary.columns[key] && at.has(step) ? summary.columns[key][at.get(step)] : null);
  const prefix = split === "train" ? "" : `test${split.slice("eval".length)}/`;
  const warned = new Set(summary.warnings.map(([step]) => step));
  const head = ["step", "right", "reward", "divergence", "length", "truncated", "no teacher", "ungraded"];
  const list = longList(
    head,
    ([step, counts, error]) =>
      error
        ? [el("span", {}, step), el("span", { class: "wide warning" }, line(error))]
        : [
            el("span", {}, step, split === "train" && warned.has(step) ? el("i", { class: "warning" }, " ▼") : ""),
            el("span", {}, `${counts.right} of ${counts.responses} `, el("small", {}, percent(counts.right, counts.responses))),
            el("span", {}, number(value(`${prefix}env/all/reward/total`, step))),
            el("span", {}, split === "train" ? number(value("sdpo/divergence/mean", step)) : "–"),
            el("span", {}, number(value(`${prefix}env/all/response_length/mean`, step))),
            el("span", {}, counts.truncated || "–"),
            el("span", {}, counts["no teacher"] || "–"),
            el("span", {}, counts.ungraded || "–"),
          ],
    ([step]) => address(split, step),
    "steps",
  );
  const section = el("section", {}, el("h2", {}, split === "train" ? "Training steps" : split === "eval" ? "Evaluations" : split), list);
  section.begin = () => list.show(summary.splits[split]);
  section.list = list;
  return section;
}

// A step

const ORDERS = {
  order: ["in order", (step) => (n) => n],
  divergence: ["largest divergence", (step) => (n) => -(step.divergence[n] ?? -Infinity)],
  reward: ["lowest reward", (step) => (n) => step.reward[n] ?? -1],
  length: ["longest", (step) => (n) => -step.tokens[n]],
};
const chosen = { tab: "groups", flag: "all", order: "order" };

function has(step, n, flag) {
  return flag === "all" || Boolean((step.flags[n] >> step.flagNames.indexOf(flag)) & 1);
}

function groupOf(step, n) {
  return step.groups.findIndex(({ first, count }) => n >= first && n < first + count);
}

function squares(step, { first, count }) {
  return Array.from({ length: count }, (_, g) => el("i", { class: `square ${kindOf(step, first + g)}` }));
}

function kindOf(step, n) {
  return has(step, n, "ungraded") ? "ungraded" : has(step, n, "right") ? "right" : "wrong";
}

function flagBadges(step, n) {
  const told = ["truncated", "unfinished thought", "no teacher", "hints lost", "teacher cut"];
  return told.filter((flag) => has(step, n, flag)).map((flag) => badge("flag", flag));
}

function stepView(summary, split, stepNumber, step) {
  if (step.error) return el("p", { class: "notes" }, visible(step.error));
  const number_of = step.flags.length;
  const found = el("p", { class: "quiet", role: "status" });
  const place_ = el("div", {});
  const firstOf = step.groups.map((group) => group.first);
  const ofResponse = step.flags.map((_, n) => n);
  const groupAt = new Array(number_of);
  step.groups.forEach(({ first, count }, p) => groupAt.fill(p, first, first + count));
  let hits = null;

  const groupsList = longList(
    ["group", "right", "responses", "divergence", "question"],
    (p) => {
      const { first, count, prompt, problem } = step.groups[p];
      const own = ofResponse.slice(first, first + count);
      const measured = own.map((n) => step.divergence[n]).filter((value) => value !== null);
      const mean = measured.length ? measured.reduce((a, b) => a + b, 0) / measured.length : null;
      const right = own.filter((n) => has(step, n, "right")).length;
      return [el("span", {}, p), el("span", {}, `${right} of ${count}`), el("span", { class: "squares" }, squares(step, step.groups[p])),
        el("span", {}, number(mean)), el("span", { class: "wide" }, line(prompt || problem))];
    },
    (p) => address(split, stepNumber, p),
    "groups",
  );
  const responsesList = longList(
    ["response", "reward", "tokens", "divergence", "answer"],
    (n) => [el("span", {}, el("i", { class: `square ${kindOf(step, n)}` }), ` ${n}`), el("span", {}, number(step.reward[n])),
      el("span", {}, step.tokens[n]), el("span", {}, number(step.divergence[n])),
      el("span", { class: "wide" }, flagBadges(step, n), line(step.snippet[n]))],
    (n) => address(split, stepNumber, groupAt[n], n - firstOf[groupAt[n]]),
    "responses",
  );
  function show() {
    const own = ofResponse.filter((n) => has(step, n, chosen.flag) && (!hits || hits.has(n)));
    const key = ORDERS[chosen.order][1](step);
    own.sort((a, b) => key(a) - key(b) || a - b);
    const groups = [...new Set(own.map((n) => groupAt[n]))];
    view.list = chosen.tab === "groups" ? groupsList : responsesList;
    place_.replaceChildren(view.list);
    view.list.show(chosen.tab === "groups" ? groups : own);
    found.textContent = `${own.length.toLocaleString("en")} of ${number_of.toLocaleString("en")} responses, in ${groups.length} groups`;
  }
  const search = searchIn(summary, split, stepNumber, step, (next, message) => {
    hits = next;
    show();
    if (message) found.textContent = message;
  });
  const flags = [["all", "all"], ...step.flagNames.filter((flag) => step.flags.some((_, n) => has(step, n, flag))).map((flag) => [flag, flag])];
  if (!flags.some(([flag]) => flag === chosen.flag)) chosen.flag = "all";
  const change = (name) => (value) => {
    chosen[name] = value;
    show();
  };
  const view = el(
    "div",
    {},
    el(
      "div",
      { class: "bar" },
      choice("show", [["groups", "groups"], ["responses", "responses"]], chosen.tab, change("tab")),
      choice("only", flags, chosen.flag, change("flag")),
      choice("sort", Object.entries(ORDERS).map(([name, [text]]) => [name, text]), chosen.order, change("order")),
      searchBox("search this step: / and Enter for whole texts", search),
    ),
    found,
    place_,
    split === "train" ? rowFold(summary, stepNumber) : "",
  );
  view.drawn = show;
  view.resized = show;
  return view;
}

/** Searches what the list has while one types, and all texts of the step on Enter. */
function searchIn(summary, split, stepNumber, step, show) {
  let latest = 0;
  return async (text, whole) => {
    const turn = ++latest;
    const wanted = text.toLowerCase();
    const holds = (said) => said.toLowerCase().includes(wanted);
    if (!wanted) return show(null);
    const hits = new Set();
    for (const { first, count, prompt, problem } of step.groups) {
      const asked = holds(problem) || holds(prompt);
      for (let n = first; n < first + count; n++) if (asked || holds(step.snippet[n])) hits.add(n);
    }
    show(hits, whole ? "" : `${hits.size} in what the list shows; Enter searches whole texts`);
    if (!whole) return;
    const chunks = [...new Set(step.groups.map(({ chunk }) => chunk))];
    for (const [k, chunk] of chunks.entries()) {
      const groups = await load(chunkName(split, stepNumber, chunk));
      if (turn !== latest) return;
      for (const group of groups) {
        const asked = group.prompt.some(({ content }) => holds(content));
        for (const response of group.responses) {
          if (asked || [response.response, response.thought, response.feedback].some(holds)) hits.add(response.number);
        }
      }
      if (k % 8 === 7) show(new Set(hits), `${hits.size} found, file ${k + 1} of ${chunks.length} searched`);
    }
    show(hits);
  };
}

function chunkName(split, step, chunk) {
  return `${folder(split, step)}/${String(chunk).padStart(4, "0")}`;
}

function rowFold(summary, stepNumber) {
  const at = summary.steps.indexOf(stepNumber);
  if (at < 0) return el("p", { class: "quiet" }, "metrics.jsonl has no row of this step.");
  const rows = Object.entries(summary.columns).filter(([, values]) => values[at] !== null);
  return fold(`All ${rows.length} numbers of this step`, el("table", { class: "settings" },
    rows.map(([key, values]) => el("tr", {}, el("td", {}, visible(key)), el("td", { class: "number" }, number(values[at], 5))))), false);
}
