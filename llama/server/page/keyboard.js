// Shortcuts. All need Alt, so that they take no letter from a screen reader or a text field; on a
// Mac also Control, because Option and a letter write other letters there.

import { ask, byId, make } from "./dom.js";

const MAC = navigator.platform.startsWith("Mac");
const HELD = MAC ? "Control + Option" : "Alt";

/**
 * Listen for shortcuts.
 * @param actions what they do: {code of the key: [words, function]}, with Alt
 */
export function listen(actions, stop) {
  document.addEventListener("keydown", (event) => {
    const dialog = document.querySelector("dialog[open]");
    if (event.key === "Escape" && !dialog && !document.querySelector(":popover-open")) stop();
    if (!event.altKey || event.ctrlKey !== MAC || event.metaKey || dialog) return;
    const action = actions[event.code];
    if (!action) return;
    event.preventDefault();
    action[1]();
  });
  const rows = [
    ...Object.entries(actions).map(([code, [words]]) => [`${HELD} + ${keyName(code)}`, words]),
    ["Escape", "Stop the answer"],
    ["Enter", "Send the message"],
    ["Shift + Enter", "New line"],
    ["↑ in an empty field", "Edit the last question"],
    ["Arrow keys, Enter", "Move between tokens, show what was considered"],
  ];
  byId("shortcut-list").replaceChildren(
    ...rows.flatMap(([keys, words]) => [
      make("dt", {}, make("kbd", {}, keys)),
      make("dd", {}, words),
    ]),
  );
}

const keyName = (code) => ({ Slash: "/" })[code] ?? code.replace("Key", "");

export const showShortcuts = () => ask("shortcuts");
