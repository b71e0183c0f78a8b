// Section 6: attention of a layer and a head. The maps are integers of one or two bytes.

const maps = data.attention;
const pairsOfMap = (side * (side + 1)) / 2;
const weights = unpack(maps.data, maps.width);
const perGroup = model.n_heads / model.kv_heads;

function unpack(text, width) {
  const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  if (width === 1) return bytes;
  const view = new DataView(bytes.buffer);
  return Uint16Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true));
}

/** Weight of a key for a query; 0 for what is masked. `layer` counts the layers of this page. */
function weightOf(layer, head, query, key) {
  if (key > query) return 0;
  const start = (layer * model.n_heads + head) * pairsOfMap;
  return weights[start + (query * (query + 1)) / 2 + key] / (maps.width === 1 ? 255 : 65535);
}

/** A weight in words. What was rounded to 0 is not quite 0. */
function weightWords(weight) {
  if (maps.width === 2) return weight === 0 ? "< 0.01 %" : percent(weight);
  return weight === 0 ? "< 0.2 %" : `${(100 * weight).toFixed(1)} %`;
}

const looks = { query: side - 1, key: 0 };

function lookInWords(query, key) {
  const weight = weightWords(weightOf(state.layer, state.head, query, key));
  return `Position ${query}, ${spoken(data.ids[query])}, reads ${weight} from position ${key}, ${spoken(data.ids[key])}`;
}

function drawAttention() {
  state.layer = maps.layers.length >> 1;
  const names = maps.layers.map((layer, i) => make("option", { value: i, selected: i === state.layer }, String(layer)));
  const layer = make("select", { id: "layer", onchange: (event) => select({ layer: Number(event.target.value) }) }, names);
  const heads = headButtons();
  const map = new CellMap({
    label: "Attention, tokens that read down, tokens that are read across",
    rows: side, columns: side, width: 600, largest: 44,
    value: (row, column) => (column > row ? null : Math.sqrt(weightOf(state.layer, state.head, row, column))),
    lastColumn: (row) => row,
    rowName: (row) => shown(data.ids[row], 10),
    columnName: (column) => shown(data.ids[column], 10),
    chosen: () => [looks.query, looks.key],
    choose: (query, key) => {
      Object.assign(looks, { query, key });
      select({ token: query });
    },
    words: lookInWords,
  });
  const some = maps.layers.length < model.n_layers ? make("span", { class: "soft" }, `${maps.layers.length} of ${model.n_layers} layers are on this page`) : null;
  const controls = make("div", { class: "row" }, make("label", { for: "layer" }, "Layer ", layer), some,
    make("span", { class: "scale cool" }, "0", make("i"), "1"));
  const beside = make("div", { class: "side" });
  byId("attention-figure").append(controls, heads.node, make("div", { class: "beside" }, make("div", {}, map.canvas), beside));
  const showRow = rowOfWeights(beside);
  redrawn(() => map.paint());
  follow(() => {
    looks.query = state.token;
    looks.key = Math.min(looks.key, looks.query);
    showRow();
    heads.mark();
    map.paint();
  });
}

/** The largest weights of the query that is selected. Returns what shows them. */
function rowOfWeights(parent) {
  const title = make("h3", {});
  const list = make("ul", { class: "bars narrow" });
  const readout = make("p", { class: "readout", id: "attention-readout" });
  parent.append(title, list, readout);

  return () => {
    const { query, key } = looks;
    const place = `Layer ${maps.layers[state.layer]}, head ${state.head}`;
    if (query >= side) {
      title.textContent = place;
      list.replaceChildren();
      readout.textContent = outside(query);
      return;
    }
    const weight = (of) => weightOf(state.layer, state.head, query, of);
    const row = Array.from({ length: query + 1 }, (_, of) => [of, weight(of)]);
    row.sort((one, other) => other[1] - one[1]);
    title.replaceChildren(`${place}: what `, tokenAt(query, 16), ` at ${query} reads`);
    list.replaceChildren(...row.slice(0, 8).map(([of, share]) => {
      const name = make("span", {}, make("span", { class: "soft" }, `${of} `), tokenAt(of, 14));
      return bar(name, share, weightWords(share));
    }));
    readout.replaceChildren(`Position ${query} `, tokenAt(query, 16), ` reads ${weightWords(weight(key))} from position ${key} `, tokenAt(key, 16), ".");
  };
}

/** A head in whole pixels. In a small map of many tokens, a pixel is the largest of several weights. */
function paintHead(canvas, head) {
  const size = Math.max(28, Math.min(48, Math.floor(900 / model.n_heads)));
  const step = Math.ceil(side / size);
  const cells = Math.ceil(side / step);
  canvas.width = canvas.height = cells;
  canvas.style.width = canvas.style.height = `${cells * Math.max(1, Math.round(size / cells))}px`;
  const largest = new Float32Array(cells * cells);
  for (let query = 0; query < side; query++) {
    for (let key = 0; key <= query; key++) {
      const at = Math.floor(query / step) * cells + Math.floor(key / step);
      largest[at] = Math.max(largest[at], weightOf(state.layer, head, query, key));
    }
  }
  const context = canvas.getContext("2d");
  context.fillStyle = colour(canvas, "accent");
  largest.forEach((weight, at) => {
    context.globalAlpha = Math.sqrt(weight);
    context.fillRect(at % cells, Math.floor(at / cells), 1, 1);
  });
}

/** A small map of every head of the layer, grouped by the KV head that they read. */
function headButtons() {
  const buttons = Array.from({ length: model.n_heads }, (_, head) =>
    make("button", { type: "button", class: "head", role: "radio", onclick: () => select({ head }) },
      make("canvas", { "aria-hidden": "true" }), `${head}`));
  const group = (kv) => make("div", { class: "group" },
    perGroup > 1 ? make("span", {}, `KV head ${kv}`) : null, make("div", {}, buttons.slice(kv * perGroup, (kv + 1) * perGroup)));
  const node = make("div", { class: "groups", role: "radiogroup", "aria-label": "Head" },
    Array.from({ length: model.kv_heads }, (_, kv) => group(kv)));
  rove(node, () => buttons, (head) => select({ head }));
  let painted = -1;

  function paint() {
    buttons.forEach((button, head) => paintHead(button.firstChild, head));
    painted = state.layer;
  }

  function mark() {
    if (painted !== state.layer) paint();
    buttons.forEach((button, head) => {
      const kv = Math.floor(head / perGroup);
      button.setAttribute("aria-checked", head === state.head);
      button.setAttribute("aria-label", perGroup > 1 ? `Head ${head}, KV head ${kv}` : `Head ${head}`);
      button.tabIndex = head === state.head ? 0 : -1;
    });
  }

  watched.add(paint);
  return { node, mark };
}
