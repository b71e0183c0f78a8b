// The list of conversations, its search, and the menu of each. Knows nothing of messages' display.

import { button, byId, make } from "./dom.js";
import { place } from "./considered.js";

const NARROW = window.matchMedia("(max-width: 800px)");

export class Sidebar {
  /** @param actions what the list does: open, rename, remove, exportOne */
  constructor(actions) {
    this.actions = actions;
    byId("search").addEventListener("input", () => this.show(this.conversations, this.current));
    byId("toggle-sidebar").addEventListener("click", () => this.toggle());
    byId("shade").addEventListener("click", () => this.toggle(false));
    NARROW.addEventListener("change", () => this.toggle(!NARROW.matches));
    byId("sidebar").addEventListener("keydown", (event) => {
      if (event.key === "Escape" && NARROW.matches) this.toggle(false);
    });
    byId("menu").addEventListener("keydown", (event) => this.moveInMenu(event));
    this.toggle(!NARROW.matches);
  }

  /** Open or close the list; on a narrow screen it lies above the conversation. */
  toggle(open = document.body.classList.contains("without-sidebar")) {
    const moved = open === document.body.classList.contains("without-sidebar");
    document.body.classList.toggle("without-sidebar", !open);
    byId("sidebar").inert = !open;
    byId("toggle-sidebar").setAttribute("aria-expanded", String(open));
    byId("shade").hidden = !(open && NARROW.matches);
    byId("main").inert = open && NARROW.matches;
    if (!moved || !NARROW.matches) return;
    (open ? byId("new") : byId("toggle-sidebar")).focus();
  }

  /** After a choice on a narrow screen the list makes room. */
  settle() {
    if (NARROW.matches) this.toggle(false);
  }

  show(conversations, current) {
    Object.assign(this, { conversations, current });
    const words = byId("search").value.trim().toLowerCase();
    const found = conversations.filter((one) => !words || one.matches(words));
    byId("nothing-found").hidden = found.length > 0 || !words;
    const nodes = [];
    let group = "";
    for (const one of found) {
      const name = when(one.updated);
      if (name !== group) nodes.push(make("li", { class: "group" }, make("h2", {}, name)));
      group = name;
      nodes.push(this.entry(one));
    }
    byId("conversations").replaceChildren(...nodes);
  }

  entry(conversation) {
    const title = conversation.title || "Untitled";
    const open = make(
      "button",
      {
        type: "button",
        class: "entry",
        "aria-current": conversation === this.current ? "true" : null,
        onclick: () => this.actions.open(conversation),
      },
      title,
    );
    const more = button("more", `Actions for ${title}`, () => this.menu(conversation, more), {
      "aria-haspopup": "menu",
    });
    return make("li", { "data-id": conversation.id }, open, more);
  }

  menu(conversation, anchor) {
    const menu = byId("menu");
    const item = (name, label, action) => {
      const run = () => (menu.hidePopover(), action(conversation));
      return button(name, label, run, { text: true, role: "menuitem" });
    };
    menu.replaceChildren(
      item("edit", "Rename", this.actions.rename),
      item("export", "Export", this.actions.exportOne),
      item("trash", "Delete", this.actions.remove),
    );
    menu.showPopover();
    place(menu, anchor);
    menu.firstChild.focus();
  }

  moveInMenu(event) {
    const items = [...byId("menu").children];
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const at = items.indexOf(document.activeElement);
    items.at((at + step) % items.length).focus();
  }
}

/** Group of a conversation in the list. */
function when(time) {
  const days = Math.floor((startOfDay(Date.now()) - startOfDay(time)) / 86400000 + 0.5);
  if (days < 1) return "Today";
  if (days < 2) return "Yesterday";
  return days < 8 ? "Last seven days" : "Earlier";
}

const startOfDay = (time) => new Date(time).setHours(0, 0, 0, 0);
