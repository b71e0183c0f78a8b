// The messages of a conversation. Knows nothing of the server or of storage.

import { announce, button, byId, copy, make } from "./dom.js";
import { Tokens } from "./inspect.js";
import { Markdown } from "./markdown.js";

const NEAR_END = 80; // pixels: a reader this near to the end follows a growing answer

/** Shows one conversation and follows its changes, at most once a frame. */
export class View {
  /** @param actions what the buttons do: regenerate, goOn, resend, branch, choose, isStop, isBusy, drawn */
  constructor(actions) {
    this.actions = actions;
    this.items = new Map(); // id of a message: its Item
    this.due = false;
    this.scroller = byId("scroller");
    this.scroller.addEventListener("scroll", () => this.showJump(), { passive: true });
    byId("jump").addEventListener("click", () => this.toEnd());
  }

  /** Show a conversation; messages that are shown already stay. */
  show(conversation) {
    if (conversation !== this.conversation) this.items.clear();
    this.conversation = conversation;
    const path = conversation.path();
    const kept = new Map();
    for (const message of path) {
      kept.set(message.id, this.items.get(message.id) ?? new Item(message, this));
    }
    this.items = kept;
    const nodes = [...kept.values()].map(({ node }) => node);
    const list = byId("messages");
    const same = nodes.length === list.children.length && nodes.every((node) => node.isConnected);
    if (!same) list.replaceChildren(...nodes);
    for (const item of kept.values()) item.refresh();
    byId("welcome").hidden = path.length > 0;
    this.showJump();
  }

  /** A message changed: draw it in the next frame. */
  changed(message) {
    const item = this.items.get(message.id);
    if (!item) return;
    item.stale = true;
    if (this.due) return;
    this.due = true;
    requestAnimationFrame(() => {
      this.due = false;
      const follow = this.nearEnd;
      for (const one of this.items.values()) if (one.stale) one.refresh();
      if (follow) this.toEnd();
      this.showJump(follow);
      this.actions.drawn();
    });
  }

  get nearEnd() {
    const { scrollHeight, scrollTop, clientHeight } = this.scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_END;
  }

  toEnd() {
    this.scroller.scrollTop = this.scroller.scrollHeight;
  }

  showJump(atEnd = this.nearEnd) {
    byId("jump").hidden = atEnd;
  }

  /** Show the tokens of a message that was just started. */
  inspect(message) {
    const item = this.items.get(message.id);
    if (item && !item.tokens) item.inspect();
  }

  editLast() {
    [...this.items.values()].findLast(({ message }) => message.role === "user")?.edit();
  }

  /** Switch between the text and the tokens of the answer that has the focus, or of the last one. */
  toggleInspection() {
    const answers = [...this.items.values()].filter(({ message }) => message.role === "assistant");
    (
      answers.find(({ node }) => node.contains(document.activeElement)) ?? answers.at(-1)
    )?.inspect();
  }
}

/** One message: its text or tokens, a notice, and its buttons. */
class Item {
  constructor(message, view) {
    Object.assign(this, { message, view, tokens: null });
    this.body = make("div", { class: "body" });
    this.notice = make("p", { class: "notice", hidden: true });
    this.foot = make("div", { class: "foot" });
    const who = message.role === "user" ? "You" : "Answer";
    const article = make("article", { "aria-label": who }, this.body, this.notice, this.foot);
    this.node = make("li", { class: `message ${message.role}`, "data-id": message.id }, article);
    this.startText();
  }

  get streaming() {
    return this.message.status === "streaming";
  }

  startText() {
    this.body.replaceChildren();
    this.body.classList.remove("coloured");
    if (this.message.role === "user") this.body.textContent = this.message.content;
    else this.markdown = new Markdown(this.body, (node) => this.hear(node));
  }

  /** Screen readers hear each block of a streamed answer once, when it is complete. */
  hear(node) {
    if (this.streamed && !this.tokens) announce(node.textContent);
  }

  refresh() {
    this.stale = false;
    const { message } = this;
    if (message.role === "assistant") this.showAnswer();
    this.notice.textContent = message.note ?? "";
    this.notice.hidden = !message.note;
    this.notice.classList.toggle("trouble", ["broken", "failed"].includes(message.status));
    const shape = [
      message.status,
      this.view.conversation.siblings(message).length,
      !!this.tokens,
    ].join();
    if (shape !== this.shape) this.foot.replaceChildren(...this.buttons());
    this.shape = shape;
    if (this.figures) this.figures.textContent = figuresOf(message, this.view.actions.isChoice());
  }

  showAnswer() {
    const { message } = this;
    this.streamed ||= this.streaming;
    this.node.classList.toggle("streaming", this.streaming);
    this.body.setAttribute("aria-busy", this.streaming);
    if (!this.draw()) return this.view.changed(message);
    if (this.streamed && !this.streaming) {
      announce(message.note || "Answer complete.");
      this.streamed = false;
    }
  }

  /** Draw the text or the tokens; false if the next frame has to go on. */
  draw() {
    const { message } = this;
    if (this.tokens) return this.tokens.show();
    const state = `${message.content.length} ${message.status}`;
    if (this.drawn === state) return true;
    const complete = this.markdown.show(message.content, !this.streaming);
    if (complete) this.drawn = state;
    return complete;
  }

  buttons() {
    const { message, view, streaming } = this;
    const { actions } = view;
    const nodes = this.branches();
    this.figures = null;
    if (message.role === "user") {
      return [
        ...nodes,
        button("edit", "Edit and send again", () => this.edit()),
        this.copyButton(),
      ];
    }
    if (!streaming) {
      nodes.push(
        this.copyButton(),
        button("repeat", "Another answer", () => actions.regenerate(message)),
      );
      if (message.status !== "done") {
        const goOn = () => actions.goOn(message);
        nodes.push(button("go", message.content ? "Go on" : "Try again", goOn, { text: true }));
      }
    }
    if (message.tokens?.length > 0 || streaming) {
      const toggle = () => this.inspect();
      const pressed = this.tokens ? "true" : "false";
      nodes.push(
        button("inspect", "Inspect tokens", toggle, { text: true, "aria-pressed": pressed }),
      );
    }
    this.figures = make("span", { class: "figures" });
    return [...nodes, this.figures];
  }

  copyButton() {
    return button("copy", "Copy", (event) => copy(this.message.content, event.currentTarget));
  }

  /** Buttons that switch between siblings, where there are any. */
  branches() {
    const { message, view } = this;
    const siblings = view.conversation.siblings(message);
    if (siblings.length < 2) return [];
    const at = siblings.indexOf(message);
    const to = (step) => () => view.actions.choose(siblings[at + step]);
    return [
      button("previous", "Previous version", to(-1), { disabled: at === 0 }),
      make("span", { class: "count" }, `${at + 1} / ${siblings.length}`),
      button("next", "Next version", to(1), { disabled: at === siblings.length - 1 }),
    ];
  }

  inspect() {
    if (this.tokens) {
      this.tokens = null;
      this.startText();
      this.drawn = null;
    } else {
      const { actions } = this.view;
      const branch = (index, candidate) => actions.branch(this.message, index, candidate);
      this.tokens = new Tokens(this.body, this.message, { branch, isStop: actions.isStop });
    }
    const focused = this.foot.contains(document.activeElement);
    this.refresh();
    if (focused) this.foot.querySelector("[aria-pressed]").focus();
  }

  /** Change a question in place; sending it makes a sibling. */
  edit() {
    const area = make("textarea", { "aria-label": "Edit the message", rows: 3 });
    area.value = this.message.content;
    const close = () => {
      this.startText();
      this.foot.hidden = false;
      this.foot.querySelector(".icon-edit").closest("button").focus();
    };
    const send = () => {
      if (this.view.actions.isBusy()) return;
      close();
      if (area.value.trim()) this.view.actions.resend(this.message, area.value);
    };
    area.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
      else return;
      event.preventDefault();
      event.stopPropagation();
    });
    const cancel = button("previous", "Cancel", close, { text: true });
    const again = button("send", "Send again", send, { text: true });
    this.body.replaceChildren(area, make("div", { class: "foot" }, cancel, again));
    this.foot.hidden = true;
    area.focus();
  }
}

function figuresOf({ figures, model, status, tokens }, named) {
  if (!figures?.generated) return "";
  const words = [`${tokens?.length || figures.generated} tokens`];
  if (figures.seconds > 0.05) {
    words.unshift(`${((figures.generated - 1) / figures.seconds).toFixed(1)} tokens a second`);
  }
  if (status !== "streaming" && figures.first)
    words.push(`${figures.first.toFixed(2)} s to the first`);
  if (figures.cached) words.push(`${figures.cached} cached`);
  if (named && model) words.push(model);
  return words.join(" · ");
}
