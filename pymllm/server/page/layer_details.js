// All that a plan says of one layer.

import { h } from "./dom.js";
import { bytes, digits, whole } from "./format.js";
import { bitsOf } from "./plan_groups.js";

/** Make the description of a layer. */
export function detailsOf(layer) {
  const bits = bitsOf(layer);
  const size = [
    layer.bytes ? `${bytes(layer.bytes)} (${whole(layer.bytes)} bytes${bits === null ? "" : `, ${digits(bits)} bits a weight`})` : null,
    layer.kv_bytes_per_token ? `${whole(layer.kv_bytes_per_token)} bytes a token, in the KV cache` : null,
    layer.state_bytes ? `${whole(layer.state_bytes)} bytes a request` : null,
    layer.tied_to ? `in ${layer.tied_to}, whose table it shares` : null,
  ].filter(Boolean);
  const rows = [
    ["Kind", layer.kind],
    ["Method", layer.method_detail],
    ["Kernel", layer.kernel],
    ["Numerics", layer.numerics],
    ["Size", size.join("; ") || "0 bytes"],
    ["Shape", shape(layer.shape) + (String(layer.shape) === String(layer.shape_local) ? "" : `, here ${shape(layer.shape_local)}`)],
    ["Why this method", layer.rule ? `your rule ${layer.rule}` : layer.source],
    ["Together with", layer.fused_with.join(", ")],
  ];
  return h("div", { class: "details" },
    h("h3", {}, layer.prefix),
    h("dl", {}, ...rows.filter(([, value]) => value).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)))),
    refusals(layer.refused),
  );
}

/** Make the list of kernels that were asked first, with the reason of each. */
export function refusals(refused) {
  if (!refused.length) return h("p", { class: "muted" }, "No other kernel was asked first.");
  return h("div", { class: "refusals" }, h("h4", {}, "Asked first, and why not"),
    h("ul", {}, ...refused.map(({ kernel, why, cause, fix }) =>
      h("li", {}, h("code", {}, kernel), ` ${why} `, h("span", { class: `cause ${cause}` }, cause), fix ? [" with ", h("code", {}, fix)] : ""))));
}

/** Write a shape. */
export function shape(sizes) {
  return sizes.join(" × ");
}
