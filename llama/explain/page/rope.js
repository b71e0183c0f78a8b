// Section 4: how fast each pair turns, and its angle at each position.

const frequencies = data.rope.frequencies;
const unscaled = data.rope.unscaled;
const turn = 2 * Math.PI;
const ropeColumns = Math.max(64, Math.min(listed, 96)); // positions of the map
const turnAt = { position: 0 };

function drawRope() {
  byId("rope-scaling").textContent = model.use_scaled_rope
    ? `Llama 3.1 turns the slow pairs up to ${model.scale_factor} times slower still, so that longer texts fit.`
    : "This model does not scale them, as Llama 3.1 and later do.";
  const map = angleMap();
  const readout = make("p", { class: "readout" });
  const left = make("div", { class: "side" }, make("h3", {}, "Positions until a pair has turned once"), wavelengths());
  const ends = listed < ropeColumns ? make("span", { class: "soft" }, "The dashed line is the end of the prompt.") : null;
  const right = make("div", {}, make("h3", {}, "Cosine of the angle, by pair (down) and position"), map.canvas,
    make("div", { class: "row" }, make("span", { class: "scale cosine" }, "−1", make("i"), "1"), ends));
  right.className = "side";
  byId("rope-figure").append(make("div", { class: "columns" }, left, right), readout);
  redrawn(() => map.paint());
  follow(() => {
    if (turnAt.token !== state.token) Object.assign(turnAt, { token: state.token, position: state.token });
    const where = turnAt.position < ropeColumns ? "" : ` This position is not in the map, which has the first ${ropeColumns}.`;
    readout.textContent = angleInWords(state.pair, turnAt.position) + where;
    map.paint();
  });
}

function angleInWords(pair, position) {
  const angle = position * frequencies[pair];
  const plain = position * unscaled[pair];
  const words = `Pair ${pair} at position ${position}: ${angle.toPrecision(4)} rad, ${(angle / turn).toPrecision(3)} turns`;
  return model.use_scaled_rope ? `${words}; unscaled ${plain.toPrecision(4)} rad.` : `${words}.`;
}

function wavelengths() {
  const all = [...frequencies, ...unscaled].map((frequency) => turn / frequency);
  const top = 10 ** Math.ceil(Math.log10(Math.max(...all)));
  const powers = Array.from({ length: Math.log10(top) + 1 }, (_, i) => 10 ** i).filter((_, i, list) => list.length < 9 || i % 2 === 0);
  const pairs = frequencies.length;
  const x = { min: 0, max: Math.max(pairs - 1, 1), ticks: ticks(pairs - 1, 4), name: "pair", format: String };
  const y = { min: 1, max: top, ticks: powers, log: true, format: (n) => short(n) };
  const label = `Positions for one turn, from ${short(turn / frequencies[0])} for pair 0 to ${short(turn / frequencies[pairs - 1])} for the last`;
  const { root, X, Y, left, right } = chart(label, x, y, 280);
  const line = (values) => path(values.map((frequency, i) => [X(i), Y(turn / frequency)]));
  const context = 8192;
  if (context <= top) {
    root.append(draw("line", { class: "mark", x1: left, x2: right, y1: Y(context), y2: Y(context), "stroke-dasharray": "1 3" }),
      draw("text", { class: "strong", x: left + 6, y: Y(context) - 5 }, "8,192: the context of Llama 3"));
  }
  if (model.use_scaled_rope) {
    root.append(draw("path", { class: "line other", d: line(unscaled) }),
      draw("text", { class: "warm", x: right, y: Y(turn / unscaled[pairs - 1]) + 34, "text-anchor": "end" }, "unscaled"),
      draw("text", { class: "accent", x: right, y: Y(turn / frequencies[pairs - 1]) - 8, "text-anchor": "end" }, "scaled"));
  }
  root.append(draw("path", { class: "line", d: line(frequencies) }));
  const dot = draw("circle", { r: 4, class: "accent" });
  root.append(dot);
  follow(() => {
    dot.setAttribute("cx", X(state.pair));
    dot.setAttribute("cy", Y(turn / frequencies[state.pair]));
  });
  return root;
}

function angleMap() {
  const pairs = frequencies.length;
  return new CellMap({
    label: "Angles of the rotary embedding, pairs down, positions across",
    rows: pairs, columns: ropeColumns, width: 460,
    aspect: Math.max(0.5, Math.min(1.4, 256 / pairs / 7)),
    ticks: ticks(ropeColumns - 1, 6), end: listed,
    value: (row, column) => Math.cos(column * frequencies[row]),
    chosen: () => [state.pair, turnAt.position],
    choose: (row, column) => {
      const at = column < listed ? { token: column } : {};
      Object.assign(turnAt, { position: column, token: at.token ?? state.token });
      select({ pair: row, ...at });
    },
    words: (row, column) => angleInWords(row, column),
  });
}
