// Data, elements, numbers, tokens as text, and what is selected. Text is always a text node.

const data = JSON.parse(document.getElementById("data").textContent);
const { model } = data;
const byId = (id) => document.getElementById(id);
const listed = data.ids.length;

/** Make an element. Attributes beginning with "on" are listeners; null and false are left out. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** Make an element of a drawing. */
function draw(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

/** Set a custom property: the policy allows no style attributes. */
function heated(node, heat) {
  node.style.setProperty("--heat", Math.max(0, Math.min(1, heat)).toFixed(3));
  return node;
}

// Numbers.
const grouped = (number) => number.toLocaleString("en-US");
const UNITS = [[1e15, "P"], [1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]];

/** Three digits and a unit: "23 kB". */
function short(number, unit = "") {
  const [size, prefix] = UNITS.find(([limit]) => number >= 0.9995 * limit) ?? [1, ""];
  const digits = Number((number / size).toPrecision(3));
  return `${digits}${prefix || unit ? " " : ""}${prefix}${unit}`;
}

/** A probability in per cent, with as many digits as matter. */
function percent(p) {
  if (p >= 0.9995) return "100 %";
  if (p >= 0.1) return `${(100 * p).toFixed(1)} %`;
  if (p >= 0.0001) return `${(100 * p).toFixed(2)} %`;
  return p > 0 ? "< 0.01 %" : "0 %";
}

const counted = (number, noun) => `${grouped(number)} ${noun}${number === 1 ? "" : "s"}`;

// Tokens. They may be parts of characters, and their characters may be invisible or turn a line.
const UNSEEN = /[\u0000-\u001f\u007f-\u00a0\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/gu;
const NAMES = { "\n": "↵", "\t": "⇥", "\r": "␍" };
const codePoint = (character) => character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");

const bytesOf = (id) => {
  const found = data.texts[id] ?? "";
  const digits = Array.isArray(found) ? found[0] : found;
  return Uint8Array.from(digits.match(/../g) ?? [], (pair) => Number.parseInt(pair, 16));
};
const sizeOf = (id) => (Array.isArray(data.texts[id]) ? data.texts[id][1] : bytesOf(id).length);
const hex = (bytes) => [...bytes].map((b) => b.toString(16).toUpperCase().padStart(2, "0")).join(" ");

/** The text of a token, or null if its bytes are only a part of a character. */
function textOf(id) {
  const cut = Array.isArray(data.texts[id]); // its last character may be cut too
  const decoder = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
  try {
    return decoder.decode(bytesOf(id), { stream: cut });
  } catch {
    return null;
  }
}

/** A token in one line, at most `most` characters. */
function shown(id, most = 24) {
  const text = textOf(id);
  if (text === null) return `⟨${hex(bytesOf(id))}⟩`;
  if (text === "") return "⟨no bytes⟩";
  const whole = text
    .replace(UNSEEN, (character) => NAMES[character] ?? `⟨U+${codePoint(character)}⟩`)
    .replace(/ /g, "␣");
  const characters = [...whole];
  return characters.length > most || sizeOf(id) > bytesOf(id).length
    ? `${characters.slice(0, most - 1).join("")}…`
    : whole;
}

/** A token as a screen reader should say it. */
function spoken(id) {
  const text = textOf(id);
  if (text === null) return `bytes ${hex(bytesOf(id))}`;
  return text.trim() === "" || text.search(UNSEEN) >= 0 ? shown(id) : text.trim();
}

/** A token as an element; its spaces are pale. */
function token(id, most) {
  const parts = shown(id, most).split(/(␣+)/).filter((part) => part !== "");
  return make("bdi", {}, parts.map((part) => (part[0] === "␣" ? make("i", {}, part) : part)));
}

/** A text of several lines. */
const readable = (text) => text.replace(UNSEEN, (character) => "\n\t".includes(character) ? character : `⟨U+${codePoint(character)}⟩`);

const tokenAt = (position, most) => token(data.ids[position], most);

/** What screen readers skip, and what only they read. */
const hide = (node) => fill(node, { "aria-hidden": "true" }, []);
const forReaders = (text) => make("span", { class: "hidden-text" }, text);

// What is selected: the same token in every section.
const side = data.attention.tokens; // of the maps of attention, and of the lens
const state = { token: Math.min(listed, side) - 1, layer: 0, head: 0, pair: 0 };
const listeners = [];

/** Call `listener` now and after each change. */
function follow(listener) {
  listeners.push(listener);
  listener();
}

function select(changes) {
  Object.assign(state, changes);
  for (const listener of listeners) listener();
}

/** What a section says of a selected token that it does not have. */
const outside = (position) => `Position ${position} is not in this map, which has the first ${side}.`;

let waiting = 0;

/** Have a screen reader say a text when the selection rests. */
function announce(text) {
  clearTimeout(waiting);
  waiting = setTimeout(() => (byId("announcer").textContent = text), 350);
}

const STEPS = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

/** Arrow keys, Home and End move over a list of which one item is in the tab order. */
function rove(list, items, choose) {
  list.addEventListener("keydown", (event) => {
    const at = items().indexOf(event.target);
    const last = items().length - 1;
    const targets = { Home: 0, End: last };
    const to = event.key in STEPS ? at + STEPS[event.key] : targets[event.key];
    if (at < 0 || to === undefined) return;
    event.preventDefault();
    const index = Math.max(0, Math.min(last, to));
    choose(index);
    items()[index].focus();
  });
}

/** Buttons of which one is chosen. */
function segments(label, names, choose) {
  const group = `choice-${label.replace(/\W/g, "")}`;
  const options = names.map((name, i) =>
    make("label", {},
      make("input", { type: "radio", name: group, value: i, checked: i === 0, onchange: () => choose(i) }),
      name),
  );
  return make("fieldset", { class: "segments", "aria-label": label }, options);
}

/** Fade the edges of a box behind which there is more. */
function faded(box) {
  const update = () => {
    box.classList.toggle("below", box.scrollTop + box.clientHeight < box.scrollHeight - 2);
    box.classList.toggle("beyond", box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
  };
  box.addEventListener("scroll", update, { passive: true });
  new ResizeObserver(update).observe(box);
  return box;
}

/** A bar from 0 to 1. */
function track(share) {
  const inside = make("i");
  inside.style.width = `${Math.max(0, Math.min(100, 100 * share))}%`;
  return make("span", { class: "track", "aria-hidden": "true" }, inside);
}

/** A line of a list: a name, a bar, a number. */
const bar = (name, share, number) => make("li", { class: "bar" }, make("span", {}, name), track(share), make("span", {}, number));
