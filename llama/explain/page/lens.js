// Section 7: the most probable next token after each layer, at each position.

const lens = data.lens;
const states = model.n_layers + 1;
const lensColumns = lens.ids.length / states / lens.k;
const lensAt = { layer: model.n_layers, column: lensColumns - 1 };

/** [[id, probability], ...] of a state and a column, the most probable first. */
function lensOf(layer, column) {
  const start = (layer * lensColumns + column) * lens.k;
  return Array.from({ length: lens.k }, (_, i) => [lens.ids[start + i], lens.probs[start + i]]);
}

const stateName = (layer) => (layer === 0 ? "embedding" : `layer ${layer - 1}`);

function drawLens() {
  const positions = Array.from({ length: lensColumns }, (_, column) => lens.first + column);
  const cells = [];
  const rows = Array.from({ length: states }, (_, layer) => {
    const own = positions.map((position, column) => {
      const [[id, p]] = lensOf(layer, column);
      const cell = make("td", {
        role: "gridcell", tabindex: "-1", title: `${percent(p)}`,
        onclick: () => choose(layer, column),
      }, token(id, 12));
      return heated(cell, p);
    });
    cells.push(own);
    return make("tr", { role: "row" }, make("th", { scope: "row" }, stateName(layer)), own);
  });
  const head = positions.map((position) => make("th", { scope: "col" }, position < listed ? tokenAt(position, 12) : String(position)));
  const table = make("table", { class: "lens", role: "grid", "aria-label": "Most probable next token by layer (down) and position (across)" },
    make("thead", {}, make("tr", { role: "row" }, make("th", { scope: "col" }, "after"), head)), make("tbody", {}, rows));
  const title = make("h3", {});
  const list = make("ul", { class: "bars" });

  function choose(layer, column) {
    Object.assign(lensAt, { layer, column });
    const position = lens.first + column;
    select(position < listed ? { token: position } : {});
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
  const frame = make("div", { class: "scroll", id: "lens-scroll" }, table);
  byId("lens-figure").append(frame, title, list);
  frame.scrollTo(frame.scrollWidth, frame.scrollHeight);
  let marked = null;
  follow(() => {
    const column = state.token - lens.first;
    if (column >= 0 && column < lensColumns) lensAt.column = column;
    marked?.setAttribute("aria-selected", "false");
    if (marked) marked.tabIndex = -1;
    marked = cells[lensAt.layer][lensAt.column];
    marked.setAttribute("aria-selected", "true");
    marked.tabIndex = 0;
    const position = lens.first + lensAt.column;
    title.replaceChildren(`After ${lensAt.layer === 0 ? "the embedding" : stateName(lensAt.layer)}, at position ${position} `,
      ...(position < listed ? [tokenAt(position, 16)] : []), ", next would be");
    list.replaceChildren(...lensOf(lensAt.layer, lensAt.column).map(([id, p]) => bar(token(id, 20), p, percent(p))));
  });
}

function lensInWords() {
  const [[id, p]] = lensOf(lensAt.layer, lensAt.column);
  return `${stateName(lensAt.layer)}, position ${lens.first + lensAt.column}: ${spoken(id)}, ${percent(p)}`;
}
