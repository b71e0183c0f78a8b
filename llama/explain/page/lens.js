// Section 7: the most probable next token after each layer, at each of the first positions.

const lens = data.lens;
const states = model.n_layers + 1;
const lensColumns = lens.tokens;
const lensAt = { layer: model.n_layers, column: lensColumns - 1 };

/** [[id, probability], ...] of a state and a column, the most probable first. */
function lensOf(layer, column) {
  const start = (layer * lensColumns + column) * lens.k;
  return Array.from({ length: lens.k }, (_, i) => [lens.ids[start + i], lens.probs[start + i]]);
}

const stateName = (layer) => (layer === 0 ? "embedding" : `layer ${layer - 1}`);

function drawLens() {
  const { table, cells } = lensTable(choose);
  const title = make("h3", {});
  const list = make("ul", { class: "bars" });

  function choose(layer, column) {
    Object.assign(lensAt, { layer, column });
    select({ token: column });
  }

  table.addEventListener("keydown", (event) => {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (!(event.key in steps)) return;
    event.preventDefault();
    const clamp = (value, last) => Math.max(0, Math.min(last, value));
    choose(clamp(lensAt.layer + steps[event.key][0], states - 1), clamp(lensAt.column + steps[event.key][1], lensColumns - 1));
    cells[lensAt.layer][lensAt.column].focus();
    announce(lensInWords());
  });
  byId("lens-figure").append(faded(make("div", { class: "scroll", id: "lens-scroll" }, table)), title, list);
  let marked = null;
  follow(() => {
    const known = state.token < lensColumns;
    if (known) lensAt.column = state.token;
    marked?.setAttribute("aria-selected", "false");
    if (marked) marked.tabIndex = -1;
    marked = cells[lensAt.layer][lensAt.column];
    marked.setAttribute("aria-selected", known);
    marked.tabIndex = 0;
    if (!known) {
      title.textContent = outside(state.token);
      list.replaceChildren();
      return;
    }
    title.replaceChildren(`After ${lensAt.layer === 0 ? "the embedding" : stateName(lensAt.layer)}, at position ${state.token} `, tokenAt(state.token, 16), ", next would be");
    list.replaceChildren(...lensOf(lensAt.layer, lensAt.column).map(([id, p]) => bar(token(id, 20), p, percent(p))));
  });
}

/** The table, and its cells by layer and position. `choose` is called with a layer and a position. */
function lensTable(choose) {
  const positions = Array.from({ length: lensColumns }, (_, column) => column);
  const cells = Array.from({ length: states }, (_, layer) => positions.map((column) => {
    const [[id, p]] = lensOf(layer, column);
    const attributes = { role: "gridcell", tabindex: "-1", title: percent(p), onclick: () => choose(layer, column) };
    return heated(make("td", attributes, token(id, 12)), p);
  }));
  const rows = cells.map((own, layer) => make("tr", { role: "row" }, make("th", { scope: "row" }, stateName(layer)), own));
  const head = positions.map((position) => make("th", { scope: "col" }, tokenAt(position, 12)));
  const label = "Most probable next token by layer (down) and position (across)";
  const table = make("table", { class: lensColumns > 10 ? "lens" : "lens roomy", role: "grid", "aria-label": label },
    make("thead", {}, make("tr", { role: "row" }, make("th", { scope: "col" }, "after"), head)), make("tbody", {}, rows));
  return { table, cells };
}

function lensInWords() {
  const [[id, p]] = lensOf(lensAt.layer, lensAt.column);
  return `${stateName(lensAt.layer)}, position ${lensAt.column}: ${spoken(id)}, ${percent(p)}`;
}
