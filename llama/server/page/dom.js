// Small helpers for elements. Text is always a text node, never markup.

/** Find one element of the page by its id. */
export const byId = (id) => document.getElementById(id);

/**
 * Make an element. Attributes beginning with "on" are listeners; null and false are left out.
 * Children are elements or strings; strings become text nodes.
 */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// Outlines on a 24 by 24 grid, drawn for this page.
const ICONS = {
  branch: "M6 3v18M6 13c0-4 12-2 12-8M18 8V3M15.5 5.5 18 3l2.5 2.5",
  check: "M5 12.5 10 17 19 7",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  down: "M12 5v14M6 13l6 6 6-6",
  edit: "M4 20l1-4L16 5l3 3L8 19zM14 7l3 3",
  export: "M12 4v11M7 10.5 12 15l5-4.5M4 20h16",
  go: "M5 12h13M12 6l6 6-6 6",
  import: "M12 15V4M7 8.5 12 4l5 4.5M4 20h16",
  inspect: "M10.5 4a6.5 6.5 0 1 1 0 13 6.5 6.5 0 0 1 0-13M15.3 15.3 21 21M10.5 8v5M8 10.5h5",
  menu: "M4 7h16M4 12h16M4 17h16",
  more: "M5 12h.01M12 12h.01M19 12h.01",
  next: "M9 5l7 7-7 7",
  plus: "M12 5v14M5 12h14",
  previous: "M15 5l-7 7 7 7",
  repeat: "M20 11a8 8 0 1 0-1.5 6M20 5v6h-6",
  send: "M12 20V5M6 11l6-6 6 6",
  settings: "M4 8h9M17 8h3M15 6v4M4 16h3M11 16h9M9 14v4",
  stop: "M7 7h10v10H7z",
  theme: "M12 3a9 9 0 1 0 0 18zM12 3a9 9 0 0 1 0 18",
  trash: "M4 7h16M9 7V4h6v3M6 7l1 13h10l1-13M10 11v6M14 11v6",
};
const SVG = "http://www.w3.org/2000/svg";

/** One of the page's icons; screen readers skip it. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("aria-hidden", "true");
  svg.setAttribute("class", `icon icon-${name}`);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[name]);
  svg.append(path);
  return svg;
}

/** A button with an icon and a label; without `text` the label is for screen readers and hover. */
export function button(name, label, onclick, { text = false, ...attributes } = {}) {
  const hints = text ? {} : { "aria-label": label, title: label };
  const classes = text ? "button" : "icon-button";
  return make(
    "button",
    { type: "button", class: classes, onclick, ...hints, ...attributes },
    icon(name),
    text ? make("span", {}, label) : null,
  );
}

/** Fill the icons of the buttons that index.html has. */
export function drawIcons(root) {
  for (const node of root.querySelectorAll("[data-icon]")) node.prepend(icon(node.dataset.icon));
}

let announcements = 0;

/** Have a screen reader say a text, once, when it is idle. */
export function announce(text) {
  const log = byId("announcer");
  log.append(make("p", {}, text));
  if (++announcements % 20 === 0) while (log.children.length > 5) log.firstChild.remove();
}

/** Show a short message at the bottom; screen readers hear it as well. */
export function toast(text) {
  const node = byId("toast");
  node.textContent = text;
  node.hidden = false;
  clearTimeout(toast.timer);
  toast.timer = setTimeout(() => (node.hidden = true), 5000);
}

/** Copy a text, and say so on the button. */
export async function copy(text, source) {
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else copySelected(text); // pages that did not come by HTTPS or from this machine
    source.querySelector("svg").replaceWith(icon("check"));
    setTimeout(() => source.querySelector("svg").replaceWith(icon("copy")), 1500);
    announce("Copied.");
  } catch {
    toast("The browser refused the clipboard. Select the text and copy it by hand.");
  }
}

function copySelected(text) {
  const area = make("textarea", { class: "visually-hidden" });
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("not copied");
}

/** Open a dialog of index.html; the promise is the value of the button that closed it. */
export function ask(id) {
  const dialog = byId(id);
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}

/** Buttons that leave a dialog without its form: Enter must not press them. */
export function listenToDialogs() {
  for (const node of document.querySelectorAll("[data-close]")) {
    node.addEventListener("click", () => node.closest("dialog").close(node.dataset.close));
  }
}

/** A message of the server as a sentence. */
export function sentence(text) {
  const words = text.trim();
  return words.charAt(0).toUpperCase() + words.slice(1) + (/[.!?]$/.test(words) ? "" : ".");
}

export const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
export const nextFrame = () =>
  new Promise((done) => {
    const timer = setTimeout(done, 100); // frames stop in a hidden tab
    requestAnimationFrame(() => (clearTimeout(timer), done()));
  });
