// The layers of a plan as a table that sorts and filters; a row opens to show the reasons.

import { byId, h, icon } from "./dom.js";
import { bytes, digits, whole } from "./format.js";
import { detailsOf, shape } from "./layer_details.js";
import { bitsOf } from "./plan_groups.js";

// Title, the text of a cell, what it sorts by, whether it is a number.
const COLUMNS = [
  ["Layer", (layer) => layer.prefix, null, false],
  ["Kind", (layer) => layer.kind, (layer) => layer.kind, false],
  ["Method", (layer) => layer.method_detail, (layer) => layer.method_detail, false],
  ["Kernel", (layer) => layer.kernel, (layer) => layer.kernel, false],
  ["Shape", (layer) => shape(layer.shape), (layer) => layer.shape.reduce((product, size) => product * size, 1), true],
  ["Bytes", sizeOf, (layer) => layer.bytes, true],
  ["Bits", (layer) => (bitsOf(layer) === null ? "" : digits(bitsOf(layer))), (layer) => bitsOf(layer) ?? -1, true],
];

let layers = [];
let rows = new Map();
let sorted = { column: 0, down: false };

/** Show the table of this plan. */
export function showTable(plan) {
  layers = plan.layers;
  rows = new Map(layers.map((layer) => [layer, rowOf(layer)]));
  byId("table-head").replaceChildren(...COLUMNS.map(([title, , , number], index) =>
    h("th", { scope: "col", class: number ? "number" : null },
      h("button", { type: "button", onclick: () => sortBy(index) }, title, icon("down")))));
  byId("filter").oninput = update;
  update();
}

/** Open the row of this layer, and go there. */
export function openRow(layer) {
  if (!matches(layer)) {
    byId("filter").value = "";
    update();
  }
  const [row] = rows.get(layer);
  toggle(layer, true);
  row.querySelector("button").focus({ preventScroll: true });
  row.scrollIntoView({ block: "center", behavior: "smooth" });
}

function sortBy(column) {
  // Numbers begin with the largest.
  sorted = sorted.column === column ? { column, down: !sorted.down } : { column, down: COLUMNS[column][3] };
  update();
}

function update() {
  const [, , value] = COLUMNS[sorted.column];
  const shown = layers.filter(matches);
  // The first column's order is the model's own.
  if (value !== null) shown.sort((a, b) => compare(value(a), value(b)));
  if (sorted.down) shown.reverse();
  byId("table-body").replaceChildren(...shown.flatMap((layer) => rows.get(layer)));
  [...byId("table-head").children].forEach((cell, index) => {
    cell.setAttribute("aria-sort", index !== sorted.column ? "none" : sorted.down ? "descending" : "ascending");
  });
  const size = shown.reduce((sum, layer) => sum + layer.bytes, 0);
  byId("table-count").textContent = `${whole(shown.length)} of ${whole(layers.length)} layers, ${bytes(size)}`;
}

function compare(a, b) {
  return a < b ? -1 : a > b ? 1 : 0;
}

// Every word has to be somewhere in what the plan says of the layer.
function matches(layer) {
  const said = [layer.prefix, layer.kind, layer.method_detail, layer.source_method, layer.kernel, layer.numerics, layer.source,
    layer.rule ?? "", ...layer.refused.flatMap(({ kernel, why, fix }) => [kernel, why, fix])].join("\n").toLowerCase();
  return byId("filter").value.toLowerCase().split(/\s+/).every((word) => said.includes(word));
}

function rowOf(layer) {
  const cells = COLUMNS.map(([title, text, , number], index) => {
    const content = index === 0
      ? h("button", { type: "button", class: "row-button", "aria-expanded": "false", onclick: () => toggle(layer) }, text(layer))
      : text(layer);
    const exact = title === "Bytes" ? { title: `${whole(layer.bytes)} bytes`, "data-bytes": layer.bytes } : {};
    return h("td", { class: number ? "number" : null, "data-title": title, ...exact }, content);
  });
  return [h("tr", { "data-prefix": layer.prefix, "data-method": layer.method, "data-kernel": layer.kernel }, ...cells)];
}

function toggle(layer, open) {
  const shown = rows.get(layer);
  const [row, extra] = shown;
  if (extra && open) return;
  if (extra) extra.remove();
  const next = extra ? null : h("tr", { class: "extra" }, h("td", { colspan: COLUMNS.length }, detailsOf(layer)));
  if (next) row.after(next);
  rows.set(layer, next ? [row, next] : [row]);
  row.querySelector("button").setAttribute("aria-expanded", String(Boolean(next)));
}

function sizeOf(layer) {
  if (layer.bytes) return bytes(layer.bytes);
  if (layer.kv_bytes_per_token) return `${whole(layer.kv_bytes_per_token)} B/token`;
  if (layer.state_bytes) return `${bytes(layer.state_bytes)}/request`;
  return layer.tied_to ? "shared" : "0 B";
}
