// Sections 2 and 3: the stages in order, with their shapes; what each of them costs.

const stages = data.stages.map(([name, module, shape, count, parameters, bytes, operations, storage]) => ({
  name, module, shape, count, parameters, bytes, operations, storage,
}));
// What the stream gets after these modules.
const ADDED = { "Attention.wo": "+ added to the stream", "FeedForward.w2": "+ added to the stream" };

function stageItem(stage) {
  const item = make("li", { class: "stage" },
    make("b", {}, stage.name), make("span", { class: "shape" }, stage.shape.map(grouped).join(" × ")),
    make("code", {}, stage.module), make("small", {}, stage.storage));
  const added = ADDED[stage.module];
  return added ? [item, make("li", { class: "adds" }, added)] : [item];
}

function drawShapes() {
  const first = stages.findIndex((stage) => inLayer(stage));
  const last = stages.findLastIndex((stage) => inLayer(stage));
  const layer = make("li", { class: "layer" },
    make("h3", {}, model.n_layers === 1 ? "the layer" : `each of ${model.n_layers} layers`),
    make("ol", { class: "flow" }, stages.slice(first, last + 1).flatMap(stageItem)));
  byId("shapes-figure").append(
    make("ol", { class: "flow" }, stages.slice(0, first).flatMap(stageItem), layer, stages.slice(last + 1).flatMap(stageItem)),
    make("p", { class: "soft" }, `Shapes are tokens × numbers, or tokens × heads × numbers. This prompt has ${counted(data.tokens.count, "token")}.`));
}

const inLayer = ({ module }) => !module.startsWith("Transformer.");

function drawParts() {
  const kinds = [["Parameters", "parameters", ""], ["Bytes", "bytes", "B"], ["Operations", "operations", ""]];
  const list = make("ul", { class: "bars" });
  const sum = make("p", { class: "readout" });
  const show = (index) => {
    const [, key, unit] = kinds[index];
    const total = stages.reduce((found, stage) => found + stage[key], 0);
    const largest = Math.max(...stages.map((stage) => stage[key]), 1);
    const weighty = stages.filter((stage) => stage[key] > 0);
    list.replaceChildren(...weighty.map((stage) => {
      const name = stage.count > 1 ? `${stage.name} × ${stage.count}` : stage.name;
      const share = stage[key] / total;
      const label = share < 0.001 ? "< 0.1 %" : `${(100 * share).toFixed(1)} %`;
      return bar(name, stage[key] / largest, `${short(stage[key], unit)} · ${label}`);
    }));
    sum.textContent = `Together ${grouped(total)}${unit ? " bytes" : ` ${key}`}${index === 2 ? ` for ${counted(data.tokens.count, "token")}` : ""}.`;
  };
  byId("parts-figure").append(segments("Measure", kinds.map(([name]) => name), show), list, sum);
  show(0);
}
