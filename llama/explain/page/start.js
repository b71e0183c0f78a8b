// Draws all sections, then follows the theme, the width and what is read.

function drawFacts() {
  const total = (key) => stages.reduce((sum, stage) => sum + stage[key], 0);
  const facts = [
    ["tokens", grouped(data.tokens.count)], ["layers", model.n_layers], ["width", grouped(model.dim)],
    ["query heads", model.n_heads], ["KV heads", model.kv_heads], ["vocabulary", grouped(model.vocab_size)],
    ["parameters", short(total("parameters"))], ["bytes", short(total("bytes"), "B")], ["computes in", model.dtype],
  ];
  byId("facts").append(...facts.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  byId("model").textContent = model.name && `Checkpoint: ${readable(model.name)}`;
  byId("prompt").textContent = readable(data.prompt) || "(an empty text)";
  document.title = `llama3 explain: ${data.prompt.replace(UNSEEN, " ").trim().slice(0, 60)}`;
  const { count, total: whole, limit } = data.tokens;
  if (whole > count) {
    byId("bounded").hidden = false;
    byId("bounded").textContent = `The prompt has ${grouped(whole)} tokens. These are the first ${grouped(count)}: a token sees only those before it, so their numbers are those of the whole prompt, but the next token is the one after these. ${limit[0].toUpperCase()}${limit.slice(1)}.`;
  }
}

/** What the page leaves out to stay small. */
function drawNotes() {
  const left = [];
  if (listed < data.tokens.count) left.push(`the first ${listed} tokens`);
  if (side < data.tokens.count) left.push(`attention and the lens of the first ${side}`);
  const missing = Array.from({ length: model.n_layers }, (_, layer) => layer).filter((layer) => !maps.layers.includes(layer));
  const one = missing.length === 1 ? "layer" : "layers";
  if (missing.length > maps.layers.length) left.push(`attention in layers ${maps.layers.join(", ")} only`);
  else if (missing.length) left.push(`attention in all layers except ${one} ${missing.join(", ")}`);
  const digits = `Attention weights are rounded to 1 / ${maps.width === 1 ? 255 : "65,535"}.`;
  const words = left.length ? `To stay below 2 MB, this page shows ${left.join("; ")}. The trace in Python has everything. ` : "";
  byId("notes").textContent = `${words}${digits} Written by llama3 explain; the page loads nothing.`;
}

function followTheme() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", redrawAll);
  byId("theme").addEventListener("click", () => {
    const isDark = (document.documentElement.dataset.theme ?? (dark.matches ? "dark" : "light")) === "dark";
    document.documentElement.dataset.theme = isDark ? "light" : "dark";
    redrawAll();
  });
  let width = 0;
  new ResizeObserver(([{ contentRect }]) => {
    if (contentRect.width !== width) requestAnimationFrame(redrawAll);
    width = contentRect.width;
  }).observe(document.querySelector("main"));
}

/** Mark the section that is read in the list of sections. */
function followSections() {
  const links = new Map([...document.querySelectorAll("nav a")].map((link) => [link.hash.slice(1), link]));
  const observer = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      for (const [id, link] of links) {
        if (id === entry.target.id) link.setAttribute("aria-current", "true");
        else link.removeAttribute("aria-current");
      }
    }
  }, { rootMargin: "-30% 0px -65% 0px" });
  for (const node of [document.querySelector("header"), ...[...links.keys()].map(byId)]) observer.observe(node);
}

faded(document.querySelector("nav .inner"));
drawFacts();
drawTokens();
drawShapes();
drawParts();
drawRope();
drawCache();
drawAttention();
drawLens();
drawNext();
drawNotes();
followTheme();
followSections();
document.documentElement.dataset.ready = "";
