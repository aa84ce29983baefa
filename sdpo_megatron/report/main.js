// Which view is shown, and the keyboard.

const main = document.getElementById("main");
const topBar = document.getElementById("top");
const help = document.getElementById("help");
const KEYS = [
  ["j k", "next and previous row, or sibling"],
  ["↵", "open the row"],
  ["← →", "previous and next step, group or response"],
  ["u, Esc", "up: from a response to its group, its step, the run"],
  ["c", "next colouring of tokens"],
  ["/", "search"],
  ["?", "these keys"],
];
let view = null;
let summary = null;
let beside = { up: null, before: null, after: null };
let turn = 0;

/** Shows what the address names; only what the summary lists is ever loaded. */
async function show() {
  const mine = ++turn;
  hideTip();
  try {
    summary ??= await load("summary");
    const made = await made_for(place());
    if (mine !== turn) return;
    view = made.view;
    beside = made;
    topBar.replaceChildren(...crumbs(made));
    main.replaceChildren(view);
    if (view.drawn) view.drawn();
    scrollTo(0, 0);
    document.title = [...made.path.map(([text]) => text).reverse(), summary.name].join(" · ");
  } catch (error) {
    if (mine !== turn) return;
    view = el("p", { class: "notes" }, visible(error.message));
    main.replaceChildren(view);
  }
}

async function made_for([split, ...rest]) {
  if (split === undefined) return { view: runView(summary), path: [], up: null };
  if (split === "problems" || split === "problem") {
    const problems = await load("problems");
    const list = ["problems", address("problems")];
    if (split === "problems") return { view: problemsView(problems), path: [list], up: "#/" };
    const name = JSON.parse(rest[0]);
    return { view: problemView(problems, name), path: [list, [name.slice(0, 60), location.hash]], up: address("problems") };
  }
  const steps = Object.hasOwn(summary.splits, split) ? stepsOf(summary, split) : [];
  const [stepNumber, p, g] = rest.map(Number);
  if (!steps.includes(stepNumber)) throw new Error("This run has no such step. The report may be older than the link.");
  const step = await load(`${folder(split, stepNumber)}/step`);
  const path = [[`${split} ${stepNumber}`, address(split, stepNumber)]];
  const near = (all, at, ...front) => ({
    before: at > 0 ? address(...front, all[at - 1]) : null,
    after: at < all.length - 1 ? address(...front, all[at + 1]) : null,
  });
  if (p === undefined) {
    return { view: stepView(summary, split, stepNumber, step), path, up: "#/", ...near(steps, steps.indexOf(stepNumber), split) };
  }
  if (!step.groups[p]) throw new Error(`Step ${stepNumber} has no such group.`);
  const chunk = await load(chunkName(split, stepNumber, step.groups[p].chunk));
  const group = chunk[p - step.groups.findIndex((other) => other.chunk === step.groups[p].chunk)];
  path.push([`group ${p}`, address(split, stepNumber, p)]);
  if (g === undefined) {
    const problems = await load("problems");
    return { view: groupView(summary, split, stepNumber, p, step, group, problems), path, up: address(split, stepNumber),
      ...near(step.groups.map((_, k) => k), p, split, stepNumber) };
  }
  if (!group.responses[g]) throw new Error(`Group ${p} has no such response.`);
  path.push([`response ${step.groups[p].first + g}`, address(split, stepNumber, p, g)]);
  return { view: responseView(summary, split, stepNumber, p, g, step, group), path, up: address(split, stepNumber, p), siblings: true,
    ...near(group.responses.map((_, k) => k), g, split, stepNumber, p) };
}

function crumbs({ path, before, after }) {
  const links = [[summary.name, "#/"], ...path].map(([text, href], k) => [k ? el("span", { class: "quiet" }, " / ") : "", el("a", { href }, line(text))]);
  const step = (href, sign, name) => el("a", { class: "near", href: href || location.hash, "aria-label": name, "aria-disabled": String(!href) }, sign);
  return [
    el("nav", {}, links),
    path.length && (before || after) ? el("span", { class: "nears" }, step(before, "←", "previous"), step(after, "→", "next")) : "",
    path.length ? "" : el("span", { class: "state quiet" }, visible(summary.state), ` · report of ${summary.written}`),
    el("button", { type: "button", class: "keys", onclick: showHelp, "aria-label": "keys" }, "?"),
  ];
}

function showHelp() {
  help.replaceChildren(
    el("h2", {}, "Keys"),
    el("table", {}, KEYS.map(([key, text]) => el("tr", {}, el("td", {}, el("kbd", {}, key)), el("td", {}, text)))),
    el("p", { class: "quiet" }, "Blue tokens are those that the teacher finds likelier than the student does, orange those it finds less likely. Marks such as \\x1b stand for characters that would not be seen."),
    el("button", { type: "button", onclick: () => help.close() }, "close"),
  );
  help.showModal();
}

function follow(href) {
  if (href) location.hash = href;
}

const ACTIONS = {
  j: () => (view.list ? view.list.move(1) : follow(beside.after)),
  k: () => (view.list ? view.list.move(-1) : follow(beside.before)),
  ArrowDown: () => view.list && view.list.move(1),
  ArrowUp: () => view.list && view.list.move(-1),
  Enter: () => view.list && view.list.enter(),
  ArrowRight: () => follow(beside.after),
  ArrowLeft: () => follow(beside.before),
  u: () => follow(beside.up),
  Escape: () => follow(beside.up),
  c: () => view.colours && view.colours.next(),
  "/": () => document.querySelector(".search")?.focus(),
  "?": showHelp,
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || help.open || !view) return;
  const typing = event.target.matches("input");
  if (typing && event.key === "Escape") return event.target.blur();
  if (typing || (event.key === "Enter" && event.target.matches("a, button, summary"))) return;
  const vertical = event.key === "ArrowDown" || event.key === "ArrowUp";
  if (!Object.hasOwn(ACTIONS, event.key) || (vertical && !view.list)) return;
  event.preventDefault();
  ACTIONS[event.key]();
});
addEventListener("hashchange", show);
addEventListener("resize", () => view && view.resized && view.resized());
addEventListener("scroll", hideTip, { passive: true });
show();
