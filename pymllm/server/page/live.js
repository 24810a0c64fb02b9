// What the server is doing now: its queue, its cache, its speed. Asked for gently, and only while somebody looks.

import { request } from "./api.js";
import { figures } from "./answer.js";
import { byId, h, svg } from "./dom.js";
import { digits, duration, percent, whole } from "./format.js";
import { maxOf, parseMetrics, sumOf } from "./metrics.js";

const SECONDS = 2;
const POINTS = 90;

// Title, how a value is read, how it is written, and what it means.
const TILES = {
  running: ["Running", (samples) => sumOf(samples, "vllm:num_requests_running"), whole, "requests that are answered now"],
  waiting: ["Waiting", (samples) => sumOf(samples, "vllm:num_requests_waiting"), whole, "requests in the queue"],
  cache: ["KV cache", (samples) => maxOf(samples, "vllm:kv_cache_usage_perc"), percent, "of its pages are in use"],
  speed: ["Speed", speedOf, (value) => `${digits(value)} /s`, "tokens of all answers"],
};

const history = Object.fromEntries(Object.keys(TILES).map((name) => [name, []]));
let before = null;
let timer = null;
let absent = false;

/** Begin to ask, whenever the page is visible. */
export function startLive() {
  document.addEventListener("visibilitychange", restart);
  restart();
}

function restart() {
  clearTimeout(timer);
  // Speed is a difference of two figures that belong together.
  before = null;
  if (!document.hidden && !absent) poll();
}

async function poll() {
  try {
    const response = await request("metrics", { quiet: true });
    show(parseMetrics(await response.text()));
  } catch (error) {
    hide();
    // A server without figures has none later either.
    if ([404, 405, 501].includes(error.status)) absent = true;
  }
  clearTimeout(timer);
  if (!document.hidden && !absent) timer = setTimeout(poll, SECONDS * 1000);
}

function speedOf(samples, now) {
  const tokens = sumOf(samples, "vllm:generation_tokens_total");
  const earlier = before;
  before = tokens === null ? null : { tokens, now };
  if (tokens === null || earlier === null || tokens < earlier.tokens) return null;
  return ((tokens - earlier.tokens) * 1000) / (now - earlier.now);
}

function hide() {
  byId("pulse").replaceChildren();
  byId("tiles").replaceChildren();
  byId("no-metrics").hidden = false;
}

function show(samples) {
  const now = performance.now();
  const values = Object.entries(TILES).map(([name, [, read]]) => [name, read(samples, now)]);
  for (const [name, value] of values) {
    if (value === null) continue;
    history[name].push(value);
    if (history[name].length > POINTS) history[name].shift();
  }
  const known = values.filter(([name, value]) => value !== null || history[name].length);
  byId("no-metrics").hidden = known.length > 0;
  byId("pulse").replaceChildren(...known.filter(([, value]) => value !== null).map(([name, value]) => {
    const [title, , write, meaning] = TILES[name];
    return h("span", { "data-live": name, title: `${title}: ${meaning}` }, h("span", { class: "muted" }, title), " ", write(value));
  }));
  if (!byId("live").hidden) showTiles(known);
}

function showTiles(known) {
  byId("tiles").replaceChildren(...known.map(([name, value]) => {
    const [title, , write, meaning] = TILES[name];
    return h("div", { class: "tile", "data-tile": name },
      h("dt", {}, title),
      h("dd", {}, h("span", { class: "value" }, value === null ? "–" : write(value)), h("span", { class: "muted" }, meaning)),
      line(history[name], name === "cache" ? 1 : Math.max(1, ...history[name])));
  }));
}

/** Draw values as a line; the right edge is now. */
function line(values, most) {
  const [width, height] = [180, 44];
  const x = (index) => width - ((values.length - 1 - index) * width) / (POINTS - 1);
  const y = (value) => height - 2 - (Math.min(value, most) / most) * (height - 6);
  const points = values.map((value, index) => `${x(index).toFixed(1)},${y(value).toFixed(1)}`);
  const area = [`${x(0).toFixed(1)},${height}`, ...points, `${width},${height}`];
  return svg("svg", { class: "line", viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("polygon", { points: area.join(" ") }), svg("polyline", { points: points.join(" "), "vector-effect": "non-scaling-stroke" }));
}

/** Show the figures of the answer that runs, or of the last one. */
export function showAnswer(answer) {
  const { first, rate, tokens, prompt, cached, exact } = figures(answer);
  const about = exact ? "" : "≈ ";
  const rows = [
    ["rate", "Tokens a second", rate === null ? null : about + digits(rate)],
    ["first", "To the first token", first === null ? null : duration(first)],
    ["tokens", "Tokens of the answer", tokens ? about + whole(tokens) : null],
    ["prompt", "Tokens read", prompt === null ? null : whole(prompt)],
    ["cached", "Of these from the cache", cached === null ? null : whole(cached)],
  ];
  const known = rows.filter(([, , value]) => value !== null);
  // One that failed before it began says nothing.
  if (!known.length) return;
  byId("no-answer").hidden = true;
  byId("answer-figures").replaceChildren(...known.map(([name, title, value]) =>
    h("div", { "data-figure": name }, h("dt", {}, title), h("dd", {}, value))));
}
