// Section 5: bytes of the cache by position, and what shared heads save.

function drawCache() {
  const { position: each, ungrouped } = data.cache;
  const times = model.n_heads / model.kv_heads;
  byId("cache-groups").textContent = times > 1
    ? `Here ${model.n_heads} query heads share ${model.kv_heads} heads of keys and values (grouped-query attention), so it has 1 / ${times} of the size.`
    : "In this model every query head has keys and values of its own.";
  const T = data.tokens.count;
  const x = { min: 0, max: T, ticks: ticks(T, 6).filter(Number.isInteger), name: "tokens in the cache", format: grouped };
  const y = { min: 0, max: ungrouped * T, ticks: ticks(ungrouped * T, 5), format: (n) => short(n, "B") };
  const label = `The cache grows to ${short(each * T, "B")}, and would to ${short(ungrouped * T, "B")} without shared heads`;
  const { root, X, Y, low, left } = chart(label, x, y, 250);
  const steps = (size) => {
    const points = [[X(0), low]];
    for (let i = 0; i < T; i++) points.push([X(i), Y(size * (i + 1))], [X(i + 1), Y(size * (i + 1))]);
    return `${path([...points, [X(T), low]])}Z`;
  };
  if (times > 1) root.append(draw("path", { class: "pale", d: steps(ungrouped) }));
  root.append(draw("path", { class: "area", d: steps(each) }));
  if (times > 1) {
    root.append(draw("text", { class: "warm", x: left + 10, y: 26 }, "if each query head had its own"),
      draw("text", { class: "accent", x: left + 10, y: 42 }, "as it is"));
  }
  const mark = draw("line", { class: "mark", y1: 12, y2: low });
  root.append(mark);
  const readout = make("p", { class: "readout" });
  const slider = make("input", {
    type: "range", min: 0, max: listed - 1, "aria-label": "Position",
    oninput: (event) => select({ token: Number(event.target.value) }),
  });
  follow(() => {
    slider.value = state.token;
    const filled = state.token + 1;
    mark.setAttribute("x1", X(filled));
    mark.setAttribute("x2", X(filled));
    const saved = times > 1 ? `, and ${short(ungrouped * filled, "B")} without shared heads` : "";
    readout.textContent = `After ${counted(filled, "token")}: ${short(each * filled, "B")}${saved}. Each token adds ${grouped(each)} bytes.`;
    slider.setAttribute("aria-valuetext", readout.textContent);
  });
  const strip = Array.from({ length: model.kv_heads }, () => make("span", {}, Array.from({ length: times }, () => make("i"))));
  const aside = make("div", { class: "side" },
    make("h3", {}, times > 1 ? `Query heads by the KV head that they share` : "Heads"),
    make("div", { class: "strip", role: "img", "aria-label": `${model.kv_heads} groups of ${times}` }, strip),
    make("p", { class: "soft" }, `8,192 tokens, the context of Llama 3, take ${short(each * 8192, "B")}; the 131,072 of Llama 3.1 take ${short(each * 131072, "B")}.`),
    make("label", { class: "slider" }, "Position ", slider), readout);
  byId("cache-figure").append(make("div", { class: "columns" }, make("div", {}, root), aside));
}
