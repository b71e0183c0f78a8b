// Conversations as a file, and back. A file may come from anybody: every field is checked, ids are
// made anew, and nothing of it is ever markup. Knows nothing of the page.

import { Conversation, ROOT, SAMPLING, randomId, titleOf } from "./conversation.js";

const FORMAT = "llama3-conversations";
const LARGEST = 64 * 1024 * 1024; // characters of a file
const STATUSES = new Set(["done", "stopped", "broken", "length", "failed"]);

/** The text of a file with some conversations, whose tokens are loaded. */
export function exported(conversations) {
  const list = conversations.map((conversation) => {
    const { messages, ...rest } = conversation.record();
    return {
      ...rest,
      messages: messages.map(({ storedTokens, ...message }) => ({
        ...message,
        tokens: conversation.messages.get(message.id).tokens ?? [],
      })),
    };
  });
  return JSON.stringify({ format: FORMAT, version: 1, conversations: list }, null, 1);
}

/** The conversations of a file; raises an Error that says what is wrong with it. */
export function imported(text) {
  check(text.length <= LARGEST, "The file is larger than 64 MB.");
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  check(isObject(data) && data.format === FORMAT, `The file's "format" is not "${FORMAT}".`);
  check(data.version === 1, "The file is of another version of this page.");
  check(Array.isArray(data.conversations), 'The file has no list "conversations".');
  return data.conversations.map(conversationOf);
}

function check(right, message) {
  if (!right) throw new Error(message);
}

const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
const textOr = (value, other) => (typeof value === "string" ? value : other);
const timeOr = (value, other) => (Number.isSafeInteger(value) && value > 0 ? value : other);

function conversationOf(data) {
  check(isObject(data) && Array.isArray(data.messages), "A conversation has no messages.");
  const conversation = new Conversation({
    created: timeOr(data.created, Date.now()),
    updated: timeOr(data.updated, Date.now()),
    system: textOr(data.system, ""),
    sampling: samplingOf(data.sampling),
    model: textOr(data.model, ""),
  });
  const ids = new Map([[ROOT, ROOT]]); // ids of the file to ours; parents come before children
  for (const message of data.messages) {
    const { id, ...fields } = messageOf(message);
    check(ids.has(message.parent), "A message comes before the message that it answers.");
    check(!ids.has(id), "Two messages have the same id.");
    const ours = randomId();
    ids.set(id, ours);
    conversation.messages.set(ours, { id: ours, ...fields, parent: ids.get(message.parent) });
    conversation.chosen.set(ids.get(message.parent), ours);
  }
  for (const pair of Array.isArray(data.chosen) ? data.chosen : []) {
    const [parent, child] = Array.isArray(pair) ? pair.map((id) => ids.get(id)) : [];
    if (conversation.messages.get(child)?.parent === parent) conversation.chosen.set(parent, child);
  }
  conversation.title = titleOf(textOr(data.title, "Imported conversation"));
  return conversation;
}

function messageOf(data) {
  check(isObject(data) && typeof data.id === "string", "A message has no id.");
  check(["user", "assistant"].includes(data.role), "A message is of neither user nor assistant.");
  check(typeof data.content === "string", "A message has no text.");
  const tokens = Array.isArray(data.tokens) ? data.tokens.map(tokenOf) : [];
  return {
    id: data.id,
    role: data.role,
    content: data.content,
    status: STATUSES.has(data.status) ? data.status : "done",
    note: textOr(data.note, ""),
    model: textOr(data.model, ""),
    created: timeOr(data.created, Date.now()),
    forkedAt: Number.isSafeInteger(data.forkedAt) ? data.forkedAt : null,
    figures: figuresOf(data.figures),
    tokens,
  };
}

function tokenOf(data) {
  const top = isObject(data) && Array.isArray(data.top) ? data.top.slice(0, 20) : [];
  return { ...candidateOf(data), top: top.map(candidateOf) };
}

function candidateOf(data) {
  const bytes = isObject(data) ? data.bytes : null;
  const right =
    Array.isArray(bytes) && bytes.every((n) => Number.isInteger(n) && n >= 0 && n < 256);
  check(right && Number.isFinite(data.logprob), "A token has no bytes or no probability.");
  const id = Number.isSafeInteger(data.id) && data.id >= 0 ? data.id : null;
  return { id, logprob: data.logprob, bytes };
}

function samplingOf(data) {
  const found = {};
  for (const [name, , smallest, largest] of SAMPLING) {
    const value = isObject(data) ? data[name] : undefined;
    if (Number.isFinite(value) && value >= smallest && value <= largest) found[name] = value;
  }
  return found;
}

function figuresOf(data) {
  if (!isObject(data)) return null;
  const names = ["prompt", "generated", "cached", "seconds", "first"];
  return Object.fromEntries(
    names.map((name) => [name, Number.isFinite(data[name]) ? data[name] : 0]),
  );
}
