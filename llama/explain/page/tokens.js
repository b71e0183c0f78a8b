// Section 1: the prompt's tokens, coloured by surprise.

const HOT = 12; // bits at which the colour is full
const bitsOf = (position) => (data.logprobs[position] === null ? null : Math.max(0, -data.logprobs[position] / Math.LN2));

/** The surprise of a token in words. */
function surpriseOf(position) {
  const bits = bitsOf(position);
  if (bits === null) return "the first token, which nothing predicts";
  const p = percent(2 ** -bits);
  return `${bits.toFixed(2)} bits (p ${p.startsWith("<") ? p : `= ${p}`})`;
}

function drawTokens() {
  const special = new Set(data.special);
  const chips = data.ids.map((id, i) => {
    const chip = make("div", {
      class: `chip${special.has(i) ? " special" : ""}`, role: "option", tabindex: "-1",
      onclick: () => select({ token: i }),
    }, hide(token(id)), hide(make("small", {}, String(id))), forReaders(`${spoken(id)}, id ${id}, ${surpriseOf(i)}`));
    return heated(chip, (bitsOf(i) ?? 0) / HOT);
  });
  const list = make("div", { class: "chips", role: "listbox", "aria-label": "Tokens of the prompt" }, chips);
  rove(list, () => chips, (index) => select({ token: index }));
  const facts = make("dl", { class: "pairs" });
  const fact = (name, value) => make("div", {}, make("dt", {}, name), make("dd", {}, value));
  follow(() => {
    chips.forEach((chip, i) => {
      chip.setAttribute("aria-selected", i === state.token);
      chip.tabIndex = i === state.token ? 0 : -1;
    });
    const id = data.ids[state.token];
    const bytes = bytesOf(id);
    const more = sizeOf(id) > bytes.length ? ` … (${grouped(sizeOf(id))} bytes)` : "";
    facts.replaceChildren(
      fact("position", String(state.token)),
      fact("id", String(id)),
      fact("text", tokenAt(state.token, 40)),
      fact("bytes", make("code", {}, `${hex(bytes)}${more}`)),
      fact("surprise", surpriseOf(state.token)),
    );
  });
  const scale = make("span", { class: "scale" }, "0 bits", make("i"), `${HOT} bits or more`);
  byId("tokens-figure").append(faded(list), make("div", { class: "row" }, scale), facts, tokenTable());
}

function tokenTable() {
  const number = (content) => make("td", { class: "number" }, content);
  const rows = data.ids.map((id, i) => {
    const bits = bitsOf(i);
    return make("tr", {},
      number(String(i)), number(String(id)), make("td", {}, token(id, 40)), make("td", {}, make("code", {}, hex(bytesOf(id)))),
      number(bits === null ? "–" : data.logprobs[i].toFixed(3)), number(bits === null ? "–" : bits.toFixed(2)));
  });
  const heads = ["position", "id", "text", "bytes", "log p", "bits"];
  const head = make("tr", {}, heads.map((name, i) => make("th", { scope: "col", class: [0, 1, 4, 5].includes(i) ? "number" : null }, name)));
  return make("details", {}, make("summary", {}, "All tokens as a table"),
    faded(make("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of tokens" },
      make("table", {}, make("thead", {}, head), make("tbody", {}, rows)))));
}
