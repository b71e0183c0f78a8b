// The dialogs: settings of a conversation, API key, rename, delete; and the theme.

import { apiKey } from "./api.js";
import { SAMPLING } from "./conversation.js";
import { ask, byId, make, toast } from "./dom.js";
import { remember } from "./store.js";

/** Edit the system prompt and sampling of a conversation; true if something may have changed. */
export async function editSettings(conversation, defaults) {
  byId("system").value = conversation.system;
  byId("for-new").checked = false;
  byId("sampling").replaceChildren(
    ...SAMPLING.map((field) => samplingField(field, conversation, defaults)),
  );
  const answer = await ask("settings");
  if (!["save", "reset"].includes(answer)) return false;
  conversation.sampling = {};
  if (answer === "save") {
    conversation.system = byId("system").value;
    for (const [name] of SAMPLING) {
      const { value } = byId(`sampling-${name}`);
      if (value !== "") conversation.sampling[name] = Number(value);
    }
  }
  if (byId("for-new").checked) {
    const { system, sampling } = conversation;
    remember.set("settings", JSON.stringify({ system, sampling }));
  }
  return true;
}

function samplingField([name, label, min, max, step, hint], conversation, defaults) {
  const id = `sampling-${name}`;
  const other = { max_tokens: "what is left", seed: "any" };
  const input = make("input", {
    type: "number",
    id,
    min,
    max,
    step,
    value: conversation.sampling[name] ?? null,
    placeholder: defaults[name] ?? other[name] ?? "0",
    "aria-describedby": `${id}-hint`,
  });
  const words = make("span", { class: "hint", id: `${id}-hint` }, hint);
  return make("div", { class: "setting" }, make("label", { for: id }, label), input, words);
}

/** What a new conversation begins with. */
export function settingsForNew() {
  try {
    const { system, sampling } = JSON.parse(remember.get("settings") ?? "{}");
    return { system: String(system ?? ""), sampling: { ...sampling } };
  } catch {
    return {};
  }
}

/** Ask for the API key, once at a time; false if the user gave none. */
export function askKey(reason) {
  askKey.open ??= (async () => {
    const refused = apiKey.get() !== "";
    byId("key-reason").textContent = refused
      ? "The server refused this key. Check it with whoever runs the server."
      : "This server asks for a key. It is kept until this tab is closed.";
    byId("key-reason").title = reason;
    byId("key").value = "";
    const given = (await ask("ask-key")) === "save" && byId("key").value !== "";
    if (given) apiKey.set(byId("key").value);
    byId("key").value = "";
    return given;
  })().finally(() => (askKey.open = null));
  return askKey.open;
}

/** Ask for a new title; null if cancelled. */
export async function askTitle(conversation) {
  byId("new-title").value = conversation.title;
  const done = ask("rename");
  byId("new-title").select();
  return (await done) === "save" ? byId("new-title").value.trim() || null : null;
}

/** Ask whether to delete a conversation. */
export async function confirmDelete(conversation) {
  byId("delete-name").textContent = conversation.title || "Untitled";
  return (await ask("confirm-delete")) === "delete";
}

const THEMES = ["system", "light", "dark"];

export function applyTheme() {
  const theme = remember.get("theme");
  if (THEMES.slice(1).includes(theme)) document.documentElement.dataset.theme = theme;
  else delete document.documentElement.dataset.theme;
}

/** The next theme: as the system, light, dark. */
export function nextTheme() {
  const theme = THEMES[(THEMES.indexOf(remember.get("theme") ?? "system") + 1) % THEMES.length];
  remember.set("theme", theme === "system" ? null : theme);
  applyTheme();
  toast(`Theme: ${theme === "system" ? "as the system" : theme}`);
}
