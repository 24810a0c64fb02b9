// The picture of a plan: a row a block, a bar a layer, as wide as its bytes and coloured by its method, say.
// One stop of the Tab key; the arrows go from layer to layer.

import { byId, h } from "./dom.js";
import { bytes, percent } from "./format.js";
import { detailsOf } from "./layer_details.js";
import { ASPECTS, blocksOfPlan, groupsOf, widthOf } from "./plan_groups.js";

let plan = null;
let aspect = "method";
let choose = () => {};
let cells = []; // of each row

/** Listen to mouse and keyboard. chosen: called with a layer that was clicked. */
export function startPicture(chosen) {
  choose = chosen;
  const picture = byId("picture");
  picture.addEventListener("keydown", move);
  for (const kind of ["focusin", "pointerover"]) picture.addEventListener(kind, (event) => show(event.target));
  picture.addEventListener("click", (event) => event.target.layer && choose(event.target.layer));
}

/** Show the picture of this plan. */
export function showPicture(shown) {
  plan = shown;
  const buttons = Object.entries(ASPECTS).map(([name, { title }]) =>
    h("button", { type: "button", "aria-pressed": String(name === aspect), onclick: () => colourBy(name) }, title));
  byId("colour-by").replaceChildren(...buttons);
  draw();
}

function colourBy(name) {
  aspect = name;
  for (const [index, key] of Object.keys(ASPECTS).entries()) {
    byId("colour-by").children[index].setAttribute("aria-pressed", String(key === name));
  }
  draw();
}

function draw() {
  const groups = groupsOf(plan.layers, aspect);
  const colours = new Map(groups.map(({ name, colour }) => [name, colour]));
  const colourOf = (layer) => colours.get(ASPECTS[aspect].of(layer));
  drawMemory(groups);
  drawLegend(groups);
  const blocks = blocksOfPlan(plan.layers);
  const width = widthOf(blocks);
  const rows = blocks.map((block) => rowOf(block, width, colourOf));
  byId("picture").replaceChildren(...rows);
  cells = rows.map((row) => [...row.querySelectorAll(".layer")]);
  cells[0]?.[0]?.setAttribute("tabindex", "0");
  if (plan.layers.length) byId("layer-details").replaceChildren(detailsOf(plan.layers[0]));
}

function rowOf(block, width, colourOf) {
  const weighted = block.layers.filter((layer) => layer.bytes);
  const others = block.layers.filter((layer) => !layer.bytes);
  const bar = h("div", { class: "bar", role: "presentation" }, ...weighted.map((layer) => {
    const cell = cellOf(layer, colourOf(layer));
    cell.style.flexGrow = layer.bytes;
    return cell;
  }));
  bar.style.width = `${Math.min(1, block.bytes / width) * 90}%`;
  if (block.bytes > width) {
    bar.classList.add("cut");
    bar.style.width = "100%";
    bar.title = "Drawn cut off: it is longer than this, as its size says";
  }
  bar.hidden = weighted.length === 0;
  const name = h("span", { class: "block-name", role: "rowheader", title: block.name }, short(block.name));
  const size = h("span", { class: "block-bytes", role: "gridcell" }, block.bytes ? bytes(block.bytes) : "");
  const dots = h("span", { class: "dots", role: "presentation" }, ...others.map((layer) => cellOf(layer, colourOf(layer))));
  return h("div", { class: "block", role: "row" }, name, h("div", { class: "track", role: "presentation" }, bar, dots), size);
}

function cellOf(layer, colour) {
  const label = `${layer.prefix}: ${layer.bytes ? bytes(layer.bytes) : "no weights of its own"}, ${layer.method_detail}, ${layer.kernel}`;
  const cell = h("span", { class: `layer colour-${colour}`, role: "gridcell", tabindex: "-1", "aria-label": label, "data-prefix": layer.prefix });
  cell.layer = layer;
  return cell;
}

// The last two parts tell blocks apart: layers.3.
function short(name) {
  const parts = name.split(".");
  return /^\d+$/.test(parts.at(-1)) ? parts.slice(-2).join(".") : parts.at(-1);
}

function show(target) {
  if (!target.layer) return;
  byId("layer-details").replaceChildren(detailsOf(target.layer));
  byId("picture").querySelector(".shown")?.classList.remove("shown");
  target.classList.add("shown");
}

function move(event) {
  if ((event.key === "Enter" || event.key === " ") && event.target.layer) {
    event.preventDefault();
    choose(event.target.layer);
    return;
  }
  const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  const row = cells.findIndex((line) => line.includes(event.target));
  if (!(event.key in steps) || row < 0) return;
  event.preventDefault();
  const [down, right] = steps[event.key];
  const line = cells[row + down];
  if (!line) return;
  const next = line[Math.min(line.length - 1, cells[row].indexOf(event.target) + right)];
  if (!next) return;
  event.target.setAttribute("tabindex", "-1");
  next.setAttribute("tabindex", "0");
  next.focus();
}

function drawLegend(groups) {
  const total = groups.reduce((sum, group) => sum + group.bytes, 0);
  byId("legend").replaceChildren(...groups.map(({ name, bytes: size, count, colour }) =>
    h("li", {}, h("span", { class: `swatch colour-${colour}` }), h("span", { class: "legend-name" }, name),
      h("span", { class: "muted" }, size ? `${bytes(size)}, ${percent(size / total)}` : `${count} layers`))));
}

// Where the memory goes: weights by colour, what has no layer, the KV cache, states.
function drawMemory(groups) {
  const { totals, kv_cache: cache } = plan;
  const named = groups.filter((group) => group.bytes).map(({ name, bytes: size, colour }) => [name, size, `colour-${colour}`]);
  const rest = totals.weight_bytes - named.reduce((sum, [, size]) => sum + size, 0);
  const parts = [
    ...named,
    ["norms and biases", rest, "colour-rest"],
    ["KV cache, when it is full", cache.bytes ?? 0, "colour-cache"],
    ["states", cache.state_bytes ?? 0, "colour-state"],
  ].filter(([, size]) => size > 0);
  byId("memory").replaceChildren(...parts.map(([name, size, colour]) => {
    const part = h("span", { class: `memory-part ${colour}`, title: `${name}: ${bytes(size)}` });
    part.style.flexGrow = size;
    return part;
  }));
  byId("memory").setAttribute("aria-label", parts.map(([name, size]) => `${name}: ${bytes(size)}`).join("; "));
}
