// Texts of models, which are shown and never run.

const CLIP = 20000;
const MORE = 200000;
// control characters but newline and tab, marks that turn the direction of text or are invisible, lone surrogates
const HIDDEN = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e" +
    "\\u2060-\\u206f\\ufeff\\ufff0-\\ufffb]|\\udb40[\\udc00-\\udc7f]" +
    "|[\\ud800-\\udbff](?![\\udc00-\\udfff])|(?<![\\ud800-\\udbff])[\\udc00-\\udfff]",
  "g",
);

function escaped(char) {
  const code = char.codePointAt(0);
  if (code < 0x100) return `\\x${code.toString(16).padStart(2, "0")}`;
  return code < 0x10000 ? `\\u${code.toString(16).padStart(4, "0")}` : `\\u{${code.toString(16)}}`;
}

/** The text as nodes; what would not be seen, or would change what is seen, as its escape. */
function visible(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(HIDDEN)) {
    if (found.index > end) nodes.push(text.slice(end, found.index));
    nodes.push(el("span", { class: "escape" }, escaped(found[0])));
    end = found.index + found[0].length;
  }
  if (end < text.length) nodes.push(text.slice(end));
  return nodes;
}

/** One line of it, for lists. */
function line(text) {
  return visible(text.replace(/\s+/g, " "));
}

/** Where a text may be cut: not inside a character. */
function cutAt(text, length) {
  const code = text.charCodeAt(length - 1);
  return code >= 0xd800 && code < 0xdc00 ? length - 1 : length;
}

/** A block of text, of which the beginning is shown, and more when asked for. */
function block(text, kind = "text", clip = CLIP) {
  const box = el("div", { class: `said ${kind}`, dir: "auto" });
  if (!text) {
    box.append(el("span", { class: "quiet" }, "(empty)"));
    return box;
  }
  let shown = 0;
  const more = el("button", { class: "more", type: "button", onclick: () => grow(MORE) });
  function grow(by) {
    const end = shown + by >= text.length ? text.length : cutAt(text, shown + by);
    more.remove();
    box.append(...visible(text.slice(shown, end)));
    shown = end;
    if (shown < text.length) {
      more.textContent = `show more (${(text.length - shown).toLocaleString("en")} characters left)`;
      box.append(more);
    }
  }
  grow(clip);
  return box;
}

/** A titled part that can be folded. */
function fold(title, content, open = true) {
  return el("details", { open, class: "fold" }, el("summary", {}, title), content);
}
