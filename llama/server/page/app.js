// The chat page: brings together conversations, answers, and what the user does.

import { Answering } from "./answering.js";
import { showChoice } from "./choice.js";
import { Composer } from "./composer.js";
import { Conversation, ROOT, titleOf } from "./conversation.js";
import { byId, drawIcons, listenToDialogs, make, toast } from "./dom.js";
import { exported, imported } from "./imports.js";
import { listen, showShortcuts } from "./keyboard.js";
import { Server } from "./server.js";
import * as dialogs from "./settings.js";
import { Sidebar } from "./sidebar.js";
import * as store from "./store.js";
import { View } from "./view.js";

const running = new Map(); // conversation: its Answering
let conversations = [];
let current = null;

const server = new Server(serverChanged, dialogs.askKey);
const isStop = (id) => server.isStop(id);
const isChoice = () => server.models.length > 1;
const view = new View({
  regenerate,
  goOn,
  resend,
  branch,
  choose,
  isStop,
  isBusy,
  isChoice,
  drawn: showGauge,
});
const sidebar = new Sidebar({ open, rename, remove, exportOne });
const composer = new Composer({ send, stop, editLast });

// Conversations.

function blank() {
  const model = store.remember.get("model") ?? "";
  return new Conversation({ ...dialogs.settingsForNew(), model });
}

async function open(conversation) {
  current = conversation;
  history.replaceState(null, "", conversation.messages.size > 0 ? `#${conversation.id}` : "#");
  const path = conversation.path();
  await store.loadTokens(path);
  if (current !== conversation) return;
  view.show(conversation);
  view.toEnd();
  composer.open(draftName());
  sidebar.settle();
  showState();
}

const isKept = (conversation) => conversations.includes(conversation);
const draftName = () => (isKept(current) ? current.id : "new");

/** Put a conversation at the top of the list, and store it. */
async function keep(conversation) {
  conversation.touch();
  conversations = [conversation, ...conversations.filter((one) => one !== conversation)];
  if (conversation === current) {
    history.replaceState(null, "", `#${conversation.id}`);
    composer.name = draftName();
  }
  await store.saveConversation(conversation).catch(() => {
    toast("The browser's storage is full. Export what you want to keep, then delete something.");
  });
}

async function rename(conversation) {
  const title = await dialogs.askTitle(conversation);
  if (title === null) return;
  conversation.title = title;
  await store.saveConversation(conversation);
  showState();
}

async function remove(conversation) {
  if (!(await dialogs.confirmDelete(conversation))) return;
  running.get(conversation)?.stop();
  conversations = conversations.filter((one) => one !== conversation);
  await store.deleteConversation(conversation);
  store.remember.set(`draft.${conversation.id}`, null);
  if (conversation === current) await open(conversations[0] ?? blank());
  else showState();
}

/** Another tab has changed a conversation: take over what it stored when its answer is complete. */
async function takeOver(id) {
  const fresh = await store.loadConversation(id);
  const old = conversations.find((one) => one.id === id);
  const writing = [...(fresh?.messages.values() ?? [])].some(
    ({ status }) => status === "streaming",
  );
  if (writing || running.has(old)) return;
  const others = conversations.filter((one) => one !== old);
  conversations = (fresh ? [fresh, ...others] : others).sort((a, b) => b.updated - a.updated);
  if (old && old === current) await open(fresh ?? blank());
  else showState();
}

async function download(list, name) {
  for (const one of list) await store.loadTokens([...one.messages.values()]);
  const file = new Blob([exported(list)], { type: "application/json" });
  const link = make("a", { href: URL.createObjectURL(file), download: `${name}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

function exportOne(conversation) {
  const name = titleOf(conversation.title).replace(/[^\p{L}\p{N} -]+/gu, "");
  return download([conversation], name || "conversation");
}

async function importFile(file) {
  try {
    const added = imported(await file.text());
    for (const conversation of added) {
      conversations.push(conversation);
      for (const message of conversation.messages.values()) await store.saveTokens(message);
      await store.saveConversation(conversation);
    }
    toast(`${added.length} ${added.length === 1 ? "conversation" : "conversations"} imported.`);
    if (added.length > 0) await open(added[0]);
  } catch (error) {
    toast(`Nothing was imported. ${error.message}`);
  }
}

// Answers.

async function answer(conversation, message) {
  if (running.has(conversation)) return;
  const changed = () => conversation === current && view.changed(message);
  const answering = new Answering({ server, conversation, message, changed });
  running.set(conversation, answering);
  const kept = keep(conversation);
  if (conversation === current) view.show(conversation);
  showState();
  await kept;
  await answering.run();
  running.delete(conversation);
  if (conversation === current) view.show(conversation);
  showState();
}

function send(text) {
  const last = current.path().at(-1);
  const question = current.add(last?.id ?? ROOT, { role: "user", content: text });
  const message = current.add(question.id, { role: "assistant", status: "streaming" });
  answer(current, message);
  view.toEnd();
}

function stop() {
  running.get(current)?.stop();
}

/** Whether an answer is being written, which has to end first. */
function isBusy() {
  if (running.has(current)) toast("Stop the answer first.");
  return running.has(current);
}

function regenerate(message) {
  if (isBusy()) return;
  answer(current, current.add(message.parent, { role: "assistant", status: "streaming" }));
}

/** Continue an answer where it ended; one without known tokens is asked again. */
function goOn(message) {
  const known = message.tokens?.length > 0 && message.tokens.every(({ id }) => id !== null);
  if (!known && server.chat) Object.assign(message, { content: "", tokens: [], storedTokens: 0 });
  answer(current, message);
}

function resend(message, text) {
  const question = current.add(message.parent, { role: "user", content: text });
  answer(current, current.add(question.id, { role: "assistant", status: "streaming" }));
}

/** Another answer that begins as this one did, up to a token, and goes on with an alternative. */
function branch(message, index, candidate) {
  if (isBusy()) return;
  const { top } = message.tokens[index];
  const tokens = [...message.tokens.slice(0, index), { ...candidate, top }];
  const { model } = message;
  const fields = { role: "assistant", status: "streaming", tokens, model, forkedAt: index };
  const started = current.add(message.parent, fields);
  answer(current, started);
  view.inspect(started);
}

async function choose(message) {
  current.choose(message);
  const saved = store.saveConversation(current); // begun before anything is awaited
  await store.loadTokens(current.path());
  view.show(current);
  await saved;
}

function editLast() {
  view.editLast();
}

// What is shown around the messages.

function showState() {
  const title = current.title || "New conversation";
  byId("title").textContent = title;
  document.title = current.title ? `${current.title} · llama3` : "llama3";
  sidebar.show(conversations, current);
  composer.busy(running.has(current));
  showChoice(server, current);
  showGauge();
}

function showGauge() {
  const figures = current.path().findLast((message) => message.figures?.prompt)?.figures;
  composer.gauge(figures ? figures.prompt + figures.generated : 0, server.room);
}

function serverChanged() {
  const { model, notice } = server;
  byId("server-notice").textContent = notice;
  byId("server-notice").hidden = notice === "";
  const kind = server.chat ? "" : "base model: continues a text";
  const words = [isChoice() ? "" : model?.id, model?.quantize, model?.dtype, kind];
  byId("model").textContent = words.filter(Boolean).join(" · ");
  if (!current) return;
  showChoice(server, current);
  showGauge();
}

async function chooseModel({ target }) {
  current.model = target.value;
  store.remember.set("model", target.value);
  if (isKept(current)) await store.saveConversation(current);
}

async function openSettings() {
  if (!(await dialogs.editSettings(current, server.defaults))) return;
  if (isKept(current)) await store.saveConversation(current);
}

async function start() {
  dialogs.applyTheme();
  drawIcons(document);
  listenToDialogs();
  if (!(await store.open())) toast("The browser keeps nothing for this page: a reload forgets it.");
  conversations = await store.loadConversations();
  for (const { messages } of conversations)
    for (const one of messages.values()) markUnfinished(one);
  store.listenToOtherTabs(takeOver);
  const here = () => conversations.find(({ id }) => `#${id}` === location.hash);
  window.addEventListener("hashchange", () => here() && open(here()));
  byId("new").addEventListener("click", () => open(blank()));
  byId("import").addEventListener("click", () => byId("import-file").click());
  byId("import-file").addEventListener("change", async ({ target }) => {
    if (target.files[0]) await importFile(target.files[0]);
    target.value = "";
  });
  byId("export-all").addEventListener("click", () => download(conversations, "conversations"));
  byId("choose-model").addEventListener("change", chooseModel);
  byId("open-settings").addEventListener("click", openSettings);
  byId("open-shortcuts").addEventListener("click", showShortcuts);
  byId("toggle-theme").addEventListener("click", dialogs.nextTheme);
  listen(
    {
      KeyN: ["New conversation", () => open(blank())],
      KeyK: ["Search conversations", () => (sidebar.toggle(true), byId("search").focus())],
      KeyB: ["Show or hide the conversations", () => sidebar.toggle()],
      KeyI: ["Inspect the tokens of an answer", () => view.toggleInspection()],
      KeyR: [
        "Another answer",
        () => current.path().length > 1 && regenerate(current.path().at(-1)),
      ],
      KeyS: ["Settings", openSettings],
      KeyT: ["Theme", dialogs.nextTheme],
      Slash: ["These shortcuts", showShortcuts],
    },
    stop,
  );
  await open(here() ?? blank());
  server.connect();
}

/** An answer that was being written when the page was closed. */
function markUnfinished(message) {
  if (message.status !== "streaming") return;
  Object.assign(message, { status: "broken", note: "The page was closed during this answer." });
}

start();
