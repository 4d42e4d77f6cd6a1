"use strict";
// Shows the values where the pointer is. All texts are set as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const pointer = document.getElementById("pointer");

function show(event, lines) {
  pointer.replaceChildren(...lines.map(([text, style]) => {
    const line = document.createElement("div");
    if (style) {
      const swatch = document.createElement("span");
      swatch.className = `swatch ${style}`;
      line.append(swatch);
    }
    line.append(text);
    return line;
  }));
  pointer.hidden = false;
  const box = pointer.getBoundingClientRect();
  const right = event.clientX + 16, fits = right + box.width <= innerWidth;
  pointer.style.left = `${Math.max(4, fits ? right : event.clientX - box.width - 16)}px`;
  pointer.style.top = `${Math.max(4, Math.min(event.clientY + 12, innerHeight - box.height - 4))}px`;
}

function hide() {
  pointer.hidden = true;
  document.querySelectorAll(".cursor").forEach((line) => line.remove());
}

// Where the pointer is, in the coordinates of a picture.
function place(svg, event) {
  const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
  return [point.x, point.y];
}

function nearest(points, x) {
  let low = 0, high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < x) low = middle + 1; else high = middle;
  }
  return low > 0 && x - points[low - 1][0] < points[low][0] - x ? low - 1 : low;
}

function format(value, digits) {
  return value.toLocaleString("en-US", {minimumFractionDigits: digits, maximumFractionDigits: digits});
}

function drawCursor(svg, x, top, height) {
  svg.querySelectorAll(".cursor").forEach((line) => line.remove());
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  for (const [name, value] of Object.entries({class: "cursor", x1: x, x2: x, y1: top, y2: top + height})) {
    line.setAttribute(name, value);
  }
  svg.append(line);
}

for (const svg of document.querySelectorAll("svg.chart")) {
  const chart = data.charts[svg.id], isStep = chart.xTitle === "step";
  const [left, top, width, height] = chart.box, [low, high] = chart.x;
  const lines = chart.lines.filter((line) => line.points.length);
  svg.addEventListener("pointermove", (event) => {
    const at = low + (place(svg, event)[0] - left) / width * (high - low);
    const found = lines.map((line) => {
      const [x, y] = line.points[nearest(line.points, at)];
      return {x, y, line};
    });
    if (!found.length) return;
    const x = found.reduce((best, one) => Math.abs(one.x - at) < Math.abs(best.x - at) ? one : best).x;
    drawCursor(svg, left + (x - low) / (high - low) * width, top, height);
    const title = isStep ? `step ${format(x, 0)}` : `${format(x, 1)} ${chart.xTitle}`;
    show(event, [[title, ""], ...found.map((one) => {
      const where = isStep && one.x !== x ? ` (step ${format(one.x, 0)})` : "";
      return [`${one.line.name}: ${format(one.y, chart.digits)}${where}`, one.line.style.split(" ")[0]];
    })]);
  });
  svg.addEventListener("pointerleave", hide);
}

// The colors of a heat map say its loads, so these are read from the pixels.
const read = new Map();
function pixels(image) {
  const address = image.getAttribute("href");
  if (!read.has(address)) {
    read.set(address, new Promise((done) => {
      const picture = new Image();
      picture.onload = () => {
        const canvas = document.createElement("canvas");
        canvas.width = picture.naturalWidth;
        canvas.height = picture.naturalHeight;
        const context = canvas.getContext("2d", {willReadFrequently: true});
        context.drawImage(picture, 0, 0);
        done(context.getImageData(0, 0, canvas.width, canvas.height));
      };
      picture.src = address;
    }));
  }
  return read.get(address);
}

function paletteIndex(image, column, row) {
  const offset = 4 * (row * image.width + column);
  let best = 0, least = Infinity;
  data.palette.forEach((color, index) => {
    const distance = color.reduce((sum, value, channel) => sum + Math.abs(value - image.data[offset + channel]), 0);
    if (distance < least) { best = index; least = distance; }
  });
  return best;
}

function loadText(index) {
  const ratio = data.ratios[index];
  if (ratio === null) return "no value";
  if (ratio === 0) return "no tokens";
  return index === data.above ? `more than ${ratio} × ${data.reference}` : `${format(ratio, 2)} × ${data.reference}`;
}

// To protect against tracking, a browser may give other pixels than those of the image; then no load is shown.
async function readScale() {
  const scale = document.querySelector("svg.scale image");
  if (!scale) return false;
  const image = await pixels(scale);
  const columns = Array.from({length: image.width}, (_, column) => column);
  return columns.every((column) => Math.abs(paletteIndex(image, column, 0) - data.scale[column]) <= 1);
}

const pixelsAreTrue = readScale();
for (const svg of document.querySelectorAll("svg.map")) {
  const image = svg.querySelector("image"), {steps, single} = data.runs[svg.dataset.run];
  const [left, top, width, height] = ["x", "y", "width", "height"].map((name) => Number(image.getAttribute(name)));
  svg.addEventListener("pointermove", async (event) => {
    const [x, y] = place(svg, event), rows = Number(svg.dataset.rows);
    const column = Math.floor((x - left) / width * steps.length), row = Math.floor((y - top) / height * rows);
    if (column < 0 || column >= steps.length || row < 0 || row >= rows) { hide(); return; }
    const [known, found] = await Promise.all([pixelsAreTrue, pixels(image)]);
    const first = column ? steps[column - 1] + 1 : 1, last = steps[column];
    const when = single || first === last ? `step ${format(last, 0)}` : `steps ${format(first, 0)} to ${format(last, 0)}`;
    const load = known ? [[loadText(paletteIndex(found, column, row)), ""]] : [];
    show(event, [[`${svg.dataset.row} ${row}, ${when}`, ""], ...load]);
  });
  svg.addEventListener("pointerleave", hide);
}
addEventListener("scroll", hide, {passive: true});
