// An answer as its tokens: what else the model considered at each, and how surprising it was.
// Knows nothing of conversations: the caller continues from a chosen alternative.

import { showConsidered } from "./considered.js";
import { make } from "./dom.js";
import { remember } from "./store.js";
import { STEPS, STEP_NAMES, hex, joined, ownText, percent, spoken, surprise } from "./token.js";

const TOKENS_A_FRAME = 500; // bounds the work of one frame

/** The tokens of one answer, each a button. */
export class Tokens {
  /**
   * @param target the element that gets them
   * @param message the answer, whose tokens may grow
   * @param branch called with (index, candidate) when the user continues from an alternative
   * @param isStop whether an id ends an answer
   */
  constructor(target, message, { branch, isStop }) {
    Object.assign(this, { target, message, branch, isStop });
    this.shown = 0;
    this.partial = []; // tokens of a character that is not complete
    this.list = make("div", {
      class: "tokens",
      role: "group",
      "aria-label": "Tokens of the answer. Arrow keys move, Enter shows what was considered.",
      onclick: (event) => this.openAt(event.target),
      onkeydown: (event) => this.move(event),
    });
    target.replaceChildren(this.toolbar(), this.list);
    this.show();
  }

  /** Add tokens that came since the last call; false if the next frame has to go on. */
  show() {
    const { tokens } = this.message;
    const from = this.shown;
    this.shown = Math.min(tokens.length, from + TOKENS_A_FRAME);
    const added = tokens.slice(from, this.shown).map((token, i) => this.token(token, from + i));
    this.list.append(...added);
    return this.shown === tokens.length;
  }

  token(token, index) {
    const forked = this.message.forkedAt === index;
    const node = make("span", {
      class: `token s${surprise(token.logprob)}${forked ? " forked" : ""}`,
      role: "button",
      tabindex: index === 0 ? "0" : "-1",
      "data-index": index,
      "aria-label": `${spoken(token.bytes)}, ${percent(token.logprob)}${forked ? ", your choice" : ""}`,
    });
    node.append(...this.glyphs(token));
    return node;
  }

  /** What a token shows: its text, or its bytes with the character that they complete. */
  glyphs(token) {
    if (this.isStop(token.id)) return [make("span", { class: "mark" }, "■")];
    const own = this.partial.length === 0 ? ownText(token.bytes) : null;
    if (own !== null) {
      const parts = own.split(/(\n)/).filter((part) => part !== "");
      return parts.flatMap((part) =>
        part === "\n" ? [make("span", { class: "mark" }, "↵"), "\n"] : [part],
      );
    }
    this.partial.push(token);
    const bytes = [...joined(this.partial)];
    const whole = ownText(bytes);
    if (whole !== null || bytes.length > 4) this.partial = [];
    return [make("span", { class: "mark" }, `⟨${hex(token.bytes)}⟩`), whole ?? ""];
  }

  toolbar() {
    const colour = make("input", {
      type: "checkbox",
      role: "switch",
      onchange: (event) => this.colour(event.target.checked),
    });
    colour.checked = remember.get("colour") !== "off";
    const legend = make(
      "ul",
      { class: "legend", "aria-label": "Probability of a token" },
      ...STEPS.map((_, step) => make("li", { class: `s${step}` }, STEP_NAMES[step])),
    );
    this.target.classList.toggle("coloured", colour.checked);
    return make(
      "div",
      { class: "inspect-bar" },
      make("label", { class: "check" }, colour, " Colour by surprise"),
      legend,
    );
  }

  colour(on) {
    remember.set("colour", on ? "on" : "off");
    for (const body of document.querySelectorAll(".body")) body.classList.toggle("coloured", on);
    for (const box of document.querySelectorAll(".inspect-bar input")) box.checked = on;
  }

  /** Move by arrow keys: one token is in the tab order at a time. */
  move(event) {
    const at = event.target.closest(".token");
    if (!at) return;
    const last = this.list.children.length - 1;
    const index = [...this.list.children].indexOf(at);
    const targets = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: last };
    targets.ArrowDown = this.below(at, index, 1);
    targets.ArrowUp = this.below(at, index, -1);
    if (event.key === "Enter" || event.key === " ") this.openAt(at);
    else if (!(event.key in targets)) return;
    else this.focus(this.list.children[Math.min(Math.max(targets[event.key], 0), last)]);
    event.preventDefault();
  }

  /** The token in the next line (or the one before) that is nearest to the left edge of this one. */
  below(node, index, step) {
    const { left, bottom } = node.getBoundingClientRect();
    let best = index;
    let line = null;
    let distance = Infinity;
    for (let i = index + step; i >= 0 && i < this.list.children.length; i += step) {
      const box = this.list.children[i].getBoundingClientRect();
      if (Math.abs(box.bottom - bottom) < 3) continue;
      line ??= box.bottom;
      if (Math.abs(box.bottom - line) > 3) break;
      if (Math.abs(box.left - left) < distance) [best, distance] = [i, Math.abs(box.left - left)];
    }
    return best;
  }

  focus(node) {
    this.list.querySelector('[tabindex="0"]')?.setAttribute("tabindex", "-1");
    node.tabIndex = 0;
    node.focus();
  }

  openAt(target) {
    const node = target.closest(".token");
    if (!node) return;
    this.focus(node);
    const index = Number(node.dataset.index);
    const branch = (candidate) => this.branch(index, candidate);
    showConsidered(node, this.message.tokens[index], { branch, isStop: this.isStop });
  }
}
