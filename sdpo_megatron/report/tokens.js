// A response's tokens, coloured by what the models said of them.

const CLIP_TOKENS = 4000;
const MORE_TOKENS = 20000;
const COLOURS = [["advantage", "advantage"], ["divergence", "divergence"], ["none", "none"]];
// what was chosen last, and what is shown: not every response has every column
let wanted = "advantage";
let colouring = wanted;

/** A response with its columns as numbers. */
function opened(response) {
  if (response.open) return response.open;
  const columns = {};
  for (const [name, text] of Object.entries(response.columns || {})) {
    columns[name] = name === "mask" ? bytes(text) : floats(text);
  }
  response.open = columns;
  return columns;
}

/** What the strongest colour stands for: a size that few tokens exceed. */
function scaleOf(responses, name) {
  const sizes = responses.flatMap((response) => Array.from(opened(response)[name] || []).filter(Number.isFinite).map(Math.abs));
  sizes.sort((a, b) => a - b);
  return sizes[Math.floor(0.98 * (sizes.length - 1))] || sizes[sizes.length - 1] || 1;
}

/** Blue where the teacher holds more of the token than the student, orange where less; violet for a divergence. */
function colourOf(value, scale, name) {
  if (!Number.isFinite(value) || value === 0) return "";
  const strength = Math.sqrt(Math.min(1, Math.abs(value) / scale)) * 0.75;
  const hue = name === "divergence" ? "var(--violet)" : value > 0 ? "var(--blue)" : "var(--orange)";
  return `color-mix(in srgb, ${hue} ${Math.round(strength * 100)}%, transparent)`;
}

/** What ends where: the marks that stand between tokens, by the token that they stand before. */
function marksOf(response) {
  const marks = new Map();
  const add = (t, text) => marks.set(t, [...(marks.get(t) || []), text]);
  const length = response.texts.length;
  const taught = response.teacherPrompt !== null && response.teacherTokens !== null;
  if (taught && response.teacherTokens < length) add(response.teacherTokens, "the teacher's context ends here");
  for (const [start, , version] of response.spans.slice(1)) add(start, `weights ${version} from here`);
  if (response.finish === "length") add(length, "cut off at the longest");
  if (response.finish === "thinking") add(length, "cut off inside the thought");
  if (response.finish === "abort") add(length, "ended by the server");
  return marks;
}

/** The tokens of a response as elements; `scale` belongs to the colouring. */
function tokenBlock(response, scale, clip = CLIP_TOKENS) {
  const columns = opened(response);
  const marks = marksOf(response);
  const box = el("div", { class: "said tokens" });
  const more = el("button", { class: "more", type: "button", onclick: () => grow(MORE_TOKENS) });
  let shown = 0;

  function grow(by) {
    const end = Math.min(response.texts.length, shown + by);
    const made = [];
    for (; shown < end; shown++) {
      for (const mark of marks.get(shown) || []) made.push(el("span", { class: "mark" }, mark));
      made.push(tokenSpan(response, columns, shown));
    }
    more.remove();
    box.append(...made);
    if (shown < response.texts.length) {
      more.textContent = `show more (${(response.texts.length - shown).toLocaleString("en")} tokens left)`;
      box.append(more);
    } else for (const mark of marks.get(shown) || []) box.append(el("span", { class: "mark" }, mark));
    paint();
  }
  function paint() {
    const values = columns[colouring];
    for (const span of box.getElementsByClassName("token")) {
      span.style.backgroundColor = values ? colourOf(values[span.dataset.t], scale(colouring), colouring) : "";
    }
  }
  const tell = (event) => {
    const span = event.target.closest(".token");
    if (span) showTip(event, ...tokenTip(response, columns, Number(span.dataset.t)));
    else hideTip();
  };
  box.addEventListener("pointermove", tell);
  box.addEventListener("pointerdown", tell);
  box.addEventListener("pointerleave", hideTip);
  box.paint = paint;
  grow(clip);
  return box;
}

function tokenSpan(response, columns, t) {
  const untrained = columns.mask && !columns.mask[t];
  const text = response.texts[t];
  // a token without a text of its own belongs to the character before it
  const content = text === "" ? "·" : visible(text.length > 2000 ? text.slice(0, 2000) : text);
  return el("span", { class: `token${untrained ? " untrained" : ""}${text === "" ? " joined" : ""}`, "data-t": t }, content);
}

function tokenTip(response, columns, t) {
  const rows = [
    ["student", columns.student, "log p"],
    ["teacher", columns.teacher, "log p"],
    ["server", columns.server, "log p"],
    ["advantage", columns.advantage, ""],
    ["divergence", columns.divergence, "nats"],
  ];
  return [
    el("b", {}, `token ${t} `, el("span", { class: "quoted" }, visible(JSON.stringify(response.texts[t].slice(0, 60))))),
    columns.mask && !columns.mask[t] ? el("div", { class: "quiet" }, "not trained") : "",
    el(
      "table",
      {},
      rows.map(([name, values, unit]) =>
        el("tr", {}, el("td", {}, name), el("td", { class: "number" }, values ? number(values[t], 4) : "–"), el("td", { class: "quiet" }, unit)),
      ),
    ),
  ];
}

/** The choice of colours, with what they mean; made before the tokens, which take the colouring from it. */
function colourChoice(responses, scale, repaint) {
  const legend = el("span", { class: "scale" });
  const explain = () => {
    if (colouring === "none") return legend.replaceChildren();
    const top = number(scale(colouring));
    const bar = (name) => el("i", { class: `bar ${name}` });
    const [low, high] = colouring === "advantage" ? [`−${top}`, `+${top}`] : ["0", top];
    legend.replaceChildren(low, bar(colouring), high);
    legend.title = "the size that few tokens exceed; colours are in its square root";
  };
  const has = COLOURS.filter(([name]) => name === "none" || responses.some((response) => opened(response)[name]));
  colouring = has.some(([name]) => name === wanted) ? wanted : has[0][0];
  const buttons = choice("colour", has, colouring, (name) => {
    wanted = colouring = name;
    explain();
    repaint();
  });
  explain();
  const box = el("div", { class: "colours" }, buttons, legend);
  box.next = () => {
    const all = [...buttons.querySelectorAll("button")];
    all[(all.findIndex((button) => button.getAttribute("aria-pressed") === "true") + 1) % all.length].click();
  };
  return box;
}

/** Remembers a scale for each colouring. */
function scales(responses) {
  const known = {};
  return (name) => (known[name] ??= scaleOf(responses, name));
}
