// Drawings that sections share: axes of a chart in SVG, and a map of cells on a canvas.

const WIDTH = 460;
const ROOM = { left: 52, right: 14, top: 12, bottom: 34 };

/** Scales and axes of a chart. x and y are {min, max, ticks, name, format}; y may be log. */
function chart(label, x, y, height = 240) {
  const { left, right, top, bottom } = ROOM;
  const right_ = WIDTH - right;
  const low = height - bottom;
  const value = y.log ? Math.log10 : (number) => number;
  const X = (number) => left + ((number - x.min) / (x.max - x.min || 1)) * (right_ - left);
  const Y = (number) => low - ((value(number) - value(y.min)) / (value(y.max) - value(y.min) || 1)) * (low - top);
  const root = draw("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label });
  for (const tick of y.ticks) {
    root.append(
      draw("line", { class: "grid", x1: left, x2: right_, y1: Y(tick), y2: Y(tick) }),
      draw("text", { x: left - 8, y: Y(tick) + 4, "text-anchor": "end" }, y.format(tick)),
    );
  }
  for (const tick of x.ticks) {
    root.append(draw("text", { x: X(tick), y: low + 16, "text-anchor": "middle" }, x.format(tick)));
  }
  root.append(draw("text", { x: (left + right_) / 2, y: height - 3, "text-anchor": "middle" }, x.name));
  return { root, X, Y, left, right: right_, top, low };
}

const path = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");

/** About `count` round numbers from 0 to `max`. */
function ticks(max, count = 5) {
  const rough = Math.max(max, 1e-9) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((n) => n * power).find((size) => size >= rough);
  return Array.from({ length: Math.floor(max / step + 1e-9) + 1 }, (_, i) => i * step);
}

const watched = new Set();

/** Draw now, and again when the theme or the width changes. */
function redrawn(paint) {
  watched.add(paint);
  paint();
}

function redrawAll() {
  for (const paint of watched) paint();
}

const colour = (node, name) => {
  node.style.color = `var(--${name})`;
  const found = getComputedStyle(node).color;
  node.style.color = "";
  return found;
};

/**
 * A map of cells, by mouse, touch and arrow keys: its canvas, and paint().
 *
 * options: label; rows, columns; value(row, column) from -1 to 1, or null for no cell;
 * rowName(row), columnName(column), or none; chosen() gives [row, column]; choose(row, column);
 * words(row, column) for screen readers; aspect: height of a cell over its width; largest: its width
 * at most; ticks: columns with a number below; end: a line before this column.
 */
class CellMap {
  constructor(options) {
    this.options = options;
    this.canvas = make("canvas", {
      class: "big", tabindex: "0", role: "application", "aria-roledescription": "map",
      "aria-label": `${options.label}. Arrow keys move.`,
      onpointermove: (event) => this.point(event),
      onpointerdown: (event) => this.point(event),
      onkeydown: (event) => this.press(event),
    });
  }

  /** Set the size of cells and the room for names. */
  layOut() {
    const { rows, columns, width = 640, largest = 26, aspect = 1 } = this.options;
    const room = Math.max(160, Math.min(width, this.canvas.parentElement?.clientWidth || 640));
    const named = this.options.rowName && rows <= 64;
    this.left = named ? 84 : 0;
    this.top = this.options.columnName && columns <= 64 ? 84 : 0;
    this.size = Math.max(2, Math.min(largest, Math.floor((room - this.left - 2) / columns)));
    if (named && this.size < 9) {
      this.left = this.top = 0;
      this.size = Math.max(2, Math.min(26, Math.floor((room - 2) / columns)));
    }
    this.tall = Math.max(2, Math.round(this.size * aspect));
  }

  paint() {
    this.layOut();
    const { canvas, left, top, size, tall } = this;
    const { rows, columns } = this.options;
    const wide = left + size * columns + 2;
    const high = top + tall * rows + (this.options.ticks ? 20 : 2);
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.round(wide * ratio);
    canvas.height = Math.round(high * ratio);
    canvas.style.width = `${wide}px`;
    canvas.style.height = `${high}px`;
    const context = canvas.getContext("2d");
    context.scale(ratio, ratio);
    context.direction = "ltr";
    this.paintCells(context);
    this.paintNames(context);
    this.paintTicks(context);
  }

  paintCells(context) {
    const { canvas, left, top, size, tall } = this;
    const { rows, columns, value, chosen } = this.options;
    const [hot, cold, panel] = ["accent", "warm", "panel"].map((name) => colour(canvas, name));
    const gap = size >= 8 ? 1 : 0;
    for (let row = 0; row < rows; row++) {
      for (let column = 0; column < columns; column++) {
        const weight = value(row, column);
        if (weight === null) continue;
        const box = [left + column * size, top + row * tall, size - gap, tall - gap];
        context.globalAlpha = 1;
        context.fillStyle = panel;
        context.fillRect(...box);
        context.globalAlpha = Math.min(1, Math.abs(weight));
        context.fillStyle = weight < 0 ? cold : hot;
        context.fillRect(...box);
      }
    }
    context.globalAlpha = 1;
    const [atRow, atColumn] = chosen();
    if (atRow >= rows || atColumn >= columns) return;
    context.strokeStyle = cold;
    context.lineWidth = 2;
    context.strokeRect(left + atColumn * size - 0.5, top + atRow * tall - 0.5, size, tall);
  }

  paintNames(context) {
    const { canvas, left, top, size, tall } = this;
    const { rows, columns, rowName, columnName, chosen } = this.options;
    const [soft, ink] = ["soft", "ink"].map((name) => colour(canvas, name));
    const [atRow, atColumn] = chosen();
    context.font = `${Math.min(12, Math.max(9, size - 2))}px ui-monospace, Menlo, Consolas, monospace`;
    context.textBaseline = "middle";
    context.textAlign = "right";
    for (let row = 0; left && row < rows; row++) {
      context.fillStyle = row === atRow ? ink : soft;
      context.fillText(rowName(row), left - 6, top + (row + 0.5) * tall);
    }
    context.textAlign = "left";
    for (let column = 0; top && column < columns; column++) {
      context.save();
      context.translate(left + (column + 0.5) * size, top - 6);
      context.rotate(-Math.PI / 2);
      context.fillStyle = column === atColumn ? ink : soft;
      context.fillText(columnName(column), 0, 0);
      context.restore();
    }
  }

  /** Numbers of columns below the cells, and a dashed line. */
  paintTicks(context) {
    const { canvas, left, top, size, tall } = this;
    const { rows, columns, ticks: marks = [], end = columns } = this.options;
    const low = top + tall * rows;
    context.fillStyle = colour(canvas, "soft");
    context.font = "11px ui-sans-serif, system-ui, sans-serif";
    context.textBaseline = "top";
    for (const column of marks) {
      context.textAlign = column === 0 ? "left" : "center";
      context.fillText(column, left + (column === 0 ? 0 : column + 0.5) * size, low + 5);
    }
    if (end >= columns) return;
    context.strokeStyle = colour(canvas, "ink");
    context.lineWidth = 1.5;
    context.setLineDash([4, 3]);
    context.beginPath();
    context.moveTo(left + end * size - 0.5, top);
    context.lineTo(left + end * size - 0.5, low + 3);
    context.stroke();
    context.setLineDash([]);
  }

  move(row, column) {
    const { rows, columns, value, choose, words } = this.options;
    const to = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
    if (value(...to) === null) return;
    choose(...to);
    announce(words(...to));
  }

  point(event) {
    const { rows, columns, value, chosen, choose } = this.options;
    const box = this.canvas.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left - this.left) / this.size);
    const row = Math.floor((event.clientY - box.top - this.top) / this.tall);
    const [atRow, atColumn] = chosen();
    const inside = row >= 0 && row < rows && column >= 0 && column < columns;
    const moved = row !== atRow || column !== atColumn;
    if (inside && moved && value(row, column) !== null) choose(row, column);
  }

  press(event) {
    const { columns, chosen, lastColumn } = this.options;
    const [row, column] = chosen();
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const places = { Home: [row, 0], End: [row, Math.min(columns - 1, lastColumn?.(row) ?? columns - 1)] };
    if (event.key in steps) this.move(row + steps[event.key][0], column + steps[event.key][1]);
    else if (event.key in places) this.move(...places[event.key]);
    else return;
    event.preventDefault();
  }
}
