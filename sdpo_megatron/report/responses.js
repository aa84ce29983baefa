// A group, one of its responses, and the same problem at other steps.

/** The question; the turns before it are folded. */
function messagesBlock(messages) {
  const turns = messages.map(({ role, content }) => [el("div", { class: "role" }, visible(role)), block(content)]);
  const before = turns.slice(0, -1);
  return [before.length ? fold(`${before.length} turns before it`, before, false) : "", ...turns.slice(-1)];
}

function groupView(summary, split, stepNumber, p, step, group, problems) {
  const { first } = step.groups[p];
  const scale = scales(group.responses);
  const coloured = [];
  const colours = colourChoice(group.responses, scale, () => coloured.forEach((box) => box.paint()));
  const cards = group.responses.map((response, g) => {
    const n = first + g;
    const text = response.texts
      ? tokenBlock(response, scale, 600)
      : block(response.thought ? `${response.thought}\n\n${response.response}` : response.response, "text", 3000);
    if (response.texts) coloured.push(text);
    return el(
      "article",
      { class: `card ${kindOf(step, n)}` },
      el("a", { class: "cardhead", href: address(split, stepNumber, p, g) },
        badge(kindOf(step, n), kindOf(step, n)), el("b", {}, `response ${n}`),
        el("small", {}, `reward ${number(response.reward)} · ${response.tokens} tokens · divergence ${number(step.divergence[n])}`)),
      el("div", {}, flagBadges(step, n)),
      text,
      response.feedback ? [el("h4", {}, "Feedback"), block(response.feedback, "text", 1000)] : "",
      response.ungraded ? [el("h4", {}, "Why it is ungraded"), block(response.ungraded, "text", 1000)] : "",
    );
  });
  const grid = el("div", { class: "cards" }, cards);
  const order = choice("siblings", [["order", "in order"], ["right", "right first"]], "order", (value) => {
    const rank = (k) => ({ right: 0, wrong: 1, ungraded: 2 })[kindOf(step, first + k)];
    const at = cards.map((_, k) => k);
    if (value === "right") at.sort((a, b) => rank(a) - rank(b) || a - b);
    grid.replaceChildren(...at.map((k) => cards[k]));
  });
  const view = el(
    "div",
    {},
    fold(el("span", {}, "Problem ", el("code", {}, line(group.problem))), messagesBlock(group.prompt)),
    el("div", { class: "bar" }, order, coloured.length ? colours : ""),
    coloured.length ? "" : el("p", { class: "quiet" }, uncoloured(group.responses[0])),
    grid,
    el("h2", {}, "The same problem at other steps"),
    historyOf(problems, `${split} ${group.problem}`, split, stepNumber),
  );
  view.colours = coloured.length ? colours : null;
  return view;
}

function uncoloured(response) {
  return response.columns
    ? "The texts of single tokens are not known: see the notes of the run."
    : "Nothing was recorded per token: of evaluations nothing is, of training of the first log.num_groups_to_log groups of a step.";
}

function historyOf(problems, problem, split, stepNumber) {
  const found = (problems.find(([name]) => name === problem) || [problem, []])[1];
  const others = found.filter(([other, step]) => other !== split || step !== stepNumber);
  if (!others.length) return el("p", { class: "quiet" }, "It was asked in this step only.");
  return el("ul", { class: "history" }, others.map(([other, step, group, right]) =>
    el("li", {}, el("a", { href: address(other, step, group) }, `${other} ${step}`), ` ${right} right`)));
}

function responseView(summary, split, stepNumber, p, g, step, group) {
  const { first } = step.groups[p];
  const response = group.responses[g];
  const n = first + g;
  const scale = scales([response]);
  const colours = response.texts ? colourChoice([response], scale, () => tokens.paint()) : "";
  const tokens = response.texts ? tokenBlock(response, scale) : "";
  const facts = [
    ["reward", number(response.reward)],
    ...(response.answer ? [["right answer", response.answer]] : []),
    ["tokens", response.tokens],
    ["ended by", { stop: "itself", length: "its longest", thinking: "its longest, inside a thought", abort: "the server" }[response.finish] || response.finish],
    ["advantage in the group", number(response.groupAdvantage)],
    ["mean divergence", number(step.divergence[n])],
    ["mean advantage", number(step.advantage[n])],
    ["weights", response.spans.map(([, , version]) => version).join(", ")],
    ...response.metrics.map(([name, value]) => [name, number(value)]),
  ];
  const parts = (response.parts || [["text", "Answer", response.response]]).map(([kind, title, text]) =>
    fold(el("span", {}, visible(title)), block(text, kind === "text" ? "text" : "code"), !tokens || Boolean(response.parts)));
  const view = el(
    "div",
    {},
    el("div", { class: "facts" }, badge(kindOf(step, n), kindOf(step, n)), flagBadges(step, n),
      facts.map(([name, value]) => el("span", {}, el("small", {}, visible(name)), " ", el("b", {}, visible(String(value)))))),
    response.note ? el("p", { class: "notes" }, visible(response.note)) : "",
    tokens
      ? [el("div", { class: "bar" }, el("h2", {}, "Tokens"), colours), tokens]
      : el("p", { class: "quiet" }, uncoloured(response)),
    response.thought ? fold("Thought", block(response.thought), !tokens) : "",
    parts,
    response.ungraded ? fold("Why it is ungraded", block(response.ungraded)) : "",
    el("h2", {}, "What the teacher knew"),
    teacherPart(split, stepNumber, p, step, group, response),
    fold("Problem", messagesBlock(group.prompt), false),
  );
  view.colours = colours;
  return view;
}

function teacherPart(split, stepNumber, p, step, group, response) {
  const { first, count } = step.groups[p];
  const shown = response.demonstration;
  const inside = shown !== null && shown >= first && shown < first + count;
  const lost = (response.tokens || 0) - (response.teacherTokens ?? 0);
  const said = [];
  if (shown !== null) {
    said.push(fold(
      el("span", {}, "Solution: ", inside ? el("a", { href: address(split, stepNumber, p, shown - first) }, `response ${shown}`) : `response ${shown}`),
      inside ? block(group.responses[shown - first].response) : el("p", {}, "It is of another group.")));
  }
  said.push(response.feedback
    ? fold("Feedback of the environment", block(response.feedback))
    : el("p", { class: "quiet" }, "The environment gave no feedback."));
  if (response.teacherPrompt !== null) {
    said.push(fold("The teacher's prompt, word for word", block(group.teacherPrompts[response.teacherPrompt])));
    if (lost > 0) said.push(el("p", { class: "warning" }, `The teacher's context ends ${lost} tokens before the response does; those have advantage 0.`));
  } else if (split !== "train" || response.teacherTokens === null) {
    said.push(el("p", { class: "quiet" }, "Nothing was learned from this response."));
  } else if (response.columns) {
    said.push(el("p", { class: "quiet" }, "There was no teacher: it would have known nothing that the student does not."));
  } else {
    said.push(el("p", { class: "quiet" }, "The teacher's prompt was not recorded: log.num_groups_to_log says of how many groups it is."));
  }
  if (has(step, response.number, "hints lost")) said.push(el("p", { class: "warning" }, "The teacher was told less than was to be said: its prompt had no room."));
  return said;
}

// Problems

function problemsView(problems) {
  const rows = problems.map(([name, asked]) => ({ name, asked, right: asked.reduce((sum, [, , , right]) => sum + right, 0) }))
    .sort((one, other) => one.right / one.asked.length - other.right / other.asked.length);
  const list = longList(
    ["asked", "right", "set and problem"],
    ({ name, asked, right }) => [el("span", {}, `${asked.length} times`), el("span", {}, right), el("span", { class: "wide" }, line(name))],
    ({ name }) => address("problem", JSON.stringify(name)),
    "problems",
  );
  const search = (text) => list.show(rows.filter(({ name }) => name.toLowerCase().includes(text.toLowerCase())));
  const view = el("div", {}, el("div", { class: "bar" }, searchBox("search problems by name", search)), list);
  view.drawn = () => search("");
  view.list = list;
  return view;
}

function problemView(problems, name) {
  return el("div", {}, el("h2", {}, line(name)), historyOf(problems, name, "", -1));
}
