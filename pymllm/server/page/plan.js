// The plan: what runs, in how many bytes, and why.

import { get } from "./api.js";
import { byId, h } from "./dom.js";
import { bytes, whole } from "./format.js";
import { refusals } from "./layer_details.js";
import { showPicture, startPicture } from "./plan_picture.js";
import { openRow, showTable } from "./plan_table.js";

let shown = null;

/** Fetch the plan and return it. */
export function fetchPlan(options) {
  return get("plan", options);
}

/** Listen to the reader. */
export function startPlan() {
  startPicture(openRow);
}

/** Fetch the plan anew, as a swap changes it, and show it where it differs from the one that is shown. */
export async function showPlan() {
  let plan;
  try {
    plan = await fetchPlan();
  } catch (error) {
    byId("plan-error").textContent = `The plan could not be read. ${error.message}`;
    byId("plan-error").hidden = false;
    return;
  }
  byId("plan-error").hidden = true;
  byId("plan-body").hidden = false;
  const text = JSON.stringify(plan);
  if (text === shown) return;
  shown = text;
  showHead(plan);
  showPicture(plan);
  showTable(plan);
  showNotes(plan);
}

/** Write what a plan runs, in a line. */
export function summaryOf(plan) {
  const ours = plan.definition.startsWith("pymllm.");
  return [plan.model_type, ours ? null : plan.definition, plan.device, numbersOf(plan)].filter(Boolean);
}

/** Say what layers pass to each other, and how many of them round it inside. */
function numbersOf(plan) {
  const layers = plan.layers.filter((layer) => !["attention", "recurrence"].includes(layer.kind));
  const rounding = layers.filter((layer) => layer.rounds_activations).length;
  return `${plan.dtype} between layers; inside, ${rounding || "none"} of ${layers.length} round their inputs to fewer bits`;
}

function showHead(plan) {
  const { totals, kv_cache: cache, tensor_parallel: ranks } = plan;
  byId("plan-summary").replaceChildren(...summaryOf(plan).map((text) => h("span", {}, text)));
  const tiles = [
    ["weight_bytes", "Weights", bytes(totals.weight_bytes), `${whole(totals.weight_bytes)} bytes, ${bytes(totals.checkpoint_bytes)} in the files`],
    ["peak_load_bytes", "While loading", bytes(totals.peak_load_bytes), "at most, at a time"],
    ["kv_cache_bytes_per_token", "A token", bytes(totals.kv_cache_bytes_per_token), "in the KV cache"],
    cache.tokens === undefined ? null : ["kv_cache", "KV cache", bytes(cache.bytes), `${whole(cache.tokens)} tokens (${cache.decided_by}); a request has at most ${whole(cache.max_model_len)}`],
    totals.state_bytes_per_request ? ["state_bytes_per_request", "States", bytes(totals.state_bytes_per_request), "a request"] : null,
    ["ranks", "Rank", `${ranks.rank} of ${ranks.size}`, `sizes that work: ${ranks.legal_sizes.join(", ")}`],
  ].filter(Boolean);
  byId("plan-totals").replaceChildren(...tiles.map(([key, title, value, text]) =>
    h("div", { class: "tile", "data-total": key, "data-value": plan.totals[key] ?? null },
      h("dt", {}, title), h("dd", {}, h("span", { class: "value" }, value), h("span", { class: "muted" }, text)))));
}

function showNotes(plan) {
  const notes = plan.notes.length ? plan.notes : ["Nothing was skipped, and nothing else is to be said."];
  byId("plan-notes").replaceChildren(...notes.map((note) => h("li", {}, note)));
  byId("plan-rules").replaceChildren(...(plan.rules.length ? plan.rules.map(ruleElement) : [h("li", { class: "muted" }, "No rule was given: the checkpoint decides.")]));
  const others = [
    ["Norms, activations, rotary positions", plan.elementwise],
    ["The choice of tokens", plan.sampling],
    ...plan.routing.map((routing) => [`Routing of ${routing.prefixes.length} routers`, routing]),
  ].filter(([, kernel]) => kernel?.kernel);
  const strategy = plan.strategy?.name ? [h("li", {}, "Answers are decoded by ", h("code", {}, plan.strategy.name), settingsOf(plan.strategy))] : [];
  const graph = plan.decoding_graph
    ? [h("li", {}, plan.decoding_graph.captured ? "A decoding step is a captured graph." : `A decoding step is not captured: ${plan.decoding_graph.why_not}`)]
    : [];
  byId("plan-others").replaceChildren(
    ...others.map(([title, kernel]) => h("li", {}, h("details", {}, h("summary", {}, title, ": ", h("code", {}, kernel.kernel)), refusals(kernel.refused ?? [])))),
    ...strategy,
    ...graph,
  );
}

function ruleElement(rule) {
  const shadow = rule.shadowed_by?.length ? `; earlier rules decide the others: ${rule.shadowed_by.join(", ")}` : "";
  return h("li", {}, h("code", {}, rule.rule), ` matches ${whole(rule.matches)} layers and decides ${whole(rule.decides)}${shadow}`);
}

function settingsOf(strategy) {
  const settings = Object.entries(strategy.settings ?? {}).map(([name, value]) => `${name} ${value} (${strategy.sources?.[name] ?? "?"})`);
  return settings.length ? `: ${settings.join(", ")}` : "";
}
