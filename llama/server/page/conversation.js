// A conversation is a tree of messages: an edited question or another answer is a sibling.
// Knows nothing of the page, of storage, or of the server.

/** Sampling fields of a request: name, label, smallest, largest, step, explanation. */
export const SAMPLING = [
  ["temperature", "Temperature", 0, 2, 0.05, "0 always takes the most probable token"],
  ["top_p", "Top p", 0, 1, 0.01, "smallest set of tokens with this total probability"],
  ["top_k", "Top k", 0, 1000, 1, "only the k most probable tokens; 0 is off"],
  ["min_p", "Min p", 0, 1, 0.01, "at least this fraction of the best token's probability"],
  ["max_tokens", "Longest answer", 1, 1048576, 1, "tokens"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "against any token that occurred"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "against tokens that occurred often"],
  ["seed", "Seed", 0, 2147483647, 1, "the same seed gives the same answer"],
];
export const ROOT = "root"; // the parent of the first messages

export class Conversation {
  constructor(fields = {}) {
    this.id = fields.id ?? randomId();
    this.title = fields.title ?? "";
    this.created = fields.created ?? Date.now();
    this.updated = fields.updated ?? this.created;
    this.system = fields.system ?? "";
    this.sampling = fields.sampling ?? {};
    this.model = fields.model ?? ""; // of its next answers; empty: the server's base
    this.messages = new Map();
    this.chosen = new Map(fields.chosen ?? []);
    for (const message of fields.messages ?? []) this.messages.set(message.id, { ...message });
  }

  /** What is stored: everything but the tokens, which have a store of their own. */
  record() {
    const { id, title, created, updated, system, sampling, model } = this;
    const messages = [...this.messages.values()].map(({ tokens, ...message }) => message);
    const settings = { system, sampling, model };
    return { id, title, created, updated, ...settings, messages, chosen: [...this.chosen] };
  }

  /** Add a message below `parent` and choose it. */
  add(parent, fields) {
    const id = randomId();
    const message = { id, parent, content: "", status: "done", created: Date.now(), ...fields };
    this.messages.set(id, message);
    this.chosen.set(parent, id);
    this.touch();
    if (!this.title && message.role === "user") this.title = titleOf(message.content);
    return message;
  }

  touch() {
    this.updated = Date.now();
  }

  siblings(message) {
    return [...this.messages.values()].filter((other) => other.parent === message.parent);
  }

  choose(message) {
    this.chosen.set(message.parent, message.id);
  }

  /** The messages that are shown, from the first to the last. */
  path() {
    const shown = [];
    for (let at = ROOT; this.chosen.has(at);) {
      const message = this.messages.get(this.chosen.get(at));
      shown.push(message);
      at = message.id;
    }
    return shown;
  }

  /** The messages above one, from the first on. */
  above(message) {
    const found = [];
    for (let at = message.parent; at !== ROOT;) {
      const parent = this.messages.get(at);
      found.unshift(parent);
      at = parent.parent;
    }
    return found;
  }

  /** Whether a text occurs in the title or in a message, in any case of letters. */
  matches(words) {
    const texts = [this.title, ...[...this.messages.values()].map(({ content }) => content)];
    return texts.some((text) => text.toLowerCase().includes(words));
  }
}

export const randomId = () =>
  [...crypto.getRandomValues(new Uint8Array(12))]
    .map((byte) => byte.toString(16).padStart(2, "0"))
    .join("");

/** A title from the first words of a question. */
export function titleOf(text) {
  const words = text.trim().replace(/\s+/g, " ");
  return words.length > 60 ? `${words.slice(0, 57).trimEnd()}…` : words;
}
