// Section 8: the distribution of the next token at each step of sampling.

function cutBy([, raw, tempered, limited, final]) {
  if (final > 0) return "";
  if (data.next.sampling.temperature < 1e-6) return "not the most probable";
  if (raw === 0) return "unused id";
  if (tempered === 0) return "no chance at this temperature";
  if (limited > 0) return "cut by top-p";
  const { top_k: k, min_p: p } = data.next.sampling;
  return `cut by ${[k > 0 ? "top-k" : "", p > 0 ? "min-p" : ""].filter(Boolean).join(" or ")}`;
}

function drawNext() {
  const { sampling, rows, left } = data.next;
  const columns = ["model", "tempered", "drawn"];
  const picks = [1, 2, 4];
  const largest = Math.max(...rows.map((row) => Math.max(row[1], row[2], row[4])), 1e-9);
  const cell = (p, words) => [
    make("td", { class: "wide" }, track(p / largest)),
    make("td", { class: words ? "number cut" : "number" }, words || percent(p)),
  ];
  const body = rows.map((row) => {
    const cut = cutBy(row);
    return make("tr", { class: cut ? "gone" : null },
      make("th", { scope: "row" }, token(row[0], 24)),
      picks.flatMap((pick) => cell(row[pick], pick === 4 ? cut : "")));
  });
  const head = make("tr", {}, make("th", { scope: "col" }, "token"),
    columns.flatMap((name) => [make("td", { class: "wide" }), make("th", { scope: "col", class: "number" }, name)]));
  const { temperature, top_k: k, min_p: least, top_p: mass } = sampling;
  const many = (count) => counted(count, "token");
  const limits = [...(k > 0 ? [`top-k ${k}`] : []), ...(least > 0 ? [`min-p ${least}`] : [])];
  const steps = [
    `temperature ${temperature}: ${many(left[1])}`,
    ...(limits.length ? [`${limits.join(" and ")}: ${many(left[2])}`] : []),
    `top-p ${mass}: ${many(left[3])}`,
  ];
  const settings = `Settings: temperature ${temperature}, top-k ${k || "0 (no limit)"}, min-p ${least || "0 (no limit)"}, top-p ${mass}.`;
  const summary = temperature < 1e-6
    ? "Temperature 0 always takes the most probable token."
    : `Of ${many(left[0])} with a chance, ${left[3] === 1 ? "one is" : `${grouped(left[3])} are`} left to draw from.`;
  byId("next-figure").append(
    make("p", { class: "soft", id: "sampling" }, settings),
    make("p", { class: "readout" }, summary, make("span", { class: "soft" }, `  ${steps.join(" → ")}`)),
    faded(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Next tokens" },
      make("table", { class: "next" },
        make("caption", {}, `The ${rows.length} most probable tokens after `, token(data.next.after, 24)),
        make("thead", {}, head), make("tbody", {}, body)))));
}
