// Lists of any length: only the rows in sight are in the page.

const ROW = 34;

/**
 * A list whose rows are made as they come into sight. `names` are its columns', `row(item)` returns the cells,
 * `open(item)` follows one. `list.show(items)` replaces what it holds; j, k and Enter move in it.
 */
function longList(names, row, open, className) {
  const inside = el("div", { class: "rows" });
  const port = el("div", { class: `port ${className}`, tabindex: 0, role: "grid", onscroll: () => draw() }, inside);
  const box = el("div", { class: "list" }, el("div", { class: `row head ${className}` }, names.map((name) => el("span", {}, name))), port);
  let items = [];
  let chosen = -1;

  function draw() {
    const first = Math.max(0, Math.floor(port.scrollTop / ROW) - 8);
    const last = Math.min(items.length, Math.ceil((port.scrollTop + port.clientHeight) / ROW) + 8);
    const made = [];
    for (let k = first; k < last; k++) {
      const made_row = el("a", { class: `row ${className}${k === chosen ? " chosen" : ""}`, href: open(items[k]) }, row(items[k]));
      made_row.style.top = `${k * ROW}px`;
      made_row.addEventListener("pointerdown", () => (chosen = k));
      made.push(made_row);
    }
    inside.replaceChildren(...made);
  }

  box.show = (next, at = -1) => {
    items = next;
    chosen = Math.min(at, items.length - 1);
    inside.style.height = `${items.length * ROW}px`;
    port.style.height = `${Math.min(items.length * ROW + 2, Math.max(240, innerHeight - 260))}px`;
    port.scrollTop = Math.max(0, chosen * ROW - port.clientHeight / 2);
    draw();
  };
  box.draw = draw;
  box.move = (by) => {
    if (!items.length) return;
    chosen = Math.max(0, Math.min(items.length - 1, chosen + by));
    const top = chosen * ROW;
    if (top < port.scrollTop) port.scrollTop = top;
    if (top + ROW > port.scrollTop + port.clientHeight) port.scrollTop = top + ROW - port.clientHeight;
    draw();
  };
  box.enter = () => {
    if (chosen >= 0 && chosen < items.length) location.hash = open(items[chosen]);
  };
  return box;
}

/** A row of buttons of which one holds. */
function choice(label, options, chosen, change) {
  const buttons = options.map(([value, text]) =>
    el("button", {
      type: "button",
      "aria-pressed": String(value === chosen),
      onclick: (event) => {
        for (const button of buttons) button.setAttribute("aria-pressed", String(button === event.currentTarget));
        change(value);
      },
    }, text),
  );
  return el("div", { class: "choice", role: "group", "aria-label": label }, el("span", { class: "label" }, label), buttons);
}

function searchBox(hint, search) {
  return el("input", {
    type: "search",
    class: "search",
    placeholder: hint,
    "aria-label": hint,
    oninput: (event) => search(event.target.value, false),
    onkeydown: (event) => event.key === "Enter" && search(event.target.value, true),
  });
}
