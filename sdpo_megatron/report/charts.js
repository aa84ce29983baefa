// Trends: one small chart for each group of numbers, and a click leads to the step.

const LEFT = 46;
const RIGHT = 10;
const TOP = 14;
const BOTTOM = 22;
const HEIGHT = 170;

/** Round numbers between the ends, some four of them. */
function ticks(low, high) {
  const span = high - low || Math.abs(high) || 1;
  const rough = span / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((factor) => factor * power >= 0.7 * rough) * power;
  const found = [];
  for (let k = Math.ceil(low / unit - 1e-9); k * unit <= high + unit * 1e-9; k++) found.push(k * unit || 0);
  return found;
}

/** What a chart draws: for each key its numbers, piled upon each other where the chart is stacked. */
function seriesOf(chart, columns) {
  const own = chart.keys.map((key) => ({ key, own: columns[key], drawn: columns[key] }));
  if (!chart.stacked) return own;
  const mean = (part) => part.own.reduce((sum, value) => sum + (value || 0), 0);
  own.sort((a, b) => mean(b) - mean(a));
  let below = own[0].own.map(() => 0);
  for (const part of own) {
    part.floor = below;
    part.drawn = below.map((floor, k) => floor + (part.own[k] || 0));
    below = part.drawn;
  }
  return own;
}

/** The path through the numbers; gaps stay gaps where no row between has a number, as with evaluations. */
function pathOf(values, x, y) {
  let path = "";
  values.forEach((value, k) => {
    if (value !== null) path += `${path ? "L" : "M"}${x(k).toFixed(1)} ${y(value).toFixed(1)}`;
  });
  return path;
}

function areaOf(part, x, y) {
  const back = part.floor.map((value, k) => `L${x(k).toFixed(1)} ${y(value).toFixed(1)}`).reverse();
  return `${pathOf(part.drawn, x, y)}${back.join("")}Z`;
}

function short(keys) {
  if (keys.length < 2) return keys;
  const cut = Math.max(0, keys[0].lastIndexOf("/") + 1);
  const same = keys.every((key) => key.startsWith(keys[0].slice(0, cut)));
  return same ? keys.map((key) => key.slice(cut)) : keys;
}

/** A chart as an element that draws itself for its width. */
function chartBox(chart, summary) {
  const series = seriesOf(chart, summary.columns);
  const names = short(series.map((part) => part.key));
  const canvas = el("div", { class: "canvas" });
  const legend = el(
    "ul",
    { class: "legend" },
    names.map((name, k) => el("li", {}, el("i", { class: `key c${k % 8}` }), name)),
  );
  const title = el("h3", {}, chart.title, chart.unit && el("small", {}, ` ${chart.unit}`));
  const box = el("section", { class: "chart" }, title, canvas, legend);
  box.draw = () => canvas.replaceChildren(drawn(chart, series, names, summary, canvas.clientWidth || 360));
  return box;
}

function drawn(chart, series, names, summary, width) {
  const steps = summary.steps;
  const numbers = series.flatMap((part) => part.drawn.filter((value) => value !== null));
  let low = numbers.reduce((a, b) => Math.min(a, b), Infinity);
  let high = numbers.reduce((a, b) => Math.max(a, b), -Infinity);
  if (chart.stacked || (low > 0 && low < high / 2)) low = 0;
  if (low === high) [low, high] = [low - Math.abs(low) / 2 - 1e-9, high + Math.abs(high) / 2 + 1e-9];
  const first = steps[0];
  const range = steps[steps.length - 1] - first || 1;
  const x = (k) => LEFT + ((steps[k] - first) / range) * (width - LEFT - RIGHT);
  const y = (value) => TOP + (1 - (value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const svg = el("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": chart.title });
  for (const tick of ticks(low, high)) {
    svg.append(
      el("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }),
      el("text", { class: "tick", x: LEFT - 6, y: y(tick) + 4, "text-anchor": "end" }, number(tick)),
    );
  }
  svg.append(
    el("text", { class: "tick", x: LEFT, y: HEIGHT - 5 }, `step ${first}`),
    el("text", { class: "tick", x: width - RIGHT, y: HEIGHT - 5, "text-anchor": "end" }, steps[steps.length - 1]),
  );
  for (const [step] of summary.warnings) {
    const at = LEFT + ((step - first) / range) * (width - LEFT - RIGHT);
    svg.append(el("polygon", { class: "warned", points: `${at - 4},2 ${at + 4},2 ${at},10` }));
  }
  series.forEach((part, k) => {
    if (chart.stacked) svg.append(el("path", { class: `area c${k % 8}`, d: areaOf(part, x, y) }));
    else svg.append(el("path", { class: `line c${k % 8}`, d: pathOf(part.drawn, x, y) }));
    const points = part.drawn.filter((value) => value !== null).length;
    if (chart.stacked || (points > 1 && points > steps.length / 2)) return;
    part.drawn.forEach((value, at) => {
      if (value !== null) svg.append(el("circle", { class: `dot c${k % 8}`, cx: x(at), cy: y(value), r: 2.5 }));
    });
  });
  svg.append(...pointer(chart, series, names, summary, x, width));
  return svg;
}

/** The line under the mouse, what it tells, and where a click leads. */
function pointer(chart, series, names, summary, x, width) {
  const steps = summary.steps;
  const cross = el("line", { class: "cross", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  const nearest = (event) => {
    const box = event.currentTarget.ownerSVGElement.getBoundingClientRect();
    const share = (event.clientX - box.left - LEFT) / (width - LEFT - RIGHT);
    const wanted = steps[0] + share * (steps[steps.length - 1] - steps[0]);
    let best = 0;
    steps.forEach((step, k) => {
      if (Math.abs(step - wanted) < Math.abs(steps[best] - wanted)) best = k;
    });
    return best;
  };
  const over = (event) => {
    const k = nearest(event);
    cross.setAttribute("x1", x(k));
    cross.setAttribute("x2", x(k));
    cross.setAttribute("visibility", "visible");
    const rows = series
      .map((part, at) => [at, names[at], part.own[k]])
      .filter(([, , value]) => value !== null)
      .map(([at, name, value]) =>
        el("tr", {}, el("td", {}, el("i", { class: `key c${at % 8}` }), name), el("td", { class: "number" }, number(value, 4))),
      );
    const warned = summary.warnings.filter(([step]) => step === steps[k]).map(([, name]) => name.replaceAll("_", " "));
    showTip(
      event,
      el("b", {}, `step ${steps[k]}`),
      el("table", {}, rows),
      warned.length ? el("div", { class: "warning" }, `▼ ${warned.join(", ")}`) : "",
    );
  };
  const leave = () => {
    cross.setAttribute("visibility", "hidden");
    hideTip();
  };
  const area = el("rect", {
    class: "hit",
    ...{ x: LEFT, y: 0, width: Math.max(0, width - LEFT - RIGHT), height: HEIGHT },
    onpointermove: over,
    onpointerleave: leave,
    onclick: (event) => {
      const step = steps[nearest(event)];
      leave();
      const split = ["train", ...Object.keys(summary.splits)].find((name) => stepsOf(summary, name).includes(step));
      if (split) go(split, step);
    },
  });
  return [cross, area];
}

function stepsOf(summary, split) {
  return (summary.splits[split] || []).map(([step]) => step);
}
