// The popover with what the model considered at one token. Knows nothing of conversations.

import { button, byId, make } from "./dom.js";
import { hex, percent, probability, spoken, visible } from "./token.js";

let asked = null; // the token whose alternatives are shown

/** Show the alternatives of a token beside it; `branch` is called with the one that is chosen. */
export function showConsidered(anchor, token, branch) {
  const popover = byId("considered");
  const top = token.top ?? [];
  const same = (candidate) => (candidate.id === null ? hex(candidate.bytes) === hex(token.bytes) : candidate.id === token.id);
  const rows = top.some(same) ? top : [...top, token];
  const rest = 1 - rows.reduce((sum, { logprob }) => sum + probability(logprob), 0);
  const close = button("plus", "Close", () => popover.hidePopover(), { class: "icon-button close" });
  popover.replaceChildren(
    make("div", { class: "considered-head" }, make("h3", {}, "The model considered"), close),
    make("ol", {}, ...rows.map((candidate) => row(candidate, same(candidate)))),
    make("p", { class: "hint" }, `All other tokens together: ${percent(Math.log(Math.max(rest, 1e-9)))}. Probabilities before temperature and filters.`),
  );
  popover.hidePopover();
  asked?.classList.remove("asked");
  asked = anchor;
  anchor.classList.add("asked");
  popover.ontoggle = ({ newState }) => newState === "closed" && asked.classList.remove("asked");
  popover.showPopover();
  place(popover, anchor);
  popover.querySelector("button.row, button")?.focus();

  function row(candidate, chosen) {
    const share = percent(candidate.logprob);
    const bar = make("span", { class: "bar" });
    bar.style.setProperty("--share", probability(candidate.logprob)); // CSSOM: the policy allows it
    const cells = [make("code", {}, visible(candidate.bytes)), bar, make("span", { class: "share" }, share)];
    const label = `${spoken(candidate.bytes)}, ${share}`;
    if (chosen) return make("li", {}, make("div", { class: "row chosen", "aria-label": `${label}, chosen`, role: "img" }, ...cells));
    const continued = () => (popover.hidePopover(), branch(candidate));
    const choose = make("button", { type: "button", class: "row", "aria-label": `Branch here with ${label}`, title: "Branch here", onclick: continued }, ...cells);
    return make("li", {}, choose);
  }
}

/** Put a popover below its anchor, or above it where there is no room. */
export function place(popover, anchor) {
  const box = anchor.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = popover;
  const left = Math.min(Math.max(box.left, 8), window.innerWidth - width - 8);
  const below = box.bottom + 6;
  const top = below + height > window.innerHeight - 8 ? Math.max(8, box.top - height - 6) : below;
  popover.style.left = `${left}px`;
  popover.style.top = `${top}px`;
}
