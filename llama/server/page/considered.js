// The popover with what the model considered at one token. Knows nothing of conversations.

import { button, byId, make } from "./dom.js";
import { hex, percent, probability, spoken, visible } from "./token.js";

let asked = null; // the token whose alternatives are shown

/**
 * Show the alternatives of a token beside it.
 * @param isStop whether an id ends an answer
 * @param branch called with the alternative that is chosen
 */
export function showConsidered(anchor, token, { isStop, branch }) {
  const popover = byId("considered");
  const rows = withToken(token);
  const rest = 1 - rows.reduce((sum, { logprob }) => sum + probability(logprob), 0);
  const close = () => popover.hidePopover();
  const show = (candidate) => {
    const chosen = isSame(candidate, token);
    const choose = chosen ? null : () => (close(), branch(candidate));
    return make("li", {}, row(candidate, isStop(candidate.id), choose));
  };
  popover.replaceChildren(
    make(
      "div",
      { class: "considered-head" },
      make("h3", {}, "The model considered"),
      button("plus", "Close", close),
    ),
    make("ol", {}, ...rows.map(show)),
    make(
      "p",
      { class: "hint" },
      `All other tokens together: ${percent(Math.log(Math.max(rest, 1e-9)))}. Before temperature `,
      "and filters. Choose one to continue from it in a new branch.",
    ),
  );
  open(popover, anchor);
  (popover.querySelector("button.row") ?? popover.querySelector("button")).focus();
}

const isSame = (candidate, token) =>
  candidate.id === null ? hex(candidate.bytes) === hex(token.bytes) : candidate.id === token.id;

/** The alternatives, and the token itself where it is not one of the most probable. */
function withToken(token) {
  const top = token.top ?? [];
  return top.some((candidate) => isSame(candidate, token)) ? top : [...top, token];
}

/** One alternative; `choose` is null for the token that the answer has. */
function row(candidate, stops, choose) {
  const share = percent(candidate.logprob);
  const bar = make("span", { class: "bar" });
  bar.style.setProperty("--share", probability(candidate.logprob)); // CSSOM: the policy allows it
  const end = "end of the answer";
  const cells = [
    stops ? make("i", {}, end) : make("code", {}, visible(candidate.bytes)),
    bar,
    make("span", { class: "share" }, share),
  ];
  const label = `${stops ? end : spoken(candidate.bytes)}, ${share}`;
  const words = choose ? `Branch here with ${label}` : `${label}, in the answer`;
  const heard = make("span", { class: "visually-hidden" }, words);
  for (const cell of cells) cell.setAttribute("aria-hidden", "true");
  if (!choose) return make("div", { class: "row chosen" }, heard, ...cells);
  const attributes = { type: "button", class: "row", title: "Branch here", onclick: choose };
  return make("button", attributes, heard, ...cells);
}

function open(popover, anchor) {
  popover.hidePopover();
  asked?.classList.remove("asked");
  asked = anchor;
  anchor.classList.add("asked");
  const follow = () => place(popover, anchor);
  popover.ontoggle = ({ newState }) => {
    if (newState !== "closed") return;
    asked.classList.remove("asked");
    byId("scroller").removeEventListener("scroll", follow);
  };
  popover.showPopover();
  follow();
  byId("scroller").addEventListener("scroll", follow, { passive: true });
}

/** Put a popover below its anchor, above it, or beside it: where it covers the anchor least. */
export function place(popover, anchor) {
  const box = anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popover;
  const low = window.innerHeight - height - 8;
  const right = window.innerWidth - width - 8;
  let left = box.left;
  let top = box.bottom + 6;
  if (top > low && box.top - height - 6 >= 8) top = box.top - height - 6;
  else if (top > low) left = box.right + 6 <= right ? box.right + 6 : box.left - width - 6;
  popover.style.left = `${Math.max(8, Math.min(left, right))}px`;
  popover.style.top = `${Math.max(8, Math.min(top, low))}px`;
}
