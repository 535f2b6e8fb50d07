// The matrix of a layer on a canvas: slider, order, hover, zoom. Rows and columns are experts.
const viewer = report.viewer;
const canvas = byId("matrix");
const pen = canvas && canvas.getContext("2d");
const MARGIN = { left: 92, bottom: 76, edge: 6 };
const MOST_LABELS = 24;
const LEVELS = 256;
const shades = report.viewer && shadesOf(report.scale);
const cells = document.createElement("canvas");
// What is seen: the layer, its matrix, the order of experts, the window [from, to) of both axes, the cell pointed at.
const seen = { layer: null, matrix: null, order: [], x: [0, 0], y: [0, 0], at: null, drag: null };
let latest = 0;

function shadesOf(scale) {
  const parts = (hex) => [1, 3, 5].map((from) => parseInt(hex.slice(from, from + 2), 16));
  return Array.from({ length: LEVELS }, (_, level) => {
    const place = (level / (LEVELS - 1)) * (scale.length - 1);
    const low = Math.min(Math.floor(place), scale.length - 2);
    const [a, b] = [parts(scale[low][1]), parts(scale[low + 1][1])];
    return [...a.map((value, part) => Math.round(value + (b[part] - value) * (place - low))), 255];
  });
}

// Numbers of the upper triangle, deflated; `top` is the value of the largest number.
async function unpack(packed, size) {
  const bytes = Uint8Array.from(atob(packed.data), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const raw = await new Response(stream).arrayBuffer();
  const numbers = packed.bits === 16 ? new Uint16Array(raw) : new Uint8Array(raw);
  const unit = packed.top / (2 ** packed.bits - 1);
  const rows = Array.from({ length: size }, () => new Float32Array(size));
  let place = 0;
  for (let a = 0; a < size; a++) {
    for (let b = a + 1; b < size; b++) rows[a][b] = rows[b][a] = numbers[place++] * unit;
  }
  return rows;
}

function orderOf(layer) {
  const numbers = viewer.names.map((_, number) => number);
  const slot = (number) => number % viewer.slots;
  const order = byId("order").value;
  if (order === "slot") return numbers.sort((a, b) => slot(a) - slot(b) || a - b);
  if (order === "pool") return numbers.sort((a, b) => layer.pool[a] - layer.pool[b] || a - b);
  return numbers;
}

function topOf(layer, distance) {
  const narrow = byId("range").value === "siblings" && viewer.siblings[distance] > 0;
  return narrow ? viewer.siblings[distance] : layer.maps[distance].top || 1;
}

async function showLayer() {
  const turn = ++latest;
  const place = Number(byId("slider").value);
  const layer = viewer.layers[place];
  const distance = byId("distance").value;
  byId("slider-value").textContent = layer.index;
  byId("slider").setAttribute("aria-valuetext", `layer ${layer.index}`);
  const matrix = await unpack(layer.maps[distance], viewer.names.length);
  if (turn !== latest) return;
  Object.assign(seen, { layer, matrix, order: orderOf(layer), top: topOf(layer, distance) });
  byId("range-top").textContent = `${seen.top.toPrecision(3)}${byId("range").value === "siblings" ? " and more" : ""}`;
  document.querySelectorAll(".pictures li").forEach((item, number) => item.classList.toggle("chosen", number === place));
  fillCells();
  paint();
  if (seen.at) tell();
  canvas.dataset.layer = layer.index;
}

// One pixel for each cell that is seen.
function fillCells() {
  const [columns, rows] = [seen.x[1] - seen.x[0], seen.y[1] - seen.y[0]];
  cells.width = columns;
  cells.height = rows;
  const image = new ImageData(columns, rows);
  for (let row = 0; row < rows; row++) {
    const values = seen.matrix[seen.order[seen.y[0] + row]];
    for (let column = 0; column < columns; column++) {
      const value = values[seen.order[seen.x[0] + column]];
      const level = Math.min(LEVELS - 1, Math.round((value / seen.top) * (LEVELS - 1)));
      image.data.set(shades[level], 4 * (row * columns + column));
    }
  }
  cells.getContext("2d").putImageData(image, 0, 0);
}

function paint() {
  const ratio = devicePixelRatio || 1;
  const side = canvas.clientWidth;
  canvas.width = side * ratio;
  canvas.height = side * ratio;
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, side, side);
  const box = area();
  pen.imageSmoothingEnabled = false;
  pen.drawImage(cells, box.left, box.top, box.width, box.height);
  labels(box, seen.x[1] - seen.x[0], seen.y[1] - seen.y[0]);
  if (seen.drag) frame(seen.drag, colour("--accent"));
  else if (seen.at) frame({ x: [seen.at.x, seen.at.x], y: [seen.at.y, seen.at.y] }, "#ff3b30");
}

function area() {
  const side = canvas.clientWidth;
  return {
    left: MARGIN.left, top: MARGIN.edge,
    width: side - MARGIN.left - MARGIN.edge, height: side - MARGIN.bottom - MARGIN.edge,
  };
}

function labels(box, columns, rows) {
  pen.fillStyle = colour("--ink");
  pen.font = "11px system-ui, sans-serif";
  pen.textBaseline = "middle";
  pen.textAlign = "right";
  const name = (place) => viewer.names[seen.order[place]];
  const short = (text) => (text.length > 14 ? `${text.slice(0, 4)}…${text.slice(-8)}` : text);
  for (let row = 0; row < rows; row += Math.ceil(rows / MOST_LABELS)) {
    pen.fillText(short(name(seen.y[0] + row)), box.left - 5, box.top + ((row + 0.5) / rows) * box.height);
  }
  for (let column = 0; column < columns; column += Math.ceil(columns / MOST_LABELS)) {
    pen.save();
    pen.translate(box.left + ((column + 0.5) / columns) * box.width, box.top + box.height + 5);
    pen.rotate(-Math.PI / 2);
    pen.fillText(short(name(seen.x[0] + column)), 0, 0);
    pen.restore();
  }
}

function frame(window, style) {
  const box = area();
  const [wide, high] = [box.width / (seen.x[1] - seen.x[0]), box.height / (seen.y[1] - seen.y[0])];
  const [left, right] = [Math.min(...window.x), Math.max(...window.x)];
  const [top, bottom] = [Math.min(...window.y), Math.max(...window.y)];
  pen.strokeStyle = style;
  pen.lineWidth = 2;
  pen.strokeRect(
    box.left + (left - seen.x[0]) * wide, box.top + (top - seen.y[0]) * high,
    (right - left + 1) * wide, (bottom - top + 1) * high,
  );
}

function cellAt(event) {
  const box = area();
  const place = (offset, start, length, [from, to]) =>
    Math.max(from, Math.min(to - 1, from + Math.floor(((offset - start) / length) * (to - from))));
  return {
    x: place(event.offsetX, box.left, box.width, seen.x),
    y: place(event.offsetY, box.top, box.height, seen.y),
  };
}

function tell() {
  const [a, b] = [seen.order[seen.at.y], seen.order[seen.at.x]];
  const pool = seen.layer.pool;
  const together = pool && pool[a] === pool[b];
  const shared = !pool || a === b ? "" : together ? `; both stand on pool expert ${pool[a]}` : "; not shared";
  const value = seen.matrix[a][b].toPrecision(4);
  byId("readout").textContent =
    `Layer ${seen.layer.index}: ${viewer.names[a]} and ${viewer.names[b]} are ${value} apart${shared}.`;
}

function pointAt(cell) {
  seen.at = cell;
  tell();
  paint();
}

function zoomTo(x, y) {
  Object.assign(seen, { x, y, drag: null });
  fillCells();
  paint();
}

function zoomOut() {
  zoomTo([0, viewer.names.length], [0, viewer.names.length]);
}

// Half of what is seen, around the cell pointed at.
function zoomIn() {
  const around = ([from, to], at) => {
    const length = Math.max(2, Math.ceil((to - from) / 2));
    const start = Math.max(from, Math.min(to - length, at - Math.floor(length / 2)));
    return [start, start + length];
  };
  zoomTo(around(seen.x, seen.at.x), around(seen.y, seen.at.y));
}

const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

function onKey(event) {
  const at = seen.at || { x: seen.x[0], y: seen.y[0] };
  if (KEYS[event.key]) {
    const inside = (value, [from, to]) => Math.max(from, Math.min(to - 1, value));
    const [right, down] = KEYS[event.key];
    pointAt({ x: inside(at.x + right, seen.x), y: inside(at.y + down, seen.y) });
  } else if (event.key === "+") {
    seen.at = at;
    zoomIn();
  } else if (event.key === "-" || event.key === "Escape") {
    zoomOut();
  } else {
    return;
  }
  event.preventDefault();
}

function listen() {
  canvas.addEventListener("pointerdown", (event) => {
    const cell = cellAt(event);
    if (event.pointerType === "mouse") seen.drag = { x: [cell.x, cell.x], y: [cell.y, cell.y] };
    else pointAt(cell);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!seen.matrix) return;
    const cell = cellAt(event);
    if (seen.drag) seen.drag = { x: [seen.drag.x[0], cell.x], y: [seen.drag.y[0], cell.y] };
    pointAt(cell);
  });
  addEventListener("pointerup", () => {
    if (!seen.drag) return;
    const [x, y] = [seen.drag.x, seen.drag.y].map((pair) => [Math.min(...pair), Math.max(...pair) + 1]);
    seen.drag = null;
    if (x[1] - x[0] > 1 && y[1] - y[0] > 1) zoomTo(x, y);
  });
  canvas.addEventListener("dblclick", zoomOut);
  canvas.addEventListener("keydown", onKey);
  for (const id of ["slider", "distance", "order", "range"]) byId(id).addEventListener("input", showLayer);
  new ResizeObserver(() => seen.matrix && paint()).observe(canvas);
}

// The small pictures choose their layer.
function makeButtons() {
  document.querySelectorAll(".pictures li").forEach((item, number) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(item.querySelector("img"));
    item.querySelector("figure").prepend(button);
    button.addEventListener("click", () => {
      byId("slider").value = number;
      showLayer();
      byId("layer").scrollIntoView({ behavior: isCalm ? "auto" : "smooth" });
    });
  });
}

async function startViewer() {
  byId("viewer").hidden = false;
  for (const name of viewer.distances) byId("distance").add(new Option(name, name));
  seen.x = seen.y = [0, viewer.names.length];
  listen();
  makeButtons();
  repaints.set("viewer", paint);
  await showLayer();
}
