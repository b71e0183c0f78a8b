// Conversations in the browser's IndexedDB, small things in localStorage. Knows nothing of the page.
//
// Tokens are stored apart from the messages, in pieces of JSON that are only ever added: an answer
// of thousands of tokens is saved every second without being copied every second.

import { Conversation } from "./conversation.js";

const NAME = "llama3";
const channel = "BroadcastChannel" in window ? new BroadcastChannel(NAME) : null; // of all tabs
let database = null; // null: nothing is kept, because the browser has no storage for this page

/** Open the database; false where the browser refuses one. */
export async function open() {
  try {
    const opening = indexedDB.open(NAME, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("conversations", { keyPath: "id" });
      opening.result.createObjectStore("tokens", { keyPath: ["message", "part"] });
    };
    database = await result(opening);
    return true;
  } catch {
    return false;
  }
}

function result(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

function finished(transaction) {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });
}

/** All conversations, the latest first. Their tokens are loaded by `loadTokens`. */
export async function loadConversations() {
  if (!database) return [];
  const records = await result(
    database.transaction("conversations").objectStore("conversations").getAll(),
  );
  return records
    .map((record) => new Conversation(record))
    .sort((one, other) => other.updated - one.updated);
}

/** One conversation as it is stored, or null. */
export async function loadConversation(id) {
  const store = database?.transaction("conversations").objectStore("conversations");
  const record = store && (await result(store.get(id)));
  return record ? new Conversation(record) : null;
}

/** Have `changed` called with the id of each conversation that another tab stores or deletes. */
export function listenToOtherTabs(changed) {
  channel?.addEventListener("message", ({ data }) => changed(data));
}

/** Store a conversation, unless it was deleted meanwhile. */
export async function saveConversation(conversation) {
  if (!database || conversation.deleted) return;
  const transaction = database.transaction("conversations", "readwrite");
  transaction.objectStore("conversations").put(conversation.record());
  transaction.commit(); // else a reload that comes at once would abort it
  await finished(transaction);
  channel?.postMessage(conversation.id);
}

const partsOf = (message) => IDBKeyRange.bound([message.id, 0], [message.id, Infinity]);

/** Store the tokens that a message got since the last call. */
export async function saveTokens(message) {
  const tokens = message.tokens ?? [];
  const stored = message.storedTokens ?? 0;
  if (!database || message.deleted || tokens.length === stored) return;
  const transaction = database.transaction("tokens", "readwrite");
  const json = JSON.stringify(tokens.slice(stored));
  transaction.objectStore("tokens").put({ message: message.id, part: stored, json });
  message.storedTokens = tokens.length;
  await finished(transaction);
}

/** Give each message of a list its tokens. */
export async function loadTokens(messages) {
  const missing = messages.filter(({ tokens, role }) => !tokens && role === "assistant");
  if (!database || missing.length === 0) return;
  const store = database.transaction("tokens").objectStore("tokens");
  await Promise.all(
    missing.map(async (message) => {
      const parts = await result(store.getAll(partsOf(message)));
      message.tokens ??= parts.flatMap(({ json }) => JSON.parse(json));
      message.storedTokens = message.tokens.length;
    }),
  );
}

/** Forget a conversation and its tokens. */
export async function deleteConversation(conversation) {
  for (const one of [conversation, ...conversation.messages.values()]) one.deleted = true;
  if (!database) return;
  const transaction = database.transaction(["conversations", "tokens"], "readwrite");
  transaction.objectStore("conversations").delete(conversation.id);
  for (const message of conversation.messages.values()) {
    transaction.objectStore("tokens").delete(partsOf(message));
  }
  await finished(transaction);
  channel?.postMessage(conversation.id);
}

/** Small things that a reload must find again: drafts, the theme. Null removes one. */
export const remember = {
  get(name) {
    try {
      return localStorage.getItem(`llama3.${name}`);
    } catch {
      return null;
    }
  },
  set(name, value) {
    try {
      if (value === null || value === "") localStorage.removeItem(`llama3.${name}`);
      else localStorage.setItem(`llama3.${name}`, value);
    } catch {
      // No storage: it is forgotten on reload.
    }
  },
};
