// Markdown of an answer that grows: closed blocks stay as they are, the open one is parsed again.
// The model's text is never trusted: marked parses it, DOMPurify removes what is not on a list.

import { Lexer, Marked } from "./vendor/marked.js";
import "./vendor/purify.js";
import hljs from "./vendor/highlight.js";
import { button, copy, make } from "./dom.js";

const BLOCKS_A_FRAME = 60; // bounds the work of one frame
const LARGEST_HIGHLIGHT = 30000; // characters; beyond, code stays plain
const PLAIN_TAG = /^<\/?(br|sub|sup|kbd|mark|u)\s*\/?>$/i; // markup that models use inside text
const ALLOWED = {
  ALLOWED_TAGS:
    "p br hr strong em del u sub sup kbd mark h1 h2 h3 h4 h5 h6 ul ol li blockquote pre code a table thead tbody tr th td span".split(
      " ",
    ),
  ALLOWED_ATTR: ["href", "title", "align", "start", "class"],
  ALLOWED_URI_REGEXP: /^(?:https?:|mailto:)/i,
  ADD_URI_SAFE_ATTR: ["align", "start"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  RETURN_DOM_FRAGMENT: true,
};

const escape = (text) => {
  const node = document.createElement("p");
  node.textContent = text;
  return node.innerHTML.replaceAll('"', "&quot;");
};

const marked = new Marked({
  gfm: true,
  renderer: {
    // Markup that is not in a code block is shown as the text that the model wrote.
    html: ({ text, block }) => {
      if (PLAIN_TAG.test(text.trim())) return text;
      return block ? `<p class="markup">${escape(text.trim())}</p>` : escape(text);
    },
    // No image is loaded: its address could carry the conversation to another server.
    image: ({ href, text }) => `<a href="${escape(href)}">${escape(`image: ${text || href}`)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) =>
      `<pre><code class="${escape(`language-${(lang ?? "").split(/\s/)[0]}`)}">${escape(text)}\n</code></pre>`,
  },
});

/** Shows a growing text in an element. */
export class Markdown {
  /**
   * @param target the element that gets the blocks
   * @param closed called with each block that is complete
   */
  constructor(target, closed = () => {}) {
    Object.assign(this, { target, closed });
    this.links = {}; // definitions of links, in closed blocks
    this.done = 0; // characters of the text that are in closed blocks
    this.parsed = 0; // characters parsed so far, for tests
    this.open = [];
  }

  /**
   * Show `text`, which begins with the text of the last call. `end`: nothing will follow.
   * Returns false if there is more to draw: call again in the next frame.
   */
  show(text, end = false) {
    const complete = this.draw(text.replace(/\r\n?/g, "\n"), end);
    if (!complete || !end || this.redrawn || Object.keys(this.links).length === 0) return complete;
    // A link may come before its definition: draw all again, now that all are known.
    Object.assign(this, { redrawn: true, done: 0, open: [], closed: () => {} });
    this.target.replaceChildren();
    return false;
  }

  draw(text, end) {
    for (const node of this.open) node.remove();
    this.open = [];
    const blocks = this.blocks(text.slice(this.done));
    let closing = true;
    for (const [i, block] of blocks.entries()) {
      if (i >= BLOCKS_A_FRAME && closing) return false;
      // A block is closed by its fence, or by a whole line of another block after it.
      closing &&= end || fenced(block) || blocks.slice(i + 1).some(isWhole);
      if (closing) this.done += block.raw.length;
      if (closing && block.type === "def") this.links[block.tag] ??= block;
      if (block.type === "space" || block.type === "def") continue;
      const nodes = render(block, closing);
      this.target.append(...nodes);
      if (closing) nodes.forEach((node) => this.closed(node));
      else this.open.push(...nodes);
    }
    return true;
  }

  blocks(text) {
    this.parsed += text.length;
    const lexer = new Lexer(marked.defaults);
    Object.assign(lexer.tokens.links, this.links);
    return lexer.lex(text);
  }
}

const isWhole = (block) => block.type !== "space" && block.raw.includes("\n");
const FENCED = /^ {0,3}(`{3,}(?!`)|~{3,}(?!~))[^\n]*\n(?:[^]*\n)? {0,3}\1[`~]*[ \t]*\n$/;
const fenced = (block) => block.type === "code" && FENCED.test(block.raw);

function render(block, closed) {
  const html = marked.parser([block]);
  const fragment = globalThis.DOMPurify.sanitize(html, ALLOWED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) {
    const frame = make("div", {
      class: "wide",
      tabindex: "0",
      role: "group",
      "aria-label": "Table",
    });
    table.replaceWith(frame);
    frame.append(table);
  }
  for (const code of fragment.querySelectorAll("pre > code")) codeBlock(code, closed);
  return [...fragment.childNodes].filter(
    (node) => node.nodeType === Node.ELEMENT_NODE || node.textContent.trim(),
  );
}

function codeBlock(code, closed) {
  const language = /language-([\w+#.-]+)/.exec(code.className)?.[1] ?? "";
  code.className = "hljs";
  const pre = code.parentNode;
  pre.tabIndex = 0; // scrolled by keyboard
  const head = make(
    "div",
    { class: "code-head" },
    make("span", {}, language || "text"),
    button("copy", "Copy code", (event) => copy(code.textContent, event.currentTarget)),
  );
  const frame = make("div", {
    class: "code",
    role: "group",
    "aria-label": `Code, ${language || "text"}`,
  });
  pre.replaceWith(frame);
  frame.append(head, pre);
  // In a task of its own: with the drawing of a long block it would take too long.
  if (closed && hljs.getLanguage(language)) setTimeout(() => highlight(code, language));
}

function highlight(code, language) {
  if (code.textContent.length > LARGEST_HIGHLIGHT) return;
  const { value } = hljs.highlight(code.textContent, { language, ignoreIllegals: true });
  const only = { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"], RETURN_DOM_FRAGMENT: true };
  code.replaceChildren(globalThis.DOMPurify.sanitize(value, only));
}
