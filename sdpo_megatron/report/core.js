"use strict";
// What all views use: elements, files of data, and where we are.

/** Makes an element. Children are elements, or text that goes in as text whatever it looks like. */
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "g", "circle", "rect", "polygon"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return made;
}

// Files of data: `file://` forbids fetch, and allows scripts.

const KEPT = 40;
const files = new Map();
const waiting = new Map();

/** Called by each file of data. */
window.report = (name, data) => {
  const taken = waiting.get(name);
  if (taken) taken(data);
};

/** Resolves to the data of NAME.js beside the page; the newest few stay in memory. */
function load(name) {
  if (files.has(name)) {
    const found = files.get(name);
    files.delete(name);
    files.set(name, found);
    return found;
  }
  const promise = new Promise((resolve, reject) => {
    const script = el("script", { src: `${name}.js` });
    const end = (call, value) => {
      waiting.delete(name);
      script.remove();
      call(value);
    };
    waiting.set(name, (data) => end(resolve, data));
    const missing = () =>
      end(reject, new Error(`${name}.js is missing or damaged. Make the report again: python -m sdpo_megatron.report`));
    script.addEventListener("error", missing);
    script.addEventListener("load", () => waiting.has(name) && missing());
    document.head.append(script);
  });
  files.set(name, promise);
  promise.catch(() => files.delete(name));
  for (const old of files.keys()) {
    if (files.size <= KEPT) break;
    if (old.includes("/")) files.delete(old);
  }
  return promise;
}

// Where we are: #/train/12/3/5 is response 5 of group 3 of step 12.

function folder(split, step) {
  return `${split}/${String(step).padStart(6, "0")}`;
}

function address(...parts) {
  return `#/${parts.map(encodeURIComponent).join("/")}`;
}

function go(...parts) {
  location.hash = address(...parts);
}

function place() {
  return location.hash.replace(/^#\/?/, "").split("/").filter(Boolean).map(decodeURIComponent);
}

// Numbers

function number(value, digits = 3) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

function percent(part, whole) {
  return whole ? `${Math.round((100 * part) / whole)}%` : "–";
}

/** The float32 numbers that a file holds in base64. */
function floats(text) {
  return new Float32Array(bytes(text).buffer);
}

function bytes(text) {
  const raw = atob(text);
  const made = new Uint8Array(raw.length);
  for (let k = 0; k < raw.length; k++) made[k] = raw.charCodeAt(k);
  return made;
}

// The one tooltip

const tip = document.getElementById("tip");

function showTip(event, ...content) {
  tip.replaceChildren(...content);
  tip.hidden = false;
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - width - 8);
  const below = event.clientY + 18 + height < innerHeight;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${below ? event.clientY + 18 : Math.max(8, event.clientY - height - 10)}px`;
}

function hideTip() {
  tip.hidden = true;
}
