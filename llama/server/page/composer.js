// The message field: its draft, its buttons, and the gauge of the context.

import { byId } from "./dom.js";
import { remember } from "./store.js";

const TOUCH = window.matchMedia("(hover: none)"); // the Enter key of a screen starts a line
const NUMBERS = new Intl.NumberFormat("en");

export class Composer {
  /** @param actions what the field does: send, stop, editLast */
  constructor(actions) {
    this.actions = actions;
    this.field = byId("draft");
    this.field.addEventListener("input", () => this.changed());
    this.field.addEventListener("keydown", (event) => this.key(event));
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    byId("stop").addEventListener("click", () => this.actions.stop());
  }

  /** Show the draft of a conversation. */
  open(name) {
    this.name = name;
    this.field.disabled = false; // only now is what is written kept
    this.field.value = remember.get(`draft.${name}`) ?? "";
    this.fit();
    if (!TOUCH.matches) this.field.focus();
  }

  changed() {
    remember.set(`draft.${this.name}`, this.field.value);
    this.fit();
  }

  /** As high as the text, up to what the style sheet allows. */
  fit() {
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight}px`;
  }

  key(event) {
    if (event.isComposing) return; // Enter ends the input of a character, not the message
    if (event.key === "Enter" && !event.shiftKey && !event.altKey && !TOUCH.matches) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && this.field.value === "") {
      event.preventDefault();
      this.actions.editLast();
    }
  }

  send() {
    const text = this.field.value;
    if (text.trim() === "" || this.isBusy) return;
    this.field.value = "";
    this.changed();
    this.actions.send(text);
  }

  /** While an answer is written, the stop button stands in the place of the send button. */
  busy(busy) {
    const focused = [byId("send"), byId("stop")].includes(document.activeElement);
    this.isBusy = busy;
    byId("send").hidden = busy;
    byId("stop").hidden = !busy;
    if (focused && !(TOUCH.matches && !busy)) (busy ? byId("stop") : this.field).focus();
  }

  gauge(used, room) {
    const { format } = NUMBERS;
    byId("gauge").max = Math.max(room, 1);
    byId("gauge").high = 0.85 * Math.max(room, 1);
    byId("gauge").value = used;
    byId("gauge-text").textContent = room ? `${format(used)} of ${format(room)} tokens` : "";
    byId("gauge").hidden = !room;
  }
}
